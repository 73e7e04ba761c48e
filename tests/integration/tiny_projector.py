"""A tiny random projector (llava's: CLIP and a two-layer perceptron) and a picture, for tests of images."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import gguf
import numpy as np

WIDTH, HIDDEN, LAYERS, PATCH = 32, 64, 2, 14


def write_projector(path: Path, n_embd: int) -> Path:
    """Write the GGUF; ``n_embd``: the width of the language model."""
    writer = gguf.GGUFWriter(str(path), "clip")
    writer.add_string("general.type", "mmproj")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", True)
    sizes = {"image_size": 2 * PATCH, "patch_size": PATCH, "embedding_length": WIDTH, "feed_forward_length": HIDDEN}
    for key, value in {**sizes, "projection_dim": n_embd, "block_count": LAYERS, "attention.head_count": 2}.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    for key in ("image_mean", "image_std"):
        writer.add_array(f"clip.vision.{key}", [0.5] * 3)
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "v.class_embd": (WIDTH,),
        "v.patch_embd.weight": (WIDTH, 3, PATCH, PATCH),
        "v.position_embd.weight": (5, WIDTH),
        **_linear("mm.0", n_embd, WIDTH),
        **_linear("mm.2", n_embd, n_embd),
        **_norm("v.pre_ln"),
        **_norm("v.post_ln"),
    }
    for number in range(LAYERS):
        block = f"v.blk.{number}."
        shapes |= {**_norm(block + "ln1"), **_norm(block + "ln2")}
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            shapes |= _linear(block + name, WIDTH, WIDTH)
        shapes |= {**_linear(block + "ffn_up", HIDDEN, WIDTH), **_linear(block + "ffn_down", WIDTH, HIDDEN)}
    for name, shape in shapes.items():
        writer.add_tensor(name, (random.normal(size=shape) * 0.1).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}


def png(shade: int, size: int = 2 * PATCH) -> bytes:
    """A picture of one grey, 0 to 255."""
    rows = (b"\0" + bytes([shade] * size)) * size

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
