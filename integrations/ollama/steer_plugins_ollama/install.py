"""``steer ollama install``: the sidecar as a service of this user. Everything is planned first, and done as planned."""

from __future__ import annotations

import os
import plistlib
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer_plugins.atomic import write_atomically
from steer_plugins.errors import SteerError
from steer_plugins.paths import expand_path

LABEL = "org.steer-plugins.ollama"
UNIT = "steer-ollama.service"
#: Variables of this shell that the service needs to behave as the commands here do.
KEPT: tuple[str, ...] = ("OLLAMA_HOST", "OLLAMA_MODELS", "OLLAMA_KEEP_ALIVE", "OLLAMA_NUM_PARALLEL", "OLLAMA_MAX_LOADED_MODELS")
KEPT += ("OLLAMA_CONTEXT_LENGTH", "OLLAMA_FLASH_ATTENTION", "OLLAMA_KV_CACHE_TYPE", "OLLAMA_LOAD_TIMEOUT", "OLLAMA_ORIGINS")
PATHS = ("OLLAMA_MODELS", "STEER_LIBRARY", "STEER_RUNTIME", "STEER_CACHE", "STEER_MODEL")
KEPT += PATHS[1:]
KEPT += ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")


@dataclass(frozen=True)
class ServicePlan:
    """A file to write (or, without content, to delete) and the commands to run before and after."""

    path: Path
    content: bytes | None
    before: tuple[tuple[str, ...], ...] = ()
    after: tuple[tuple[str, ...], ...] = ()

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        content = None if self.content is None else self.content.decode()
        return {"path": str(self.path), "content": content, "before": list(self.before), "after": list(self.after)}

    def text(self) -> str:
        """For people."""
        parts = [f"run:    {' '.join(one)}" for one in self.before]
        if self.content is None:
            parts.append(f"delete: {self.path}")
        else:
            shown = "\n".join(f"    {line}" for line in self.content.decode().splitlines())
            parts.append(f"write:  {self.path}\n{shown}")
        return "\n".join([*parts, *(f"run:    {' '.join(one)}" for one in self.after)])

    def run(self) -> Iterator[str]:
        """Do it; yields what was done. Raises SteerError at the first thing that fails."""
        for one in self.before:
            _run(one, fatal=False)
        try:
            if self.content is None:
                self.path.unlink(missing_ok=True)
                yield f"deleted {self.path}"
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self.path, self.content)
                yield f"wrote {self.path}"
        except OSError as error:
            raise SteerError(f"{self.path} cannot be changed: {error.strerror or error}") from None
        for one in self.after:
            _run(one, fatal=True)
            yield f"ran {' '.join(one)}"


def _run(command: Sequence[str], *, fatal: bool) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise SteerError(f"{command[0]} cannot be run: {error.strerror or error}") from None
    if done.returncode and fatal:
        said = " ".join((done.stderr or done.stdout).split())[:300]
        raise SteerError(f"`{' '.join(command)}` failed ({said}): run it yourself, the rest is done")


def plan(options: Sequence[str], *, platform: str | None = None, environ: Mapping[str, str] | None = None) -> ServicePlan:
    """What installing does. ``options``: those of ``steer ollama serve``.

    Raises:
        SteerError: this system has neither systemd nor launchd.
    """
    platform, env = platform or sys.platform, os.environ if environ is None else environ
    command = [sys.executable, "-m", "steer_plugins", "ollama", "serve", *options]
    kept = {key: env[key] for key in KEPT if env.get(key)}
    for key in PATHS:
        if key in kept:  # the service starts elsewhere
            kept[key] = str(expand_path(kept[key]).absolute())
    if platform == "darwin":
        path = agent_path()
        return ServicePlan(path, launchd_agent(command, kept), after=(("launchctl", "load", "-w", str(path)),))
    if platform.startswith("linux"):
        if shutil.which("systemctl") is None and environ is None:
            raise SteerError("there is no systemctl here: start `steer ollama serve` by the means of this system")
        after = (("systemctl", "--user", "daemon-reload"), ("systemctl", "--user", "enable", "--now", UNIT))
        return ServicePlan(unit_path(env), systemd_unit(command, kept).encode(), after=after)
    raise SteerError("install knows systemd and launchd: start `steer ollama serve` by the means of this system")


def removal(*, platform: str | None = None, environ: Mapping[str, str] | None = None) -> ServicePlan:
    """What undoing it does. Raises SteerError."""
    platform, env = platform or sys.platform, os.environ if environ is None else environ
    if platform == "darwin":
        return ServicePlan(agent_path(), None, before=(("launchctl", "unload", "-w", str(agent_path())),))
    if platform.startswith("linux"):
        before = (("systemctl", "--user", "disable", "--now", UNIT),)
        return ServicePlan(unit_path(env), None, before, (("systemctl", "--user", "daemon-reload"),))
    raise SteerError("install knows systemd and launchd: there is nothing to remove here")


def unit_path(environ: Mapping[str, str]) -> Path:
    """Where the systemd user unit belongs. As everywhere, a relative path in ``XDG_CONFIG_HOME`` is ignored."""
    named = environ.get("XDG_CONFIG_HOME", "")
    base = Path(named) if os.path.isabs(named) else Path.home() / ".config"
    return base / "systemd" / "user" / UNIT


def agent_path() -> Path:
    """Where the launchd agent belongs."""
    return Path.home() / "Library" / "LaunchAgents" / f"{LABEL}.plist"


def systemd_unit(command: Sequence[str], environ: Mapping[str, str]) -> str:
    """The unit file."""
    lines = "".join(f"Environment={_quoted(f'{key}={value}')}\n" for key, value in environ.items())
    return (
        "[Unit]\nDescription=Steering for Ollama (steer ollama serve)\n\n"
        f"[Service]\nExecStart={' '.join(_quoted(word).replace('$', '$$') for word in command)}\n{lines}"
        "Restart=on-failure\nRestartSec=3\nKillMode=mixed\nTimeoutStopSec=30\n\n"
        "[Install]\nWantedBy=default.target\n"
    )


def _quoted(text: str) -> str:
    """A word of a unit file: specifiers, quotes and white space lose their meaning."""
    if any(not c.isprintable() for c in text):
        raise SteerError(f"{text[:60]!r} cannot stand in a unit file: it has control characters")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"' if any(c in " \t\"\\'$;" for c in text) else escaped


def launchd_agent(command: Sequence[str], environ: Mapping[str, str]) -> bytes:
    """The property list."""
    log = str(Path.home() / "Library" / "Logs" / "steer-ollama.log")
    return plistlib.dumps(
        {
            "Label": LABEL,
            "ProgramArguments": list(command),
            "EnvironmentVariables": dict(environ),
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "StandardErrorPath": log,
            "StandardOutPath": log,
        }
    )
