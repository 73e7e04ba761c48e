"""Bad arguments: a negative code, one sentence that names the offender, and nothing has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_double, c_float, c_int32
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_plugins import native
from steer_plugins.errors import EngineError, ModelError
from steer_plugins.native import binding
from steer_plugins.runtime.patching import load_patch
from tests.engine import harness as H
from tests.engine.harness import ADD, ALL, ATTN, CLAMP, FFN, MEAN, PROJECT, RESID, NativeTerm, Raw

MakeRaw = Callable[..., Raw]
ARG, ARCH, MEMORY, LIMIT = -1, -2, -3, -4
BIG = 1 << 40


def vector_set(
    r: Raw,
    vector: int = 0,
    *,
    layers: Sequence[int] | None = (1,),
    sites: Sequence[int] | None = (RESID,),
    dirs: np.ndarray | None | str = "unit",
    scales: Sequence[float] | None = (1.0,),
    n: int | None = None,
) -> int:
    """llama_steer_vector_set with any argument spoiled; None is NULL."""
    n = n if n is not None else len(layers or (0,))
    if isinstance(dirs, str):
        dirs = H.directions(max(n, 1), r.n_embd)
    pointer = dirs.astype(np.float32).ctypes.data_as(POINTER(c_float)) if dirs is not None else None
    return int(
        r.library.llama_steer_vector_set(
            r.handle,
            vector,
            n,
            (c_int32 * len(layers))(*layers) if layers is not None else None,
            (c_int32 * len(sites))(*sites) if sites is not None else None,
            pointer,
            (c_double * len(scales))(*scales) if scales is not None else None,
        )
    )


def config_set(r: Raw, config: int, *terms: NativeTerm, n: int | None = None, null: bool = False) -> int:
    array = (binding._Term * max(1, len(terms)))()
    for slot, t in zip(array, terms, strict=False):
        slot.vector, slot.op, slot.strength = t.vector, t.op, t.strength
        slot.il_first, slot.il_last, slot.stream = t.il_first, t.il_last, t.stream
    return int(r.library.llama_steer_config_set(r.handle, config, len(terms) if n is None else n, None if null else array))


def capture_set(
    r: Raw, layers: Sequence[int] | None, sites: Sequence[int] | None, stream: int = MEAN, rows: int = 0, n: int | None = None
) -> int:
    return int(
        r.library.llama_steer_capture_set(
            r.handle,
            n if n is not None else len(layers or ()),
            (c_int32 * len(layers))(*layers) if layers is not None else None,
            (c_int32 * len(sites))(*sites) if sites is not None else None,
            stream,
            rows,
            True,
        )
    )


def capture_get(r: Raw, layer: int, out: Any, room: int) -> int:
    return int(r.library.llama_steer_capture_get(r.handle, layer, RESID, out, room))


def unit(r: Raw, at: int, value: float) -> np.ndarray:
    v = H.directions(1, r.n_embd)
    v[0, at] = value
    return v


# name, architecture, call, code, part of the sentence
CASES: list[tuple[str, str, Callable[[Raw], int], int, str]] = [
    ("vector -1", "llama", lambda r: vector_set(r, -1), LIMIT, "vector -1 is out of range"),
    ("vector 4096", "llama", lambda r: vector_set(r, 4096), LIMIT, "vector 4096 is out of range"),
    ("no directions", "llama", lambda r: vector_set(r, n=0), ARG, "needs 1 to"),
    ("negative count", "llama", lambda r: vector_set(r, n=-3), ARG, "needs 1 to"),
    ("too many directions", "llama", lambda r: vector_set(r, n=1000), ARG, "needs 1 to"),
    ("no layers", "llama", lambda r: vector_set(r, layers=None), ARG, "with layers, sites and scales"),
    ("no sites", "llama", lambda r: vector_set(r, sites=None), ARG, "with layers, sites and scales"),
    ("no data", "llama", lambda r: vector_set(r, dirs=None), ARG, "with layers, sites and scales"),
    ("no scales", "llama", lambda r: vector_set(r, scales=None), ARG, "with layers, sites and scales"),
    ("layer -1", "llama", lambda r: vector_set(r, layers=[-1]), ARG, "layer -1 is out of range: this model has layers 0 to 3"),
    ("layer 4", "llama", lambda r: vector_set(r, layers=[4]), ARG, "layer 4 is out of range: this model has layers 0 to 3"),
    ("layer 6", "deepseek4", lambda r: vector_set(r, layers=[6]), ARG, "layer 6 is out of range"),
    ("site 3", "llama", lambda r: vector_set(r, sites=[3]), ARG, "site 3 does not exist"),
    ("site -1", "llama", lambda r: vector_set(r, sites=[-1]), ARG, "site -1 does not exist"),
    ("attn_out", "llama", lambda r: vector_set(r, sites=[ATTN]), ARCH, "site attn_out is not available in architecture 'llama'"),
    ("ffn_out", "gemma3", lambda r: vector_set(r, sites=[FFN]), ARCH, "site ffn_out is not available in architecture 'gemma3'"),
    ("NaN", "llama", lambda r: vector_set(r, dirs=unit(r, 3, np.nan)), ARG, "at layer 1 holds NaN or Inf"),
    ("Inf", "llama", lambda r: vector_set(r, dirs=unit(r, 0, -np.inf)), ARG, "at layer 1 holds NaN or Inf"),
    ("huge", "llama", lambda r: vector_set(r, dirs=unit(r, 0, 3e38)), ARG, "has norm 3e+38"),
    ("zero", "llama", lambda r: vector_set(r, dirs=np.zeros((1, r.n_embd))), ARG, "has norm 0 instead of 1"),
    ("norm 1.002", "llama", lambda r: vector_set(r, dirs=1.002 * H.directions(1, r.n_embd)), ARG, "has norm 1.002"),
    ("second is bad", "llama", lambda r: vector_set(r, layers=[1, 2], sites=[0, 0], scales=[1, 1],
                                                    dirs=H.directions(2, r.n_embd) * [[1], [2]]), ARG, "at layer 2 has norm 2"),
    ("NaN scale", "llama", lambda r: vector_set(r, scales=[np.nan]), ARG, "scale of vector 0 at layer 1 is not finite"),
    ("Inf scale", "llama", lambda r: vector_set(r, scales=[np.inf]), ARG, "scale of vector 0 at layer 1 is not finite"),
    ("a place twice", "llama", lambda r: vector_set(r, layers=[1, 1], sites=[0, 0], scales=[1, 1]), ARG,
     "two directions at layer 1, resid_post"),
    ("used elsewhere", "llama", lambda r: vector_set(r, 2, layers=[0]), ARG,
     "vector 2 is used by a config whose layer window holds none of its new layers"),
    ("scale too large for a config", "llama", lambda r: vector_set(r, 2, layers=[2], scales=[1e39]), ARG, "too large"),
    ("clear unknown", "llama", lambda r: r.library.llama_steer_vector_clear(r.handle, 77), ARG, "vector 77 is not set"),
    ("clear -1", "llama", lambda r: r.library.llama_steer_vector_clear(r.handle, -1), ARG, "vector -1 is not set"),
    ("clear used", "llama", lambda r: r.library.llama_steer_vector_clear(r.handle, 2), ARG, "vector 2 is in use"),
    ("config 0", "llama", lambda r: config_set(r, 0, NativeTerm(0)), ARG, "config 0 cannot be set"),
    ("config -5", "llama", lambda r: config_set(r, -5, NativeTerm(0)), ARG, "config -5 cannot be set"),
    ("-1 terms", "llama", lambda r: config_set(r, 1, n=-1), LIMIT, "0 to 256 terms, not -1"),
    ("257 terms", "llama", lambda r: config_set(r, 1, *[NativeTerm(0)] * 257), LIMIT, "0 to 256 terms, not 257"),
    ("terms NULL", "llama", lambda r: config_set(r, 1, n=2, null=True), LIMIT, "terms"),
    ("unknown vector", "llama", lambda r: config_set(r, 1, NativeTerm(99)), ARG, "vector 99 is not set"),
    ("second unknown", "llama", lambda r: config_set(r, 1, NativeTerm(0, PROJECT), NativeTerm(-1)), ARG, "vector -1 is not set"),
    ("op 6", "llama", lambda r: config_set(r, 1, NativeTerm(0, 6)), ARG, "op 6 does not exist"),
    ("op -1", "llama", lambda r: config_set(r, 1, NativeTerm(0, -1)), ARG, "op -1 does not exist"),
    ("NaN strength", "llama", lambda r: config_set(r, 1, NativeTerm(0, 0, np.nan)), ARG, "of vector 0 is not finite"),
    ("Inf strength", "llama", lambda r: config_set(r, 1, NativeTerm(0, 1, -np.inf)), ARG, "of vector 0 is not finite"),
    ("large strength", "llama", lambda r: config_set(r, 1, NativeTerm(0, ADD, 1e300)), ARG, "1e+300 of vector 0 is too large"),
    ("large projection", "llama", lambda r: config_set(r, 1, NativeTerm(0, PROJECT, 1e39)), ARG, "project takes -1 to 3"),
    ("large sum", "llama", lambda r: config_set(r, 1, *[NativeTerm(0, ADD, 1e38)] * 100), ARG, "too large"),
    ("large projections", "llama", lambda r: config_set(r, 1, *[NativeTerm(0, PROJECT, 3e38)] * 2), ARG, "project takes -1"),
    ("window 2-1", "llama", lambda r: config_set(r, 1, NativeTerm(0, ADD, 1.0, 2, 1)), ARG, "layer window 2-1 is empty"),
    ("window 3-3", "llama", lambda r: config_set(r, 1, NativeTerm(0, ADD, 1.0, 3, 3)), ARG, "window 3-3 holds none"),
    ("window 9-", "llama", lambda r: config_set(r, 1, NativeTerm(0, ADD, 1.0, 9)), ARG, "holds none of the layers of vector 0"),
    ("stream 1", "llama", lambda r: config_set(r, 1, NativeTerm(0, stream=1)), ARG, "stream 1 does not exist: this model has 1"),
    ("stream 4", "deepseek4", lambda r: config_set(r, 1, NativeTerm(0, stream=4)), ARG, "stream 4 does not exist"),
    ("stream -2", "deepseek4", lambda r: config_set(r, 1, NativeTerm(0, stream=MEAN)), ARG, "stream -2 does not exist"),
    ("stream of a writer", "deepseek4", lambda r: config_set(r, 1, NativeTerm(3, stream=0)), ARG,
     "a stream cannot be named at attn_out"),
    ("clear config 9", "llama", lambda r: r.library.llama_steer_config_clear(r.handle, 9), ARG, "config 9 is not set"),
    ("clear config 0", "llama", lambda r: r.library.llama_steer_config_clear(r.handle, 0), ARG, "config 0 is not set"),
    ("range seq", "llama", lambda r: r.library.llama_steer_range(r.handle, -1, 0, -1, 1), ARG, "is no range"),
    ("range start", "llama", lambda r: r.library.llama_steer_range(r.handle, 0, -1, 5, 1), ARG, "is no range"),
    ("range empty", "llama", lambda r: r.library.llama_steer_range(r.handle, 0, 5, 5, 1), ARG, "is no range"),
    ("range backwards", "llama", lambda r: r.library.llama_steer_range(r.handle, 0, 5, 2, 1), ARG, "5 to 2 is no range"),
    ("range config", "llama", lambda r: r.library.llama_steer_range(r.handle, 0, 0, -1, 55), ARG, "config 55 is not set"),
    ("range config -1", "llama", lambda r: r.library.llama_steer_range(r.handle, 0, 0, -1, -1), ARG, "config -1 is not set"),
    ("captures -1", "llama", lambda r: capture_set(r, [], [], n=-1), ARG, "captures can be set, not -1"),
    ("captures 1000", "llama", lambda r: capture_set(r, [0], [0], n=1000), ARG, "captures can be set, not 1000"),
    ("captures NULL", "llama", lambda r: capture_set(r, None, None, n=1), ARG, "captures"),
    ("capture layer", "llama", lambda r: capture_set(r, [0, 4], [0, 0]), ARG, "layer 4 is out of range"),
    ("capture site", "llama", lambda r: capture_set(r, [0], [FFN]), ARCH, "site ffn_out is not available"),
    ("capture site 9", "deepseek4", lambda r: capture_set(r, [0], [9]), ARG, "site 9 does not exist"),
    ("capture twice", "llama", lambda r: capture_set(r, [0, 1, 0], [0, 0, 0]), ARG, "layer 0, resid_post is captured twice"),
    ("capture stream 0", "deepseek4", lambda r: capture_set(r, [0], [0], 0), ARG, "stream mode 0 does not exist"),
    ("capture rows", "llama", lambda r: capture_set(r, [0], [0], rows=-1), ARG, "captures cannot hold -1 rows"),
    ("want seq", "llama", lambda r: r.library.llama_steer_capture_range(r.handle, -2, 0, -1, True), ARG, "is no range"),
    ("want empty", "llama", lambda r: r.library.llama_steer_capture_range(r.handle, 0, 3, 1, True), ARG, "is no range"),
    ("get uncaptured", "llama", lambda r: capture_get(r, 3, (c_float * 4)(), 4), ARG, "layer 3, resid_post is not captured"),
    ("get no room", "llama", lambda r: capture_get(r, 0, (c_float * 4)(), 4), ARG, "there is room for 4"),
    ("get NULL", "llama", lambda r: capture_get(r, 0, None, BIG), ARG, "NULL"),
    ("index NULL", "llama", lambda r: r.library.llama_steer_capture_index(r.handle, None, None), ARG, "NULL"),
    ("stats NULL", "llama", lambda r: r.library.llama_steer_get_stats(r.handle, None), ARG, "NULL"),
]  # fmt: skip


@pytest.mark.parametrize("arch", sorted({case[1] for case in CASES}))
def test_bad_arguments(raw: MakeRaw, arch: str) -> None:
    """All of them on one steered context, whose logits, rows and ids must stay as they are after each."""
    toks = H.prompt(7)

    def steered() -> Raw:
        r = raw(arch)
        H.vector(r.n_embd, [(1, RESID), (2, RESID)]).put(r.steer, 0)
        H.vector(r.n_embd, [(2, RESID)], seed=3).put(r.steer, 2)
        r.steer.set_config(1, [NativeTerm(0, ADD, 0.7), NativeTerm(0, CLAMP, 0.1)])
        r.steer.set_config(2, [NativeTerm(2, ADD, 1.0, 2, 3)])
        if arch == "deepseek4":
            H.vector(r.n_embd, [(1, ATTN), (1, RESID)], seed=4).put(r.steer, 3)
        r.steer.set_range(0, 0, 4, 1)
        r.steer.set_range(0, 4, -1, 2)
        r.steer.set_captures([0, 2], [RESID, RESID])
        r.steer.want(0, 1, 5)
        return r

    def state() -> tuple[Any, ...]:
        r.forget()
        r.steer.clear_rows()
        logits = r.decode(toks)
        rows = [r.steer.rows(il, RESID) for il in (0, 2)]
        return logits, *rows, np.array([r.steer.edit_id(0, p) for p in range(9)], np.uint64)

    r = steered()
    before = state()
    reserves = r.steer.stats().n_reserves
    problems = []
    for name, where, call, code, sentence in CASES:
        if where != arch:
            continue
        got = call(r)
        said = r.library.llama_steer_error(r.handle).decode()
        if got != code:
            problems.append(f"{name}: code {got} instead of {code}")
        elif sentence not in said:
            problems.append(f"{name}: '{said}' instead of '{sentence}'")
        if not all(np.array_equal(a, b) for a, b in zip(state(), before, strict=True)):
            problems.append(f"{name}: something changed")
            r = steered()
    assert not problems, "\n".join(problems)
    assert r.steer.stats().n_reserves == reserves


def test_error_sentences_reach_python(raw: MakeRaw) -> None:
    r = raw("llama")
    with pytest.raises(EngineError, match=r"^layer 4 is out of range: this model has layers 0 to 3$"):
        H.vector(r.n_embd, [(4, RESID)]).put(r.steer, 0)
    with pytest.raises(EngineError, match="n_embd 128"):
        r.steer.set_vector(0, [1], [0], H.directions(1, 64), [1.0])
    with pytest.raises(EngineError, match="n_embd 128"):
        r.steer.set_vector(0, [1, 2], [0, 0], H.directions(1, 128), [1.0, 1.0])
    with pytest.raises(EngineError, match="n_embd 128"):
        r.steer.set_vector(0, [1], [0], H.directions(1, 128), [])
    with pytest.raises(EngineError, match="n_embd 128"):
        r.steer.set_vector(0, [1], [0], H.directions(1, 128)[0], [1.0])
    with pytest.raises(EngineError, match="config 3 is not set"):
        r.steer.set_range(0, 0, -1, 3)


def test_captures_and_layers_of_unequal_length_do_not_reach_c(raw: MakeRaw) -> None:
    """C reads as many sites as there are layers: Python must not pass a shorter array."""
    r = raw("llama")
    with pytest.raises(EngineError):
        r.steer.set_captures([0, 1, 2], [RESID])


def test_rows_with_the_wrong_number_of_streams(raw: MakeRaw) -> None:
    """Asking for streams that were not read gives a sentence, not numbers from nowhere."""
    r = raw("deepseek4")
    r.steer.set_captures([1], [RESID], stream=MEAN)
    r.steer.want(0, 0, -1)
    r.decode(H.prompt(3))
    with pytest.raises(EngineError):
        r.steer.rows(1, RESID, 4)
    r.steer.set_captures([1], [RESID], stream=ALL)
    r.forget()
    r.decode(H.prompt(3))
    with pytest.raises(EngineError):
        r.steer.rows(1, RESID)
    assert r.steer.rows(1, RESID, 4).shape == (3, 4, r.n_embd)


def test_nothing_infinite_gets_in_through_a_callback(raw: MakeRaw) -> None:
    """c and the scale are finite, their product is not."""
    r = raw("llama")
    toks = H.prompt(4)
    plain = r.decode(toks)
    H.vector(r.n_embd, [(1, RESID)], scale=1e30).put(r.steer, 0)
    r.forget()
    r.steer.on_add(lambda t: t.c.__setitem__((0, 0), 1e30))
    assert r.try_decode(toks) == -3
    assert "too large at layer 1: a dose of 1e+15 is the limit" in r.steer.error()
    r.steer.on_add(None)
    r.forget()
    assert np.array_equal(r.decode(toks), plain)


def test_null_everywhere(raw: MakeRaw) -> None:
    r = raw("llama")
    lib = r.library
    model_info = binding._Info()
    term = (binding._Term * 1)()
    ints, floats, doubles = (c_int32 * 1)(), (c_float * 128)(), (c_double * 1)(1.0)
    calls: list[Any] = [
        lambda: lib.llama_steer_model_info(None, byref(model_info)),
        lambda: lib.llama_steer_model_info(r.model, None),
        lambda: lib.llama_steer_vector_set(None, 0, 1, ints, ints, floats, doubles),
        lambda: lib.llama_steer_vector_clear(None, 0),
        lambda: lib.llama_steer_config_set(None, 1, 1, term),
        lambda: lib.llama_steer_config_clear(None, 1),
        lambda: lib.llama_steer_range(None, 0, 0, -1, 0),
        lambda: lib.llama_steer_seq_clear(None, -1),
        lambda: lib.llama_steer_capture_set(None, 0, None, None, MEAN, 0, True),
        lambda: lib.llama_steer_capture_range(None, 0, 0, -1, True),
        lambda: lib.llama_steer_capture_index(None, ints, ints),
        lambda: lib.llama_steer_capture_get(None, 0, 0, floats, 128),
        lambda: lib.llama_steer_capture_clear(None),
        lambda: lib.llama_steer_set_read_callback(None, binding._READ_CB(), None),
        lambda: lib.llama_steer_set_add_callback(None, binding._ADD_CB(), None),
        lambda: lib.llama_steer_get_stats(None, byref(binding._Stats())),
        lambda: lib.llama_steer_free(None),
    ]
    for i, call in enumerate(calls):
        assert call() == ARG, i
        assert lib.llama_steer_error(None)
    assert lib.llama_steer_capture_count(None) == 0
    assert lib.llama_steer_edit_id(None, 0, 0) == lib.llama_steer_config_id(None, 1) == 0
    assert lib.llama_steer_fired(None, 0, 0) == 0
    assert lib.llama_steer_arch_name(-1) is None and lib.llama_steer_arch_name(1000) is None


def test_odd_arguments_that_are_fine(raw: MakeRaw) -> None:
    r = raw("llama")
    lib = r.library
    assert lib.llama_steer_edit_id(r.handle, -5, 3) == lib.llama_steer_edit_id(r.handle, 0, -3) == 0
    assert lib.llama_steer_config_id(r.handle, -1) == 0
    assert lib.llama_steer_fired(r.handle, 99, 99) == 0
    assert lib.llama_steer_capture_count(r.handle) == 0
    assert lib.llama_steer_seq_clear(r.handle, 1234) == 0
    assert vector_set(r, 4095) == 0 and config_set(r, 2**31 - 1, NativeTerm(4095)) == 0
    assert lib.llama_steer_range(r.handle, 0, 0, 2**31 - 1, 2**31 - 1) == 0
    assert lib.llama_steer_range(r.handle, 0, 2**31 - 1, -1, 2**31 - 1) == 0
    toks = H.prompt(3)
    assert np.isfinite(r.decode(toks)).all()
    assert config_set(r, 1, *[NativeTerm(4095, ADD, 0.01)] * 256) == 0
    assert capture_set(r, [], []) == 0 and capture_set(r, None, None) == 0


def test_an_error_belongs_to_its_context(raw: MakeRaw) -> None:
    r = raw("llama")
    other = r.second_context()
    try:
        r.library.llama_steer_config_clear(r.handle, 5)
        r.library.llama_steer_config_clear(other.handle, 6)
        assert "config 5" in r.library.llama_steer_error(r.handle).decode()
        assert "config 6" in r.library.llama_steer_error(other.handle).decode()
    finally:
        other.close()


def test_an_untested_architecture_is_refused(llama_cpp: Any, untested: Path) -> None:
    """It loads and decodes; reading and steering it is refused with a sentence."""
    r = Raw(untested, steer=False)
    try:
        native.load(r.library)
        toks = H.prompt(5)
        plain = r.decode(toks)
        with pytest.raises(
            ModelError, match="'llama-embed' has not been tested with steering; take a model of one of the \\d+ that"
        ):
            native.model_info(r.library, r.model)
        info = binding._Info()
        assert r.library.llama_steer_model_info(r.model, byref(info)) == ARCH
        assert (info.n_layer, info.n_embd, info.n_streams, list(info.sites)) == (2, 128, 1, [False] * 3)
        assert vector_set(r) == ARCH
        assert "llama-embed" in r.library.llama_steer_error(r.handle).decode()
        assert capture_set(r, [0], [0]) == ARCH
        assert config_set(r, 1, NativeTerm(0)) == ARCH
        assert r.library.llama_steer_set_read_callback(r.handle, binding._READ_CB(), None) == ARCH
        assert r.library.llama_steer_free(r.handle) == 0
        r.forget()
        assert np.array_equal(r.decode(toks), plain)
    finally:
        r.close()


def test_list_of_architectures(raw: MakeRaw) -> None:
    """The library's list is the one these tests run on (test_every_architecture), and those that were promised are in it."""
    listed = native.tested_architectures(raw("llama").library)
    assert len(set(listed)) == len(listed) and set(listed) == set(load_patch().architectures())
    assert {"llama", "qwen2", "qwen3", "gemma3", "deepseek2", "deepseek4"} <= set(listed)


def test_a_library_without_steering_or_of_another_version() -> None:
    from steer_plugins.errors import RuntimeMissing

    class Function:
        def __call__(self) -> bytes:
            return b"llama-steer 99"

    class Later:
        def __getattr__(self, name: str) -> Function:
            return Function()

    with pytest.raises(RuntimeMissing, match="has no steering"):
        native.load(object())  # type: ignore[arg-type]
    with pytest.raises(RuntimeMissing, match="llama-steer 99"):
        native.load(Later())  # type: ignore[arg-type]
