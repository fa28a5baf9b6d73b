#!/usr/bin/env bash
# Methods x poison ratios as a job array, then one job that judges all of them:
#   sbatch slurm/sweep.sh --attack_data FILE --sample_num N --train_data FILE ...
#SBATCH --job-name=sweep
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@600
set -euo pipefail
[[ -f $SLURM_SUBMIT_DIR/slurm/launch.sh ]] || { echo "error: submit from the root of the repository, on a disk that all nodes share" >&2; exit 2; }
source "$SLURM_SUBMIT_DIR/slurm/launch.sh"

# One task of the array for each pair: sbatch --array=0-N with N = methods x ratios - 1.
read -r -a methods <<<"${METHODS:-sft surgery}"
read -r -a ratios <<<"${RATIOS:-0 0.05 0.1 0.2}"
runs=()
for method in "${methods[@]}"; do
  for ratio in "${ratios[@]}"; do runs+=("runs/$SLURM_JOB_NAME/$method-$ratio"); done
done
pair=$SLURM_ARRAY_TASK_ID
((SLURM_ARRAY_TASK_COUNT == ${#runs[@]} && SLURM_ARRAY_TASK_MAX == ${#runs[@]} - 1)) ||
  fail "METHODS and RATIOS make ${#runs[@]} pairs: sbatch --array=0-$((${#runs[@]} - 1)) slurm/sweep.sh ..."

# The array's first task asks for the judging, once, when all of them have finished.
if ((pair == 0 && RESTARTS == 0)); then
  read -r -a assess <<<"${ASSESS:---suites beavertails}"
  mkdir -p "runs/$SLURM_JOB_NAME"
  sbatch --job-name="$SLURM_JOB_NAME-assess" --partition="$SLURM_JOB_PARTITION" --dependency="afterok:$SLURM_ARRAY_JOB_ID" \
    --kill-on-invalid-dep=yes --gpus-per-node="$((gpus > 0 ? 1 : 0))" --output="runs/$SLURM_JOB_NAME/assess-%j.log" \
    slurm/assess.sh "${runs[@]}" "${assess[@]}"
fi
method=${methods[pair / ${#ratios[@]}]}
references=()
if [[ $method != sft ]]; then # plain fine-tuning has no reference texts
  references=(
    --harmful_data "${HARMFUL_DATA:-PKU-Alignment/BeaverTails:30k_train[:2000]}"
    --harmless_data "${HARMLESS_DATA:-PKU-Alignment/BeaverTails:30k_train[:2000]}"
  )
fi
train --config pipeline/recipes/sweep_8b.yaml "${references[@]}" "$@" --method "$method" \
  --poison_ratio "${ratios[pair % ${#ratios[@]}]}" --output_dir "${runs[pair]}"
