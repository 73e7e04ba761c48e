"""The Steering tab, for gradio 4.37 as the webui has it. What a widget shows is kept in :mod:`.settings`, not in the page."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from steer_plugins.errors import SpecError, SteerError
from steer_plugins.steering.grammar import format_terms
from steer_plugins.steering.vector import check_name

from . import jobs, loader, replies, shared, webui, wording
from .link import current, current_or_none
from .pages import add_slider, follow, pages
from .settings import settings

MAX_COMPARE = 512
"""Tokens of a comparison."""


def build() -> None:
    """Make the tab's components and connect them."""
    if webui.multi_user():
        gr.Markdown(
            "Steering by slider is off in multi-user mode: one slider would move everybody's replies. "
            "Requests of the API carry their own `steering`."
        )
        return
    Tab()


def told(at: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Show a handler's SteerError in the component ``at``, beside what was pressed, then refresh the tab."""

    def decorate(handler: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(handler)
        def wrapped(self: Tab, *values: Any) -> Any:
            try:
                handler(self, *values)
            except SteerError as error:
                return self.view(problem=str(error), at=at)
            return self.view()

        return wrapped

    return decorate


class Tab:
    """One page's tab. Sliders, presets and traits are drawn by ``page.js`` (see :mod:`.pages`), the rest is gradio's.

    ``view()`` gives a value for every component in ``self.all``, in that order.
    """

    def __init__(self) -> None:
        self.all: list[Any] = []
        with gr.Column(elem_id="steering-tab"):
            gr.HTML('<div id="steering-panel"></div>')
            self.wishes = gr.Textbox(elem_id="steering-send", elem_classes="steer-hidden", show_label=False)
            self.answer = gr.Textbox(elem_id="steering-answer", elem_classes="steer-hidden", show_label=False)
            self._compare()
            self.shared = shared.Panel()
            self._train()
            self._activations()
            self._server()
        self._connect()
        jobs.trainer.on_done = add_slider

    def _add(self, component: Any) -> Any:
        self.all.append(component)
        return component

    # ---- parts of the page ----

    def _compare(self) -> None:
        with gr.Accordion("Compare: the same prompt unsteered and steered", open=False, elem_id="steering-compare"):
            with gr.Row():
                self.prompt = gr.Textbox(value="Describe a walk in the forest.", label="Prompt", scale=5, lines=1, max_lines=6)
                self.length = gr.Slider(16, MAX_COMPARE, value=96, step=16, label="Tokens", scale=2, min_width=140)
                self.run = gr.Button("Compare", elem_classes="small-button", scale=0, min_width=100, elem_id="steering-run")
            with gr.Row():
                self.plain = gr.Textbox(label="Unsteered", lines=7, interactive=False, elem_id="steering-plain")
                self.steered = gr.Textbox(label="Steered", lines=7, interactive=False, elem_id="steering-steered")
            self.compare_note = gr.HTML()

    def _train(self) -> None:
        with gr.Accordion("Train a vector on the loaded model", open=False, elem_id="steering-train"):
            with gr.Row():
                self.name = gr.Textbox(label="Name", placeholder="politeness", scale=2, elem_id="steering-name")
                self.kind = gr.Radio(
                    ["Descriptions", "Prompt pairs"], value="Descriptions", label="Contrast by", scale=2, min_width=220
                )
                self.level = gr.Dropdown(
                    [("none: 1 is a guess", "none"), ("quick: minutes", "quick"), ("full: several times that", "full")],
                    value="quick",
                    label="Calibrate",
                    elem_classes="slim-dropdown",
                    elem_id="steering-level",
                    min_width=110,
                )
                self.count = gr.Slider(4, jobs.max_prompts(), value=24, step=1, label="Prompts to fit on", scale=2, min_width=160)
            with gr.Row():
                self.positive = gr.Textbox(
                    label="Positive, strength 1",
                    info="A description on each line, or a whole prompt on each line",
                    placeholder="polite, warm and full of respect",
                    lines=4,
                    elem_id="steering-positive",
                )
                self.negative = gr.Textbox(
                    label="Negative, strength −1",
                    info="Line by line the counterpart",
                    placeholder="rude, cold and full of contempt",
                    lines=4,
                    elem_id="steering-negative",
                )
            with gr.Row():
                self.overwrite = gr.Checkbox(label="Replace a vector of this name", scale=0, min_width=240)
                self.train = gr.Button("Train", elem_classes="small-button", elem_id="steering-start")
                self.stop = self._add(gr.Button("Cancel", elem_classes="small-button", visible=False))
            self.train_note = self._add(gr.HTML())
            self.train_progress = self._add(gr.HTML(elem_id="steering-train-progress"))
            self.shown = self._add(gr.Dropdown([], label="Report of", elem_classes="slim-dropdown", elem_id="steering-report-of"))
            self.report = gr.HTML(elem_id="steering-report")

    def _activations(self) -> None:
        with gr.Accordion("Activations of the last reply", open=False, elem_id="steering-activations"):
            with gr.Row():
                self.along = self._add(
                    gr.Dropdown([], label="Along the vector", elem_classes="slim-dropdown", elem_id="steering-along", scale=4)
                )
                self.read = gr.Button("Read", elem_classes="small-button", scale=0, min_width=90, elem_id="steering-read")
            self.picture = gr.HTML(elem_id="steering-picture")

    def _server(self) -> None:
        with gr.Accordion("Server and API", open=False, elem_id="steering-server"):
            self.details = self._add(gr.HTML())
            self.api_too = self._add(
                gr.Checkbox(
                    label="Steer requests of the API that have no steering field of their own", elem_id="steering-api-too"
                )
            )
            self.cpu_too = self._add(gr.Checkbox(label="Use the steering server although it runs on the CPU only"))
            self.adopt = gr.Button("Look for the steering server again", elem_classes="small-button", elem_id="steering-adopt")
            self.server_note = self._add(gr.HTML())

    # ---- what leads to what ----

    def _connect(self) -> None:
        ui = webui.shared()
        # no names under which other programs could call what the page does
        private: dict[str, Any] = {"api_name": False}
        quick: dict[str, Any] = {"show_progress": "hidden", **private}
        # always_last: what is wished while an answer is under way is sent after it
        self.wishes.input(pages.answer, [self.wishes], [self.answer], trigger_mode="always_last", **quick)
        self.answer.change(None, [self.answer], None, js="(text) => window.steering && window.steering.take(text)", **private)
        watch: dict[str, Any] = {"concurrency_limit": None, **quick}
        start = [self.name, self.kind, self.level, self.count, self.positive, self.negative, self.overwrite]
        self.train.click(self.start_training, start, self.all, **quick).then(self.watch, None, self.all, **watch)
        self.stop.click(jobs.trainer.cancel, None, None, **quick)
        self.shown.change(self.show_report, [self.shown], [self.report], **quick)
        self.run.click(
            self.compare,
            [self.prompt, self.length],
            [self.plain, self.steered, self.compare_note],
            concurrency_limit=None,
            **quick,
        )
        self.read.click(self.show_activations, [self.along], [self.picture], show_progress="minimal", **private)
        self.shared.connect(self.view, self.all, quick)
        self.api_too.input(functools.partial(self.flag, "api_too"), [self.api_too], self.all, **quick)
        self.cpu_too.input(functools.partial(self.flag, "cpu_too"), [self.cpu_too], self.all, **quick)
        self.adopt.click(self.look_again, None, self.all, show_progress="minimal", **private)
        character = ui.gradio.get("character_menu")
        if character is not None:
            character.change(new_character, [character], None, **quick)
        page = ui.gradio.get("interface")
        if page is not None:
            page.load(functools.partial(self.view, fresh=True), None, self.all, **quick).then(self.watch, None, self.all, **watch)
        tab = getattr(gr.context.Context, "block", None)
        if tab is not None and hasattr(tab, "select"):  # a model may have come or gone meanwhile
            tab.select(self.view, None, self.all, js="() => { window.steering && window.steering.refresh(); return [] }", **quick)

    # ---- handlers ----

    @told("train_note")
    def start_training(
        self, name: str, kind: str, level: str, count: float, positive: str, negative: str, overwrite: bool
    ) -> None:
        name = check_name((name or "").strip())
        source: jobs.Source
        if kind == "Descriptions":
            source = jobs.trait_of(name, positive, negative, int(count))
        else:
            source = jobs.pairs_of(positive, negative)
        jobs.trainer.add(current(), name, source, calibrate=level, overwrite=bool(overwrite))

    def watch(self) -> Iterator[list[Any]]:
        """The progress of what is being fitted, until nothing is any more. Another page may watch the same."""
        nothing = [gr.update() for _ in self.all]
        if not jobs.trainer.active:
            yield nothing  # a generator that yields nothing would set every component to null
            return
        at = [i for i, component in enumerate(self.all) if component is self.train_progress]
        while jobs.trainer.active:
            values = list(nothing)
            for i in at:
                values[i] = gr.update(value=wording.progress())
            yield values
            time.sleep(0.5)
        done = [job for job in jobs.trainer.jobs if job.state == "done"]
        yield self.view(show=done[-1].name if done else None)

    def show_report(self, name: str | None) -> str:
        try:
            return wording.report(name) if name else ""
        except SteerError as error:
            return wording.bad(str(error))

    def compare(self, prompt: str, length: float) -> Iterator[tuple[Any, Any, Any]]:
        try:
            terms = settings().active
            if not terms:
                raise SpecError("nothing is steered: move a slider, or switch steering on")
            label = f"Steered: {format_terms(terms)}"
            for plain, steered in replies.compare(current(), prompt or "", terms, max(1, min(int(length), MAX_COMPARE))):
                yield plain, gr.update(value=steered, label=label), ""
        except SteerError as error:
            yield gr.update(), gr.update(), wording.bad(str(error))

    def show_activations(self, name: str | None) -> str:
        try:
            link = current()
            if not name:
                raise SpecError("choose a vector")
            return replies.activations(link, name)
        except SteerError as error:
            return wording.bad(str(error))

    def flag(self, name: str, value: bool) -> list[Any]:
        settings().set_flag(name, value)
        return self.view()

    @told("server_note")
    def look_again(self) -> None:
        loader.devices.cache_clear()
        loader.adopt()

    # ---- what is shown ----

    def view(self, *, problem: str = "", at: str = "", show: str | None = None, fresh: bool = False) -> list[Any]:
        """A value for each of ``self.all``. ``problem``: what the last action came to, said in the component ``at``;
        ``show``: the report to open; ``fresh``: the page has just been opened, so nobody has chosen anything in it."""
        link = current_or_none()
        names = wording.names_of(link)
        values: dict[Any, Any] = {
            self.stop: gr.update(visible=jobs.trainer.active),
            self.train_progress: wording.progress(),
            self.shown: gr.update(choices=names, **({"value": show} if show or fresh else {})),
            self.along: gr.update(choices=names, **({"value": names[0] if names else None} if fresh else {})),
            self.train_note: "",
            self.server_note: "",
            self.details: wording.details(link),
            self.api_too: settings().api_too,
            self.cpu_too: gr.update(value=settings().cpu_too, visible=settings().cpu_too or "CPU only" in loader.state.problem),
        }
        if problem:
            values[getattr(self, at)] = wording.bad(problem)
        return [values[component] for component in self.all]


def new_character(character: str | None) -> None:
    """The chat is with another character: its preset comes, the one before's goes."""
    if settings().meet(character or ""):
        follow()
