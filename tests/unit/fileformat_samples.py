"""A small valid file of every format, written byte by byte or by the format's own writer, and how it is read."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from steer_plugins.store.formats import Facts

N = 8
ROWS = np.random.default_rng(5).normal(size=(3, N)).astype(np.float32)
UNIT = (ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True)).astype(np.float32)


# ---- GGUF, by hand: the writer under test must not be the only thing its reader understands ----


def gguf(tensors: list[tuple[str, np.ndarray]], values: dict[str, object], *, dims: object = None, kind: int = 0) -> bytes:
    def text(s: str) -> bytes:
        return struct.pack("<Q", len(s.encode())) + s.encode()

    def value(v: object) -> bytes:
        if isinstance(v, str):
            return struct.pack("<I", 8) + text(v)
        if isinstance(v, bool):
            return struct.pack("<I?", 7, v)
        return struct.pack("<Ii", 5, v) if isinstance(v, int) else struct.pack("<If", 6, v)

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    head += b"".join(text(k) + value(v) for k, v in values.items())
    offset = 0
    for name, array in tensors:
        shape = array.shape[::-1] if dims is None else dims
        head += text(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in shape)  # type: ignore[arg-type]
        head += struct.pack("<IQ", kind, offset)
        offset += -(-array.nbytes // 32) * 32
    body = b"".join(a.tobytes() + b"\0" * (-a.nbytes % 32) for _, a in tensors)
    return head + b"\0" * (-len(head) % 32) + body


CONTROL = {"general.architecture": "controlvector", "controlvector.model_hint": "llama", "controlvector.layer_count": 3}
GLP = {**CONTROL, "glp.spec_version": 1, "glp.mode": "project", "glp.hook_point": "ffn_out_pre_residual", "glp.rank": 1}


def directions(rows: np.ndarray, first: int = 1) -> list[tuple[str, np.ndarray]]:
    return [(f"direction.{il}", row) for il, row in enumerate(rows, first)]


# ---- torch.save's layout, by hand ----


def text(s: str) -> bytes:
    return b"X" + struct.pack("<I", len(s.encode())) + s.encode()


def integer(n: int) -> bytes:
    return b"J" + struct.pack("<i", n)


def tensor(
    shape: tuple[int, ...],
    *,
    storage: str = "FloatStorage",
    key: str = "0",
    n: int | None = None,
    offset: int = 0,
    stride: object = None,
) -> bytes:
    """The opcodes torch.save writes for one tensor."""
    steps = [int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))] if stride is None else stride
    items = int(np.prod(shape)) if n is None else n

    def numbers(values: object) -> bytes:
        return b"(" + b"".join(integer(v) for v in values) + b"t"  # type: ignore[attr-defined]

    described = b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + text(key) + text("cpu") + integer(items) + b"tQ"
    arguments = described + integer(offset) + numbers(shape) + numbers(steps) + b"\x89" + b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def pt(program: bytes, storages: dict[str, bytes], **more: bytes) -> bytes:
    members = {"v/data.pkl": b"\x80\x02" + program + b".", "v/byteorder": b"little"}
    members |= {f"v/data/{key}": data for key, data in storages.items()}
    return archive({**members, **{f"v/{k}": v for k, v in more.items()}})


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file:
        for name, data in members.items():
            file.writestr(zipfile.ZipInfo(name), data, compression)
    return out.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)  # type: ignore[arg-type]
    return out.getvalue()


def safetensors(arrays: dict[str, np.ndarray]) -> bytes:
    from safetensors.numpy import save

    return save(arrays)


SAE = {"W_enc": ROWS.T.copy(), "W_dec": ROWS, "b_dec": np.zeros(N, np.float32), "b_enc": np.zeros(3, np.float32)}
SAE_CONFIG = {"architecture": "jumprelu", "d_in": N, "d_sae": 3, "metadata": {"hook_name": "blocks.4.hook_resid_post"}}
NEURONPEDIA = {"modelId": "m", "layerNumber": 5, "hookType": "hook_resid_pre", "vector": ROWS[1].tolist(), "vectorLabel": "Cats!"}
DS4 = {"format": "ds4-directional-steering-v1", "shape": [3, N], "component": "ffn_out", "thinking": False}
DS41 = struct.pack("<8s6IQ32s", b"DS41DIR\0", 1, 3, N, 1, 1, 0, 0b111, bytes(range(32)))
SVEC = {"model_type": "llama", "directions": {"0": ROWS[0].tolist(), "7": ROWS[1].tolist()}, "explained_variances": {"0": 0.5}}

#: format -> (file name, its bytes, files beside it, what the user has to say)
SAMPLES: dict[str, tuple[str, bytes, dict[str, bytes], Facts]] = {
    "gguf-control-vector": ("v.gguf", gguf(directions(ROWS), CONTROL), {}, Facts()),
    "glp": ("v.gguf", gguf(directions(UNIT), GLP), {}, Facts()),
    "ds4": ("v.f32", UNIT.tobytes(), {"v.json": json.dumps(DS4).encode()}, Facts()),
    "ds41dir": ("v.ds41dir", DS41 + UNIT.tobytes(), {}, Facts(site="ffn_out")),
    "svec": ("v.svec", json.dumps(SVEC).encode(), {}, Facts()),
    "npz": ("v.npz", npz(**{"direction.0": ROWS[0], "direction.7": ROWS[1]}), {}, Facts()),
    "torch": ("v.pt", pt(tensor((3, N)), {"0": ROWS.tobytes()}), {}, Facts(at="blocks")),
    "saelens": ("sae_weights.safetensors", safetensors(SAE), {"cfg.json": json.dumps(SAE_CONFIG).encode()}, Facts(feature=1)),
    "gemma-scope": ("params.npz", npz(**SAE), {}, Facts(feature=1, at=(20,))),
    "neuronpedia": ("v.json", json.dumps(NEURONPEDIA).encode(), {}, Facts()),
}


def put(folder: Path, name: str, data: bytes | None = None) -> tuple[Path, Facts]:
    """Write the sample of a format, or ``data`` in its place; its path and facts."""
    file, sample, beside, facts = SAMPLES[name]
    for other, content in beside.items():
        (folder / other).write_bytes(content)
    path = folder / file
    path.write_bytes(sample if data is None else data)
    return path, facts


Change = Callable[[bytes], bytes]
