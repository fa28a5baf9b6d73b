"""Kill -9 at random points of saving, training, converting and merging, as often as asked; prints a summary as JSON.

    python tests/distributed/soak.py --cycles 50 --seed 1

A cycle is one kill. Two real ranks train a tiny model and one of them is killed, at random or aimed at a save; the
next life resumes, and every line of metrics.jsonl and at the end every shard must be that of an undisturbed run, to
the bit. Converting and merging are killed anywhere between start and end; what is there then must be whole, and the
next attempt must give the undisturbed folder. Exit code 1 if anything is not as it should be.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # not this folder

from pipeline.checkpoints.checksums import MANIFEST, check_manifest  # noqa: E402
from pipeline.checkpoints.contents import content_problems, content_sum  # noqa: E402
from pipeline.checkpoints.markers import complete_checkpoints, read_marker  # noqa: E402
from tests.distributed.inputs import write_inputs  # noqa: E402
from tests.distributed.lives import Lives, lives, metrics  # noqa: E402
from tests.tiny import save_model_folder, tiny_llama  # noqa: E402

SAVE = 3  # --save_steps
KINDS = {"full": [], "lora": ["--lora_r", "4"]}
AIMS = {"stepping": 4, "saving": 5, "starting": 1, "converting": 3, "merging": 2}  # how often, relative to each other


class Soak:
    """The undisturbed results, and what has been seen so far."""

    def __init__(self, server: Lives, folder: Path, steps: int, seed: int) -> None:
        self.server, self.folder, self.steps, self.random = server, folder, steps, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        model = save_model_folder(tiny_llama(), folder / "model")
        self.flags = write_inputs(model, folder / "inputs")
        self.seconds: dict[str, float] = {}
        for kind in KINDS:
            server.run("pipeline/train.py", *self.argv(kind, self.reference(kind)), ranks=2, logs=folder / "logs")
        # name -> command but for the output folder
        last = f"checkpoint-{self.steps}"
        self.tools = {
            "converting": ["tools/zero_to_hf.py", str(self.reference("full") / last)],
            "merging": ["tools/merge_lora.py", str(model), str(folder / "adapter")],
        }
        server.run(
            "tools/zero_to_hf.py", str(self.reference("lora") / last), str(folder / "adapter"), logs=folder / "logs"
        )
        for name, command in self.tools.items():
            began = time.monotonic()
            server.run(*command, str(folder / name), "--max_shard_size", "100KB", logs=folder / "logs")
            self.seconds[name] = time.monotonic() - began
        self.run, self.kind, self.newest = self.folder / "none", "lora", 0

    def reference(self, kind: str) -> Path:
        """The run that nobody disturbed."""
        return self.folder / f"straight-{kind}"

    def argv(self, kind: str, out: Path) -> list[str]:
        """A run of one kind."""
        steps = ["--max_steps", str(self.steps), "--save_steps", str(SAVE), "--save_total_limit", "2"]
        return [*self.flags, *KINDS[kind], *steps, "--output_dir", str(out), "--resume_from_checkpoint", "auto"]

    def expect(self, true: bool, what: str) -> None:
        """Note what is not as it should be."""
        if not true:
            self.problems.append(f"cycle {sum(self.counts.values())}: {what}")

    def cycle(self) -> None:
        """One kill."""
        aim = self.random.choices(list(AIMS), list(AIMS.values()))[0]
        if aim in self.tools:
            self.kill_tool(aim)
        else:
            self.kill_training(aim)

    def kill_training(self, aim: str) -> None:
        """A life of the current run, or of a new one after its end, that one rank's death ends."""
        if not self.run.exists():
            self.kind = "lora" if self.kind == "full" else "full"
            self.run, self.newest = self.folder / f"run{sum(self.counts.values())}", 0
            self.run.mkdir()
        life = self.server.start(
            "pipeline/train.py", *self.argv(self.kind, self.run), ranks=2, logs=self.folder / "logs"
        )
        began, at = time.time(), self.step() + self.random.randint(1, self.steps // 3)
        while None in life.codes() and not self.reached(aim, at, began):
            time.sleep(0.001)
        time.sleep(self.random.uniform(0, 1.5 if aim == "starting" else 0.1))
        saving = self.saving(began)
        ended = None not in life.codes()
        life.kill(self.random.randrange(2))
        time.sleep(self.random.choice([0, 0.2]))  # what the other one does meanwhile, before a launcher ends it
        life.kill()
        codes = life.wait()
        if ended:
            self.expect(codes == [0, 0], f"{self.kind}: ended with {codes}: {life.output()[-2000:]}")
            self.counts["runs_finished"] += 1
            self.check_end()
            return
        self.counts[f"killed_{'saving' if saving else aim if aim != 'saving' else 'stepping'}"] += 1
        self.check_killed()

    def reached(self, aim: str, at: int, began: float) -> bool:
        """The moment that a kill is aimed at."""
        return self.saving(began) if aim == "saving" else aim == "starting" or self.step() >= at

    def saving(self, began: float) -> bool:
        """A checkpoint is being written; what an earlier life left does not count."""
        try:
            return any(each.stat().st_ctime > began for each in self.run.glob("checkpoint-*.partial"))
        except FileNotFoundError:  # renamed in between
            return False

    def step(self) -> int:
        """The last step in metrics.jsonl."""
        path = self.run / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def check_killed(self) -> None:
        """Nothing lost but what came after the last complete checkpoint; nothing taken for complete that is not."""
        complete = {read_marker(each).step: each for each in complete_checkpoints(self.run)}
        newest = max(complete, default=0)
        for each in complete.values():
            marker = read_marker(each)
            self.expect(content_problems(each, marker.sums, marker.files) == [], f"{each} is damaged and counts")
            self.expect(marker.step % SAVE == 0 and each.name == f"checkpoint-{marker.step}", f"{each} is misnamed")
        logged = metrics(self.run)
        last = logged[-1]["step"] if logged else 0
        self.expect(newest >= self.newest, f"checkpoint-{self.newest} was complete and is lost")
        # A step is logged only after the save before it was complete.
        self.expect(newest >= (last - 1) // SAVE * SAVE, f"step {last} was logged, and only {newest} is complete")
        self.expect(
            logged == metrics(self.reference(self.kind))[: len(logged)], f"{self.kind}: other losses up to {last}"
        )
        self.newest = newest
        self.counts["steps_made_again"] += int(last) - newest

    def check_end(self) -> None:
        """A run that was killed many times is the undisturbed one."""
        wanted = self.reference(self.kind)
        self.expect(metrics(self.run) == metrics(wanted), f"{self.kind}: other losses in {self.run.name}")
        last = f"checkpoint-{self.steps}"
        for each in sorted((wanted / last).glob("global_step*/*_states.pt")):
            same = content_sum(each) == content_sum(self.run / each.relative_to(wanted))
            self.expect(same, f"{self.kind}: {each.name} differs at the end of {self.run.name}")
        left = sorted(each.name for each in self.run.glob("checkpoint-*"))
        self.expect(left == sorted([f"checkpoint-{self.steps - SAVE}", last]), f"{self.run.name} ends with {left}")
        shutil.rmtree(self.run)

    def kill_tool(self, name: str) -> None:
        """A conversion or merge killed anywhere, then made again."""
        out = self.folder / "out" / name
        command = [*self.tools[name], str(out), "--max_shard_size", "100KB"]
        life = self.server.start(*command, logs=self.folder / "logs")
        time.sleep(self.random.uniform(0.2, 1.05) * self.seconds[name])
        late = None not in life.codes()
        life.kill()
        life.wait()
        self.counts[f"killed_{name}{'_too_late' if late else ''}"] += 1
        if out.exists():
            self.check_folder(name, out)
        else:
            self.server.run(*command, logs=self.folder / "logs")
            self.check_folder(name, out)
        hidden = [each.name for each in out.parent.iterdir() if each.name.endswith(".partial")]
        self.expect(not hidden, f"{name}: {hidden} is left after a finished attempt")
        shutil.rmtree(out)

    def check_folder(self, name: str, out: Path) -> None:
        """Whole, and the same files as the undisturbed attempt's."""
        try:
            check_manifest(out)
            same = json.loads((out / MANIFEST).read_text()) == json.loads((self.folder / name / MANIFEST).read_text())
            self.expect(same, f"{name}: other files than the undisturbed attempt's")
        except ValueError as error:
            self.expect(False, f"{name}: {error}")


def soak(server: Lives, folder: Path, *, cycles: int, steps: int, seed: int) -> dict[str, object]:
    """Run that many kills; the summary. steps: of each run, a multiple of SAVE."""
    began = time.monotonic()
    state = Soak(server, folder, steps, seed)
    prepared = time.monotonic() - began
    while sum(n for name, n in state.counts.items() if name.startswith("killed_")) < cycles:
        state.cycle()
    while state.run.exists():  # to its end, undisturbed
        server.run("pipeline/train.py", *state.argv(state.kind, state.run), ranks=2, logs=folder / "logs")
        state.counts["runs_finished"] += 1
        state.check_end()
    return {
        "cycles": cycles, "seed": seed, **dict(sorted(state.counts.items())), "problems": state.problems,
        "seconds_to_prepare": round(prepared), "seconds": round(time.monotonic() - began),
    }  # fmt: skip


def main() -> None:
    """Parse, soak, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=50, help="kills")
    parser.add_argument("--steps", type=int, default=24, help="of a run; a life makes up to a third of them")
    parser.add_argument("--seed", type=int, default=1, help="of the points at which they come")
    options = parser.parse_args()
    with lives() as server, tempfile.TemporaryDirectory() as folder:
        summary = soak(server, Path(folder), cycles=options.cycles, steps=options.steps, seed=options.seed)
    print(json.dumps(summary, indent=2))
    sys.exit(bool(summary["problems"]))


if __name__ == "__main__":
    main()
