"""What the tab says: its sentences, sliders and progress bars, as HTML and updates of gradio's components."""

from __future__ import annotations

import re
import time
from html import escape

from steer_plugins.steering.grammar import TermSpec
from steer_plugins.store.library import Library

from . import charts, hooks, jobs, loader, webui, wishes
from .link import Link, current, why_not
from .settings import settings


def window_text(term: TermSpec) -> str:
    """The layers as they are written in the grammar."""
    if term.layers is None:
        return ""
    lo, hi = term.layers
    return f"{lo}" if lo == hi else f"{lo}-{'' if hi is None else hi}"


def first_use(names: list[str]) -> None:
    """Sliders at 0 for the bundled traits that the model has vectors for, before the user has set anything."""
    there = [name for name in jobs.bundled_traits() if name in names]
    if there and not settings().touched:
        settings().set_terms([TermSpec(name, 0.0) for name in there])


def names_of(link: Link | None) -> list[str]:
    """The vectors that can be added."""
    if link is not None:
        return jobs.library_names(link)
    return [vector["name"] for vector in hooks.vectors()] if hooks.applies() else []


def bad(sentence: str) -> str:
    """A sentence that something is wrong."""
    return f'<div class="steer-note bad" role="alert">{coded(sentence)}</div>'


def coded(sentence: str) -> str:
    """The sentence as HTML; a command to type, and what is between backticks, stands out."""
    head, mark, command = sentence.partition("with: ")
    if mark:
        return f"{escape(head)}with: <code>{escape(command)}</code>"
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(sentence))


def acting(link: Link | None, wanted: list[TermSpec]) -> tuple[list[TermSpec], list[str]]:
    """The terms that act on the loaded model, and a sentence for each of the others."""
    if link is not None:
        return link.usable(wanted)
    return wishes.fitting(wanted, hooks.check) if hooks.applies() else ([], [])


def status(link: Link | None) -> str:
    """One line: whether the loaded model can be steered, and where it runs."""
    if link is not None:
        model = escape(webui.shared().model_name or link.info.name)
        where = f"{model} on {escape(link.device)}"
        return f'<div class="steer-status good"><i></i><b>Ready</b><span>{where}</span><span>{_counted(link)}</span></div>'
    if hooks.applies():
        return (
            '<div class="steer-status good"><i></i><b>Ready</b><span>Transformers loader, through hooks; '
            f"training, comparing and activations need llama.cpp</span><span>{_counted(None)}</span></div>"
        )
    sentence = why_not() if webui.llama_server() is None else loader.state.problem
    if not webui.loader_name() and loader.state.problem:
        sentence = f"{sentence}; {loader.state.problem}"
    why = coded(sentence or "this server cannot steer")
    return f'<div class="steer-status warn"><i></i><b>Not available</b><span>{why}</span></div>'


def _counted(link: Link | None) -> str:
    """How many sliders act."""
    wanted = settings().active
    n = len(acting(link, wanted)[0])
    if not settings().on:
        return "switched off"
    if not settings().terms:
        return "no sliders"
    if not wanted:
        return "all sliders at 0"
    return f"{n} active" if n == len(wanted) else f"{n} of {len(wanted)} active"


def details(link: Link | None) -> str:
    """The server in use, and what is lost with it."""
    from . import api

    lines = []
    if link is not None:
        lines.append(f"llama-server with steering: <code>{escape(loader.state.server)}</code>, on {escape(link.device)}.")
        lines.append(coded(loader.LOST))
    elif loader.state.problem:
        lines.append(coded(loader.state.problem))
    if api.problem:
        lines.append(escape(api.problem))
    else:
        lines.append(
            'API requests take <code>"steering": "mood:0.6"</code>; '
            "<code>GET /v1/internal/steering</code> lists vectors and presets."
        )
    return "".join(f"<p>{line}</p>" for line in lines)


def progress() -> str:
    """A bar for each job of this session that has something to say."""
    parts = []
    for job in jobs.trainer.jobs:
        name = escape(job.name)
        if job.state == "failed":
            parts.append(bad(f"{job.name}: {job.error}"))
        elif job.state == "done" and job.vector is not None:
            parts.append(f'<div class="steer-job done"><b>Fitted</b> {escape(charts.summary(job.vector))}</div>')
        elif job.state == "cancelled":
            left = "; its slider stays, provisional" if job.provisional else ""
            parts.append(f'<div class="steer-job"><b>{name}</b> cancelled{left}</div>')
        else:
            percent = f"{100 * job.share:.0f}"
            parts.append(
                f'<div class="steer-job"><b>{name}</b> {escape(_step(job))}'
                f'<div class="steer-bar"><i style="width:{percent}%"></i></div></div>'
            )
    return "".join(parts)


STEPS = {"measuring the speed": 1, "reading": 2, "calibrating": 3, "writing": 3}


def step() -> str:
    """Where the job is that runs, as plain text; "" when none does."""
    running = [job for job in jobs.trainer.jobs if job.state == "running"]
    return f"{running[0].name}: {_step(running[0])}" if running else ""


def _step(job: jobs.TrainJob) -> str:
    """Which step of how many a job is at, and how long it has taken."""
    if job.state == "waiting":
        return "waits for its turn"
    if job.cancel.is_set():
        return "stops after the tokens it is at"
    if isinstance(job.source, jobs.SystemPrompt):
        return f"{job.stage}, {time.monotonic() - job.started:.0f} s"
    steps = 2 if job.calibrate == "none" else 3
    said = f"step {min(STEPS.get(job.stage, steps), steps)} of {steps}, {job.stage}"
    spent = time.monotonic() - job.started
    if job.seconds and spent > job.seconds:
        said += f": {spent:.0f} s, longer than the {job.seconds:.0f} s that were expected"
    elif job.seconds:
        said += f": {spent:.0f} s of about {job.seconds:.0f}"
    if job.provisional:
        said += "; its slider is there, provisional: strength 1 is a guess until this is done"
    return said


def report(name: str) -> str:
    """Charts of a vector's fit and calibration."""
    vector = Library().resolve(name, current().info.identity)
    drawn = charts.report_chart(vector) + charts.curve_chart(vector)
    return f'<p>{escape(charts.summary(vector))}</p><div class="steer-charts">{drawn}</div>'
