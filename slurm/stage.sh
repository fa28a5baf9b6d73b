#!/usr/bin/env bash
# One stage of a chain; tools/chain.py RECIPE --slurm submits it.
#SBATCH --job-name=chain
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
stage "$@"
