"""steer train, generate, read and demo as a user meets them, on an engine without a model."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open

from steer_plugins.cli import common, demo
from steer_plugins.cli import read as cli_read
from steer_plugins.cli.main import main
from steer_plugins.cli.train import duration, parse_layers
from steer_plugins.errors import DataError, SpecError
from steer_plugins.hub import starter
from steer_plugins.plugins.manager import reset
from steer_plugins.steering.terms import Term
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.library import Library
from steer_plugins.store.vectorfile import read_vector
from steer_plugins.training.train import Training, TrainOptions, options_of
from steer_plugins.training.traits import load_trait
from tests.unit.fakes import IDENTITY, N_LAYER, FakeEngine

PAIRS = [{"positive": f"so much joy {i}", "negative": f"so much woe {i}"} for i in range(10)]


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """The engine that every command opens; no library or plugins of whoever runs the tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEER_LIBRARY", str(tmp_path / "library"))
    monkeypatch.setenv("STEER_PLUGINS", "")
    monkeypatch.delenv("STEER_DEBUG", raising=False)
    reset()
    made = FakeEngine()
    monkeypatch.setattr(common.EngineOptions, "open", lambda self, **more: made)
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    yield made
    reset()


def joyful(tmp_path, **changes):
    """A trait file that the fake engine understands."""
    data = {
        "format": "steer-plugins-trait-v1",
        "name": "joyful",
        "poles": {"positive": "joyful", "negative": "woeful"},
        "system": {"positive": "joy", "negative": "woe"},
        "train_prompts": [f"tell {i}" for i in range(6)],
        "heldout_prompts": [f"say {i}" for i in range(12)],
        **changes,
    }
    (tmp_path / "joyful.json").write_text(json.dumps(data))


def run(capsys, *arguments):
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def files(tmp_path):
    return sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())


# ---- train ----


def test_train_on_pairs_writes_to_the_library(engine, tmp_path, capsys):
    code, out, err = run(capsys, "train", "calm", "--pairs", "pairs.jsonl")
    assert code == 0, err
    vector = Library().get("calm", IDENTITY)
    assert engine.closed
    assert vector.identity == IDENTITY and vector.default_scope == "response" and vector.op == "add"
    for key, direction in vector.directions.items():
        assert abs(direction[0]) == pytest.approx(1), key
    source = vector.provenance["source"]
    assert (source["kind"], source["file"]) == ("pairs", "pairs.jsonl") and len(source["sha256"]) == 64
    assert (vector.provenance["n_pairs"], vector.provenance["n_held_out"]) == (8, 2)
    assert vector.calibration["level"] == "quick" and vector.calibration["effect"] > 0
    assert "calm: 8 pairs on fake.gguf; about" in err and "tokens" in err
    # both held-out pairs are scored, though their openings are one and the same prompt
    assert "on 2 held-out pairs" in out
    assert str(Library().path("calm", IDENTITY)) in out


def test_what_to_try_next_works_wherever_the_vector_is(engine, tmp_path, capsys):
    """A vector that --out has put into a file is not in the library: the command that is suggested names the file."""
    (tmp_path / "my vectors").mkdir()
    for options, spec in (((), "calm:1"), (("--out", "my vectors/c.safetensors"), "'\"my vectors/c.safetensors\":1'")):
        code, out, err = run(capsys, "train", "calm", "--pairs", "pairs.jsonl", "--calibrate", "none", *options)
        assert code == 0, err
        assert f"Try: steer generate --steer {spec} " in out
        code, _, err = run(capsys, *shlex.split(out.split("Try: steer ")[1].splitlines()[0]))
        assert code == 0, err


def test_train_on_a_trait_of_the_package(engine, capsys):
    code, out, err = run(capsys, "train", "mood")
    assert code == 0, err
    vector = Library().get("mood", IDENTITY)
    assert vector.provenance["source"]["trait"] == "mood"
    assert vector.calibration["objective"] == {"kind": "metric", "name": "mood", "unit": "score", "of": "prompts"}
    assert "hardly more than noise" in out  # numbers have no mood
    asked = {str(request.prompt) for request in engine.generated if isinstance(request.steering, Term)}
    held_out = {str(engine.tokenize([{"role": "user", "content": p}])) for p in load_trait("mood").heldout_prompts}
    assert asked and asked <= held_out


def test_a_trait_without_a_metric_is_scored_by_log_probability(engine, tmp_path, capsys):
    joyful(tmp_path)
    engine.reply = lambda prompt, pull, dose, n: (
        ("joy!" if "<s>joy" in prompt else "woe!" if "<s>woe" in prompt else f"{pull:+.4f}"),
        "length",
    )
    code, out, err = run(capsys, "train", "gay", "--trait", "joyful.json")
    assert code == 0, err
    record = Library().get("gay", IDENTITY).calibration
    assert record["objective"]["kind"] == "logprob-contrast"
    # states are (±1, 1, small, 0): a median norm is the root of 2, and each answer moves by the pull at each sign
    assert record["effect"] == pytest.approx(4 * np.sqrt(2) * record["dose"], rel=1e-3)
    assert not any("system" in str(prompt) or "<s>" in prompt for prompt, text in engine.scored if text in ("joy!", "woe!"))


def test_train_without_calibration_says_so(engine, capsys):
    code, out, err = run(capsys, "train", "calm", "--pairs", "pairs.jsonl", "--calibrate", "none", "--json")
    assert code == 0, err
    printed = json.loads(out)
    assert printed["calibration"] is None and printed["file"].endswith("calm.safetensors")
    vector = read_vector(printed["file"])
    assert sum(vector.scales[il, s] / vector.provenance["median_norms"][str(il)] for il, s in vector.scales) == pytest.approx(
        0.3, rel=1e-3
    )
    assert vector.provenance["n_pairs"] == 10 and not engine.generated
    code, out, err = run(capsys, "train", "calm2", "--pairs", "pairs.jsonl", "--calibrate", "none")
    assert "not calibrated" in out


def test_out_layers_scope(engine, tmp_path, capsys):
    arguments = ("train", "calm", "--pairs", "pairs.jsonl", "--layers", "2-4", "--scope", "all", "--out", "v.safetensors")
    code, _, err = run(capsys, *arguments)
    assert code == 0, err
    vector = read_vector(tmp_path / "v.safetensors")
    assert vector.layers == [2, 3, 4] and vector.default_scope == "all"
    assert vector.calibration["window"] == [2, 4]
    assert not (tmp_path / "library").exists()


def test_nothing_is_replaced_unasked(engine, tmp_path, capsys):
    assert run(capsys, "train", "calm", "--pairs", "pairs.jsonl")[0] == 0
    before = Library().path("calm", IDENTITY).read_bytes()
    engine.generated.clear()
    code, _, err = run(capsys, "train", "calm", "--pairs", "pairs.jsonl", "--seed", "1")
    assert code == 1 and "replace it with --overwrite" in err and not engine.generated
    assert Library().path("calm", IDENTITY).read_bytes() == before
    assert run(capsys, "train", "calm", "--pairs", "pairs.jsonl", "--seed", "1", "--overwrite")[0] == 0
    assert Library().path("calm", IDENTITY).read_bytes() != before
    (tmp_path / "v.safetensors").write_text("mine")
    code, _, err = run(capsys, "train", "calm", "--pairs", "pairs.jsonl", "--out", "v.safetensors")
    assert code == 1 and "v.safetensors exists" in err
    assert (tmp_path / "v.safetensors").read_text() == "mine"


def test_the_same_training_gives_the_same_bytes(engine, tmp_path, capsys):
    for name in ("a", "b"):
        assert run(capsys, "train", "calm", "--pairs", "pairs.jsonl", "--out", f"{name}.safetensors")[0] == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("after", [1, 3, 8])
def test_ctrl_c_leaves_nothing(engine, tmp_path, capsys, after):
    calls = 0
    made = engine.generate_many

    def generate_many(requests, **more):
        nonlocal calls
        calls += 1
        if calls == after:
            raise KeyboardInterrupt
        return made(requests, **more)

    engine.generate_many = generate_many
    before = files(tmp_path)
    assert run(capsys, "train", "calm", "--pairs", "pairs.jsonl")[0] == 130
    assert calls == after and files(tmp_path) == before and engine.closed


BAD_INPUT = {
    (
        "train",
        "nothing",
    ): "no trait 'nothing' comes with the package (caution, creativity, debugging, formality, mood, succinctness do)",
    ("train", "Bad Name", "--pairs", "pairs.jsonl"): "is not a vector name",
    ("train", "../up", "--pairs", "pairs.jsonl"): "is not a vector name",
    ("train", "calm", "--pairs", "nowhere.jsonl"): "does not exist",
    ("train", "calm", "--pairs", "few.jsonl"): "4 pairs are too few",
    ("train", "calm", "--trait", "nowhere.json"): 'no trait "nowhere.json"',
    ("train", "calm", "--pairs", "pairs.jsonl", "--layers", "x"): "--layers 'x'",
    ("train", "calm", "--pairs", "pairs.jsonl", "--layers", "5-2"): "ends before it starts",
    ("train", "calm", "--pairs", "pairs.jsonl", "--layers", "5-10"): "it has 0 to 9",
    ("train", "calm", "--pairs", "pairs.jsonl", "--method", "magic"): "no method named 'magic'",
    ("train", "calm", "--pairs", "pairs.jsonl", "--out", "no/v.safetensors"): "no folder no",
    ("train", "calm", "--pairs", "pairs.jsonl", "--out", "."): "is a folder",
    ("train", "calm", "--trait", "odd.json"): "no metric named 'odd'",
    ("generate", "hi", "--steer", "nobody:1"): "no vector 'nobody'",
    ("generate", "hi", "--steer", "mood:much"): "mood:much",
    ("generate", "hi", "--steer", "mood:nan"): "mood:nan",
    ("generate", "hi", "--steer", "broken.safetensors:1"): "broken.safetensors",
    ("generate", ""): "the prompt is empty",
    ("generate", "hi", "--raw", "--system", "be nice"): "--raw leaves no place",
    ("read", "hi", "--out", "no/a.safetensors"): "its folder is missing",
    ("read", "hi", "--out", "pairs.jsonl"): "exists",
    ("read", "hi", "--out", "a.safetensors", "--layers", "a"): "--layers 'a'",
    ("read", "hi", "--out", "a.safetensors", "--layers", "-1"): "--layers '-1'",
    ("read", "hi", "--out", "a.safetensors", "--positions", "0-99999999"): "not a range",
    ("read", "hi", "--out", "a.safetensors", "--positions", "first"): "--positions 'first'",
}


@pytest.mark.parametrize("arguments", BAD_INPUT, ids=" ".join)
def test_bad_input_is_one_sentence(engine, tmp_path, capsys, arguments):
    (tmp_path / "few.jsonl").write_text("\n".join(map(json.dumps, PAIRS[:4])))
    (tmp_path / "broken.safetensors").write_text("no")
    joyful(tmp_path, metric="odd")
    (tmp_path / "joyful.json").rename(tmp_path / "odd.json")
    before = files(tmp_path)
    code, out, err = run(capsys, *arguments)
    lines = err.strip().splitlines()
    assert code == 1 and not out
    assert len(lines) == 1 and lines[0].startswith("steer: ") and BAD_INPUT[arguments] in lines[0]
    assert files(tmp_path) == before


def test_pairs_and_trait_together_are_wrong_usage(engine, capsys):
    assert run(capsys, "train", "calm", "--pairs", "pairs.jsonl", "--trait", "mood")[0] == 2


def test_layers_are_read_strictly():
    assert parse_layers("3") == (3,) and parse_layers(" 3-5 ") == (3, 4, 5) and parse_layers("8,1-2, 2") == (1, 2, 8)
    for text in ("", "-", "3-", "-3", "3-4-5", "3.5", "٣", "99999", "3,", "3,,4", "5-2"):
        with pytest.raises(SpecError):
            parse_layers(text)


def test_durations():
    assert [duration(s) for s in (0.1, 40, 200, 7200)] == ["1 s", "40 s", "3 min", "2.0 h"]


def test_a_layer_without_a_direction_cannot_be_steered(engine):
    from steer_plugins.training.extract import ContrastData, Pair, Side

    data = ContrastData("pairs", tuple(Pair(Side("joy"), Side("joy!!"), i) for i in range(5)), "0" * 64)
    engine._states = lambda text, n, layer: np.ones((n, 4), np.float32)
    with pytest.raises(DataError, match="read the same"):
        Training(engine, "calm", data, TrainOptions(calibrate="none")).run()


def test_the_estimate_counts_what_is_done(engine):
    done = {"reading": 0, "calibrating": 0}
    training = Training(engine, "mood", load_trait("mood"))
    plan = training.plan()
    training.run(lambda stage, tokens: done.__setitem__(stage, done[stage] + tokens))
    assert 0.5 * plan.read < done["reading"] < 1.5 * plan.read
    # the fake engine's replies are seven characters, whatever their limit
    assert done["calibrating"] > 0


# ---- generate ----


def vector(scale=0.5):
    return SteeringVector("up", {(4, "resid_post"): [1, 0, 0, 0]}, {(4, "resid_post"): scale * 5}, identity=IDENTITY)


def test_generate_streams_the_steered_text(engine, capsys):
    Library().put(vector(), IDENTITY)
    assert run(capsys, "generate", "hi", "--steer", "up:0.8")[:2] == (0, "+0.4000\n")
    assert run(capsys, "generate", "hi", "-s", "up:0.8", "-s", "up:-0.2")[1] == "+0.3000\n"
    assert run(capsys, "generate", "hi")[1] == "+0.0000\n"


def test_generate_passes_its_options_on(engine, capsys):
    arguments = ("--max-tokens", "5", "--temperature", "0.5", "--seed", "7", "--system", "be nice", "--thinking")
    assert run(capsys, "generate", "hi", *arguments)[0] == 0
    request = engine.generated[-1]
    assert (request.max_tokens, request.temperature, request.seed, request.thinking) == (5, 0.5, 7, True)
    assert request.prompt == [{"role": "system", "content": "be nice"}, {"role": "user", "content": "hi"}]
    run(capsys, "generate", "hi", "--raw")
    assert engine.generated[-1].prompt == "hi" and engine.generated[-1].thinking is None


def test_a_model_without_a_template_gets_the_text(engine, capsys):
    engine.info = common_info(engine, has_chat_template=False)
    assert run(capsys, "generate", "hi")[0] == 0 and engine.generated[-1].prompt == "hi"
    code, _, err = run(capsys, "generate", "hi", "--system", "be nice")
    assert code == 1 and "no chat template" in err


def common_info(engine, **changes):
    return replace(engine.info, **changes)


def test_generate_json(engine, capsys):
    Library().put(vector(), IDENTITY)
    printed = json.loads(run(capsys, "generate", "hi", "--steer", "up:-1", "--json")[1])
    assert printed["text"] == "-0.5000" and printed["steering"] == [{"vector": "up", "strength": -1.0}]
    assert printed["finish_reason"] == "length" and printed["tokens"] == 7


# ---- read ----


def test_read_writes_states_tokens_and_identity(engine, tmp_path, capsys):
    code, out, err = run(capsys, "read", "joy", "--out", "a.safetensors", "--layers", "1,3-4", "--positions", "last")
    assert code == 0 and "wrote 3 layers of 1 x 4" in out, err
    tokens = engine.tokenize([{"role": "user", "content": "joy"}])
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        assert set(file.keys()) == {"layer.1", "layer.3", "layer.4", "tokens", "positions"}
        assert file.get_tensor("layer.3").tolist() == [[4, 4, 4 * (len(tokens) - 1) / 1024, 0]]
        assert file.get_tensor("layer.3").dtype == np.float32
        assert file.get_tensor("tokens").tolist() == tokens and file.get_tensor("tokens").dtype == np.int32
        assert file.get_tensor("positions").tolist() == [len(tokens) - 1]
        facts = json.loads(file.metadata()["steer"])
    assert facts["format"] == cli_read.FORMAT and facts["identity"] == IDENTITY.to_dict()
    assert facts["n_prompt"] == len(tokens) and facts["site"] == "resid_post"
    code, out, _ = run(capsys, "read", "joy", "--out", "a.safetensors", "--overwrite", "--json")
    assert json.loads(out)["layers"] == list(range(N_LAYER))


def test_position_lists():
    assert cli_read.parse_positions("0,5-7,-1") == [0, 5, 6, 7, -1]
    assert cli_read.parse_positions("response") == "response"
    assert cli_read.parse_layer_list("4,1-2,4") == [1, 2, 4]


# ---- demo ----


def test_demo_fits_what_is_missing_and_reuses_it(engine, capsys):
    code, out, err = run(capsys, "demo", "--json")
    assert code == 0, err
    printed = json.loads(out)
    assert set(printed) == {"model", "strength_zero_identical", "rows"} and printed["strength_zero_identical"] is True
    rows = printed["rows"]
    assert [(r["vector"], r["prompt"], r["strength"]) for r in rows] == [
        (v, q, s) for v, asked in demo.QUESTIONS.items() for q in asked for s in demo.STRENGTHS
    ]
    assert set(rows[0]) == {"vector", "prompt", "strength", "text", "score", "words", "perplexity"}
    pulls = [float(r["text"]) for r in rows]
    for start in range(0, len(pulls), 5):
        assert pulls[start : start + 5] == sorted(pulls[start : start + 5]) and pulls[start + 2] == 0
    assert "first fits mood and succinctness" in err
    before = len(engine.generated)
    code, out, err = run(capsys, "demo")
    assert code == 0 and "first fits" not in err
    assert len(engine.generated) - before == 24  # 20 answers and the four plain ones
    assert all((r.temperature, r.seed) == (0.7, 1) for r in engine.generated[before:])
    assert "the same tokens as the plain model" in out
    assert all(q in out for asked in demo.QUESTIONS.values() for q in asked) and max(map(len, out.splitlines())) <= 80


def test_demo_has_the_vectors_of_its_own_model(engine, capsys, monkeypatch):
    places = {(3, "resid_post"): np.eye(engine.info.n_embd, dtype=np.float32)[0]}
    made = SteeringVector("made", places, dict.fromkeys(places, 4.0), identity=engine.info.identity)
    monkeypatch.setattr(starter, "starter_vector", lambda name, identity: made.replace(name=name))
    code, out, err = run(capsys, "demo")
    assert code == 0 and "first fits" not in err and len(engine.generated) == 24
    assert {entry.name for entry in Library().list()} == set(demo.QUESTIONS)  # for the commands that the demo ends with


def test_long_answers_are_cut_to_a_few_lines():
    assert demo._lines("one \n two", 74) == ["one two"] and demo._lines(" \n", 74) == ["(nothing)"]
    lines = demo._lines("word " * 200, 74)
    assert len(lines) == demo.SHOWN_LINES and lines[-1].endswith(" […]") and max(map(len, lines)) <= 74


def test_demo_notices_a_strength_0_that_is_not_plain(engine, capsys):
    # a model that is touched by steering at strength 0
    made = engine.generate_many
    engine.generate_many = lambda requests, **more: made(
        [r if r.steering is None or r.steering.strength else _touched(r) for r in requests], **more
    )
    code, out, _ = run(capsys, "demo", "--json")
    assert code == 1 and json.loads(out)["strength_zero_identical"] is False


def _touched(request):
    return replace(request, steering=Term(request.steering.vector, 0.25))


# ---- train --again ----


def test_again_gives_the_same_directions(engine, tmp_path, capsys):
    assert run(capsys, "train", "calm", "--pairs", "pairs.jsonl", "--method", "lda", "--seed", "3")[0] == 0
    made = engine.generated
    engine.generated = []
    code, out, err = run(capsys, "train", "--again", "calm")
    assert code == 0 and "calm: the same directions, bit for bit" in out, err
    assert not engine.generated and made  # nothing is calibrated again
    code, out, _ = run(capsys, "train", "twin", "--again", "calm", "--json")
    printed = json.loads(out)
    assert (
        printed["identical"] is True
        and set(printed["cosines"].values()) == {1.0}
        and printed["file"].endswith("twin.safetensors")
    )
    old, new = (Library().get(name, IDENTITY) for name in ("calm", "twin"))
    assert new.content_hash == old.content_hash and new.calibration == old.calibration and new.provenance == old.provenance


def test_again_with_all_options(engine, capsys):
    options = (
        "--method",
        "pca_center",
        "--layers",
        "2-3,5",
        "--remove-neutral",
        "--calibrate",
        "none",
        "--positions",
        "response",
    )
    assert run(capsys, "train", "calm", "--pairs", "pairs.jsonl", *options)[0] == 0
    vector = Library().get("calm", IDENTITY)
    assert vector.layers == [2, 3, 5] and vector.provenance["remove_neutral"] is True
    assert options_of(vector) == TrainOptions(
        method="pca_center", positions="response", layers=(2, 3, 5), calibrate="none", remove_neutral=True, baseline=False
    )
    assert run(capsys, "train", "--again", "calm")[0] == 0


def test_again_tells_other_directions(engine, capsys):
    assert run(capsys, "train", "calm", "--pairs", "pairs.jsonl", "--calibrate", "none")[0] == 0
    states = engine._states
    engine._states = lambda text, n, layer: states(text, n, layer) + np.float32([0, 0, 0, 0.5 * ("joy" in text)])
    code, out, _ = run(capsys, "train", "--again", "calm")
    assert code == 1 and "not the same directions; the lowest cosine is 0.9" in out
    engine._states = lambda text, n, layer: states(text, n, layer) if layer != 4 else np.ones((n, 4), np.float32)
    code, out, _ = run(capsys, "train", "--again", "calm", "--json")
    assert code == 1 and json.loads(out)["cosines"]["4"] is None


def test_again_wants_the_same_data(engine, tmp_path, capsys):
    assert run(capsys, "train", "calm", "--pairs", "pairs.jsonl", "--calibrate", "none")[0] == 0
    joyful(tmp_path)
    assert run(capsys, "train", "gay", "--trait", "joyful.json", "--calibrate", "none")[0] == 0
    assert run(capsys, "train", "--again", "gay", "--trait", "joyful.json")[0] == 0
    file = tmp_path / "pairs.jsonl"
    (tmp_path / "old.jsonl").write_bytes(file.read_bytes())
    file.write_text(file.read_text() + "\n")
    up = SteeringVector("up", {(4, "resid_post"): [1, 0, 0, 0]}, identity=IDENTITY)
    Library().put(up, IDENTITY)
    other = SteeringVector("other", {(4, "resid_post"): [1, 0, 0, 0]}, identity=IDENTITY, provenance={"method": ["lda"]})
    Library().put(other, IDENTITY)
    for arguments, sentence in {
        ("calm",): "pairs.jsonl is not what 'calm' was fitted to",
        ("gay",): "name its file with --trait",
        ("up",): "does not say how it was fitted",
        ("other",): "does not say how it was fitted",
        ("calm", "--trait", "mood"): "the trait 'mood' is not what 'calm' was fitted to",
    }.items():
        code, out, err = run(capsys, "train", "--again", *arguments)
        assert code == 1 and sentence in err and err.count("\n") == 1 and not out
    assert run(capsys, "train", "--again", "calm", "--pairs", "old.jsonl")[0] == 0
    file.unlink()
    assert "which is not here: name the file with --pairs" in run(capsys, "train", "--again", "calm")[2]


def test_again_takes_its_options_from_the_vector(engine, capsys):
    code, _, err = run(capsys, "train", "--again", "calm", "--seed", "1")
    assert code == 2 and "--seed" in err
    code, _, err = run(capsys, "train", "--again", "calm", "--remove-neutral")
    assert code == 2 and "--remove-neutral" in err
    assert run(capsys, "train")[0] == 2


# ---- three classes ----


def test_a_baseline_is_fitted_and_recorded(engine, tmp_path, capsys):
    three = [{**pair, "baseline": f"so much {i}"} for i, pair in enumerate(PAIRS)]
    (tmp_path / "three.jsonl").write_text("\n".join(map(json.dumps, three)))
    assert run(capsys, "train", "a", "--pairs", "three.jsonl", "--calibrate", "none")[0] == 0
    assert run(capsys, "train", "b", "--pairs", "three.jsonl", "--calibrate", "none", "--no-baseline")[0] == 0
    assert run(capsys, "train", "mood", "--baseline", "--calibrate", "none")[0] == 0
    made = {name: Library().get(name, IDENTITY).provenance for name in ("a", "b", "mood")}
    assert [made[name]["baseline"] for name in made] == [True, False, True]
    assert made["a"]["report"]["layers"][3]["baseline"] == pytest.approx(0.5)
    for name in made:
        assert run(capsys, "train", "--again", name)[0] == 0
    code, _, err = run(capsys, "train", "c", "--pairs", "pairs.jsonl", "--baseline")
    assert code == 1 and 'a third side, "baseline"' in err


# ---- show, plot ----


def test_show_prints_the_report(engine, capsys):
    assert run(capsys, "train", "calm", "--pairs", "pairs.jsonl", "--calibrate", "none")[0] == 0
    code, out, _ = run(capsys, "show", "calm")
    assert code == 0 and "suggested window  layers 3-7" in out and "held-out pairs: 5-fold; 12 resamples" in out
    assert "none: strength 1 is a usual dose, relative to the residual norm" in out
    table = out[out.index("suggested window") :]
    for column in ("norm", "distance in norms", "pairs in order", "cosine to next", "stability"):
        assert column in table
    assert len(table.strip().splitlines()) == 3 + N_LAYER - 1  # the window, the columns, a line, the layers
    assert json.loads(run(capsys, "show", "calm", "--json")[1])["provenance"]["report"]["window"] == [3, 7]


def test_training_names_the_window(engine, capsys):
    _, out, _ = run(capsys, "train", "calm", "--pairs", "pairs.jsonl", "--calibrate", "none")
    assert "calm: layers 3-7 tell the poles apart best" in out and "100%" in out
