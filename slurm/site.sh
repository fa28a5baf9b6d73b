# shellcheck shell=bash disable=SC2034
# The one file a site edits. Every job sources it on its first node; `source slurm/site.sh` in your shell before sbatch
# makes the SBATCH_ lines count as well. slurm/README.md explains each variable.

# ---- EDIT FROM HERE -------------------------------------------------------------------------------------------------

# Read by sbatch. The command line goes before them.
# export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=project

# Modules and environment: whatever makes $PYTHON the Python with this project's packages, at the same path on all nodes.
# module load cuda
PYTHON=${PYTHON:-.venv/bin/python}

# A container in place of that environment (enroot and pyxis); $PYTHON is then a path inside it.
CONTAINER_IMAGE=${CONTAINER_IMAGE:-}
CONTAINER_MOUNTS=${CONTAINER_MOUNTS:-$PWD:$PWD}

# A folder on a disk of the node: compiled kernels and temporary files.
SCRATCH=${SCRATCH:-${TMPDIR:-/tmp}}

# Downloads, on a disk that all nodes share; filled on a login node, because jobs run without a network.
# export HF_HOME=/shared/huggingface

# Network interfaces, where the fastest is not found by itself.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5

# How often a stopped job is started again, and how long nodes may take to be found ready.
MAX_RESTARTS=${MAX_RESTARTS:-20}
DOCTOR_SECONDS=${DOCTOR_SECONDS:-300}

# ---- TO HERE --------------------------------------------------------------------------------------------------------
