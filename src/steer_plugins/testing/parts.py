"""What the tiny architectures are made of: tensors, blueprints, and the pieces that several of them share.

Key and tensor names follow llama.cpp's loaders (``src/models/<architecture>.cpp``). Shapes are in ggml order
(``ne``, fastest axis first: a matrix is ``(inputs, outputs)``), the reverse of numpy's.

Weights are scaled so that the residual stream stays of order one: matrices have a standard deviation of about
``1/sqrt(inputs)``, and embeddings are somewhat smaller than what the blocks add, because otherwise the next token
would hardly depend on the context and greedy text would fall into short loops.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .vocab import Vocabulary, vocabulary

KeyValue = bool | int | float | str | Sequence[int]

EMBEDDING_STD = 0.5
QK_GAIN = 2.0  # attention that picks out a few positions instead of averaging over all of them
BIAS_STD = 0.3
_LOGIT_STD = 3.0


@dataclass(frozen=True)
class TensorSpec:
    """One tensor to generate.

    ``shape`` in ggml order; values are uniform with mean ``mean`` and standard deviation ``std``. ``big`` matrices
    follow the ``weights`` option of :func:`steer_plugins.testing.write`, everything else is float32. ``choices``
    > 0 makes it an int32 table instead: each row holds ``shape[0]`` different numbers below ``choices``.
    ``per_token`` tensors have one row for each token and get small rows for the vocabulary's muted tokens.
    """

    name: str
    shape: tuple[int, ...]
    std: float = 0.0
    mean: float = 0.0
    big: bool = False
    choices: int = 0
    per_token: bool = False


@dataclass(frozen=True)
class Blueprint:
    """A tiny model without its numbers. ``keys`` that start with a dot get the architecture as prefix."""

    architecture: str
    n_layer: int
    keys: dict[str, KeyValue]
    tensors: list[TensorSpec]
    vocab: Vocabulary
    pre_tokenizer: str
    bos: str
    eos: str
    add_bos: bool
    chat_template: str
    pad: str = ""


def matrix(name: str, inputs: int, outputs: int, *more: int, gain: float = 1.0, big: bool = True) -> TensorSpec:
    return TensorSpec(f"{name}.weight", (inputs, outputs, *more), std=gain / math.sqrt(inputs), big=big)


def norm(name: str, size: int, mean: float = 1.0) -> TensorSpec:
    # Not all ones: a norm that is forgotten, or taken from another model, must show.
    return TensorSpec(f"{name}.weight", (size,), std=0.1 * mean, mean=mean)


def vector(name: str, size: int, std: float, mean: float = 0.0, suffix: str = "weight") -> TensorSpec:
    return TensorSpec(f"{name}.{suffix}", (size,), std=std, mean=mean)


def embedding(n_embd: int, n_vocab: int, std: float = EMBEDDING_STD) -> TensorSpec:
    return TensorSpec("token_embd.weight", (n_embd, n_vocab), std=std, big=True)


def output_head(n_embd: int, n_vocab: int) -> list[TensorSpec]:
    # A head of its own: with tied random embeddings the likeliest next token is the current one.
    output = TensorSpec("output.weight", (n_embd, n_vocab), std=_LOGIT_STD / math.sqrt(n_embd), big=True, per_token=True)
    return [norm("output_norm", n_embd), output]


def dense_ffn(block: str, n_embd: int, n_ff: int) -> list[TensorSpec]:
    return [
        matrix(f"{block}.ffn_gate", n_embd, n_ff),
        matrix(f"{block}.ffn_up", n_embd, n_ff),
        matrix(f"{block}.ffn_down", n_ff, n_embd, gain=1.5),
    ]


def moe_ffn(block: str, n_embd: int, n_ff: int, n_expert: int, shared: bool = True, biases: bool = False) -> Iterator[TensorSpec]:
    """A router and its experts; ``shared`` adds the expert that every token passes through."""
    yield matrix(f"{block}.ffn_gate_inp", n_embd, n_expert, big=False)
    yield matrix(f"{block}.ffn_gate_exps", n_embd, n_ff, n_expert)
    yield matrix(f"{block}.ffn_up_exps", n_embd, n_ff, n_expert)
    yield matrix(f"{block}.ffn_down_exps", n_ff, n_embd, n_expert, gain=1.5)
    if shared:
        yield matrix(f"{block}.ffn_gate_shexp", n_embd, n_ff)
        yield matrix(f"{block}.ffn_up_shexp", n_embd, n_ff)
        yield matrix(f"{block}.ffn_down_shexp", n_ff, n_embd, gain=1.5)
    if biases:
        yield vector(f"{block}.ffn_gate_inp", n_expert, std=BIAS_STD, suffix="bias")
        for name, size in (("ffn_gate_exps", n_ff), ("ffn_up_exps", n_ff), ("ffn_down_exps", n_embd)):
            yield TensorSpec(f"{block}.{name}.bias", (size, n_expert), std=BIAS_STD)


def chatml_vocabulary(control: tuple[str, ...] = ()) -> Vocabulary:
    return vocabulary(("<|endoftext|>", "<|im_start|>", "<|im_end|>", *control), ("<think>", "</think>"))


def common_keys(n_layer: int, n_ctx: int, n_embd: int, n_head: int, n_head_kv: int) -> dict[str, KeyValue]:
    return {
        ".context_length": n_ctx,
        ".embedding_length": n_embd,
        ".block_count": n_layer,
        ".attention.head_count": n_head,
        ".attention.head_count_kv": n_head_kv,
        ".attention.layer_norm_rms_epsilon": 1e-6,
        ".rope.freq_base": 10000.0,
    }
