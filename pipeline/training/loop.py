"""The only training loop. It owns the optimizer step, the finite check, logging, evaluation, saving and stopping; it
names no method."""

from __future__ import annotations

import math
import time

import torch
import torch.distributed as dist

from pipeline.data.cache import EncodedPool
from pipeline.data.packing import pack
from pipeline.training import zero3
from pipeline.training.engine import Engine
from pipeline.training.heartbeat import CHECKPOINT, EVALUATION, OPTIMIZER, Heart
from pipeline.training.method import NonFinite, StepContext, model_kwargs
from pipeline.training.metrics import MetricsLog
from pipeline.training.prepared import Prepared
from pipeline.training.saving import save
from pipeline.training.signals import Requests


class Loop:
    """Trains `run` on `engine` from optimizer step `start`."""

    def __init__(
        self, run: Prepared, engine: Engine, *, start: int, log: MetricsLog | None, heart: Heart | None = None
    ) -> None:
        """log: rank 0's; None on the other ranks. heart: what the watchdog listens to."""
        self.run = run
        self.heart = heart or Heart()
        self.requests = Requests(run.output_dir, main=run.world.main)
        self.engine = engine
        self.step = start
        self.log = log
        self._sums: dict[str, list[torch.Tensor]] = {}
        # Since the last logging step, with evaluation and saving left out.
        self._seconds, self._tokens, self._steps = 0.0, 0, 0

    def train(self) -> None:
        """All remaining steps, then the last evaluation and checkpoint. Errors: Stopped on all ranks together, with
        the step they stopped at saved."""
        train, saved = self.run.train, self.step
        self.heart.watch(self.engine.deepspeed)
        self._poll()  # a signal may have come while the model was loaded
        if not self.requests.end and self._evaluation_is_missing():
            self._evaluate()
        while self.step < self.run.steps and not self.requests.end:
            self.heart.phase("training", self.step + 1)
            grad_norm = self.train_step()
            last = self.step == self.run.steps
            saving = last or (train.save_steps and self.step % train.save_steps == 0) or self.requests.any
            if saving or self.step % train.logging_steps == 0:  # what went into no line before a save would be lost
                self._log_training(grad_norm)
            if not self.requests.end and (last or (train.eval_steps and self.step % train.eval_steps == 0)):
                self._evaluate()
            if saving:
                self._save()
                saved = self.step
        if self.log is not None:
            self.log.close()
        if self.requests.end:
            raise self.requests.exception(f"checkpoint-{saved}" if saved else "before the first step")

    def _save(self) -> None:
        self.heart.phase("saving", self.step)
        self.heart.call(CHECKPOINT)
        save(self.run, self.engine, self.step)
        self.requests.saved()

    def _poll(self) -> None:
        """Agree on what was asked, where no other collective carries it."""
        asked = torch.tensor(self.requests.mine(), device=self.engine.device)
        dist.all_reduce(asked)
        self.requests.agree(asked.tolist())

    def _evaluation_is_missing(self) -> bool:
        """Whether the step this attempt starts from was to be evaluated, and the earlier attempt did not get to it."""
        steps = self.run.train.eval_steps
        due = self.step in (0, self.run.steps) or bool(steps and self.step % steps == 0)
        missing = torch.tensor(float(self.log is not None and not self.log.evaluated), device=self.engine.device)
        dist.all_reduce(missing)
        return due and missing.item() > 0

    def train_step(self) -> float:
        """One optimizer step; returns the gradient norm before clipping. Errors: NonFinite on all ranks together."""
        began = time.perf_counter()
        ctx = StepContext(
            step=self.step, steps=self.run.steps, rank=self.run.world.rank, streams=self.run.streams,
            engine=self.engine.deepspeed, token_loss=self.engine.token_loss, device=self.engine.device,
        )  # fmt: skip
        self.run.method.step(ctx)
        self.heart.call(OPTIMIZER)
        grad_norm = self._checked_norm(ctx)
        self.engine.deepspeed.step()
        self.run.method.after_step(ctx)
        self.step += 1
        for name, values in ctx.metrics.items():
            self._sums.setdefault(name, []).append(torch.stack(values).mean())
        stream = self.run.streams["train"]
        self._tokens += int(stream.pool.lengths[stream.global_batch(self.step - 1)].sum())
        self._steps += 1
        self._seconds += time.perf_counter() - began
        return grad_norm

    def _checked_norm(self, ctx: StepContext) -> float:
        """The global gradient norm, after making sure that it and every loss is finite; what the ranks were asked
        travels with it. One collective and one host read a step."""
        losses = torch.stack([loss.double() for loss, _ in ctx.losses])
        local = torch.stack([zero3.squared_gradient_norm(self.engine.deepspeed), losses.sum() * 0])
        local = torch.cat([local, local.new_tensor(self.requests.mine())])
        dist.all_reduce(local)
        squared, losses_bad, *asked = local.tolist()
        self.requests.agree(asked)
        if math.isfinite(squared) and losses_bad == 0:
            return math.sqrt(squared)
        rows = [row for loss, ids in ctx.losses if not math.isfinite(float(loss)) for row in ids]
        found: list[list[str]] = [[] for _ in range(self.run.world.size)]
        dist.all_gather_object(found, rows)
        raise NonFinite(_explain(self.step + 1, found, [row for _, ids in ctx.losses for row in ids]))

    def _log_training(self, grad_norm: float) -> None:
        """Means since the last logging step, over its steps, micro-steps and ranks, in one collective."""
        names = sorted(self._sums)
        packed = torch.stack([torch.stack(self._sums[name]).mean() for name in names])
        dist.all_reduce(packed)
        self._sums.clear()
        seconds, tokens, steps = self._seconds, self._tokens, self._steps
        self._seconds, self._tokens, self._steps = 0.0, 0, 0
        if self.log is None:
            return
        values = dict(zip(names, (packed / self.run.world.size).tolist(), strict=True))
        values |= {
            # The method's terms over the cross-entropy, which is 0 where nothing is trained.
            "penalty_ratio": values["loss"] / values["ce_loss"] - 1 if values["ce_loss"] else 0.0,
            "learning_rate": self.engine.deepspeed.get_lr()[0],
            "grad_norm": grad_norm,
            "tokens_per_second": tokens / seconds,
            "seconds_per_step": seconds / steps,
        }
        if self.engine.device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.log.training(self.step, values)

    def _evaluate(self) -> None:
        if not self.run.evaluations:
            return
        self.heart.phase("evaluating", self.step)
        self.heart.call(EVALUATION)
        self.engine.deepspeed.eval()
        values = {
            f"eval_{name}_loss" if name != "eval" else "eval_loss": self._mean_loss(pool)
            for name, pool in self.run.evaluations.items()
            if not self.requests.end
        }
        self.engine.deepspeed.train()
        zero3.release_gathered(self.engine.deepspeed)
        if self.log is not None and not self.requests.end:  # else the next attempt evaluates
            self.log.evaluation(self.step, values)

    def _mean_loss(self, pool: EncodedPool) -> float:
        """Token-mean cross-entropy of a pool. Every rank runs as many passes; one with no rows left repeats some with
        weight 0."""
        rows, ranks = self.run.train.per_device_train_batch_size, self.run.world.size
        batches = [range(first, min(first + rows, len(pool))) for first in range(0, len(pool), rows)]
        total = torch.zeros(2, dtype=torch.float64, device=self.engine.device)
        for turn in range(math.ceil(len(batches) / ranks)):
            self._poll()
            if self.requests.end:
                return math.nan
            mine = turn * ranks + self.run.world.rank
            batch = pack([pool[i] for i in batches[min(mine, len(batches) - 1)]]).to(self.engine.device)
            with torch.no_grad():
                nll = self.engine.token_loss(self.engine.deepspeed, batch.targets, **model_kwargs(batch))
            if mine < len(batches):
                total += torch.stack(
                    [nll.double().sum(), torch.tensor(float(len(nll)), device=nll.device, dtype=torch.float64)]
                )
        dist.all_reduce(total)
        summed, count = total.tolist()
        return float(summed / count)


def _explain(step: int, found: list[list[str]], mine: list[str]) -> str:
    guilty = [f"rank {rank}: rows {', '.join(rows)}" for rank, rows in enumerate(found) if rows]
    if guilty:
        return f"step {step}: the loss is not finite on " + "; ".join(guilty) + ". No optimizer step was taken"
    return (
        f"step {step}: the gradient norm is not finite, with every loss finite "
        f"(this rank's rows: {', '.join(mine)}). No optimizer step was taken"
    )
