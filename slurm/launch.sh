# shellcheck shell=bash
# What the templates of this folder share: sourced by them inside a job, at the root of the repository.

fail() {
  echo "error: $*" >&2
  exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "not inside a job: submit it, as in sbatch slurm/surgery_70b.sh --train_data FILE"
cd "$SLURM_SUBMIT_DIR" || fail "the folder $SLURM_SUBMIT_DIR is not on this node: submit from a disk that all nodes share"

# shellcheck source=slurm/site.sh
source "${SITE:-slurm/site.sh}"
if [[ -z $CONTAINER_IMAGE ]]; then
  command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON of ${SITE:-slurm/site.sh} is no program on $(hostname): make setup, or edit it"
fi

RESTARTS=${SLURM_RESTART_COUNT:-0}
JOB=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # the id alone may mean the whole array

# srun starts the ranks, one task each: no ssh, no host file. Which rank a task is, Python reads from SLURM_*.
gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}} # 8, a100:8, or 0 for ranks on CPUs
gpus=${gpus##*:}
RANKS_PER_NODE=$((gpus > 0 ? gpus : 1))
CORES=$((SLURM_CPUS_ON_NODE / RANKS_PER_NODE))
CONTAINER=()
if [[ -n $CONTAINER_IMAGE ]]; then
  CONTAINER=("--container-image=$CONTAINER_IMAGE" "--container-mounts=$CONTAINER_MOUNTS" "--container-workdir=$PWD")
fi
# Ranks that linger after the first end are ended half a minute later.
ALL_RANKS=(
  srun "--nodes=$SLURM_JOB_NUM_NODES" "--ntasks=$((SLURM_JOB_NUM_NODES * RANKS_PER_NODE))"
  "--ntasks-per-node=$RANKS_PER_NODE" "--cpus-per-task=$((CORES > 0 ? CORES : 1))" --wait=30 "${CONTAINER[@]}"
)

# The first node is where rank 0 runs. The port is below those that Linux gives to outgoing connections.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')}
MASTER_PORT=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}
export MASTER_ADDR MASTER_PORT

# Compute nodes have no hub; caches that are written stay on the node; a core each for the ranks' threads.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} HF_DATASETS_OFFLINE=${HF_DATASETS_OFFLINE:-1} WANDB_MODE=${WANDB_MODE:-offline}
export TRITON_CACHE_DIR="$SCRATCH/triton-$SLURM_JOB_USER" TORCH_EXTENSIONS_DIR="$SCRATCH/torch-extensions-$SLURM_JOB_USER"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES > 0 ? CORES : 1))} TOKENIZERS_PARALLELISM=false
export PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1
# A failed NCCL collective ends its rank; the last collectives are kept, and written out when one does not return.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1 TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=1
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} DEEPSPEED_TIMEOUT=${DEEPSPEED_TIMEOUT:-120}

# How to go on by hand; run.json keeps it.
script=$(scontrol show job "$JOB" | sed -n 's/^ *Command=\([^ ]*\).*/\1/p')
array=${SLURM_ARRAY_TASK_ID:+ --array=${SLURM_ARRAY_TASK_MIN:-}-${SLURM_ARRAY_TASK_MAX:-}}
RESUME_COMMAND=$(printf 'cd %q && sbatch --job-name=%q --partition=%q --nodes=%q --gpus-per-node=%q%s %q' \
  "$PWD" "$SLURM_JOB_NAME" "$SLURM_JOB_PARTITION" "$SLURM_JOB_NUM_NODES" "$gpus" "$array" "$script")
for word in "$@"; do RESUME_COMMAND+=$(printf ' %q' "$word"); done
export RESUME_COMMAND

# folder_of WORDS...: the run folder that train.py's flags name, or the job's name below runs/
folder_of() {
  local folder="runs/$SLURM_JOB_NAME"
  while (($#)); do
    case $1 in
      --output_dir) folder=${2:-} ;;
      --output_dir=*) folder=${1#*=} ;;
    esac
    shift
  done
  echo "$folder"
}

# wait_for PID: its exit code, however often this shell is interrupted by a signal. The ranks get the same signals.
wait_for() {
  local code=0
  while kill -0 "$1" 2>/dev/null; do
    code=0
    wait "$1" || code=$?
  done
  return "$code"
}
trap 'echo "the scheduler ends this job: the ranks save"' USR1 TERM

# preflight FOLDER: every node is looked at, and the collectives tried, before anything is loaded
preflight() {
  local code=0
  ((DOCTOR_SECONDS > 0)) || return 0
  # Without --kill-on-bad-exit: all end by themselves, and none must be ended by the signal that means a stop.
  "${ALL_RANKS[@]}" --kill-on-bad-exit=0 "$PYTHON" tools/doctor.py --distributed --output_dir "$1" --timeout "$DOCTOR_SECONDS" &
  wait_for $! || code=$?
  case $code in
    0) ;;
    138 | 143) requeue "$code" "stopped while the nodes were looked at" ;; # SIGUSR1, SIGTERM
    *) fail "the nodes are not ready (above); leave one out with sbatch --exclude=NODE" ;;
  esac
}

# train WORDS...: pipeline/train.py on all ranks, resumed if its folder holds a checkpoint; its exit code
train() {
  local folder code=0 logs
  folder=$(folder_of "$@")
  mkdir -p "$folder" || fail "--output_dir $folder cannot be made on $(hostname)"
  preflight "$folder"
  logs=$(realpath "$folder")/logs/$SLURM_JOB_ID-$RESTARTS
  mkdir -p "$logs"
  export REQUEUE_MARKER=$logs/requeue.json TORCH_FR_DUMP_TEMP_FILE=$logs/nccl_trace_rank_
  rm -f "$REQUEUE_MARKER"
  echo "start $RESTARTS of job $SLURM_JOB_ID: $((SLURM_JOB_NUM_NODES * RANKS_PER_NODE)) ranks on $SLURM_JOB_NODELIST, logs in $logs"
  echo "to go on by hand: $RESUME_COMMAND"
  # One rank that fails ends all.
  "${ALL_RANKS[@]}" --kill-on-bad-exit=1 "--output=$logs/rank_%t.log" \
    "$PYTHON" pipeline/train.py --resume_from_checkpoint auto --output_dir "$folder" "$@" &
  local ranks=$!
  touch "$logs/rank_0.log"
  tail --pid="$ranks" -n +1 -f "$logs/rank_0.log" &
  local follow=$!
  wait_for "$ranks" || code=$?
  wait_for "$follow" || true
  if [[ -e $REQUEUE_MARKER ]]; then
    requeue "$code" "$(<"$REQUEUE_MARKER")"
  fi
  if ((code != 0)); then
    echo "error: training ended with exit code $code; what the other ranks said:" >&2
    grep -m 3 -H -E '(^|[A-Za-z])[Ee]rror' "$logs"/rank_*.log | grep -v '/rank_0\.log:' | head -n 20 >&2 || true
  fi
  return "$code"
}

# door FILE WORDS...: one of the other doors, as one task on the first node
door() {
  local code=0
  srun --nodes=1 --ntasks=1 "--cpus-per-task=$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=1 "${CONTAINER[@]}" "$PYTHON" "$@" &
  wait_for $! || code=$?
  return "$code"
}

# stage RECIPE FOLDER NAME [--keep_models]: one stage of a chain, with the chain's records before and after it
stage() {
  local recipe=$1 folder=$2 name=$3 words
  shift 3
  mapfile -d '' -t words < <(door tools/chain.py "$recipe" --output_dir "$folder" --begin "$name")
  wait $! || fail "stage $name cannot begin (above)"
  if ((${#words[@]})); then
    if [[ ${words[0]} == pipeline/train.py ]]; then
      train "${words[@]:1}"
    else
      door "${words[@]}"
    fi
    door tools/chain.py "$recipe" --output_dir "$folder" --end "$name" "$@"
  fi
}

# requeue CODE REASON: start this job again, unless that was too often or the scheduler has done it; ends the job
requeue() {
  local job
  job=$(scontrol show job "$JOB")
  if [[ $job != *JobState=RUNNING* || $job != *" Restarts=$RESTARTS "* ]]; then
    echo "the scheduler has requeued or ended this job itself: $2"
  elif ((RESTARTS >= MAX_RESTARTS)); then
    echo "error: stopped again after $RESTARTS restarts (MAX_RESTARTS): not requeued: $2" >&2
  else
    echo "requeued: $2"
    scontrol requeue "$JOB" || echo "error: could not be requeued; to go on: $RESUME_COMMAND" >&2
  fi
  exit "$1"
}
