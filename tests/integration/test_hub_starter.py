"""The starter set in examples/hub: what the project publishes with its own command, pulled as anybody would.

From the folder, from a git clone and from a plain web server, by a user with an empty home; offline afterwards.
"""

from __future__ import annotations

import functools
import http.server
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from steer_plugins.errors import SteerError
from steer_plugins.hub import index as indexes
from steer_plugins.hub.hub import Hub
from steer_plugins.hub.site import write_site
from steer_plugins.steering.vector import ModelIdentity
from steer_plugins.store.library import Library
from steer_plugins.training.traits import bundled_traits

from ..behaviour.conftest import engine  # noqa: F401  # the fixture

STARTER = Path(__file__).parents[2] / "examples" / "hub"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy that may be moved away."""
    return Path(shutil.copytree(STARTER, tmp_path / "starter", ignore=shutil.ignore_patterns("*.md", ".lock")))


@pytest.fixture(params=["folder", "git", "web"])
def address(request: pytest.FixtureRequest, copy: Path) -> Iterator[str]:
    """Where the copy is to be had."""
    if request.param == "folder":
        yield str(copy)
    elif request.param == "git":
        if shutil.which("git") is None:
            pytest.skip("git is not installed")
        who = ("-c", "user.name=Ann", "-c", "user.email=ann@example.org", "-c", "init.defaultBranch=main")
        for arguments in (["init"], ["add", "."], ["commit", "-m", "one"]):
            subprocess.run(["git", "-C", str(copy), *who, *arguments], check=True, capture_output=True)
        yield f"git+{copy.as_uri()}"
    else:

        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *arguments: object) -> None: ...

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(copy)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        server.server_close()


def models() -> dict[str, ModelIdentity]:
    index = indexes.read_index(STARTER / "index.json", "the starter set")
    return {entry["name"]: ModelIdentity.from_dict(entry["model"]) for entry in index.entries if entry["model"]}


def test_pulled_by_a_stranger_and_offline_after(address: str, copy: Path, tmp_path: Path) -> None:
    hub = Hub(Library(tmp_path / "home"))
    hub.add(address, name="starter")
    identity = models()["starter/mood"]
    offers, total = hub.search(["cheerful"], identity=identity)
    assert total >= 1 and offers[0].entry["name"] == "starter/mood"
    assert hub.card(offers[0])["calibration"]["curve"]
    names = sorted(models())
    for name in names:
        hub.pull(name, identity=identity)
    shutil.rmtree(copy)
    again = Hub(Library(tmp_path / "home"))
    for item in again.pulled.items():
        card = again.verify(item)
        assert card["trait"] and card["safety"]["refusal"] is not None and card["base_model"] and card["licence"]
        assert again.library.resolve(item.name, identity).identity == identity
    assert sorted(item.name for item in again.pulled.items()) == names


def test_what_is_in_it() -> None:
    assert {f"starter/{trait}" for trait in bundled_traits()} <= set(models())
    index = indexes.read_index(STARTER / "index.json", "the starter set")
    named = {"index.json", "README.md", ".gitattributes"}
    for entry in index.entries:
        assert index.header["expires"] is None and index.header["name"] == "starter"
        named |= {f"files/{ref['sha256']}.{ref['type']}" for ref in (entry["card"], *entry["files"].values())}
        named.add(f"files/{entry['card']['sha256']}.minisig")
    there = {path.relative_to(STARTER).as_posix() for path in STARTER.rglob("*") if path.is_file() and path.name != ".lock"}
    assert named < there and len(there - named) == 1  # the index's signature
    assert sum(path.stat().st_size for path in STARTER.rglob("*")) < 1 << 20


def test_its_site(tmp_path: Path) -> None:
    assert write_site(STARTER, tmp_path / "site", "https://example.org/") == len(models()) + 1
    assert "starter/mood" in (tmp_path / "site" / "index.html").read_text("utf-8")


def test_it_steers_the_demo_model(tmp_path: Path, engine) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    hub = Hub(Library(tmp_path / "home"))
    hub.add(str(STARTER))
    item = hub.pull("starter/mood", identity=engine.info.identity)
    vector = hub.library.resolve(item.name, engine.info.identity)
    assert vector.identity is not None and vector.identity.mismatch(engine.info.identity) is None
    prompt = [{"role": "user", "content": "Describe a walk in the forest."}]
    answers = [(prompt, "It is a wonderful, joyful day, full of light."), (prompt, "It is a dark, gloomy day, full of sorrow.")]
    from steer_plugins.steering.terms import Term

    def gap(strength: float) -> float:
        glad, sad = engine.logprobs(answers, steering=Term(vector, strength))
        return float(np.sum(glad) - np.sum(sad))

    assert gap(1.0) - gap(-1.0) > 5.0
    with pytest.raises(SteerError, match="not for this model"):
        hub.pull("starter/mood", identity=ModelIdentity("llama", 4, 8, "a" * 64, "b" * 64))
