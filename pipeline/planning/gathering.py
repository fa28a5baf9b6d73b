"""Which weights are whole at which time, and how much is gathered in one forward and backward pass.

Replays the rules of DeepSpeed's PartitionedParameterCoordinator on the order in which modules ask for their weights:
a module's own weights are fetched, the next ones in the recorded order are prefetched (`fetch_sub_module`), and a
weight is released behind its module unless it is needed again within the reuse distance (`release_sub_module`).
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from pipeline.planning.layers import representative
from pipeline.planning.order import Event
from pipeline.planning.states import Weight, ZeroSettings, persistent

NEVER = -1


@dataclass(frozen=True)
class Gathers:
    """One micro-batch on one rank, in bytes of whole weights, their padding included."""

    forward: int  # gathered
    backward: int  # gathered, for recomputation too
    changed: int  # of both, what is gathered first of weights that a step has changed: the trained ones
    live: int  # whole at one time, at most, without those that always are
    largest: int  # the largest module's own weights
    largest_module: str
    copied: int  # the largest gather of several weights, which exists twice while it is taken apart


def extend(events: Sequence[Event], layers: str, kinds: list[int], traced: int) -> list[Event]:
    """The events of a model with all its layers, from those of one with its first `traced` ones.

    layers: name of the list of layers. kinds: of all layers; a layer that was not traced does what one of its kind
    did.
    """
    if traced == len(kinds):
        return list(events)
    at = re.compile(re.escape(layers) + r"\.(\d+)(?=\.|$)")

    def place(event: Event) -> int:
        found = at.match(event.module)
        return int(found[1]) if found else NEVER

    parts = [(layer, list(group)) for layer, group in groupby(events, key=place)]
    standing = representative(kinds, traced)

    def copies(backward: bool) -> list[Event]:
        blocks = {layer: block for layer, block in parts if layer != NEVER and block[0].backward == backward}
        order = range(traced, len(kinds))
        return [
            renamed(event, f"{layers}.{layer}")
            for layer in (reversed(order) if backward else order)
            for event in blocks[standing[kinds[layer]]]
        ]

    def renamed(event: Event, layer: str) -> Event:
        return replace(
            event, module=at.sub(layer, event.module), weights=[at.sub(layer, name) for name in event.weights],
            borrowed=[at.sub(layer, name) for name in event.borrowed],
        )  # fmt: skip

    extended: list[Event] = []
    for layer, block in parts:
        if layer == traced - 1 and block[0].backward:
            extended += copies(True) + block
        elif layer == traced - 1:
            extended += block + copies(False)
        else:
            extended += block
    return extended


def gathers(events: Sequence[Event], weights: Sequence[Weight], zero: ZeroSettings) -> Gathers:
    """What is gathered in a micro-batch after the first two steps, in which DeepSpeed learns the order."""
    if zero.ranks == 1 and not zero.parameters_on_host:  # the shard is the weight
        return Gathers(0, 0, 0, 0, 0, "", 0)
    return _Replay(events, weights, zero).run()


class _Replay:
    def __init__(self, events: Sequence[Event], weights: Sequence[Weight], zero: ZeroSettings) -> None:
        self.events, self.weights, self.zero = events, weights, zero
        self.numbers = {weight.name: i for i, weight in enumerate(weights)}
        self.kept = {self.numbers[weight.name] for weight in persistent(weights, zero)}
        self.order = [self._asked(event) for event in events if event.fetch]
        self.queue = deque((w, step) for step, asked in enumerate(self.order) for w in asked)
        self.fetched_for = [NEVER] * len(weights)  # the last step that a weight was fetched or prefetched for
        self.whole: set[int] = set(self.kept)
        self.users: dict[int, set[str]] = {}
        # Frozen weights that were fetched to recompute stay whole until the module whose backward pass it was is done.
        self.going_back: dict[str, set[int]] = {}  # modules in their backward pass, the latest last
        self.available = self.step = 0  # elements; fetches so far
        self.live = self.most = self.copied = 0  # bytes
        self.gathered = {False: 0, True: 0}  # bytes, by whether it is the backward pass
        self.once: set[int] = set()

    def _asked(self, event: Event) -> list[int]:
        """DeepSpeed adds to a module's weights the borrowed ones that were not whole when it first read them."""
        borrowed = [w for name in event.borrowed if (w := self.numbers[name]) not in self.kept]
        return [self.numbers[name] for name in event.weights] + borrowed

    def run(self) -> Gathers:
        for event in self.events:
            if event.fetch:
                self._fetch(event)
            else:
                self._release(event)
        changed = sum(self._bytes(w) for w in self.once if self.weights[w].trained)
        sizes = {e.module: sum(self._bytes(w) for w in self._asked(e) if w not in self.kept) for e in self.events}
        largest = max(sizes, key=lambda module: sizes[module])
        return Gathers(
            self.gathered[False], self.gathered[True], changed, self.most, sizes[largest], largest, self.copied
        )

    def _bytes(self, w: int) -> int:
        return self.weights[w].shard(self.zero.ranks) * self.zero.ranks * self.weights[w].width

    def _gather(self, some: Sequence[int], backward: bool) -> None:
        for w in some:
            self.whole.add(w)
            self.available += self.weights[w].numel
            self.live += self._bytes(w)
            self.gathered[backward] += self._bytes(w)
            self.once.add(w)
        self.most = max(self.most, self.live)
        if len(some) > 1:
            self.copied = max(self.copied, sum(map(self._bytes, some)))

    def _fetch(self, event: Event) -> None:
        own = self._asked(event)
        self._gather([w for w in own if w not in self.whole], event.backward)
        if not event.forward:
            self.going_back.setdefault(event.module, set())
        for w in own:
            self.users.setdefault(w, set()).add(event.module)
            if event.forward and self.going_back and not self.weights[w].trained:
                latest = next(reversed(self.going_back))
                self.users[w].add(latest)
                self.going_back[latest].add(w)
        new = sum(self.fetched_for[w] < self.step for w in own)
        for _ in range(min(new, len(self.queue))):
            w, step = self.queue.popleft()
            self.fetched_for[w] = step
        self._prefetch(event.backward)
        self.step += 1

    def _prefetch(self, backward: bool) -> None:
        room = min(self.zero.live - self.available, self.zero.prefetch)
        ahead: list[int] = []
        elements = 0
        while self.queue and elements < room:
            w, step = self.queue.popleft()
            self.fetched_for[w] = max(self.fetched_for[w], step)
            if w not in self.whole and w not in ahead:
                ahead.append(w)
                elements += self.weights[w].numel
        self._gather(ahead, backward)

    def _release(self, event: Event) -> None:
        module = event.module
        own = set(self._asked(event))
        going = {w for w in own if w not in self.kept and self.fetched_for[w] <= self.step}
        distance = 0
        for step in range(self.step, len(self.order)):
            if distance >= self.zero.reuse or not going:
                break
            for w in self.order[step]:
                going.discard(w)
                distance += self.weights[w].numel
        if not event.forward:
            recomputed = self.going_back.pop(module, set())
            going |= recomputed - self.kept
            own |= recomputed
        for w in own:
            self.users.get(w, set()).discard(module)
        for w in going & self.whole:
            if not self.users.get(w):
                self.whole.discard(w)
                self.available -= self.weights[w].numel
                self.live -= self._bytes(w)
