"""Every layout of published autoencoders, written small by hand, gives the code that its family computes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from steer_plugins.concepts.published import read_published
from steer_plugins.errors import VectorError
from tests.unit.fileformat_samples import pt, tensor, text

D, N = 6, 16
RNG = np.random.default_rng(3)
W_ENC = RNG.standard_normal((D, N)).astype(np.float32)
W_DEC = RNG.standard_normal((N, D)).astype(np.float32)
B_ENC = RNG.standard_normal(N).astype(np.float32)
B_DEC = RNG.standard_normal(D).astype(np.float32)
THRESHOLD = np.abs(RNG.standard_normal(N)).astype(np.float32)
ROWS = RNG.standard_normal((40, D)).astype(np.float32) * 2

LINEAR = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T, "decoder.bias": B_DEC}


def safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)


def torch_file(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """What torch.save writes of a dictionary of tensors."""
    program = b"}("
    storages = {}
    for i, (name, value) in enumerate(tensors.items()):
        program += text(name) + tensor(value.shape, key=str(i))
        storages[str(i)] = np.ascontiguousarray(value, "<f4").tobytes()
    path.write_bytes(pt(program + b"u", storages))


def jump(z: np.ndarray, threshold: Any) -> np.ndarray:
    return np.where(z > threshold, z, 0.0)


def topk(z: np.ndarray, k: int) -> np.ndarray:
    cut = np.sort(z, axis=1)[:, -k][:, None]
    return np.where(z >= cut, np.maximum(z, 0), 0.0)


def gemma_scope(folder: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    path = folder / "layer_4" / "width_16k"
    path.mkdir(parents=True)
    np.savez(path / "params.npz", W_enc=W_ENC, W_dec=W_DEC, b_enc=B_ENC, b_dec=B_DEC, threshold=THRESHOLD)
    return path, jump(ROWS @ W_ENC + B_ENC, THRESHOLD), W_DEC


def gemma_scope_2(folder: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    path = folder / "any"
    names = {"w_enc": W_ENC, "w_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": THRESHOLD}
    safetensors(path / "params.safetensors", names)
    (path / "config.json").write_text(json.dumps({"architecture": "jump_relu", "hf_hook_point_in": "model.layers.4.output"}))
    return path / "params.safetensors", jump(ROWS @ W_ENC + B_ENC, THRESHOLD), W_DEC


def llama_scope(folder: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    safetensors(folder / "checkpoints" / "final.safetensors", LINEAR)
    config = {
        "d_model": D,
        "d_sae": N,
        "hook_point_in": "blocks.4.hook_resid_post",
        "jump_relu_threshold": 0.3,
        "dataset_average_activation_norm": {"in": 9.0},
    }
    (folder / "hyperparams.json").write_text(json.dumps(config))
    s = math.sqrt(D) / 9.0
    return folder, jump(s * ROWS @ W_ENC + B_ENC, 0.3 * s), W_DEC / s


def llama_scope_distill(folder: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    safetensors(folder / "sae_weights.safetensors", {**LINEAR, "log_jumprelu_threshold": np.log(THRESHOLD)})
    norms = {"in": 9.0}
    config = {"d_model": D, "hook_point_in": "blocks.4.hook_resid_post", "dataset_average_activation_norm": norms}
    (folder / "config.json").write_text(json.dumps(config))
    s = math.sqrt(D) / 9.0
    return folder, jump(s * ROWS @ W_ENC + B_ENC, THRESHOLD), W_DEC / s


def qwen_scope(folder: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    path = folder / "SAE-Res-Qwen3-1.7B-W16K-L0_3"
    path.mkdir()
    torch_file(path / "layer4.sae.pt", {"W_enc": W_ENC.T, "W_dec": W_DEC.T, "b_enc": B_ENC, "b_dec": B_DEC})
    return path / "layer4.sae.pt", topk(ROWS @ W_ENC + B_ENC, 3), W_DEC


def goodfire(folder: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    named = {key.replace(".", "_linear."): value for key, value in LINEAR.items()}
    torch_file(folder / "Llama-3.1-8B-Instruct-SAE-l4.pth", named)
    return folder / "Llama-3.1-8B-Instruct-SAE-l4.pth", jump(ROWS @ W_ENC + B_ENC, 0.0), W_DEC


def qresearch(folder: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    torch_file(folder / "DeepSeek-R1-Distill-Llama-8B-SAE-l4.pt", LINEAR)
    return folder / "DeepSeek-R1-Distill-Llama-8B-SAE-l4.pt", jump(ROWS @ W_ENC + B_ENC, 0.0), W_DEC


def sparsify(folder: Path, normalised: bool = False) -> tuple[Path, np.ndarray, np.ndarray]:
    path = folder / "layers.4"
    safetensors(path / "sae.safetensors", {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC})
    (path / "cfg.json").write_text(json.dumps({"d_in": D, "num_latents": N, "k": 3, "normalize_decoder": normalised}))
    read = ROWS if normalised else ROWS - B_DEC
    return path, topk(read @ W_ENC + B_ENC, 3), W_DEC


def sparsify_normalised(folder: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    return sparsify(folder, True)


def dictionary_topk(folder: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    named = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T, "b_dec": B_DEC}
    torch_file(folder / "ae.pt", named)
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoderTopK", "k": 3, "layer": 4}}))
    return folder, topk((ROWS - B_DEC) @ W_ENC + B_ENC, 3), W_DEC


def dictionary_batchtopk(folder: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    named = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T, "b_dec": B_DEC}
    torch_file(folder / "ae.pt", {**named, "threshold": np.array([0.4], np.float32)})
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "BatchTopKSAE", "k": 3, "layer": 4}}))
    return folder / "ae.pt", jump((ROWS - B_DEC) @ W_ENC + B_ENC, 0.4), W_DEC


def dictionary_relu(folder: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    named = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T, "bias": B_DEC}
    torch_file(folder / "ae.pt", named)
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder", "layer": 4}}))
    return folder, jump((ROWS - B_DEC) @ W_ENC + B_ENC, 0.0), W_DEC


LAYOUTS: list[Callable[[Path], tuple[Path, np.ndarray, np.ndarray]]] = [
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    llama_scope_distill,
    qwen_scope,
    goodfire,
    qresearch,
    sparsify,
    sparsify_normalised,
    dictionary_topk,
    dictionary_batchtopk,
    dictionary_relu,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_a_layout_is_computed_as_its_family_does(
    tmp_path: Path, layout: Callable[..., tuple[Path, np.ndarray, np.ndarray]]
) -> None:
    path, activations, decoder = layout(tmp_path)
    code = read_published(path)
    assert (code.layer, code.site) == (4, "resid_post")
    assert np.allclose(code.encode(ROWS), activations, atol=1e-4)
    assert (activations > 0).any()
    assert np.allclose(code.w_dec, decoder, atol=1e-5)
    with pytest.raises(VectorError):
        read_published(path, layer=5) if layout not in (gemma_scope, goodfire, qresearch, qwen_scope) else read_published(
            tmp_path / "x"
        )


def test_facts_that_a_file_lacks_are_asked_for(tmp_path: Path) -> None:
    names = {"W_enc": W_ENC.T, "W_dec": W_DEC.T, "b_enc": B_ENC, "b_dec": B_DEC}
    torch_file(tmp_path / "sae.pt", names)
    with pytest.raises(VectorError, match="--layer"):
        read_published(tmp_path / "sae.pt", k=2)
    with pytest.raises(VectorError, match="--k"):
        read_published(tmp_path / "sae.pt", layer=4)
    code = read_published(tmp_path / "sae.pt", layer=4, k=2)
    assert code.layer == 4 and np.allclose(code.encode(ROWS), topk(ROWS @ W_ENC + B_ENC, 2), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"affine_skip_connection": W_DEC}, "transcoder"),
        ({"w_enc": W_ENC * np.nan}, "not finite"),
        ({"w_enc": W_ENC[:, :5]}, "turned round"),
        ({"threshold": THRESHOLD[:3]}, "3 numbers"),
        ({"b_dec": None}, "lack b_dec"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    tensors = {"w_enc": W_ENC, "w_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": THRESHOLD, **change}
    safetensors(tmp_path / "params.safetensors", {k: v for k, v in tensors.items() if v is not None})
    with pytest.raises(VectorError, match=says):
        read_published(tmp_path, layer=4)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"{" * 1000])
@pytest.mark.parametrize("name", ["params.npz", "params.safetensors", "ae.pt", "l4.pt", "hyperparams.json", "sae.safetensors"])
def test_hostile_files_get_a_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    for extra in ("config.json", "cfg.json"):
        (tmp_path / extra).write_text('{"trainer": {"dict_class": "AutoEncoder"}, "k": 3}')
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(VectorError) as caught:
            read_published(path)
        assert "\n" not in str(caught.value)
