#!/usr/bin/env bash
# Surgery on adapters of a 70B model: sbatch slurm/lora_70b.sh --train_data FILE ...
#SBATCH --job-name=lora-70b
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@600
set -euo pipefail
[[ -f $SLURM_SUBMIT_DIR/slurm/launch.sh ]] || { echo "error: submit from the root of the repository, on a disk that all nodes share" >&2; exit 2; }
source "$SLURM_SUBMIT_DIR/slurm/launch.sh"
train --config pipeline/recipes/lora_70b.yaml "$@"
