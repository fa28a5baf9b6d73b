"""The weights of a Hugging Face model, or of a PEFT adapter, out of DeepSpeed's shards.

The shards are held against the model that the configuration describes, built on the meta device: names, shapes and
whether a tensor holds floating-point numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModelForCausalLM, get_peft_model_state_dict
from transformers import PreTrainedModel

from pipeline.checkpoints.model_folder import empty_model
from pipeline.checkpoints.saved_form import SavedTensor, compute, saved_form
from pipeline.checkpoints.shards import Shards, Stored, cut
from pipeline.checkpoints.tensor_file import RegionReader
from pipeline.checkpoints.weights_out import TensorSpec


@dataclass(frozen=True)
class ShardWeights:
    """What is written out of `shards`, and the meta model that it was planned with."""

    shards: Shards
    reader: RegionReader
    model: PreTrainedModel
    saved: Mapping[str, SavedTensor]

    @property
    def specs(self) -> list[TensorSpec]:
        """The tensors as they are written, in their order."""
        return [each.spec for each in self.saved.values()]

    def read(self, name: str) -> Iterator[torch.Tensor]:
        """The elements of a written tensor in order, flat, in pieces that are overwritten when the next is asked for.

        Raises:
            ValueError: the shards do not hold them, or end before they do.
        """
        tensor = self.saved[name]
        if tensor.start is None:
            whole = {source: self._whole(source).to(tensor.spec.dtype) for source in tensor.sources}
            yield compute(self.model, name, whole).flatten()
        else:
            regions = self.shards.regions(_stored(self.shards, tensor.sources[0]))
            yield from self.reader.read(cut(regions, tensor.start, tensor.start + tensor.spec.numel))

    def check(self) -> None:
        """Holds all that the written tensors were read from, now or before an interruption, against its checksums.

        Raises:
            ValueError: a shard is not what was written, by file.
        """
        stored = {_stored(self.shards, source) for each in self.saved.values() for source in each.sources}
        self.reader.check(region for name in stored for region in self.shards.regions(name))

    def _whole(self, source: str) -> torch.Tensor:
        stored = _stored(self.shards, source)
        pieces = [piece.clone() for piece in self.reader.read(self.shards.regions(stored))]
        return torch.cat(pieces).view(self.shards.tensors[stored].shape)


def model_weights(shards: Shards, config_folder: Path, dtype: torch.dtype) -> ShardWeights:
    """A model's weights as save_pretrained would write them.

    Raises:
        ValueError: the shards hold other tensors than the model of config.json.
    """
    if any("lora_" in name for name in shards.tensors):
        raise ValueError(
            f"{shards.folder}: holds LoRA weights, and adapter_config.json is not beside `latest`; copy it from the "
            "run, or write it with model.peft_config['default'].save_pretrained"
        )
    model = empty_model(config_folder)
    held = {name: shards.tensors[_stored(shards, name)] for name in (*shards.tensors, *shards.aliases)}
    _compare(held, model.state_dict(), shards.folder)
    stored: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if stored.setdefault(id(parameter), _stored(shards, name)) != _stored(shards, name):
            raise ValueError(
                f"{shards.folder}: {name} and {stored[id(parameter)]} were trained apart, but config.json ties them; "
                "set tie_word_embeddings to false in it"
            )
    return ShardWeights(shards, RegionReader(), model, {each.spec.name: each for each in saved_form(model, dtype)})


def adapter_weights(shards: Shards, config_folder: Path, adapter_config: Path, dtype: torch.dtype) -> ShardWeights:
    """A LoRA adapter's weights as PEFT would write them; frozen weights in the shards are left out.

    Raises:
        ValueError: the shards hold other trained tensors than the adapter has.
    """
    lora = LoraConfig.from_pretrained(str(adapter_config.parent))
    lora.inference_mode = False  # else PEFT freezes the adapter, and its parameters are not told from the base's
    lora.init_lora_weights = False  # names and shapes are wanted: no starting values from files or decompositions
    lora.megatron_config = None  # PEFT would import the module that it names
    base = empty_model(config_folder)
    with torch.device("meta"):
        model = PeftModelForCausalLM(base, lora)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    held = {name: stored for name, stored in shards.tensors.items() if stored.trained}
    _compare(held, trained, shards.folder)
    state = model.state_dict()
    names = {id(tensor): name for name, tensor in state.items()}
    # The vocabulary is never resized, so no embedding joins them ("auto" would ask the hub).
    written = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    saved = {
        name: SavedTensor(TensorSpec(name, tuple(tensor.shape), dtype), (names[id(tensor)],), 0)
        for name, tensor in written.items()
    }
    # A well-known failure under ZeRO-3 is a valid file without a single weight.
    empty = [name for name, each in saved.items() if not each.spec.numel]
    if len(saved) != len(trained) or empty:
        raise ValueError(
            f"{shards.folder}: the adapter would have {len(saved)} tensors, {len(empty)} of them empty, for "
            f"{len(trained)} trained parameters"
        )
    return ShardWeights(shards, RegionReader(), base, saved)


def _stored(shards: Shards, name: str) -> str:
    """The name under which the shards hold a tensor."""
    return shards.aliases.get(name, name)


def _compare(held: Mapping[str, Stored], expected: Mapping[str, torch.Tensor], folder: Path) -> None:
    common = expected.keys() & held.keys()
    floats = {name for name, each in expected.items() if each.is_floating_point()}
    for problem, names in (
        ("missing", expected.keys() - common),
        ("unexpected", held.keys() - common),
        ("of another shape", {name for name in common if expected[name].shape != held[name].shape}),
        ("of another type", {name for name in common if held[name].dtype.is_floating_point != (name in floats)}),
    ):
        if names:
            shown = ", ".join(sorted(names)[:5])
            raise ValueError(
                f"{folder}: {len(names)} tensors are {problem} for the model that config.json describes ({shown}); "
                "the shards or the config belong to another model"
            )
