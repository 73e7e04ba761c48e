"""Our server under the llama.cpp loader, and what goes to it, with stand-ins for the webui and for the server."""

from __future__ import annotations

import json
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from steer_plugins_textgen import api, extension, hooks, link, loader, replies, settings, webui

from steer_plugins.errors import SpecError, SteerError
from steer_plugins.steering.grammar import parse
from steer_plugins.steering.vector import SteeringVector
from steer_plugins.store.library import Library
from tests.unit.steering_server import IDENTITY, FakeServer
from tests.unit.textgen_webui import StandIn

posix = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for llama-server is a script with a #! line")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    found = StandIn(monkeypatch, tmp_path / "user_data")
    monkeypatch.setenv("STEER_LIBRARY", str(tmp_path / "library"))
    monkeypatch.setattr(settings, "_settings", settings.Settings(None))
    monkeypatch.setattr(loader, "state", loader.State())
    monkeypatch.setattr(link, "_links", {})
    monkeypatch.setattr(replies, "last", None)
    monkeypatch.setitem(sys.modules, "llama_cpp_binaries", None)  # none is installed
    monkeypatch.setattr(loader, "find_server", lambda: ("ours", ""))
    monkeypatch.setattr(loader, "devices", lambda server: ())
    monkeypatch.setattr(loader, "flags_problem", lambda server, command: "")
    yield found


@pytest.fixture
def server(stand_in: StandIn) -> Iterator[FakeServer]:
    with FakeServer() as found:
        stand_in.port = found.server_address[1]
        yield found


def put(name: str) -> None:
    Library().put(SteeringVector(name, {(1, "resid_post"): [0.0, 0.0, 0.0, 1.0]}, {(1, "resid_post"): 2.0}), IDENTITY)


def load(stand_in: StandIn, server_path: str | None = None) -> Any:
    """A model that was loaded before the extension was."""
    found = stand_in.llama_cpp_server.LlamaServer("model.gguf", server_path)
    vars(stand_in.shared).update(model=found, tokenizer=found, model_name="model.gguf")
    return found


def setup_with(stand_in: StandIn) -> None:
    stand_in.switch(False)  # the webui lists an extension after its setup
    extension.setup()
    stand_in.switch(True)


def eventually(check: Callable[[], Any]) -> None:
    for _ in range(500):
        if check():
            return
        time.sleep(0.01)
    raise AssertionError("it never happened")


def stock(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loaded server cannot steer."""
    real = link.Link

    def refuse(url: str) -> Any:
        if stand_in.shared.model.server_path != "ours":
            raise SteerError(f"the server at {url} cannot steer")
        return real(url)

    monkeypatch.setattr(link, "Link", refuse)


# ---- the swap ----


def test_a_loaded_model_is_loaded_again_on_our_server(
    stand_in: StandIn, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock(stand_in, monkeypatch)
    before = load(stand_in)
    setup_with(stand_in)
    assert stand_in.started == ["stock", "ours"] and before.stopped
    assert stand_in.shared.model.server_path == "ours" and loader.state.problem == ""
    setup_with(stand_in)  # "Apply flags/extensions and restart"
    assert stand_in.started == ["stock", "ours"]


def test_flags_are_checked_before_the_model_is_unloaded(
    stand_in: StandIn, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock(stand_in, monkeypatch)
    asked: list[Any] = []
    monkeypatch.setattr(loader, "flags_problem", lambda *args: asked.append(args) or "error: invalid argument: --new")
    before = load(stand_in)
    setup_with(stand_in)
    assert asked == [("ours", ["--model", "model.gguf", "--flash-attn", "on"])]
    assert stand_in.started == ["stock"] and not before.stopped
    assert "--new" in loader.state.problem and any("--new" in line for line in stand_in.lines)


def test_the_webuis_own_server_is_restored(stand_in: StandIn, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    stock(stand_in, monkeypatch)
    stand_in.breaks.add("ours")
    load(stand_in)
    setup_with(stand_in)
    assert stand_in.started == ["stock", "ours", "stock"]
    assert stand_in.shared.model.server_path == "stock" and "did not start" in loader.state.problem


def test_later_models_get_our_server_while_the_extension_is_on(stand_in: StandIn, server: FakeServer) -> None:
    setup_with(stand_in)
    stand_in.load("other.gguf")
    stand_in.switch(False)
    stand_in.load("third.gguf")
    assert stand_in.started == ["ours", "stock"]
    stand_in.llama_cpp_server.LlamaServer("model.gguf", "somebody else's")
    assert stand_in.started[-1] == "somebody else's"


def test_a_gpu_is_not_given_up_unasked(stand_in: StandIn, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    stock(stand_in, monkeypatch)
    monkeypatch.setattr(loader, "stock_server", lambda: "/binaries/llama-server")
    monkeypatch.setattr(loader, "devices", lambda path: ("A GPU",) if path.startswith("/binaries") else ())
    load(stand_in)
    setup_with(stand_in)
    assert stand_in.started == ["stock"]
    assert "A GPU" in loader.state.problem and f"steer build --on {Path('/binaries')}" in loader.state.problem
    settings.settings().set_flag("cpu_too", True)
    loader.adopt()
    assert stand_in.shared.model.server_path == "ours"


def test_a_server_that_does_not_say_what_it_runs_on_is_kept(
    stand_in: StandIn, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock(stand_in, monkeypatch)
    monkeypatch.setattr(loader, "stock_server", lambda: "/binaries/llama-server")
    monkeypatch.setattr(loader, "devices", lambda path: None if path.startswith("/binaries") else ())
    load(stand_in)
    setup_with(stand_in)
    assert stand_in.started == ["stock"] and "could not be found out" in loader.state.problem


def test_a_reply_that_is_being_written_is_not_cut_off(
    stand_in: StandIn, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock(stand_in, monkeypatch)
    load(stand_in)
    with webui.busy():
        setup_with(stand_in)
    assert stand_in.started == ["stock"] and "being written" in loader.state.problem
    loader.adopt()
    assert stand_in.started == ["stock", "ours"] and loader.state.problem == ""


def test_ik_keeps_its_server(stand_in: StandIn, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    stock(stand_in, monkeypatch)
    stand_in.shared.args.ik = True
    load(stand_in)
    setup_with(stand_in)
    assert stand_in.started == ["stock"] and "--ik" in loader.state.problem


def test_a_first_load_that_failed_is_made_up_for(stand_in: StandIn, server: FakeServer) -> None:
    stand_in.shared.model_name = "model.gguf"  # the webui brought no llama-server, so nothing is loaded
    setup_with(stand_in)
    assert stand_in.started == ["ours"] and stand_in.shared.model.server_path == "ours"


def test_patches_do_not_stack(stand_in: StandIn, server: FakeServer) -> None:
    setup_with(stand_in)
    cls = stand_in.llama_cpp_server.LlamaServer

    def patched() -> list[Any]:
        others = [stand_in.text_generation.generate_reply_HF, stand_in.logits._get_next_logits]
        return [cls.__init__, cls.prepare_payload, cls.generate_with_streaming, *others]

    before = patched()
    setup_with(stand_in)
    assert before == patched()


@posix
def test_flags_and_devices_are_asked_of_the_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "llama-server"
    program.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        "if '--list-devices' in sys.argv:\n"
        "    print('Available devices:\\n  CUDA0: Fake GPU (24000 MiB, 23000 MiB free)\\n  CPU: a processor')\n"
        "elif sys.argv[-1] != '--help' or '--new' in sys.argv:\n"
        "    print('warning: x\\nerror: invalid argument: --new', file=sys.stderr); sys.exit(1)\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    assert loader.flags_problem(str(program), ["--model", "m"]) == ""
    assert loader.flags_problem(str(program), ["--new"]) == "error: invalid argument: --new"
    assert "error" in loader.flags_problem(str(tmp_path / "none"), [])
    assert loader.devices(str(program)) == ("Fake GPU",)
    assert loader.devices(str(tmp_path / "none")) is None


# ---- requests ----


def test_an_unsteered_request_of_the_api_is_left_alone(stand_in: StandIn, server: FakeServer) -> None:
    setup_with(stand_in)
    model, _ = stand_in.load("m")
    assert model.prepare_payload({"temperature": 1, "steering": None}) == {"temperature": 1}
    assert server.log == []


def test_steering_of_one_request_is_its_own(stand_in: StandIn, server: FakeServer) -> None:
    put("mood")
    setup_with(stand_in)
    model, _ = stand_in.load("m")
    settings.settings().set_terms(parse("mood:-1"))
    payload = model.prepare_payload({"temperature": 1, "steering": [{"vector": "mood", "strength": 0.5}]})
    assert [term["strength"] for term in payload["steering"]] == [0.5]
    assert payload["steering"][0]["vector"] in server.vectors
    assert "steering" not in model.prepare_payload({"temperature": 1, "steering": None})
    assert model.prepare_payload({"temperature": 1, "steering": []})["steering"] == []
    assert "request_id" not in payload


@pytest.mark.parametrize("state", [{}, {"steering": "mood:0.5"}], ids=["page", "api"])
def test_a_reply_whose_vector_was_lost_is_asked_for_once_more(
    stand_in: StandIn, server: FakeServer, state: dict[str, Any]
) -> None:
    put("mood")
    setup_with(stand_in)
    model, _ = stand_in.load("m")
    stand_in.shared.model = model
    settings.settings().set_terms(parse("mood:0.5"))

    def post(payload: dict[str, Any]) -> None:
        if not all(term["vector"] in server.vectors for term in payload["steering"]):
            raise RuntimeError("400 Client Error: Bad Request")

    list(model.generate_with_streaming("Hello", {"temperature": 1, **state}))
    server.vectors.clear()  # somebody deleted it
    stand_in.on_post = post
    assert list(model.generate_with_streaming("Hello", {"temperature": 1, **state})) == ["one", "one two"]
    assert len(stand_in.posted) == 3

    def fail(payload: dict[str, Any]) -> None:
        raise RuntimeError("400 Client Error: something else")

    stand_in.on_post = fail
    with pytest.raises(RuntimeError, match="something else"):
        list(model.generate_with_streaming("Hello", {"temperature": 1, **state}))
    assert len(stand_in.posted) == 4, "what is refused for another reason is not asked for again"
    assert link.current()._running == {}


def test_chat_and_calibration_share_one_cache_of_uploads(stand_in: StandIn, server: FakeServer) -> None:
    """Compare, and then a calibration of many trials: the next reply names a vector that the server has."""
    put("mood")
    setup_with(stand_in)
    model, _ = stand_in.load("m")
    stand_in.shared.model = model
    found, terms = link.current(), parse("mood:0.8")
    found.fields(terms)
    found.engine.request_fields(found.steering(terms))
    for k in range(1, 140):
        found.engine.request_fields(SteeringVector("trial", {(1, "resid_post"): [0.0, 0.0, 1.0, float(k)]}, identity=IDENTITY))
    assert found.fields(terms)["steering"][0]["vector"] in server.vectors


def test_thinking_scopes_bring_the_tags(stand_in: StandIn, server: FakeServer) -> None:
    put("mood")
    setup_with(stand_in)
    model, _ = stand_in.load("m")
    payload = model.prepare_payload({"temperature": 1, "steering": "mood?thinking"})
    assert payload["steering_tags"] == {"open": "<think>", "close": "</think>"}


def test_a_reply_of_the_page_is_steered_and_remembered(stand_in: StandIn, server: FakeServer) -> None:
    put("mood")
    setup_with(stand_in)
    model, _ = stand_in.load("m")
    stand_in.shared.model = model
    settings.settings().set_terms(parse("mood:0.5 + nothing:1"))
    assert list(model.generate_with_streaming("Hello", {"temperature": 1})) == ["one", "one two"]
    (payload,) = stand_in.posted
    assert [term["strength"] for term in payload["steering"]] == [0.5] and payload["request_id"].startswith("textgen-")
    assert any("'nothing'" in line for line in stand_in.lines)
    assert replies.last is not None and (replies.last.prompt, replies.last.text) == ("Hello", "one two")
    assert replies.last.terms == parse("mood:0.5")
    assert link.current()._running == {}


def test_terms_of_the_page_that_do_not_go_together(stand_in: StandIn, server: FakeServer) -> None:
    put("mood")
    setup_with(stand_in)
    model, _ = stand_in.load("m")
    settings.settings().set_terms(parse("mood:0.5 + mood:0.25%renorm + mood:-1"))
    payload = model.prepare_payload({"temperature": 1})  # the reply is not lost over it
    assert [term["strength"] for term in payload["steering"]] == [0.5, -1.0]
    assert any("restores the length" in line for line in stand_in.lines)


def test_asking_for_logits_is_no_reply_that_follows(stand_in: StandIn, server: FakeServer) -> None:
    put("mood")
    setup_with(stand_in)
    model, _ = stand_in.load("m")
    stand_in.shared.model = model
    settings.settings().set_terms(parse("mood:0.5"))
    payload = model.prepare_payload({"temperature": 1})
    assert payload["steering"] and "request_id" not in payload
    assert link.current()._running == {}


def test_switched_off(stand_in: StandIn, server: FakeServer) -> None:
    put("mood")
    setup_with(stand_in)
    model, _ = stand_in.load("m")
    settings.settings().set_terms(parse("mood:0.5"))
    settings.settings().set_flag("on", False)
    assert "steering" not in {k for k, v in model.prepare_payload({"temperature": 1}).items() if v}
    stand_in.switch(False)
    assert model.prepare_payload({"temperature": 1}) == {"temperature": 1}


def test_the_running_reply_follows(stand_in: StandIn, server: FakeServer) -> None:
    put("mood")
    setup_with(stand_in)
    stand_in.shared.model, _ = stand_in.load("m")
    current = link.current()
    name = current.begin([])
    current.change_running(parse("mood:0.25"))  # the server does not know the reply yet: it is asked again
    eventually(lambda: server.bodies(f"/steering/requests/{name}"))
    with server.lock:
        server.running[name] = []
    eventually(lambda: [t["strength"] for t in server.running[name]] == [0.25])
    current.change_running(parse("mood:-1"))
    eventually(lambda: [t["strength"] for t in server.running[name]] == [-1.0])
    current.end(name)
    eventually(lambda: current._worker is None)
    n = len(server.bodies("/steering/requests/"))
    current.change_running(parse("mood:1"))
    assert current._worker is None and len(server.bodies("/steering/requests/")) == n


# ---- the API's field ----


def test_checked_fields(stand_in: StandIn, server: FakeServer) -> None:
    put("mood")
    setup_with(stand_in)
    stand_in.shared.model, _ = stand_in.load("m")
    assert api.checked(None) is None
    assert api.checked("mood:0.5") == [{"vector": "mood", "strength": 0.5}]
    for value, named in (
        ("nomood", "nomood"),
        ("mood@3", "layers"),
        ("mood:x", "character 6"),
        ("mood?sometimes", "character 6"),
        ('"./mood.safetensors"', "is a file"),
        ([{"vector": "mood"}, {"vector": "mood", "op": "renorm"}], "restores the length"),
    ):
        with pytest.raises(SteerError, match=named):
            api.checked(value)
    stand_in.switch(False)
    with pytest.raises(SpecError, match="switched off"):
        api.checked("mood")


def test_a_server_that_cannot_steer_is_said(stand_in: StandIn, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    stock(stand_in, monkeypatch)
    monkeypatch.setattr(loader, "find_server", lambda: (None, "Make one with: steer build"))
    load(stand_in)
    setup_with(stand_in)
    with pytest.raises(SpecError, match="steer build"):
        api.checked("mood:1")
    assert api.checked([]) == []  # asks for nothing
    facts = api.facts()
    assert not facts["steers"] and "steer build" in facts["problem"] and facts["vectors"] == []


def test_other_loaders_say_so(stand_in: StandIn) -> None:
    setup_with(stand_in)
    with pytest.raises(SteerError, match="no model"):
        api.checked("mood:1")
    stand_in.shared.model = SimpleNamespace()
    stand_in.shared.args.loader = "ExLlamav3"
    with pytest.raises(SteerError, match="ExLlamav3 loader cannot be steered"):
        api.checked("mood:1")


def test_request_models(stand_in: StandIn, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pydantic = pytest.importorskip("pydantic", reason="the webui brings pydantic, this project does not need it")

    class Refused(Exception):
        def __init__(self, message: str, param: str) -> None:
            super().__init__(message)

    stand_in._module("modules.api.errors").InvalidRequestError = Refused
    put("mood")
    setup_with(stand_in)
    stand_in.shared.model, _ = stand_in.load("m")

    class ChatCompletionRequest(pydantic.BaseModel):  # type: ignore[misc, name-defined]
        prompt: str

    model = api.with_steering(ChatCompletionRequest)
    assert model.__name__ == "ChatCompletionRequest"
    assert model(prompt="x").steering is None
    assert model(prompt="x", steering="mood:0.5").__dict__["steering"] == [{"vector": "mood", "strength": 0.5}]
    with pytest.raises(Refused, match="nomood"):
        model(prompt="x", steering="nomood")


def test_log_probabilities_of_a_prompt_are_not_steered(stand_in: StandIn, server: FakeServer) -> None:
    pydantic = pytest.importorskip("pydantic", reason="the webui brings pydantic, this project does not need it")

    class Refused(Exception):
        def __init__(self, message: str, param: str) -> None:
            super().__init__(message)

    class CompletionRequest(pydantic.BaseModel):  # type: ignore[misc, name-defined]
        echo: bool = False
        logprobs: int | None = None

    stand_in._module("modules.api.errors").InvalidRequestError = Refused
    put("mood")
    setup_with(stand_in)
    stand_in.shared.model, _ = stand_in.load("m")
    model = api.with_steering(CompletionRequest)
    assert model(echo=True, logprobs=3).steering is None
    assert model(echo=True, steering="mood").steering and model(logprobs=3, steering="mood").steering
    with pytest.raises(Refused, match="not steered"):
        model(echo=True, logprobs=0, steering="mood")


def test_names_are_looked_for_in_the_library_only(
    stand_in: StandIn, server: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put("mood")
    setup_with(stand_in)
    stand_in.shared.model, _ = stand_in.load("m")
    monkeypatch.chdir(Library().path("mood", IDENTITY).parent)  # where mood.safetensors is a file
    with pytest.raises(SteerError, match="no vector 'mood.safetensors'"):
        link.current().steering(parse("mood.safetensors"))
    assert link.current().steering(parse('"./mood.safetensors"')).terms  # typed in the page


@pytest.mark.parametrize(
    ("origin", "host", "refused"),
    [
        (None, "127.0.0.1:5000", False),
        (None, "localhost:5000", False),
        ("http://127.0.0.1:7860", "127.0.0.1:5000", False),
        ("http://localhost:3000", "127.0.0.1:5000", False),
        ("http://[::1]:3000", "127.0.0.1:5000", False),
        ("https://evil.example", "127.0.0.1:5000", True),
        ("https://127.0.0.1.evil.example", "127.0.0.1:5000", True),
        ("http://localhost.evil.example", "127.0.0.1:5000", True),
        ("null", "127.0.0.1:5000", True),
        (None, "evil.example:5000", True),  # a name that was pointed here
        (None, None, True),
    ],
)
def test_pages_of_others_do_not_read_the_steering(stand_in: StandIn, origin: str | None, host: str | None, refused: bool) -> None:
    assert api.foreign(origin, host) is refused


def test_pages_of_others_where_the_webui_is_open(stand_in: StandIn) -> None:
    stand_in.shared.args.listen = True
    assert not api.foreign(None, "box.lan:5000") and not api.foreign("http://box.lan:7860", "box.lan:5000")
    assert api.foreign("https://evil.example", "box.lan:5000")


def test_a_page_that_others_can_open_names_no_files(stand_in: StandIn, server: FakeServer, tmp_path: Path) -> None:
    put("mood")
    setup_with(stand_in)
    stand_in.shared.model, _ = stand_in.load("m")
    file = Library().path("mood", IDENTITY)
    terms = parse(json.dumps(str(file)))
    assert len(link.current().steering(terms)) == 1
    for flag in ("listen", "share"):
        setattr(stand_in.shared.args, flag, True)
        with pytest.raises(SpecError, match="is a file"):
            link.current().steering(terms)
        setattr(stand_in.shared.args, flag, False)


def test_the_api_lists_vectors_and_presets(stand_in: StandIn, server: FakeServer) -> None:
    put("mood")
    settings.settings().set_terms(parse("mood:0.5"))
    settings.settings().save_preset("half")
    setup_with(stand_in)
    stand_in.shared.model, _ = stand_in.load("m")
    facts = api.facts()
    assert facts["steers"] and facts["device"] == "CPU" and facts["page"]["steering"] == "mood:0.5"
    assert facts["vectors"] == [{"name": "mood", "layers": [1], "op": "add", "scope": "all"}]
    assert facts["presets"] == {"half": [{"vector": "mood", "strength": 0.5}]}


def test_idle_unloading_waits_for_what_we_do(stand_in: StandIn) -> None:
    with webui.busy():
        assert stand_in.models.active_generation_count == 1
    assert stand_in.models.active_generation_count == 0


def test_nothing_heavy_is_imported() -> None:
    assert "torch" not in vars(hooks) and "gradio" not in sys.modules
