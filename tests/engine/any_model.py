"""A tiny random model of any architecture that libllama knows.

libllama itself says which tensors an architecture has: it is given the metadata and asks for every tensor's content. What it
asked for is written as a GGUF, which any test can load. The shapes below are as small as the architectures allow.

    python -m tests.engine.any_model ARCHITECTURE FILE
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np

N_LAYER = 4
N_VOCAB = 256

# Those that attend to a compressed state (MLA): the kernels know these head sizes only.
_LATENT = {
    "deepseek2",
    "deepseek2-ocr",
    "deepseek32",
    "glm-dsa",
    "dots3note",
    "kimi-linear",
    "bailingmoe3",
    "kimi-k3",
    "glm5-next",
    "hy_v4",
}
_LATENT |= {"mistral4", "plm", "minicpm3"}
# Layers that attend and layers that do not take turns: a layer of the latter has no heads.
_HYBRID = {
    "plamo2",
    "jamba",
    "granitehybrid",
    "lfm2",
    "lfm2moe",
    "kimi-linear",
    "bailingmoe3",
    "kimi-k3",
    "nemotron_h",
    "nemotron_h_moe",
}
# No experts where an architecture would take them: those of the same name without.
_DENSE = {
    "gemma4",
    "granitehybrid",
    "nemotron_h",
    "qwen2vl",
    "qwen3vl",
    "qwen35",
    "minicpm",
    "refact",
    "llama-embed",
    "jamba",
    "lfm2",
    "mamba",
}
_DENSE |= {"llama", "granite", "mistral3", "starcoder", "command-r", "bert"}


def metadata(arch: str) -> dict[str, Any]:
    """What a model file would say of itself: everything that some architecture asks for, at sizes that fit together."""
    n_embd, n_head, n_ff, n_layer = 128, 2, 192, N_LAYER
    if arch in _LATENT:
        n_head = 1
    n_layer = {"gemma4": 5, "gemma3n": 22, "hrm_text": 6}.get(arch, n_layer)
    if arch == "gemma3n":
        n_embd, n_head, n_ff = 64, 1, 96
    head = n_embd // n_head
    turns: list[int] = [0 if il % 2 else n_head for il in range(n_layer)]
    heads: Any = turns if arch in _HYBRID else n_head
    experts = 0 if arch in _DENSE else 2
    keys: dict[str, Any] = {
        "vocab_size": N_VOCAB,
        "context_length": 256,
        "embedding_length": n_embd,
        "features_length": n_embd,
        "block_count": n_layer,
        "leading_dense_block_count": 1,
        "feed_forward_length": [n_ff if il % 2 == 0 and il else 0 for il in range(n_layer)]
        if arch.startswith("nemotron_h")
        else n_ff,
        "use_parallel_residual": False,
        "logit_scale": 1.0,
        "time_mix_extra_dim": 32,
        "time_decay_extra_dim": 32,
        "full_attention_interval": 2,
        "attention.head_count": heads,
        "attention.head_count_kv": 1 if arch == "deepseek4" else heads,
        "attention.max_alibi_bias": 8.0,
        "attention.clamp_kqv": 1.0,
        "attention.layer_norm_epsilon": 1e-5,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.group_norm_epsilon": 1e-5,
        "attention.group_norm_groups": 8,
        "attention.q_lora_rank": 64,
        "attention.kv_lora_rank": 512 if arch in _LATENT else 64,
        "attention.decay_lora_rank": 16,
        "attention.iclr_lora_rank": 16,
        "attention.value_residual_mix_lora_rank": 16,
        "attention.gate_lora_rank": 16,
        "attention.relative_buckets_count": 8,
        "attention.sliding_window": 32,
        "attention.sliding_window_pattern": 2,
        "attention.indexer.head_count": 64,
        "attention.indexer.key_length": 128,
        "attention.indexer.top_k": 4096,
        "attention.indexer.block_size": 4,
        "attention.indexer.kpool": 4,
        "attention.indexer.kpool_select_tail": True,
        "attention.indexer.local_blocks": 1,
        "attention.shared_kv_layers": 0,
        "attention.output_group_count": 8,
        "attention.output_lora_rank": 32,
        "rope.dimension_sections": [8, 12, 12, 0] if arch == "bailingmoe3" else [head // 4] * 4,
        "rope.freq_base_swa": 10000.0,
        "rope.scaling.attn_factor": 1.0,
        "hyper_connection.count": 4,
        "hyper_connection.sinkhorn_iterations": 2,
        "hyper_connection.epsilon": 1e-6,
        "hyper_connection.magnitude": 2.0,
        "hyper_connection.low_rank": 8,
        "hash_layer_count": 0,
        "embedding_length_per_layer_input": n_embd // 2,
        "expert_feed_forward_length": n_ff,
        "expert_shared_feed_forward_length": n_ff,
        "expert_chunk_feed_forward_length": n_ff,
        "expert_latent_length": n_ff,
        "moe_latent_size": n_ff,
        "expert_count": experts,
        "expert_used_count": experts,
        "expert_shared_count": min(1, experts),
        "expert_gating_func": 4 if arch == "deepseek4" else 2,
        "expert_group_scale": 1.0,
        "expert_weights_scale": 1.0,
        "expert_weights_norm": True,
        "experts_per_group": 1,
        "interleave_moe_layer_step": 2,
        "moe_every_n_layers": 2,
        "ssm.inner_size": 2 * n_embd,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 128 if arch.startswith("qwen") else 16,
        "ssm.time_step_rank": n_head,
        "ssm.group_count": 0 if arch == "plamo2" else 2,
        "kda.head_dim": 128,
        "kda.safe_gate": True,
        "kda.gate_lower_bound": -5.0,
        "wkv.head_size": head,
        "token_shift_count": 1 if arch in ("arwkv7", "rwkv6qwen2") else 2,
        "shortconv.l_cache": 3,
        "residual_scale": 1.0,
        "embedding_scale": 1.0,
        "attention.scale": 0.1,
        "attn_res.block_size": 12,
        "activation.situ_beta": 4.0,
        "activation.situ_linear_beta": 25.0,
        "hrm.layers_per_stack": 1,
        "hrm.h_cycles": 2,
        "hrm.l_cycles": 2,
        "swiglu_clamp_exp": 7.0,
        "decoder_start_token_id": 0,
        "n_deepstack_layers": 0,
        "num_loops": 2,
    }
    if arch in _LATENT:
        keys |= {
            "attention.key_length": 512 if arch == "glm5-next" else 576,
            "attention.value_length": 512,
            "attention.key_length_mla": 192,
            "attention.value_length_mla": 128,
            "rope.dimension_count": 0 if arch == "glm5-next" else 64,
        }
    if arch in ("plm", "minicpm3"):
        keys |= {
            "attention.key_length": 96,
            "attention.value_length": 64,
            "rope.dimension_count": 32,
            "attention.kv_lora_rank": 64,
        }
    if arch == "glm5-next":
        keys |= {"attention.head_count": n_head, "attention.head_count_kv": turns}
    if arch == "gemma4":
        keys |= {
            "attention.key_length_swa": head,
            "attention.value_length_swa": head,
            "attention.sliding_window_pattern": [0, 1, 1, 1, 0],
        }
    if arch in ("cohere2moe", "mimo2", "step35", "spark2_5", "muse-glimmer", "dots3note", "maple", "granite_swa"):
        keys["attention.sliding_window_pattern"] = [il % 2 for il in range(n_layer)]
    if arch in ("dots3note", "hy_v4"):
        keys["attention.indexer.types"] = [1 - il % 2 for il in range(n_layer)]
    if arch == "dots3note":
        keys |= {
            f"attention.{key}_swa": number for key, number in (("kv_lora_rank", 512), ("key_length", 576), ("value_length", 512))
        }
        keys |= {"attention.key_length_mla_swa": 192, "attention.value_length_mla_swa": 128}
    if arch == "minimax-m3":
        keys |= {"attention.indexer.head_count": n_head, "rope.dimension_count": 64}
    if arch == "deepseek4":
        keys |= {"attention.key_length": 64, "attention.value_length": 64, "rope.dimension_count": 32}
        keys |= {"embedding_length": 512, "attention.head_count": 8, "attention.compress_ratios": [0, 0, 4, 128]}
        keys["attention.compress_rope_freq_base"] = 160000.0
    if arch in ("qwen3next", "qwen35", "qwen35moe", "qwen4exp"):
        keys |= {"ssm.inner_size": 256}
    result = {f"{arch}.{key}": value for key, value in keys.items()}
    for key, number in {"alpha_n": 1.0, "alpha_p": 1.0, "beta": 1.0, "eps": 1e-7}.items():
        result[f"xielu.{key}"] = number
    return result


def write(arch: str, path: Path, library: Any, seed: int = 0) -> Path:
    """Write a model of ``arch`` with ``library`` (the ``llama_cpp.llama_cpp`` module). Raises ValueError: it has none."""
    base = library._lib
    keys = metadata(arch)
    with tempfile.TemporaryDirectory() as scratch:
        head = Path(scratch) / "head.gguf"
        _write(head, arch, keys, {})
        made = _construct(base, library, head, seed)
    _write(path, arch, keys, made)
    return path


def _construct(base: Any, library: Any, head: Path, seed: int) -> dict[str, np.ndarray]:
    """The tensors that libllama asks for when it is given the metadata in ``head``."""

    class Options(ctypes.Structure):
        _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))

    class Tensor(ctypes.Structure):
        _fields_ = (("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4))

    ggml = ctypes.CDLL(None)
    for name in ("gguf_init_from_file", "ggml_get_name", "ggml_backend_tensor_set"):
        if not hasattr(ggml, name):  # not loaded for all: through the library that is linked to it
            ggml = base
    ggml.gguf_init_from_file.restype = ctypes.c_void_p
    ggml.gguf_init_from_file.argtypes = [ctypes.c_char_p, Options]
    ggml.ggml_get_name.restype = ctypes.c_char_p
    ggml.ggml_get_name.argtypes = [ctypes.c_void_p]
    ggml.ggml_backend_tensor_set.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    ggml.ggml_backend_tensor_set.restype = None
    made: dict[str, np.ndarray] = {}

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
    def fill(tensor: int, _: int) -> None:
        at = Tensor.from_address(tensor)
        name = ggml.ggml_get_name(tensor).decode()
        shape = [int(n) for n in at.ne]
        while len(shape) > 1 and shape[-1] == 1:
            shape.pop()
        values = _values(name, shape, seed).astype({0: np.float32, 1: np.float16, 26: np.int32}[at.type])
        made[name] = values
        ggml.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)

    context = ggml.gguf_init_from_file(str(head).encode(), Options(True, None))
    params = library.llama_model_default_params()
    params.n_gpu_layers = 0
    make = base.llama_model_init_from_user
    make.restype = ctypes.c_void_p
    make.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, type(params)]
    model = make(context, ctypes.cast(fill, ctypes.c_void_p), None, params)
    if not model:
        raise ValueError("llama.cpp made no model of it")
    base.llama_model_free.argtypes = [ctypes.c_void_p]
    base.llama_model_free(model)
    return made


def _values(name: str, shape: list[int], seed: int) -> np.ndarray:
    """Weights for which states keep their size from layer to layer; shape in ggml's order."""
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    normal = random.standard_normal(tuple(reversed(shape))).astype(np.float32)
    if "ssm_a" in name or "ssm_dt" in name:  # a state has to decay
        return -np.abs(normal) - 0.1 if "ssm_a" in name else normal
    if "norm" in name and name.endswith(".weight"):
        return 1 + 0.1 * normal
    if len(shape) == 1:
        return 0.1 * normal
    return normal / np.float32(np.sqrt(shape[0])) if "embd" not in name else normal


def _write(path: Path, arch: str, keys: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    writer = gguf.GGUFWriter(str(path), arch)
    for key, value in keys.items():
        first = value[0] if isinstance(value, list) else value
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(first, bool):
            writer.add_bool(key, value)
        elif isinstance(first, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    writer.add_string("tokenizer.ggml.model", "none")
    writer.add_token_list([f"t{i}" for i in range(N_VOCAB)])  # of the model's identity; llama.cpp does not read it
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    from steer_plugins.runtime import activate, ensure_runtime

    module = activate(ensure_runtime())
    print(write(sys.argv[1], Path(sys.argv[2]), module.llama_cpp))
