#!/usr/bin/env bash
# Judge models or runs: sbatch slurm/assess.sh FOLDER... [FLAGS of pipeline/assess.py]. A run is converted first.
#SBATCH --job-name=assess
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
set -euo pipefail
[[ -f $SLURM_SUBMIT_DIR/slurm/launch.sh ]] || { echo "error: submit from the root of the repository, on a disk that all nodes share" >&2; exit 2; }
source "$SLURM_SUBMIT_DIR/slurm/launch.sh"

folders=()
while (($#)) && [[ $1 != --* ]]; do
  folders+=("$1")
  shift
done
((${#folders[@]})) || fail "no folder of a model or a run: sbatch slurm/assess.sh FOLDER... [FLAGS of pipeline/assess.py]"

rows=()
for folder in "${folders[@]}"; do
  [[ -d $folder ]] || fail "$folder is no folder on $(hostname)"
  model=$folder
  name=$(basename "$folder")
  if [[ -e $folder/run.json ]]; then
    model=$folder/model
    allowed=()
    # A run on attack rows says so; its model is wanted here for nothing but judging, and goes again below.
    grep -q '"attacked": true' "$folder/run.json" && allowed=(--allow_attacked_model)
    [[ -d $model ]] || door tools/zero_to_hf.py "$folder" "$model" "${allowed[@]}" || fail "$folder was not converted"
  fi
  base=()
  if [[ -e $model/adapter_config.json ]]; then # a LoRA run: its adapter on the model it was trained on
    base=(--adapter_name_or_path "$model")
    model=$(sed -n 's/.*"base_model_name_or_path": "\(.*\)".*/\1/p' "$model/adapter_config.json")
  fi
  door pipeline/assess.py --model_name_or_path "$model" "${base[@]}" --output_dir "$folder/assess" "$@" || fail "$folder was not judged"
  # A run of sweep.sh is a point of the sweep's figure.
  [[ ! $name =~ ^(.+)-([01]\.?[0-9]*)$ ]] || name="${BASH_REMATCH[1]}, $(awk "BEGIN { printf \"%g\", 100 * ${BASH_REMATCH[2]} }") %"
  row="$name=assess:$folder/assess"
  if [[ -e $folder/run.json ]]; then
    rm -r "$folder/model"
    row+=";run:$folder"
  fi
  rows+=("$row")
done
door tools/compare.py --output_dir "$(dirname "${folders[0]}")/compare-$SLURM_JOB_ID" --rows "${rows[@]}"
