"""The tiny architectures by name, and the ones with a structure of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..errors import ModelError
from . import templates
from .ordinary import LAYOUTS, ordinary
from .parts import (
    EMBEDDING_STD,
    QK_GAIN,
    Blueprint,
    TensorSpec,
    chatml_vocabulary,
    common_keys,
    dense_ffn,
    embedding,
    matrix,
    moe_ffn,
    norm,
    output_head,
    vector,
)
from .vocab import vocabulary


def _gemma3(architecture: str, n_layer: int, n_ctx: int) -> Blueprint:
    """Gemma 3: scaled embeddings, norms before and after each block, five sliding-window layers then a global one."""
    n_embd, n_head, n_head_kv, n_ff, head = 128, 4, 1, 256, 64
    vocab = chatml_vocabulary()

    def tensors() -> Iterator[TensorSpec]:
        # The graph multiplies embeddings by sqrt(n_embd).
        yield embedding(n_embd, len(vocab.tokens), std=EMBEDDING_STD / math.sqrt(n_embd))
        yield from output_head(n_embd, len(vocab.tokens))
        for il in range(n_layer):
            blk = f"blk.{il}"
            yield norm(f"{blk}.attn_norm", n_embd)
            yield matrix(f"{blk}.attn_q", n_embd, n_head * head)
            yield matrix(f"{blk}.attn_k", n_embd, n_head_kv * head)
            yield matrix(f"{blk}.attn_v", n_embd, n_head_kv * head)
            yield norm(f"{blk}.attn_q_norm", head, mean=QK_GAIN)
            yield norm(f"{blk}.attn_k_norm", head)
            yield matrix(f"{blk}.attn_output", n_head * head, n_embd)
            yield norm(f"{blk}.post_attention_norm", n_embd, mean=0.6)
            yield norm(f"{blk}.ffn_norm", n_embd)
            yield from dense_ffn(blk, n_embd, n_ff)
            yield norm(f"{blk}.post_ffw_norm", n_embd, mean=0.6)

    keys = common_keys(n_layer, n_ctx, n_embd, n_head, n_head_kv)
    keys |= {
        ".feed_forward_length": n_ff,
        ".attention.key_length": head,
        ".attention.value_length": head,
        ".attention.sliding_window": 32,  # short, so that a prompt of a few sentences leaves it
        ".rope.freq_base": 1000000.0,
    }
    return Blueprint(
        architecture,
        n_layer,
        keys,
        list(tensors()),
        vocab,
        pre_tokenizer="smollm",
        bos="<|endoftext|>",
        eos="<|im_end|>",
        add_bos=True,
        chat_template=templates.CHATML_BOS,
    )


def _deepseek2(architecture: str, n_layer: int, n_ctx: int) -> Blueprint:
    """DeepSeek-V2/V3 and Mistral 4: latent attention (MLA) in its absorbed form, one dense layer, then experts plus a shared one.

    The cache holds one latent "head" of kv_lora + rope values, which is what key_length and value_length state; the
    ``_mla`` keys are the sizes of the real heads.
    """
    n_embd, n_head, q_lora, kv_lora, rope, nope, v_head = 128, 4, 64, 64, 32, 32, 32
    n_ff, n_expert, n_used, n_ff_expert, n_dense = 256, 8, 2, 64, 1
    vocab = chatml_vocabulary()

    def tensors() -> Iterator[TensorSpec]:
        yield embedding(n_embd, len(vocab.tokens))
        yield from output_head(n_embd, len(vocab.tokens))
        for il in range(n_layer):
            blk = f"blk.{il}"
            yield norm(f"{blk}.attn_norm", n_embd)
            yield matrix(f"{blk}.attn_q_a", n_embd, q_lora)
            yield norm(f"{blk}.attn_q_a_norm", q_lora, mean=QK_GAIN)
            yield matrix(f"{blk}.attn_q_b", q_lora, n_head * (nope + rope))
            yield matrix(f"{blk}.attn_kv_a_mqa", n_embd, kv_lora + rope)
            yield norm(f"{blk}.attn_kv_a_norm", kv_lora)
            # Stored transposed (it is folded into the query), so the latent width counts as its inputs here.
            yield TensorSpec(f"{blk}.attn_k_b.weight", (nope, kv_lora, n_head), std=1 / math.sqrt(kv_lora), big=True)
            yield matrix(f"{blk}.attn_v_b", kv_lora, v_head, n_head)
            yield matrix(f"{blk}.attn_output", n_head * v_head, n_embd, gain=1.5)
            yield norm(f"{blk}.ffn_norm", n_embd)
            if il < n_dense:
                yield from dense_ffn(blk, n_embd, n_ff)
            else:
                yield from moe_ffn(blk, n_embd, n_ff_expert, n_expert)
                yield vector(f"{blk}.exp_probs_b", n_expert, std=0.1, suffix="bias")

    keys = common_keys(n_layer, n_ctx, n_embd, n_head, 1)
    keys |= {
        ".feed_forward_length": n_ff,
        ".leading_dense_block_count": n_dense,
        ".rope.dimension_count": rope,
        ".attention.q_lora_rank": q_lora,
        ".attention.kv_lora_rank": kv_lora,
        ".attention.key_length": kv_lora + rope,
        ".attention.value_length": kv_lora,
        ".attention.key_length_mla": nope + rope,
        ".attention.value_length_mla": v_head,
        ".expert_count": n_expert,
        ".expert_used_count": n_used,
        ".expert_shared_count": 1,
        ".expert_feed_forward_length": n_ff_expert,
        ".expert_weights_scale": 1.5,
        ".expert_weights_norm": True,
        ".expert_gating_func": 2,  # sigmoid
    }
    if architecture == "mistral4":
        keys |= {".attention.temperature_scale": 0.1, ".attention.temperature_length": 64}
    return Blueprint(
        architecture,
        n_layer,
        keys,
        list(tensors()),
        vocab,
        pre_tokenizer="deepseek-v3",
        bos="<|endoftext|>",
        eos="<|im_end|>",
        add_bos=True,
        chat_template=templates.CHATML_BOS,
    )


def _deepseek4(architecture: str, n_layer: int, n_ctx: int) -> Blueprint:
    """DeepSeek-V4: four residual streams, compressed attention, hash-routed then learned experts.

    Compress ratios start 0, 0 and alternate 4, 128 as in the real model, so the default six layers hold each kind;
    the first three layers route by token id. llama.cpp wants exactly four streams, an indexer width that is a
    multiple of 64 and differs from the head width, and ratios 0, 4 or 128. ``top_k`` covers every compressed block
    of the default context: a ranking among random scores could flip with the last bit of a sum.
    """
    n_embd, n_head, head, rope, q_lora = 256, 4, 64, 32, 64
    groups, o_lora = 2, 64
    n_expert, n_used, n_ff = 8, 2, 32
    ix_head, ix_dim = 4, 128
    n_hc = 4
    n_mix = (2 + n_hc) * n_hc
    ratios = [0 if il < 2 else 4 if il % 2 == 0 else 128 for il in range(n_layer)]
    n_hash = min(3, n_layer)
    bos, eos, pad = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
    vocab = vocabulary((bos, eos, pad, "<｜User｜>", "<｜Assistant｜>"), ("<think>", "</think>"))
    n_vocab = len(vocab.tokens)

    def hyper_connection(name: str) -> Iterator[TensorSpec]:
        # fn's output is scaled and shifted into 4 read gains, 4 write gains and a 4x4 mixing matrix. The spread of
        # the shifts is what makes the streams differ, and large enough that they stay different.
        yield matrix(f"{name}_fn", n_hc * n_embd, n_mix, big=False)
        yield vector(f"{name}_base", n_mix, std=1.0)
        yield vector(f"{name}_scale", 3, std=0.05, mean=0.5)

    def compressor(name: str, width: int, out: int, ratio: int) -> Iterator[TensorSpec]:
        yield matrix(f"{name}_kv", n_embd, width)
        yield matrix(f"{name}_gate", n_embd, width)
        yield TensorSpec(f"{name}_ape.weight", (width, ratio), std=0.5)
        yield norm(f"{name}_norm", out)

    def tensors() -> Iterator[TensorSpec]:
        yield embedding(n_embd, n_vocab)
        yield from output_head(n_embd, n_vocab)
        yield matrix("output_hc_fn", n_hc * n_embd, n_hc, big=False)
        yield vector("output_hc_base", n_hc, std=0.5)
        yield vector("output_hc_scale", 1, std=0.05, mean=0.5)
        for il, ratio in enumerate(ratios):
            blk = f"blk.{il}"
            yield norm(f"{blk}.attn_norm", n_embd)
            yield vector(f"{blk}.attn_sinks", n_head, std=0.5)
            yield matrix(f"{blk}.attn_q_a", n_embd, q_lora)
            yield norm(f"{blk}.attn_q_a_norm", q_lora)
            yield matrix(f"{blk}.attn_q_b", q_lora, n_head * head)
            yield matrix(f"{blk}.attn_kv", n_embd, head)
            # Queries are normalised without a weight, so the keys (which are the values too) carry the gain.
            yield norm(f"{blk}.attn_kv_a_norm", head, mean=QK_GAIN)
            yield matrix(f"{blk}.attn_output_a", n_head * head // groups, o_lora * groups)
            yield matrix(f"{blk}.attn_output_b", groups * o_lora, n_embd)
            yield from hyper_connection(f"{blk}.hc_attn")
            yield from hyper_connection(f"{blk}.hc_ffn")
            yield norm(f"{blk}.ffn_norm", n_embd)
            yield from moe_ffn(blk, n_embd, n_ff, n_expert)
            if il < n_hash:
                yield TensorSpec(f"{blk}.ffn_gate_tid2eid.weight", (n_used, n_vocab), choices=n_expert)
            else:
                yield vector(f"{blk}.exp_probs_b", n_expert, std=0.1, suffix="bias")
            if ratio:
                overlap = 2 if ratio == 4 else 1
                yield from compressor(f"{blk}.attn_compressor", overlap * head, head, ratio)
            if ratio == 4:
                yield matrix(f"{blk}.indexer.proj", n_embd, ix_head)
                yield matrix(f"{blk}.indexer.attn_q_b", q_lora, ix_head * ix_dim)
                yield from compressor(f"{blk}.indexer_compressor", 2 * ix_dim, ix_dim, ratio)

    keys = common_keys(n_layer, n_ctx, n_embd, n_head, 1)
    keys |= {
        ".embedding_length_out": n_hc * n_embd,
        ".rope.dimension_count": rope,
        ".attention.key_length": head,
        ".attention.value_length": head,
        ".attention.q_lora_rank": q_lora,
        ".attention.sliding_window": 128,
        ".attention.indexer.head_count": ix_head,
        ".attention.indexer.key_length": ix_dim,
        ".attention.indexer.top_k": 512,
        ".attention.output_group_count": groups,
        ".attention.output_lora_rank": o_lora,
        ".attention.compress_rope_freq_base": 160000.0,
        ".attention.compress_ratios": ratios,
        ".expert_count": n_expert,
        ".expert_used_count": n_used,
        ".expert_shared_count": 1,
        ".expert_feed_forward_length": n_ff,
        ".expert_weights_scale": 1.5,
        ".expert_weights_norm": True,
        ".expert_gating_func": 4,
        ".swiglu_clamp_exp": 10.0,
        ".hyper_connection.count": n_hc,
        ".hyper_connection.sinkhorn_iterations": 20,
        ".hyper_connection.epsilon": 1e-6,
        ".hash_layer_count": n_hash,
    }
    return Blueprint(
        architecture,
        n_layer,
        keys,
        list(tensors()),
        vocab,
        pre_tokenizer="joyai-llm",
        bos=bos,
        eos=eos,
        pad=pad,
        add_bos=True,
        chat_template=templates.DEEPSEEK_V4,
    )


@dataclass(frozen=True)
class _Recipe:
    build: Callable[[str, int, int], Blueprint]
    n_layer: int
    min_layers: int = 1


_RECIPES = {
    **{name: _Recipe(ordinary, 4, min_layers=4 if layout.hybrid else 1) for name, layout in LAYOUTS.items()},
    "gemma3": _Recipe(_gemma3, 6),
    "deepseek2": _Recipe(_deepseek2, 4),
    "mistral4": _Recipe(_deepseek2, 4),
    "deepseek4": _Recipe(_deepseek4, 6, min_layers=3),  # llama.cpp divides by zero without a layer of ratio 4
}

ARCHITECTURES: tuple[str, ...] = tuple(_RECIPES)
"""The architectures :func:`steer_plugins.testing.write` knows, by their GGUF names."""


MAX_LAYERS = 64


def blueprint(architecture: str, *, n_layer: int | None, n_ctx: int) -> Blueprint:
    """The blueprint of an architecture; ``n_layer`` None takes its default depth. Raises ``ModelError``."""
    if architecture not in _RECIPES:
        raise ModelError(f"there is no tiny model of architecture {architecture!r}; choose one of {', '.join(_RECIPES)}")
    recipe = _RECIPES[architecture]
    n_layer = recipe.n_layer if n_layer is None else n_layer
    if not recipe.min_layers <= n_layer <= MAX_LAYERS:
        raise ModelError(f"a tiny {architecture} cannot have {n_layer} layers; choose {recipe.min_layers} to {MAX_LAYERS}")
    if n_ctx < 1:
        raise ModelError(f"a tiny model cannot have a context of {n_ctx} tokens; choose at least 1")
    return recipe.build(architecture, n_layer, n_ctx)
