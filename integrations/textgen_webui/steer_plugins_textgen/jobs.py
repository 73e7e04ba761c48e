"""Fitting vectors on the running server, one after the other, while the chat goes on."""

from __future__ import annotations

import hashlib
import json
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from steer_plugins.errors import DataError, SpecError, SteerError
from steer_plugins.steering.vector import SteeringVector, check_name, layer_ranges
from steer_plugins.training.extract import ContrastData, Pair, Side, chat
from steer_plugins.training.imitate import Imitation
from steer_plugins.training.train import Training, TrainOptions
from steer_plugins.training.traits import Trait, bundled_traits, load_trait

from . import webui
from .link import Link

MAX_LINES = 500
MAX_JOBS = 64
"""Vectors that may wait at the same time."""
N_HELDOUT = 10


@dataclass(frozen=True)
class SystemPrompt:
    """A system prompt, to be made a slider of: strength 1 does what it does."""

    text: str


Source = Trait | ContrastData | SystemPrompt


class Cancelled(Exception):
    """The user does not want it any more."""


@dataclass
class TrainJob:
    """One vector in the making. ``state``: ``waiting``, ``running``, ``done``, ``failed`` or ``cancelled``."""

    name: str
    source: Source
    calibrate: str
    overwrite: bool
    link: Link
    state: str = "waiting"
    stage: str = "waiting"
    tokens: int = 0
    total: int = 0
    started: float = 0.0
    seconds: float = 0.0
    error: str = ""
    vector: SteeringVector | None = None
    provisional: bool = False
    """Whether its slider is there already, with a strength that is still a guess."""
    cancel: threading.Event = field(default_factory=threading.Event)

    @property
    def share(self) -> float:
        """How far it is, 0 to 1; an estimate, which never says that it is finished before it is."""
        if self.state == "done":
            return 1.0
        return min(0.99, self.tokens / self.total) if self.total else 0.0


class Trainer:
    """A queue of jobs and the thread that works on it.

    ``on_done`` is called, from that thread, once for each job, when its vector can first be used.
    """

    def __init__(self) -> None:
        self._jobs: list[TrainJob] = []
        self._lock = threading.Lock()
        self._worker: threading.Thread | None = None
        self.on_done: Callable[[TrainJob], None] = lambda job: None

    @property
    def jobs(self) -> list[TrainJob]:
        """All of this session, oldest first."""
        with self._lock:
            return list(self._jobs)

    @property
    def active(self) -> bool:
        """Whether anything waits or runs."""
        return any(job.state in ("waiting", "running") for job in self.jobs)

    @property
    def stopping(self) -> bool:
        """Whether what runs has been told to stop, and has not come to that yet."""
        return any(job.state == "running" and job.cancel.is_set() for job in self.jobs)

    def add(self, link: Link, name: str, source: Source, *, calibrate: str = "quick", overwrite: bool = False) -> TrainJob:
        """Put a vector in the queue.

        Raises:
            VectorError: a bad name. SpecError: the name is taken, in the library or in the queue.
        """
        check_name(name)
        if not overwrite and link.library.path(name, link.info.identity).exists():
            raise SpecError(f"the library has {name!r} for this model already: choose another name, or allow it to be replaced")
        job = TrainJob(name, source, calibrate, overwrite, link)
        with self._lock:
            if any(other.name == name and other.state in ("waiting", "running") for other in self._jobs):
                raise SpecError(f"{name!r} is being fitted already")
            if sum(other.state in ("waiting", "running") for other in self._jobs) >= MAX_JOBS:
                raise SpecError(f"{MAX_JOBS} vectors wait to be fitted already: let some of them finish first")
            self._jobs = [*(other for other in self._jobs if other.state in ("waiting", "running")), job]
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, daemon=True, name="steering fits vectors")
                self._worker.start()
        return job

    def cancel(self) -> None:
        """Stop what runs, after the tokens it is at, and forget what waits."""
        for job in self.jobs:
            job.cancel.set()
            if job.state == "waiting":
                job.state = "cancelled"

    def _work(self) -> None:
        while True:
            with self._lock:
                job = next((one for one in self._jobs if one.state == "waiting"), None)
                if job is None:
                    self._worker = None
                    return
            self._run(job)

    def _run(self, job: TrainJob) -> None:
        job.state, job.stage, job.started = "running", "measuring the speed", time.monotonic()
        try:
            with webui.busy():
                job.vector = self._train(job)
            job.state = "done"
            if not job.provisional:
                self.on_done(job)
        except Cancelled:
            job.state = "cancelled"
        except SteerError as error:
            job.state, job.error = "failed", str(error)
        except Exception as error:  # the thread has to go on, and the user has to know
            job.state, job.error = "failed", f"{type(error).__name__}: {error}"
            webui.log(f"fitting {job.name} failed, {job.error}", error=True)

    def _train(self, job: TrainJob) -> SteeringVector:
        def report(stage: str, tokens: int) -> None:
            if job.cancel.is_set():
                raise Cancelled
            job.stage, job.tokens = stage, job.tokens + tokens

        library, identity = job.link.library, job.link.info.identity
        if isinstance(job.source, SystemPrompt):
            vector = Imitation(job.link.engine, job.name, job.source.text).run(lambda stage, done, total: report(stage, 0))
            library.put(vector, identity, overwrite=job.overwrite)
            return vector
        report("measuring the speed", 0)
        training = Training(job.link.engine, job.name, job.source, TrainOptions(calibrate=job.calibrate))
        plan = training.plan()
        job.total, job.seconds = max(1, plan.tokens), plan.seconds
        fit = training.fit(report)
        if job.calibrate != "none" and not (job.overwrite and library.path(job.name, identity).exists()):
            # a slider now, its strength 1 a guess; calibrating goes on behind it
            rough = Training(job.link.engine, job.name, job.source, TrainOptions(calibrate="none")).finish(fit)
            report("writing", 0)
            library.put(rough, identity, overwrite=job.overwrite)
            job.provisional = True
            self.on_done(job)
        vector = training.finish(fit, report)
        report("writing", 0)
        library.put(vector, identity, overwrite=job.overwrite or job.provisional)
        return vector


trainer = Trainer()


# ---- what to fit ----


def missing_traits(link: Link) -> list[str]:
    """Bundled traits that this model has no vector for."""
    there = {entry.name for entry in link.library.list(link.info.identity)}
    return [name for name in bundled_traits() if name not in there]


def poles_of(vector: SteeringVector) -> tuple[str, str] | None:
    """What the two ends of a vector are called, negative first: by whom it was fitted, else by the trait of its name."""
    source = (vector.provenance or {}).get("source")
    poles = source.get("poles") if isinstance(source, dict) else None
    if poles is None and vector.name in bundled_traits():
        poles = load_trait(vector.name).poles
    if not isinstance(poles, dict) or not {"negative", "positive"} <= set(poles):
        return None
    return str(poles["negative"])[:60], str(poles["positive"])[:60]


def layers_of(vector: SteeringVector) -> str:
    """The layers that a vector has, as ranges."""
    return layer_ranges(vector.layers)


def lines_of(text: str, what: str) -> list[str]:
    """The lines of a box that hold something. Raises DataError when none does, or too many do."""
    lines = [line.strip() for line in str(text or "").splitlines() if line.strip()]
    if not lines:
        raise DataError(f"the {what} box is empty: write at least one line")
    if len(lines) > MAX_LINES:
        raise DataError(f"the {what} box has {len(lines)} lines: {MAX_LINES} are the limit")
    return lines


def trait_of(name: str, positive: str, negative: str, n_prompts: int) -> Trait:
    """A trait from descriptions, one on each line, of what texts of either pole are like ("warm and kind").

    The prompts are those of the bundled traits; line i of one box goes with line i of the other.

    Raises:
        DataError: an empty box, or boxes of different lengths.
    """
    sides = {"positive": lines_of(positive, "positive"), "negative": lines_of(negative, "negative")}
    if len(sides["positive"]) != len(sides["negative"]):
        raise DataError("the two boxes have different numbers of lines: line 1 goes with line 1, line 2 with line 2")
    train, held = _prompts(n_prompts)
    frames = ("Whatever you are asked, write a text that is {}.", "Answer in a way that is {}. Every sentence is {}.")
    system = {pole: [f.replace("{}", line) for line in lines for f in frames] for pole, lines in sides.items()}
    return Trait.from_dict(
        {
            "format": "steer-plugins-trait-v1",
            "name": check_name(name),
            "poles": {pole: lines[0][:60] for pole, lines in sides.items()},
            "description": f"Made in text-generation-webui: {sides['positive'][0]} against {sides['negative'][0]}."[:500],
            "system": system,
            "train_prompts": train,
            "heldout_prompts": held,
        },
        "the descriptions",
    )


def pairs_of(positive: str, negative: str) -> ContrastData:
    """Pairs from two lists of prompts: line i of one against line i of the other, as messages of a user.

    Raises:
        DataError: an empty box, or boxes of different lengths.
    """
    one, other = lines_of(positive, "positive"), lines_of(negative, "negative")
    if len(one) != len(other):
        raise DataError(f"{len(one)} positive and {len(other)} negative prompts: line 1 goes with line 1, line 2 with line 2")
    pairs = tuple(Pair(Side(chat(a)), Side(chat(b))) for a, b in zip(one, other, strict=True))
    content = json.dumps([one, other], ensure_ascii=False).encode()
    return ContrastData("pairs", pairs, hashlib.sha256(content).hexdigest(), {"file": "text-generation-webui"})


def _prompts(n: int) -> tuple[list[str], list[str]]:
    """Prompts to fit on and to hold out, of all bundled traits, the same ones each time."""
    traits = [load_trait(name) for name in bundled_traits()]
    held = list(dict.fromkeys(prompt for trait in traits for prompt in trait.heldout_prompts))
    train = list(dict.fromkeys(prompt for trait in traits for prompt in trait.train_prompts if prompt not in held))
    shuffled = random.Random(0)
    shuffled.shuffle(train)
    shuffled.shuffle(held)
    return train[: max(4, min(int(n), len(train)))], held[:N_HELDOUT]


def prompt_of_chat(character: str) -> tuple[str, str]:
    """(name, system prompt) of what the chat is with: a character's description, or in instruct mode the system message.

    Both are "" where there is none.
    """
    shared = webui.shared()
    state = {**getattr(shared, "settings", {}), **getattr(shared, "persistent_interface_state", {})}
    instruct = state.get("mode") == "instruct"
    text = str(state.get("custom_system_message" if instruct else "context") or "").strip()
    if not text:
        return "", ""
    text = text.replace("{{char}}", character).replace("{{user}}", "the user")
    name = "system-prompt" if instruct else re.sub(r"[^a-z0-9]+", "-", character.lower()).strip("-")
    return name[:60] or "character", text


def max_prompts() -> int:
    """How many prompts there are to fit on."""
    return len(_prompts(1 << 30)[0])


def library_names(link: Link) -> list[str]:
    """All vectors of the model, by name."""
    return [entry.name for entry in link.library.list(link.info.identity)]


def describe(jobs: Sequence[TrainJob]) -> list[dict[str, Any]]:
    """Plain data on jobs, for the API and tests."""
    return [{"name": job.name, "state": job.state, "stage": job.stage, "share": job.share, "error": job.error} for job in jobs]
