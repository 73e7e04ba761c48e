"""What the tab says: its sentences, sliders and progress bars, as HTML and updates of gradio's components."""

from __future__ import annotations

import time
from html import escape
from typing import Any

import gradio as gr

from steer_plugins.errors import SteerError
from steer_plugins.steering.grammar import TermSpec
from steer_plugins.store.library import Library

from . import charts, hooks, jobs, loader, webui
from .link import Link, current, current_or_none, why_not
from .settings import settings

MAX_ROWS = 12
"""Sliders that are there, shown or not; gradio 4 cannot add any while it runs. More terms act all the same."""


def rows_note(n: int) -> str:
    """What there is to say about the sliders that are not there."""
    if n == 0:
        return '<p class="steer-quiet">No sliders yet: add a vector, or fit a trait.</p>'
    if n > MAX_ROWS:
        return f'<p class="steer-quiet">{n - MAX_ROWS} more terms act, and have no slider: see the expression.</p>'
    return ""


def slider_of(term: TermSpec) -> Any:
    """A slider as wide as its strength needs: what was typed beyond 1 is shown as it is."""
    poles = poles_named(term.vector)
    info = f"−1 {poles[0]} · 0 off · 1 {poles[1]}" if poles else "0 off"
    if term.op == "project":
        info = "0 off · 1 removed"
    reach = max(1.0, abs(term.strength))
    return gr.update(label=term.vector, info=info, value=term.strength, minimum=-reach, maximum=reach)


def poles_named(name: str) -> tuple[str, str] | None:
    """The ends of the vector that the loaded model has under a name."""
    link = current_or_none()
    try:
        if link is not None:
            return jobs.poles_of(link.library.get(name, link.info.identity))
        return jobs.poles_of(hooks.resolve([TermSpec(name)]).terms[0].vector) if hooks.applies() else None
    except SteerError:
        return None


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
    """The sentence as HTML; a command to type stands out."""
    head, mark, command = sentence.partition("with: ")
    if mark:
        return f"{escape(head)}with: <code>{escape(command)}</code>"
    return escape(sentence)


def note() -> str:
    """What keeps terms from acting on this model; "" when all is well."""
    link = current_or_none()
    wrong = settings().problem and [settings().problem] or []
    if link is not None:
        wrong = [*wrong, *link.usable(settings().active)[1]]
    elif hooks.applies():
        for term in settings().active:
            try:
                hooks.check([term])
            except SteerError as error:
                wrong.append(str(error))
    return "".join(bad(sentence) for sentence in wrong)


def status(link: Link | None) -> str:
    """One line: whether the loaded model can be steered, and where it runs."""
    if link is not None:
        model = escape(webui.shared().model_name or link.info.name)
        wanted = settings().active
        active = len(link.usable(wanted)[0])
        count = f"{active} active" if active == len(wanted) else f"{active} of {len(wanted)} active"
        what = count if wanted else ("nothing set" if settings().on else "switched off")
        where = f"{model} on {escape(link.device)}"
        return f'<div class="steer-status good"><i></i><b>Ready</b><span>{where}</span><span>{what}</span></div>'
    if hooks.applies():
        return (
            '<div class="steer-status good"><i></i><b>Ready</b><span>Transformers loader, through hooks; '
            "training, comparing and activations need llama.cpp</span></div>"
        )
    sentence = why_not() if webui.llama_server() is None else loader.state.problem
    if not webui.loader_name() and loader.state.problem:
        sentence = f"{sentence}; {loader.state.problem}"
    why = coded(sentence or "this server cannot steer")
    return f'<div class="steer-status warn"><i></i><b>Not available</b><span>{why}</span></div>'


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


def traits_note(link: Link | None, missing: list[str]) -> str:
    """What there is to say when nothing is left to fit, or nothing can be."""
    if link is None:
        return '<p class="steer-quiet">Needs a model on the steering server.</p>'
    return "" if missing else '<p class="steer-quiet">All bundled traits have a vector for this model.</p>'


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
            parts.append(f'<div class="steer-job"><b>{name}</b> cancelled</div>')
        else:
            percent = f"{100 * job.share:.0f}"
            seconds = f", {time.monotonic() - job.started:.0f} s" if job.started else ""
            if job.seconds:
                seconds += f" of about {job.seconds:.0f}"
            parts.append(
                f'<div class="steer-job"><b>{name}</b> {escape(job.stage)}{seconds}'
                f'<div class="steer-bar"><i style="width:{percent}%"></i></div></div>'
            )
    return "".join(parts)


def report(name: str) -> str:
    """Charts of a vector's fit and calibration."""
    vector = Library().resolve(name, current().info.identity)
    drawn = charts.report_chart(vector) + charts.curve_chart(vector)
    return f'<p>{escape(charts.summary(vector))}</p><div class="steer-charts">{drawn}</div>'
