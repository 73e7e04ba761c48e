"""Transformers that differ from llama in details only: which norms, which biases, how the feed-forward part is made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from . import templates
from .parts import (
    BIAS_STD,
    QK_GAIN,
    Blueprint,
    KeyValue,
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

_N_EMBD, _N_HEAD, _N_HEAD_KV, _N_EXPERT = 128, 4, 2, 8
_QKV = ("attn_q", "attn_k", "attn_v")


@dataclass(frozen=True)
class Layout:
    """In what an architecture differs from llama.

    ``attn_norm`` and ``ffn_norm`` are the tensors' names, empty where there is no norm; ``post_norms`` are two more,
    after each half of the block. ``ffn`` is "gated", "fused" (gate and up in one matrix) or "plain" (no gate). With
    ``moe_every`` n > 0 each n-th layer has experts instead, ``shared`` one that every token passes through.
    ``biases`` names the projections that have one. ``hybrid``: each fourth layer has attention, with a gate on its
    output; the others keep a recurrent state instead (gated delta net). ``tied``: the embedding is the output head
    too; ``sqrt_embd``: the graph multiplies embeddings by the root of their size. ``control`` are further control
    tokens, ``keys`` further metadata.
    """

    head: int = _N_EMBD // _N_HEAD
    attn_norm: str = "attn_norm"
    ffn_norm: str = "ffn_norm"
    post_norms: bool = False
    qk_norm: str = ""  # "head": shared by all heads, "all": over all heads at once
    layer_norm: bool = False  # instead of RMS norm
    norm_bias: bool = False
    fused_qkv: bool = False
    biases: tuple[str, ...] = ()
    sinks: bool = False
    hybrid: bool = False
    ffn: str = "gated"
    n_ff: int = 256
    moe_every: int = 0
    n_used: int = 2
    shared: bool = False
    shared_gate: bool = False
    tied: bool = False
    sqrt_embd: bool = False
    control: tuple[str, ...] = ()
    pre_tokenizer: str = "smollm"
    add_bos: bool = True
    chat_template: str = templates.CHATML_BOS
    keys: Mapping[str, KeyValue] = field(default_factory=dict)


def _qwen(chat_template: str = templates.CHATML, **differences: object) -> Layout:
    return Layout(pre_tokenizer="qwen2", add_bos=False, chat_template=chat_template, **differences)  # type: ignore[arg-type]


_STATE, _KEY_HEADS, _VALUE_HEADS, _KERNEL = 32, 2, 4, 4  # of the recurrent layers


def _qwen_hybrid(keys: Mapping[str, KeyValue], **differences: object) -> Layout:
    state = {
        ".ssm.conv_kernel": _KERNEL,
        ".ssm.inner_size": _VALUE_HEADS * _STATE,
        ".ssm.state_size": _STATE,
        ".ssm.time_step_rank": _VALUE_HEADS,
        ".ssm.group_count": _KEY_HEADS,
    }
    keys = {".rope.dimension_count": 32, ".full_attention_interval": 4, **state, **keys}
    return _qwen(
        templates.CHATML_THINKING,
        head=64,
        qk_norm="head",
        ffn_norm="post_attention_norm",
        hybrid=True,
        keys=keys,
        **differences,
    )


# Windows are short, so that a prompt of a few sentences leaves them. Rope widths below the head's: partial rotation.
LAYOUTS: dict[str, Layout] = {
    "llama": Layout(),
    "qwen2": _qwen(biases=_QKV),
    "qwen3": _qwen(templates.CHATML_THINKING, head=64, qk_norm="head"),
    "qwen2moe": _qwen(biases=_QKV, moe_every=1, shared=True, shared_gate=True),
    "qwen3moe": _qwen(templates.CHATML_THINKING, head=64, qk_norm="head", moe_every=1),
    "qwen3next": _qwen_hybrid({}, moe_every=1, shared=True, shared_gate=True),
    "qwen35": _qwen_hybrid({".rope.dimension_sections": (6, 5, 5, 0)}),
    "qwen35moe": _qwen_hybrid({".rope.dimension_sections": (6, 5, 5, 0)}, moe_every=1, shared=True, shared_gate=True),
    "gemma": Layout(head=64, tied=True, sqrt_embd=True),
    "gemma2": Layout(
        head=64,
        post_norms=True,
        tied=True,
        sqrt_embd=True,
        keys={".attention.sliding_window": 32, ".attn_logit_softcapping": 50.0, ".final_logit_softcapping": 30.0},
    ),
    # llama.cpp asks for these tokens in any model whose name contains "phi3".
    "phi3": Layout(fused_qkv=True, ffn="fused", control=("<unk>", "<s>", "</s>")),
    "glm4": Layout(biases=_QKV, post_norms=True, ffn="fused", keys={".rope.dimension_count": 16}),
    "gpt-oss": Layout(
        head=64,
        ffn_norm="post_attention_norm",
        biases=(*_QKV, "attn_output", "ffn"),
        sinks=True,
        moe_every=1,
        keys={".attention.sliding_window": 32},
    ),
    "granite": Layout(keys={".logit_scale": 2.0, ".residual_scale": 0.8, ".embedding_scale": 1.5, ".attention.scale": 0.15}),
    "granitemoe": Layout(
        n_ff=64,  # the experts' width
        moe_every=1,
        shared=True,
        keys={".logit_scale": 2.0, ".residual_scale": 0.8, ".embedding_scale": 1.5, ".attention.scale": 0.15},
    ),
    "olmo2": Layout(attn_norm="", ffn_norm="", post_norms=True, qk_norm="all", keys={".attention.sliding_window": 32}),
    "smollm3": Layout(),
    "command-r": Layout(ffn_norm="", layer_norm=True, tied=True, keys={".logit_scale": 1.5}),
    "cohere2": Layout(ffn_norm="", layer_norm=True, tied=True, keys={".logit_scale": 1.5, ".attention.sliding_window": 32}),
    "mistral3": Layout(keys={".attention.temperature_scale": 0.1, ".rope.scaling.original_context_length": 64}),
    "starcoder2": Layout(layer_norm=True, norm_bias=True, biases=(*_QKV, "attn_output", "ffn_up", "ffn_down"), ffn="plain"),
    "llama4": Layout(moe_every=2, n_used=1, shared=True, keys={".interleave_moe_layer_step": 2}),
    "exaone": Layout(),
    "exaone4": Layout(attn_norm="", ffn_norm="", post_norms=True, qk_norm="head"),
    "stablelm": Layout(layer_norm=True, norm_bias=True, biases=_QKV, keys={".rope.dimension_count": 8}),
}


def _ends(layout: Layout, n_vocab: int) -> Iterator[TensorSpec]:
    if layout.tied:
        # Smaller, or the current token would always be the likeliest next one. Where the graph enlarges the
        # embedding, only the last norm is left to make up for it in the logits.
        std = 0.25 / math.sqrt(_N_EMBD) if layout.sqrt_embd else 0.2
        yield TensorSpec("token_embd.weight", (_N_EMBD, n_vocab), std=std, big=True, per_token=True)
        yield norm("output_norm", _N_EMBD, mean=2.0 if layout.sqrt_embd else 1.0)
    else:
        yield embedding(_N_EMBD, n_vocab)
        yield from output_head(_N_EMBD, n_vocab)
    if layout.norm_bias:
        yield vector("output_norm", _N_EMBD, std=BIAS_STD, suffix="bias")


def _attention(layout: Layout, block: str) -> Iterator[TensorSpec]:
    q, kv = _N_HEAD * layout.head, _N_HEAD_KV * layout.head
    widths = {"attn_q": q, "attn_k": kv, "attn_v": kv}
    if layout.fused_qkv:
        yield matrix(f"{block}.attn_qkv", _N_EMBD, q + 2 * kv, gain=QK_GAIN)
    else:
        for name, width in widths.items():
            gates = 2 if layout.hybrid and name == "attn_q" else 1
            yield matrix(f"{block}.{name}", _N_EMBD, gates * width, gain=QK_GAIN if name == "attn_q" else 1.0)
    for name, width in widths.items():
        if name in layout.biases:
            yield vector(f"{block}.{name}", width, std=BIAS_STD, suffix="bias")
    if layout.qk_norm:
        over_all = layout.qk_norm == "all"
        yield norm(f"{block}.attn_q_norm", q if over_all else layout.head, mean=QK_GAIN)
        yield norm(f"{block}.attn_k_norm", kv if over_all else layout.head)
    if layout.sinks:
        yield vector(f"{block}.attn_sinks", _N_HEAD, std=0.5)
    yield matrix(f"{block}.attn_output", q, _N_EMBD, gain=1.5)
    if "attn_output" in layout.biases:
        yield vector(f"{block}.attn_output", _N_EMBD, std=BIAS_STD, suffix="bias")


def _recurrent(block: str, fused_ba: bool) -> Iterator[TensorSpec]:
    keys, values = _KEY_HEADS * _STATE, _VALUE_HEADS * _STATE
    yield matrix(f"{block}.attn_qkv", _N_EMBD, 2 * keys + values)
    yield matrix(f"{block}.attn_gate", _N_EMBD, values)
    yield matrix(f"{block}.ssm_conv1d", _KERNEL, 2 * keys + values, big=False)
    yield vector(f"{block}.ssm_dt", _VALUE_HEADS, std=0.5, suffix="bias")
    yield TensorSpec(f"{block}.ssm_a", (_VALUE_HEADS,), std=0.3, mean=-1.0)  # below zero: the state fades
    if fused_ba:
        yield matrix(f"{block}.ssm_ba", _N_EMBD, 2 * _VALUE_HEADS)
    else:
        yield matrix(f"{block}.ssm_beta", _N_EMBD, _VALUE_HEADS)
        yield matrix(f"{block}.ssm_alpha", _N_EMBD, _VALUE_HEADS)
    yield norm(f"{block}.ssm_norm", _STATE)
    yield matrix(f"{block}.ssm_out", values, _N_EMBD, gain=1.5)


def _feed_forward(layout: Layout, block: str, il: int) -> Iterator[TensorSpec]:
    if layout.moe_every and (il + 1) % layout.moe_every == 0:
        yield from moe_ffn(block, _N_EMBD, 64, _N_EXPERT, shared=layout.shared, biases="ffn" in layout.biases)
        if layout.shared_gate:
            yield vector(f"{block}.ffn_gate_inp_shexp", _N_EMBD, std=1 / math.sqrt(_N_EMBD))
    elif layout.ffn == "gated":
        yield from dense_ffn(block, _N_EMBD, layout.n_ff)
    else:
        yield matrix(f"{block}.ffn_up", _N_EMBD, layout.n_ff * (2 if layout.ffn == "fused" else 1))
        yield matrix(f"{block}.ffn_down", layout.n_ff, _N_EMBD, gain=1.5)
    for name, width in (("ffn_up", layout.n_ff), ("ffn_down", _N_EMBD)):
        if name in layout.biases:
            yield vector(f"{block}.{name}", width, std=BIAS_STD, suffix="bias")


def _block(architecture: str, layout: Layout, il: int) -> Iterator[TensorSpec]:
    block = f"blk.{il}"

    def before(name: str) -> Iterator[TensorSpec]:
        if name:
            yield norm(f"{block}.{name}", _N_EMBD)
        if name and layout.norm_bias:
            yield vector(f"{block}.{name}", _N_EMBD, std=BIAS_STD, suffix="bias")

    yield from before(layout.attn_norm)
    if layout.hybrid and (il + 1) % 4:
        yield from _recurrent(block, fused_ba=architecture == "qwen3next")
    else:
        yield from _attention(layout, block)
    if layout.post_norms:
        yield norm(f"{block}.post_attention_norm", _N_EMBD, mean=0.6)
    yield from before(layout.ffn_norm)
    yield from _feed_forward(layout, block, il)
    if layout.post_norms:
        yield norm(f"{block}.post_ffw_norm", _N_EMBD, mean=0.6)


def ordinary(architecture: str, n_layer: int, n_ctx: int) -> Blueprint:
    """The blueprint of an architecture of :data:`LAYOUTS`."""
    layout = LAYOUTS[architecture]
    vocab = chatml_vocabulary(layout.control)
    tensors = list(_ends(layout, len(vocab.tokens)))
    for il in range(n_layer):
        tensors.extend(_block(architecture, layout, il))

    keys = common_keys(n_layer, n_ctx, _N_EMBD, _N_HEAD, _N_HEAD_KV)
    keys |= {".feed_forward_length": layout.n_ff, ".rope.dimension_count": layout.head}
    if layout.head != _N_EMBD // _N_HEAD:
        keys |= {".attention.key_length": layout.head, ".attention.value_length": layout.head}
    if layout.layer_norm:
        keys[".attention.layer_norm_epsilon"] = keys.pop(".attention.layer_norm_rms_epsilon")
    if layout.moe_every:
        keys |= {".expert_count": _N_EXPERT, ".expert_used_count": layout.n_used, ".expert_feed_forward_length": 64}
    if layout.shared:
        keys[".expert_shared_feed_forward_length"] = 64
    keys |= layout.keys
    return Blueprint(
        architecture,
        n_layer,
        keys,
        tensors,
        vocab,
        pre_tokenizer=layout.pre_tokenizer,
        bos="<|endoftext|>",
        eos="<|im_end|>",
        add_bos=layout.add_bos,
        chat_template=layout.chat_template,
    )
