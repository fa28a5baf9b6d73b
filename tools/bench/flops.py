"""Floating-point operations of a step's texts, and the bound they set on what reference texts may cost.

A text of n tokens, t of them trained, costs in its forward pass, per layer (hidden size D, H query and G key/value
heads of dimension d, MLP width I) and once (vocabulary V):

    projections   2 n (D H d + 2 D G d + H d D + 3 D I)      q, k, v, o; gate, up, down
    attention     2 H d n^2                                  q k^T and p v over the causal half of n^2
    output        2 t D V                                    of the user's texts only: references train no token

The backward pass doubles each of them, so ratios need the forward pass only. Norms, rotations and the softmax are left
out. A dense decoder with a gated MLP is assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tools.bench.layouts import Layout

TOLERANCE = 1.05  # what the sink itself, the longer packed row and one more mask may cost


@dataclass(frozen=True)
class Flops:
    """Forward operations of some texts by kind."""

    projections: int
    attention: int
    output: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.projections + self.attention + self.output


def forward_flops(config: Any, texts: int, tokens: int, trained: int) -> Flops:
    """Forward operations of `texts` texts of `tokens` tokens each, `trained` tokens in all.

    config: the transformers configuration of the (text) model. Errors: ValueError for a model with experts.
    """
    if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        raise ValueError(f"--model_name_or_path: {config.model_type} has experts, and the bound counts dense layers")
    hidden, heads = config.hidden_size, config.num_attention_heads
    groups, dim = groups_and_dim(config)
    a_token = 2 * hidden * dim * (heads + groups) + 3 * hidden * config.intermediate_size
    layers = config.num_hidden_layers
    return Flops(
        projections=2 * layers * texts * tokens * a_token,
        attention=2 * layers * texts * tokens**2 * heads * dim,
        output=2 * trained * hidden * config.vocab_size,
    )


def groups_and_dim(config: Any) -> tuple[int, int]:
    """Key/value heads and head dimension, which a configuration may leave out."""
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return getattr(config, "num_key_value_heads", None) or heads, dim


def bound(config: Any, layout: Layout, trained: int) -> float:
    """What Surgery's step may cost in steps of SFT: 1.05 (1 + reference FLOPs / user FLOPs)."""
    user = forward_flops(config, layout.texts, layout.tokens, trained)
    references = forward_flops(config, layout.references, layout.reference_tokens, 0)
    return TOLERANCE * (1 + references.total / user.total)
