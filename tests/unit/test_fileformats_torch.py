"""Reading what torch.save writes: the same numbers as torch would give, and nothing of what a pickle could do."""

from __future__ import annotations

import collections
import os
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer_plugins.errors import VectorError
from steer_plugins.store.foreign import torchfile
from steer_plugins.store.formats import NO_FACTS, Facts, read_any
from tests.unit.fileformat_samples import ROWS, N, archive, integer, pt, tensor, text

BLOCKS = Facts(at="blocks")


def put(folder: Path, program: bytes, storages: dict[str, bytes] | None = None, **more: bytes) -> Path:
    path = folder / "v.pt"
    path.write_bytes(pt(program, {"0": ROWS.tobytes()} if storages is None else storages, **more))
    return path


def refused(path: Path, match: str, facts: Facts = BLOCKS) -> None:
    with pytest.raises(VectorError, match=match) as caught:
        read_any(path, facts)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


# ---- tensors ----

DTYPES = {
    "FloatStorage": ("<f4", 0),
    "DoubleStorage": ("<f8", 0),
    "HalfStorage": ("<f2", 1e-3),
    "BFloat16Storage": ("bf16", 1e-2),
    "LongStorage": ("<i8", 0),
    "IntStorage": ("<i4", 0),
}


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("storage", DTYPES)
def test_dtypes_and_byte_orders(tmp_path: Path, storage: str, order: str) -> None:
    code, rtol = DTYPES[storage]
    rows = np.round(ROWS * 100) if "i" in code else ROWS
    stored = (rows.view(np.uint32) >> 16).astype("<u2") if code == "bf16" else rows.astype(code)
    data = (stored.byteswap() if order == "big" else stored).tobytes()
    vector = read_any(put(tmp_path, tensor((3, N), storage=storage), {"0": data}, byteorder=order.encode()), BLOCKS)
    for il in range(3):
        np.testing.assert_allclose(vector.effective(il, "resid_post"), rows[il], rtol=rtol + 1e-5, atol=1e-6)


def test_views_of_a_storage(tmp_path: Path) -> None:
    """Offsets, transposes, and one storage for several tensors."""
    transposed = tensor((N, 3), n=3 * N, stride=(1, N))
    vector = read_any(put(tmp_path, transposed), Facts(at="blocks"))
    np.testing.assert_allclose(vector.effective(2, "resid_post"), ROWS.T[2], atol=1e-6)
    last = tensor((N,), n=3 * N, offset=2 * N)
    vector = read_any(put(tmp_path, last), Facts(at=(9,)))
    np.testing.assert_allclose(vector.effective(9, "resid_post"), ROWS[2], atol=1e-6)
    both = b"}(" + b"".join(integer(il) + tensor((N,), n=3 * N, offset=il * N) for il in (0, 2)) + b"u"
    vector = read_any(put(tmp_path, both))
    assert vector.layers == [0, 2]
    np.testing.assert_allclose(vector.effective(2, "resid_post"), ROWS[2], atol=1e-6)


@pytest.mark.parametrize("key", ["5", "layer_5", "layers.5", 5])
def test_dictionaries_by_layer(tmp_path: Path, key: Any) -> None:
    name = integer(key) if isinstance(key, int) else text(key)
    row = b"ctorch._utils\n_rebuild_parameter\n(" + tensor((1, N)) + b"\x89Nt" + b"R"
    vector = read_any(put(tmp_path, b"}(" + name + row + b"u", {"0": ROWS[0].tobytes()}))
    assert vector.layers == [5]
    nested = b"}(" + text("directions") + b"}(" + name + row + b"u" + text("other") + integer(1) + b"u"
    assert read_any(put(tmp_path, nested, {"0": ROWS[0].tobytes()})).layers == [5]


def test_lists_of_tensors_are_rows(tmp_path: Path) -> None:
    items = b"](" + b"".join(tensor((N,), n=3 * N, offset=il * N) for il in range(3)) + b"e"
    refused(put(tmp_path, items), "3 rows and does not say", NO_FACTS)
    assert read_any(tmp_path / "v.pt", Facts(at="embedding")).layers == [0, 1]
    refused(put(tmp_path, b"](" + tensor((3, N)) + b"e"), r"not all \[n_embd\]")


def test_one_tensor_of_several(tmp_path: Path) -> None:
    two = b"}(" + text("a") + tensor((3, N)) + text("b") + tensor((3, N)) + b"u"
    refused(put(tmp_path, two), "tensors 'a' and 'b': choose one with steer convert --key")
    assert read_any(tmp_path / "v.pt", Facts(at="blocks", key="b")).layers == [0, 1, 2]
    with_notes = b"}(" + text("note") + text("hi") + text("f") + b"G\x7f\xf0" + b"\0" * 6 + text("a") + tensor((3, N)) + b"u"
    vector = read_any(put(tmp_path, with_notes), BLOCKS)
    assert vector.provenance and vector.provenance["entries"] == {"note": "hi"}


def test_the_opcodes_are_those_of_real_pickles(tmp_path: Path) -> None:
    """What pickle's own writer makes of stand-ins for torch's objects, in every protocol that it has for them."""
    for protocol in (2, 3, 4, 5):
        path = tmp_path / "v.pt"
        program = _pickled({"layer": 3, "bias": _FakeTensor(), "x": (1, 2.5, None, True, "é", {}, [])}, protocol)
        assert not protocol > 3 or b"\x93" in program  # STACK_GLOBAL
        path.write_bytes(archive({"v/data.pkl": program, "v/data/0": ROWS[0].tobytes()}))
        assert read_any(path).layers == [3]


class _FakeStorage:
    pass


class _FakeTensor:
    def __reduce__(self) -> Any:
        return _rebuild_tensor_v2, (_FakeStorage(), 0, (N,), (1,), False, collections.OrderedDict())


def _rebuild_tensor_v2() -> None: ...


class FloatStorage: ...


def _pickled(content: Any, protocol: int) -> bytes:
    import io
    import sys
    import types

    fakes = {"torch": types.ModuleType("torch"), "torch._utils": types.ModuleType("torch._utils")}
    fakes["torch"].FloatStorage = FloatStorage  # type: ignore[attr-defined]
    fakes["torch._utils"]._rebuild_tensor_v2 = _rebuild_tensor_v2  # type: ignore[attr-defined]

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", FloatStorage, "0", "cpu", N) if isinstance(obj, _FakeStorage) else None

    out = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        for name, module in fakes.items():
            patch.setitem(sys.modules, name, module)
        patch.setattr(FloatStorage, "__module__", "torch")
        patch.setattr(_rebuild_tensor_v2, "__module__", "torch._utils")
        Pickler(out, protocol).dump(content)
    return out.getvalue()


# ---- what a pickle could do ----


class _Bomb:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_no_pickle_runs(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "ran"
    bombs = [_Bomb(os.mkdir, str(marker)), _Bomb(eval, f"open({str(marker)!r}, 'w')"), _Bomb(os.system, f"touch {marker}")]
    for bomb in bombs:
        for content in (bomb, {"a": bomb}, [bomb], (1, bomb)):
            program = pickle.dumps(content, protocol)
            for name, data in (("v.pt", archive({"v/data.pkl": program})), ("v.pth", program)):
                (tmp_path / name).write_bytes(data)
                if protocol < 2 and name == "v.pth":
                    refused(tmp_path / name, "none of the formats")  # no pickle begins like that for certain
                else:
                    refused(tmp_path / name, "mentions|opcode|plain pickle|damaged")
            assert not marker.exists()
    pickle.loads(pickle.dumps(bombs[0]))  # it would have
    assert marker.exists()


@pytest.mark.parametrize(
    ("program", "match"),
    [
        (b"cos\nsystem\n" + text("true") + b"\x85R", "mentions 'os.system'"),
        (b"ctorch\nload\n" + text("x") + b"\x85R", "mentions 'torch.load'"),
        (b"cbuiltins\neval\n.", "mentions 'builtins.eval'"),
        (text("os") + text("system") + b"\x93", "mentions 'os.system'"),
        (b"(" + text("true") + b"ios\nsystem\n", "opcode INST"),
        (b"(cos\nsystem\n" + text("true") + b"o", "mentions"),
        (b"ccollections\nOrderedDict\n)\x81", "opcode NEWOBJ"),
        (b"\x82\x01", "opcode EXT1"),
        (b"P0\n", "opcode PERSID"),
        (b"I01\n", "opcode INT"),
        (tensor((3, N)) + b"}b", "damaged"),
        (tensor((3, N)) + b"0" + tensor((3, N)), "opcode POP"),
        (b"ctorch\nFloatStorage\n)R", "damaged"),
        (b"ccollections\nOrderedDict\n" + integer(1) + b"\x85R", "damaged"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R", "damaged"),
        (b"ctorch._utils\n_rebuild_parameter\n)R", "damaged"),
        (b"ccollections\nOrderedDict\n", "no tensor"),
        (text("hello"), "no tensor"),
        (b"]", "no tensor"),
        (b"}", "holds no tensors"),
        (b"", "damaged"),
        (b"((((", "damaged"),
        (b"t", "damaged"),
        (b"}(" + text("a") + b"u", "damaged"),
        (b"](" + text("a") + text("b") + b"u", "damaged"),
        (b"}(" + b"(t" + text("a") + b"u", "neither texts nor whole numbers"),
        (b"}(" + text("1") + tensor((N,)) + text("1") + tensor((N,)) + b"u", "'1' twice"),
        (b"}(" + text("1") + tensor((N,), n=24) + text("layer_1") + tensor((N,), n=24) + b"u", "two tensors for layer 1"),
        (b"}(" + text("1") + tensor((3, N)) + b"u", r"shape \[3, 8\]"),
        (b"h\x07", "damaged"),
        (b"\x8a\xff" + b"\x7f" * 255 + b"0", "opcode POP"),
        (tensor((3, N), key="../../etc/passwd"), "damaged"),
        (tensor((3, N), key="7"), "lacks 'v/data/7'"),
        (tensor((3, N), n=25), "96 bytes, not those of 25 numbers"),
        (tensor((3, N), n=-24), "not a whole number"),
        (tensor((4, N), n=24), "does not lie within its storage"),
        (tensor((3, N), offset=1), "does not lie within its storage"),
        (tensor((3, N), offset=-1), "not a whole number"),
        (tensor((1 << 30, 1 << 30), n=24, stride=(0, 0)), "does not lie within its storage"),
        (tensor((0, N), n=24), "does not lie within its storage"),
        (tensor((1, 1, 1, 1, 24), n=24), "5 dimensions"),
        (tensor((1, 3, N)), r"shape \[1, 3, 8\]"),
        (tensor((), n=24), r"shape \[\]"),
        (tensor((3, N), storage="BoolStorage"), "mentions 'torch.BoolStorage'"),
        (tensor((3, N), stride=(8,)), "damaged"),
    ],
)
def test_programs_that_describe_no_vector(tmp_path: Path, program: bytes, match: str) -> None:
    refused(put(tmp_path, program), match)


def test_tensors_that_share_a_storage_have_a_bound_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = b"}(" + b"".join(integer(il) + tensor((N,), n=3 * N) for il in range(40)) + b"u"
    assert len(read_any(put(tmp_path, many)).layers) == 40
    monkeypatch.setattr(torchfile, "MAX_BYTES", 8 * (40 * N - 1))
    refused(put(tmp_path, many), "too large")


def test_a_program_has_a_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(put(tmp_path, b"N" * (1 << 20)), "too large")
    monkeypatch.setattr(torchfile, "_MAX_STEPS", 100)
    refused(put(tmp_path, b"](" + b"N" * 100 + b"e"), "too long")


def test_structures_without_end(tmp_path: Path) -> None:
    """A list in itself, and tuples of tuples that would unfold to 2**60 values."""
    refused(put(tmp_path, b"]q\x00h\x00a"), "no tensor")
    doubling = b"N" + b"".join(bytes([ord("q"), i, ord("h"), i, 0x86]) for i in range(60))
    refused(put(tmp_path, doubling), "no tensor")


def test_other_archives(tmp_path: Path) -> None:
    path = tmp_path / "v.pt"
    path.write_bytes(archive({"a/data.pkl": b"\x80\x02}.", "b/data.pkl": b"\x80\x02}."}))
    refused(path, "one data.pkl")
    path.write_bytes(pt(tensor((3, N)), {"0": ROWS.tobytes()}, byteorder=b"middle"))
    refused(path, "byte order")


OPCODES = [
    *(op.code.encode("latin1") for op in pickletools.opcodes if op.arg is None),
    *(bytes([code, n]) for code in (ord("q"), ord("h"), ord("K")) for n in (0, 1, 3)),
    text("storage"),
    text("0"),
    integer(24),
    integer(-1),
    b"ctorch\nFloatStorage\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n",
    b"cos\nsystem\n",
    tensor((3, N)),
    tensor((N,), n=24),
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(OPCODES), max_size=30).map(b"".join) | st.binary(max_size=60))
def test_any_program_is_read_or_refused(tmp_path: Path, program: bytes) -> None:
    try:
        assert read_any(put(tmp_path, program), BLOCKS).n_embd in (N, 3, 1)
    except VectorError as error:
        assert "\n" not in str(error)


# ---- real files ----


def test_real_files() -> None:
    """The direction files of the PyPI wheel hidden-directions (MIT), unpacked or installed where STEER_HIDDEN_DIRECTIONS says."""
    folder = os.environ.get("STEER_HIDDEN_DIRECTIONS")
    if not folder:
        pytest.skip("STEER_HIDDEN_DIRECTIONS names no folder with the files of hidden-directions 0.1.6")
    paths = sorted(Path(folder).rglob("*.pt"))
    assert len(paths) == 41
    for path in paths:
        single = path.name == "advocate_bias.pt"
        vector = read_any(path, NO_FACTS if single else BLOCKS)
        assert vector.n_embd == 3584 and vector.layers == ([17] if single else list(range(28)))
        with zipfile.ZipFile(path) as file:
            (name,) = [name for name in file.namelist() if name.endswith("/data/0")]
            raw = np.frombuffer(file.read(name), "<u2").astype(np.uint32) << 16
        rows = raw.view(np.float32).reshape(-1, 3584)
        for layer, row in zip(vector.layers, rows, strict=True):
            np.testing.assert_allclose(vector.effective(layer, "resid_post"), row, atol=1e-5 * float(np.abs(row).max()))
