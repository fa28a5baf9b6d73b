"""Any other task, by lm-evaluation-harness: its prompts, its rules, its numbers. Nothing of a task is ours."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.evaluation.model import EvaluatedModel
from pipeline.evaluation.suite import Protocol
from pipeline.report.records import read_json
from pipeline.training.manifest import write_json

if TYPE_CHECKING:
    from pipeline.evaluation.run import AssessArguments

FILE = "lm_eval.json"


def check_installed() -> None:
    """Errors: ValueError, with the command that installs it."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--lm_eval_tasks: lm-evaluation-harness is not installed; `pip install -e '.[lm-eval]'`")


def run(
    arguments: AssessArguments, load: Callable[[], Any], model: EvaluatedModel, protocol: Protocol
) -> dict[str, Any]:
    """Writes lm_eval.json: of each task its metrics, version, shots and n; a task that stands there is not run again.

    Raises:
        ValueError: the harness does not know a task, or its data are not here.
    """
    path = Path(arguments.output_dir or "") / FILE
    done: dict[str, Any] = read_json(path) if path.is_file() else {}
    missing = [task for task in arguments.lm_eval_tasks if task not in done]
    if not missing:
        return done
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=arguments.lm_eval_include_path)
    unknown = [task for task in missing if task not in manager.all_tasks]
    if unknown:
        raise ValueError(f"--lm_eval_tasks {unknown[0]}: lm-evaluation-harness has no such task")
    harness = HFLM(
        pretrained=load(), tokenizer=model.tokenizer, batch_size=arguments.batch_size, max_length=arguments.max_length
    )
    for task in missing:
        try:
            found = lm_eval.simple_evaluate(
                model=harness,
                tasks=[task],
                task_manager=manager,
                apply_chat_template=protocol == "chat",
                system_instruction=arguments.system_prompt,
                log_samples=False,  # they hold texts
            )
        except (OSError, ConnectionError, FileNotFoundError) as error:
            first = str(error).splitlines()[0]
            raise ValueError(f"--lm_eval_tasks {task}: its data could not be read: {first}") from None
        for name, metrics in found["results"].items():
            done[name] = {
                **{key: value for key, value in metrics.items() if isinstance(value, int | float)},
                "version": found["versions"].get(name),
                "shots": found["n-shot"].get(name),
                "n": found["n-samples"].get(name, {}).get("effective"),
            }
        write_json(path, done)
    return done
