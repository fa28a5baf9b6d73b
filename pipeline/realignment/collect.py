"""Stage A: all anchors through the safe model, layer by layer, and the subspace of every map on the way.

In memory at one time: one layer, or one map's outputs. The hidden states of the anchors and a layer's outputs lie in
the work folder. What a layer computes, W X without the bias, is the Z of the method.
"""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import nn

from pipeline.realignment.anchors import Anchor, Anchors
from pipeline.realignment.arguments import Norm
from pipeline.realignment.bases import Bases
from pipeline.realignment.layers import LayerByLayer
from pipeline.realignment.maps import LinearMap
from pipeline.realignment.subspace import find_subspace, standardise

GRID_ETA = 0.9  # subspaces are kept up to here at least, so that a grid below it computes nothing again
_FLOAT = 4  # bytes of fp32
_BLOCK = 2**22  # elements read from a scratch file at once


def collect(
    model: LayerByLayer, anchors: Anchors, maps: Sequence[LinearMap], bases: Bases, *, eta: float, norm: Norm
) -> int:
    """Computes the subspaces that `bases` lacks for this `eta`; a killed run goes on in the layer where it was.

    Returns: how many maps were computed.

    Raises:
        ValueError: weights or hidden states that are not finite, by name; another process is computing there.
    """
    todo = [each for each in maps if not bases.decided(each, eta)]
    if not todo:
        return 0
    with bases.lock():
        layers = sorted({each.layer for each in todo})
        hidden = _HiddenStates(bases.folder, anchors)
        start = hidden.resume(layers[0], model)
        began = time.monotonic()
        for index in range(start, layers[-1] + 1):
            here = [each for each in todo if each.layer == index]
            _one_layer(model, index, anchors, here, bases, hidden, max(eta, GRID_ETA), norm)
            _say(index - start + 1, layers[-1] + 1 - start, began, here, bases, eta)
        hidden.remove()
    return len(todo)


def _one_layer(
    model: LayerByLayer,
    index: int,
    anchors: Anchors,
    maps: Sequence[LinearMap],
    bases: Bases,
    hidden: _HiddenStates,
    eta: float,
    norm: Norm,
) -> None:
    with ExitStack() as stack:
        with model.layer(index) as layer:
            outputs = stack.enter_context(_outputs(layer, {each.module for each in maps}, bases.folder))
            hidden.advance(index, model, outputs)
        for each in maps:
            z = outputs.load(each, anchors.tokens)
            if not z.isfinite().all():
                raise ValueError(
                    f"{each.tensor}: its outputs on the anchors are not finite; is the safe model broken?"
                )
            dead = standardise(z, norm)
            # The seed is of the map alone, so the order of the work and a kill change nothing.
            bases.store(each, find_subspace(z, eta=eta, seed=zlib.crc32(each.key.encode()), dead=dead))
    hidden.commit(index)


class _Outputs:
    """The counted rows of what modules put out, text after text, in files."""

    def __init__(self, files: dict[str, Path]) -> None:
        self._files = files
        self._open: dict[str, BinaryIO] = {name: path.open("wb") for name, path in files.items()}
        self.counted: torch.Tensor = torch.empty(0, dtype=torch.bool)  # of the text that is run now

    def keep(self, name: str, module: nn.Linear, out: torch.Tensor) -> None:
        rows = out[0] if module.bias is None else out[0] - module.bias
        self._open[name].write(rows[self.counted].contiguous().numpy().data)

    def load(self, each: LinearMap, tokens: int) -> torch.Tensor:
        """fp32 [tokens, rows] of a map, of a fused one its part of the rows."""
        self._open[each.module].flush()
        path = self._files[each.module]
        width = path.stat().st_size // (_FLOAT * tokens)
        found = torch.empty(tokens, each.stop - each.start)
        block = max(_BLOCK // width, 1)
        with path.open("rb") as file:
            for part in found.split(block):
                read = np.fromfile(file, dtype=np.float32, count=len(part) * width)
                part.copy_(torch.from_numpy(read).view(-1, width)[:, each.start : each.stop])
        return found

    def close(self) -> None:
        for name, file in self._open.items():
            file.close()
            self._files[name].unlink()


@contextmanager
def _outputs(layer: nn.Module, modules: set[str], folder: Path) -> Iterator[_Outputs]:
    """Records what the named linear modules of a layer put out."""
    outputs = _Outputs({name: folder / f"outputs-{name}.scratch" for name in sorted(modules)})
    hooks = []
    for name in modules:
        module = layer.get_submodule(name)
        assert isinstance(module, nn.Linear)

        def hook(module: nn.Linear, _: object, out: torch.Tensor, name: str = name) -> None:
            outputs.keep(name, module, out)

        hooks.append(module.register_forward_hook(hook))
    try:
        yield outputs
    finally:
        for each in hooks:
            each.remove()
        outputs.close()


class _HiddenStates:
    """What goes into a layer for all anchors, fp32, in one file a layer; only the newest is kept."""

    def __init__(self, folder: Path, anchors: Anchors) -> None:
        self._folder, self._anchors = folder, anchors.used

    def resume(self, first: int, model: LayerByLayer) -> int:
        """The layer to go on with: the highest up to `first` whose input is there, or else 0, whose input is made."""
        there = [int(path.stem.removeprefix("hidden-")) for path in self._folder.glob("hidden-*.scratch")]
        if start := max((each for each in there if each <= first), default=0):
            return start
        with _Replacing(self._path(0)) as out:
            for anchor in self._anchors:
                _write(out, model.first_hidden(anchor.ids))
        return 0

    def advance(self, index: int, model: LayerByLayer, outputs: _Outputs) -> None:
        """Runs all anchors through the loaded layer and writes the next layer's input beside its place."""
        with self._path(index).open("rb") as source, self._next(index).open("wb") as out:
            for anchor in self._anchors:
                hidden = self._read(source, anchor, self._path(index).stat().st_size)
                outputs.counted = torch.tensor(anchor.counted)
                result = model.run(index, anchor.ids, hidden)
                if not result.isfinite().all():
                    raise ValueError(
                        f"layer {index}: its outputs on the anchors are not finite; is the safe model broken?"
                    )
                _write(out, result)

    def commit(self, index: int) -> None:
        """Everything of the layer is kept: its output becomes the next layer's input."""
        self._next(index).rename(self._path(index + 1))
        self._path(index).unlink()

    def remove(self) -> None:
        for path in self._folder.glob("hidden-*"):
            path.unlink()

    def _read(self, source: BinaryIO, anchor: Anchor, size: int) -> torch.Tensor:
        width = size // (_FLOAT * sum(len(each.ids) for each in self._anchors))
        read = np.fromfile(source, dtype=np.float32, count=len(anchor.ids) * width)
        return torch.from_numpy(read).view(1, len(anchor.ids), width)

    def _path(self, index: int) -> Path:
        return self._folder / f"hidden-{index}.scratch"

    def _next(self, index: int) -> Path:
        return self._folder / f"hidden-{index + 1}.tmp"


class _Replacing:
    """A file that is there whole or not at all."""

    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, path.with_suffix(".tmp")

    def __enter__(self) -> BinaryIO:
        self._file = self._temporary.open("wb")
        return self._file

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._file.close()
        if kind is None:
            self._temporary.rename(self._path)


def _write(out: BinaryIO, hidden: torch.Tensor) -> None:
    out.write(hidden[0].contiguous().numpy().data)


def _say(done: int, total: int, began: float, maps: Sequence[LinearMap], bases: Bases, eta: float) -> None:
    """A line a layer: a layer of a large model takes a minute."""
    ranks = []
    for each in maps:
        spectrum = bases.spectrum(each)
        ranks.append(f"{each.projection} {spectrum.rank(eta) if spectrum else 0}")
    left = (time.monotonic() - began) / done * (total - done)
    print(f"subspaces: layer {done}/{total}, {left:.0f} s left; ranks {', '.join(ranks)}", file=sys.stderr, flush=True)
