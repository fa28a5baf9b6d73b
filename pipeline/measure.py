"""Measure attention sinks: how much more attention a model's heads pay to the sink on harmful texts than on harmless
ones.

    python pipeline/measure.py --model_name_or_path DIR --harmful_data S --harmless_data S --output_dir OUT
    python pipeline/measure.py --model_name_or_path RUN --assessed checkpoint-3=DIR checkpoint-6=DIR ...
    deepspeed --num_gpus 2 pipeline/measure.py --ds_config ds_configs/z3.json --model_name_or_path DIR ...

DIR is a model folder or hub id, with an adapter if --adapter_name_or_path names one; or RUN, a run folder of train.py
or one of its checkpoint-N folders. Checkpoints are converted one after the other into a private folder inside OUT,
which is removed afterwards: no model is exported, whatever it was trained on.

OUT/sinks.json holds the settings and, for the model or the run's last checkpoint, `positive_heads` (share of heads
with divergence > 0), `penalty` (mean of max(divergence, 0)), `significant_positive_heads`,
`significant_negative_heads`, `pairs`, and layers x heads arrays: `divergence`, `harmful_mean`, `harmless_mean`,
`standard_error`, `positive_pairs`, `p_value`, `p_holm`, `significant` (1, -1, 0); evaluation/sink_statistics.py
defines them. `checkpoints` has the same fields, with `checkpoint`, `step` and, where --assessed names it,
`harmful_score`, for every checkpoint by step (empty for a model). OUT/sinks_per_text*.npz holds what they were
computed from, `harmful` and `harmless` [texts, layers, heads] with the rows' ids. OUT/heatmap.png, positive_heads.png
(several checkpoints), hypothesis.png (several of them assessed) and sinks.html show them.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not pipeline/, whose files would shadow installed modules

from pipeline.config import ModelArguments, parse  # noqa: E402
from pipeline.door import run_door  # noqa: E402
from pipeline.training.distributed import world  # noqa: E402


def main() -> None:
    """Parse, measure, print the summary."""
    here = world()
    from pipeline.evaluation.sinks import MeasureArguments, measure

    parsed = parse([ModelArguments, MeasureArguments], sys.argv[1:], description=(__doc__ or "").split("\n\n")[0])
    found = measure(parsed[ModelArguments], parsed[MeasureArguments], here)
    if here.main:
        print(
            f"positive heads {found['positive_heads']:.1%} (significant {found['significant_positive_heads']})  "
            f"penalty {found['penalty']:.3e}  {parsed[MeasureArguments].output_dir}/sinks.html"
        )


if __name__ == "__main__":
    run_door(main)
