#!/usr/bin/env bash
# Surgery on all parameters of an 8B model, one node: sbatch slurm/surgery_8b.sh --train_data FILE ...
#SBATCH --job-name=surgery-8b
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@600
set -euo pipefail
[[ -f $SLURM_SUBMIT_DIR/slurm/launch.sh ]] || { echo "error: submit from the root of the repository, on a disk that all nodes share" >&2; exit 2; }
source "$SLURM_SUBMIT_DIR/slurm/launch.sh"
train --config pipeline/recipes/surgery_8b.yaml "$@"
