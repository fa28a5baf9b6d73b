"""measure.py against eager attention, over more texts than one forward pass packs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.data.chat import ChatEncoder
from pipeline.data.schema import read_conversations
from tests.ranks import ROOT
from tests.tiny import chat_row, write_jsonl


def test_divergence_is_the_difference_of_mean_sink_attention(tiny_model_dir: Path, tmp_path: Path) -> None:
    pools = {}
    for name in ("harmful", "harmless"):
        rows = [chat_row(f"{name} text {i}", "bread " * (3 * i % 19 + 1)) for i in range(20)]
        pools[name] = str(write_jsonl(tmp_path / f"{name}.jsonl", rows))
    out = tmp_path / "out"
    done = subprocess.run(
        [
            sys.executable, "pipeline/measure.py", "--model_name_or_path", str(tiny_model_dir),
            "--output_dir", str(out),
            "--harmful_data", pools["harmful"], "--harmless_data", pools["harmless"], "--max_texts", "18",
        ],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "sinks.json").read_text())

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, attn_implementation="eager")
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(tiny_model_dir), max_length=512)
    means = {}
    for name, path in pools.items():
        texts = [encoder.encode(row) for row in read_conversations(path, flag="x")[:18]]
        each = []
        for text in texts:
            attentions = model(torch.tensor(text.input_ids)[None], output_attentions=True).attentions
            each.append(torch.stack([layer[0, :, 1:, 0].mean(-1) for layer in attentions]))
        means[name] = torch.stack(each).mean(0)
    wanted = means["harmful"] - means["harmless"]
    torch.testing.assert_close(torch.tensor(found["divergence"]), wanted, rtol=1e-4, atol=1e-6)
    assert found["positive_heads"] == pytest.approx((wanted > 0).float().mean().item())
    assert found["texts"] == {"harmful_data": 18, "harmless_data": 18}
