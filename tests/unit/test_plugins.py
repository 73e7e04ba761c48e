"""Plugins: built-ins, one that is installed, broken ones, and that the documentation is true."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

import steer_plugins
from steer_plugins.cli.main import SteerGroup
from steer_plugins.errors import SteerError, VectorError
from steer_plugins.metrics import builtin_metrics
from steer_plugins.plugins import Manager, PluginWarning, hookspecs, manager
from steer_plugins.plugins.manager import COMMAND_PLUGINS, DEFAULT_PLUGINS, reset

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "tests" / "plugins" / "steer-exclaim"
DOCS = (ROOT / "docs" / "plugins.md").read_text("utf-8")
HOOKS = {name: spec for name, spec in vars(hookspecs).items() if name.startswith("register_")}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("STEER_PLUGINS", raising=False)
    monkeypatch.delenv("STEER_TRACE_PLUGINS", raising=False)
    reset()
    yield
    reset()


@pytest.fixture
def install(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Installs modules as distributions with an entry point, as far as Python can tell, for the length of a test."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def add(name: str, code: str, module: str | None = None, target: str | None = None) -> Path:
        module = module or f"plugin_{name}"
        (site / f"{module}.py").write_text(textwrap.dedent(code), "utf-8")
        info = site / f"dist_{name}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dist-{name}\nVersion: 1.5\n", "utf-8")
        (info / "entry_points.txt").write_text(f"[steer_plugins]\n{name} = {target or module}\n", "utf-8")
        monkeypatch.delitem(sys.modules, module, raising=False)
        return site

    yield add
    for name in [name for name in sys.modules if name.startswith("plugin_") or name == "steer_exclaim"]:
        del sys.modules[name]


METRIC = """
from steer_plugins.plugins import hookimpl

@hookimpl
def register_metrics(register):
    register({name!r}, len)
"""
COMMAND = """
import click
from steer_plugins.plugins import hookimpl

@hookimpl
def register_commands(cli):
    @cli.command({name!r})
    def command():
        "From a plugin."
        click.echo("said the plugin")
"""


# --- built-ins


def test_builtins_bring_their_own():
    assert {"mood", "succinctness"} <= manager().registry("metrics").keys()
    assert "steer-vector" in manager().registry("formats")
    assert "mean_difference" in manager().registry("methods")
    assert manager() is manager()


def test_names_of_builtin_modules():
    assert all(module == f"steer_plugins.cli.{name.replace('-', '_')}" for name, module in COMMAND_PLUGINS.items())
    for info in manager().infos():
        assert info.source == "built-in" or info.name not in (*COMMAND_PLUGINS.values(), *DEFAULT_PLUGINS)
        assert info.hooks or info.source != "built-in", f"{info.name} implements nothing"


def test_find_names_what_exists():
    assert manager().find("metrics", "mood")
    with pytest.raises(SteerError, match="there is no metric named 'nix': choose from caution, creativity, debugging"):
        manager().find("metrics", "nix")


# --- installed plugins


def test_an_installed_plugin_is_found_and_described(install):
    install("length", METRIC.format(name="length"))
    assert manager().find("metrics", "length")("four") == 4
    (info,) = [info for info in manager().infos() if info.source != "built-in" and info.name == "length"]
    assert (info.source, info.hooks, info.error) == ("dist-length 1.5", ("register_metrics",), None)


def test_an_entry_point_may_name_an_object_in_a_module(install):
    code = """
    from steer_plugins.plugins import hookimpl

    class Plugin:
        @hookimpl
        def register_methods(self, register):
            register("toaster", self)

    plugin = Plugin()
    """
    install("toaster", code, target="plugin_toaster:plugin")
    assert type(manager().find("methods", "toaster")).__name__ == "Plugin"


def test_the_set_can_be_pinned(install, monkeypatch):
    install("one", METRIC.format(name="one"))
    install("two", METRIC.format(name="two"))
    for pinned, expected in [(None, {"one", "two"}), ("two", {"two"}), (" one , two ", {"one", "two"}), ("", set())]:
        if pinned is not None:
            monkeypatch.setenv("STEER_PLUGINS", pinned)
        registry = Manager().registry("metrics")
        assert registry.keys() & {"one", "two"} == expected and "mood" in registry
    monkeypatch.setenv("STEER_PLUGINS", "one,three")
    with pytest.warns(PluginWarning, match="'three'.*no such plugin is installed"):
        assert "one" in Manager().registry("metrics")


def test_hook_calls_can_be_traced(install, monkeypatch, capsys):
    install("one", METRIC.format(name="one"))
    Manager().registry("metrics")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("STEER_TRACE_PLUGINS", "1")
    Manager().registry("metrics")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "steer: hook register_metrics(register) -> steer_plugins.plugins.builtin",
        "steer: hook register_metrics(register) -> one",
    ]


# --- broken ones


def test_a_format_that_cannot_look_does_not_keep_others_from_reading(install, tmp_path):
    code = """
    from steer_plugins.store.formats import Format
    from steer_plugins.plugins import hookimpl

    def fail(path):
        raise KeyError("oops")

    @hookimpl
    def register_formats(register):
        register(Format("bad", (".safetensors",), fail, None, fail))
    """
    from steer_plugins.steering.vector import SteeringVector
    from steer_plugins.store.formats import read_any
    from steer_plugins.store.vectorfile import write_vector

    install("badformat", code)
    vector = SteeringVector("v", {(0, "resid_post"): [3, 4]})
    write_vector(vector, tmp_path / "v.bin")
    assert read_any(tmp_path / "v.bin") == vector  # .bin: the built-in format is asked first
    (tmp_path / "w.safetensors").write_bytes(b"")
    with pytest.warns(PluginWarning, match="'bad' failed to look at"), pytest.raises(VectorError, match="none of"):
        read_any(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        ("import not_installed_anywhere", "ModuleNotFoundError"),
        ("def broken(:", "SyntaxError"),
        ("raise SystemExit('no')", "SystemExit: no"),
        (METRIC.format(name="x").replace("register_metrics", "register_metric"), None),  # no such hook: it does nothing
        (METRIC.format(name="x").replace("(register):", "(register, colour):"), "PluginValidationError"),
        (METRIC.format(name="mood"), "'mood' is already registered in metrics"),
        (METRIC.format(name=""), "is not a name"),
        (METRIC.format(name="x").replace("len)", "5)"), "'x' cannot be called"),
        (METRIC.format(name="x") + "    raise KeyError('late')", "register_metrics failed, KeyError"),
        (METRIC.format(name="x") + "    raise SystemExit(3)", "register_metrics failed, SystemExit"),
        (METRIC.format(name="x").replace("len)", "len, 5, 6)"), "register_metrics failed, TypeError"),
    ],
)
def test_a_broken_plugin_is_named_and_left_out(install, code, reason):
    install("bad", code)
    install("good", METRIC.format(name="good"))
    plugins = Manager()
    if reason is None:
        registry = plugins.registry("metrics")
    else:
        with pytest.warns(PluginWarning) as caught:
            registry = plugins.registry("metrics")
        (warning,) = caught
        message = str(warning.message)
        assert message.startswith("the plugin 'bad' (dist-bad 1.5) is not used: ") and reason in message
        assert "\n" not in message
        (info,) = [info for info in plugins.infos() if info.name == "bad"]
        assert reason in (info.error or "")
    assert registry.keys() == {*builtin_metrics(), "good"}
    assert registry["mood"] is not len


def test_an_error_in_a_builtin_is_not_hidden(monkeypatch):
    plugins = Manager()
    monkeypatch.setattr("steer_plugins.metrics.builtin_metrics", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plugins.registry("metrics")


# --- commands


def run(*arguments: str):
    group = SteerGroup("steer", plugins=Manager())
    return CliRunner().invoke(group, list(arguments))


def test_commands_of_plugins(install):
    install("hello", COMMAND.format(name="hello"))
    assert run("hello").output == "said the plugin\n"
    listing = run("--help").output
    assert "From a plugin." in listing
    assert listing.index("  show") < listing.index("  hello")  # the package's own come first


@pytest.mark.parametrize("name", ["show", "build", "generate"])
def test_a_plugin_cannot_take_the_name_of_a_builtin_command(install, name):
    install("thief", COMMAND.format(name=name))
    with pytest.warns(PluginWarning, match=f"the command '{name}' of the plugin 'thief' is not used"):
        result = run("--help")
    assert "From a plugin." not in result.output


def test_of_two_plugins_the_first_keeps_the_name(install):
    install("a", COMMAND.format(name="hello"))
    install("b", COMMAND.format(name="hello").replace("said the plugin", "said the other"))
    with pytest.warns(PluginWarning, match="'hello' of the plugin 'b'"):
        assert run("hello").output == "said the plugin\n"


def test_a_broken_command_plugin_leaves_the_others(install):
    install("bad", COMMAND.format(name="half") + "\n    raise ValueError('late')")
    install("good", COMMAND.format(name="hello"))
    with pytest.warns(PluginWarning, match="'bad'.*register_commands failed, ValueError: late"):
        result = run("--help")
    assert result.exit_code == 0 and "hello" in result.output and "half" not in result.output


def test_one_builtin_command_loads_no_other_plugin(install):
    install("bad", "raise RuntimeError('must not be imported')")
    assert run("show", "--help").exit_code == 0  # no warning, which would be an error here
    assert "plugin_bad" not in sys.modules


# --- what is documented is true


@pytest.mark.parametrize("hook", HOOKS)
def test_each_hook_is_documented_with_its_arguments(hook):
    arguments = ", ".join(inspect.signature(HOOKS[hook]).parameters)
    assert f"### `{hook}({arguments})`" in DOCS
    assert HOOKS[hook].__doc__


def test_no_other_hook_is_documented():
    assert sorted(re.findall(r"^### `(\w+)\(", DOCS, re.M)) == sorted(HOOKS)


def test_variables_are_documented():
    source = inspect.getsource(sys.modules[Manager.__module__])
    for variable in set(re.findall(r"STEER_[A-Z_]+", source)):
        assert f"`{variable}" in DOCS


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCS, re.M | re.S)


def test_the_tutorial_is_the_example():
    assert blocks("python")[0] == (EXAMPLE / "steer_exclaim.py").read_text("utf-8")
    assert blocks("toml")[0] == (EXAMPLE / "pyproject.toml").read_text("utf-8")


@pytest.fixture
def example(tmp_path) -> Path:
    """A folder in which the example is installed, as its pyproject.toml says."""
    site = tmp_path / "example-site"
    site.mkdir()
    shutil.copy(EXAMPLE / "steer_exclaim.py", site)
    project = (EXAMPLE / "pyproject.toml").read_text("utf-8")
    (entry,) = re.findall(r"^\[project\.entry-points\.steer_plugins\]\n(\w+) = \"(\w+)\"$", project, re.M)
    info = site / "steer_exclaim-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: steer-exclaim\nVersion: 0.1\n", "utf-8")
    (info / "entry_points.txt").write_text(f"[steer_plugins]\n{entry[0]} = {entry[1]}\n", "utf-8")
    return site


def steer(site: Path, *arguments: str) -> str:
    source = Path(steer_plugins.__file__).parents[1]
    path = os.pathsep.join([str(source), str(site), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, "-m", "steer_plugins", *arguments], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout


def test_the_tutorial_works_as_written(example):
    console = blocks("console")[0]
    assert steer(example, "exclaim", "What a day! We walked.") == "0.50\n"
    assert '$ steer exclaim "What a day! We walked."\n0.50\n' in console
    (row,) = [line.split() for line in steer(example, "plugins").splitlines() if line.split()[:1] == ["exclaim"]]
    assert row in [line.split() for line in console.splitlines()]
    listed = json.loads(steer(example, "plugins", "--json"))["plugins"]
    assert {
        "name": "exclaim",
        "source": "steer-exclaim 0.1",
        "hooks": ["register_commands", "register_formats", "register_metrics"],
        "error": None,
    } in listed


def test_the_parts_of_the_tutorial(example, monkeypatch, tmp_path):
    from steer_plugins.store.formats import read_any

    monkeypatch.syspath_prepend(example)
    assert manager().find("metrics", "exclamation")("Go! Now! Please?") == pytest.approx(2 / 3)
    path = tmp_path / "calm.txt"
    path.write_text("layer 3\n3\n4\n", "utf-8")
    vector = read_any(path)
    assert vector.layers == [3] and vector.scales[3, "resid_post"] == 5
    path.write_text("layer 3\nx\n", "utf-8")
    with pytest.raises(VectorError, match="could not convert"):
        read_any(path)
    monkeypatch.delitem(sys.modules, "steer_exclaim", raising=False)


def test_python_of_the_documentation_runs():
    space: dict = {}
    exec(blocks("python")[1], space)
    assert space["score"]("What a lovely day") > 0 and "steer-vector" in space["formats"]
