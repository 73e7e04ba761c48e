"""A fit on a tiny model can be repeated: same model, data, method and seed give the same directions, bit for bit."""

from __future__ import annotations

import pytest

from steer_plugins.engine.local import LocalEngine
from steer_plugins.errors import DataError, VectorError
from steer_plugins.training.extract import ContrastData, Pair, Side, builtin_methods
from steer_plugins.training.train import Training, TrainOptions, train_again

WORDS = "one two three four five six seven eight nine ten eleven twelve".split()


def data(kind: str) -> ContrastData:
    pairs = []
    for i, word in enumerate(WORDS):
        if kind == "texts":
            pairs.append(Pair(Side(f"a long day is bright, {word}"), Side(f"a long day is dark, {word}"), i))
        else:
            pairs.append(Pair(Side(f"say {word}", "bright and good"), Side(f"say {word}", "dark and bad"), i))
    return ContrastData("pairs", tuple(pairs), "0" * 64)


def engine(tiny, arch: str = "llama", **options) -> LocalEngine:
    return LocalEngine(tiny(arch, **options), n_ctx=256, n_threads=1, n_parallel=3)


@pytest.mark.parametrize("method", [method.name for method in builtin_methods()])
def test_the_directions_are_the_same_bits(llama_cpp, tiny, method):
    for kind, positions in (("texts", "last"), ("answers", "response"), ("answers", "answer")):
        options = TrainOptions(method=method, calibrate="none", positions=positions, seed=2, remove_neutral=True)
        with engine(tiny) as first:
            vector = Training(first, "calm", data(kind), options).run()
        with engine(tiny) as second:
            repeat = train_again(second, vector, data(kind))
            assert repeat.identical, repeat.cosines
            assert repeat.training.finish(repeat.fit).content_hash == vector.content_hash
            # nor does it matter what the engine has done before
            assert train_again(second, vector, data(kind)).identical


def test_streams_of_deepseek4_too(llama_cpp, tiny):
    with engine(tiny, "deepseek4") as first:
        vector = Training(first, "calm", data("texts"), TrainOptions(calibrate="none")).run()
        assert train_again(first, vector, data("texts")).identical


def test_another_model_or_other_data(llama_cpp, tiny):
    with engine(tiny) as first:
        vector = Training(first, "calm", data("texts"), TrainOptions(calibrate="none")).run()
        with pytest.raises(DataError, match="is not what 'calm' was fitted to"):
            train_again(first, vector, ContrastData("pairs", data("texts").pairs, "1" * 64))
    with engine(tiny, "qwen3") as other, pytest.raises(VectorError, match="is for"):
        train_again(other, vector, data("texts"))
