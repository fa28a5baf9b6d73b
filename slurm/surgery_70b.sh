#!/usr/bin/env bash
# Surgery on all parameters of a 70B model, ZeRO-3 over nodes: sbatch slurm/surgery_70b.sh --train_data FILE ...
#SBATCH --job-name=surgery-70b
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=48:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@1200
set -euo pipefail
[[ -f $SLURM_SUBMIT_DIR/slurm/launch.sh ]] || { echo "error: submit from the root of the repository, on a disk that all nodes share" >&2; exit 2; }
source "$SLURM_SUBMIT_DIR/slurm/launch.sh"
train --config pipeline/recipes/surgery_70b.yaml "$@"
