"""The Steering tab, for gradio 4.37 as the webui has it. What a widget shows is kept in :mod:`.settings`, not in the page."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from steer_plugins.errors import SpecError, SteerError
from steer_plugins.steering.grammar import TermSpec, parse
from steer_plugins.steering.vector import OPS, check_name

from . import hooks, jobs, loader, replies, shared, webui, wording
from .link import current, current_or_none
from .settings import settings

OWN = "the vector's own"
FIT = "Fit in the background"
MAX_COMPARE = 512
"""Tokens of a comparison."""
EARLIER = "the steering has changed since this text was shown: press Enter to go back to it, or ↻ to see what acts"
WINDOW = "from-to, such as 10-20; empty: all"


def build() -> None:
    """Make the tab's components and connect them."""
    if webui.multi_user():
        gr.Markdown(
            "Steering by slider is off in multi-user mode: one slider would move everybody's replies. "
            "Requests of the API carry their own `steering`."
        )
        return
    Tab()


def told(at: str = "", *, keep: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Show a handler's SteerError in the tab, then refresh it.

    Args:
        at: the component beside the button, which says it as well as the note under the expression.
        keep: the component that was typed into, which keeps what was typed.
    """

    def decorate(handler: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(handler)
        def wrapped(self: Tab, *values: Any) -> Any:
            try:
                handler(self, *values)
            except SteerError as error:
                return self.view(problem=str(error), at=at, keep=keep)
            return self.view()

        return wrapped

    return decorate


class Tab:
    """One page's tab. ``view()`` gives a value for every component in ``self.all``, in that order."""

    def __init__(self) -> None:
        self.all: list[Any] = []
        self.rows: list[tuple[Any, Any, Any, Any]] = []
        self._listed: dict[str, list[str]] = {}
        self._said: deque[str] = deque(maxlen=200)  # expressions that pages were told
        with gr.Column(elem_id="steering-tab"):
            self.status = self._add(gr.HTML(elem_id="steering-status"))
            with gr.Row():
                with gr.Column(scale=3, min_width=320):
                    self._sliders()
                    self._expression()
                    self._advanced()
                with gr.Column(scale=2, min_width=320):
                    self._presets()
                    self._traits()
            self._compare()
            self.shared = shared.Panel()
            self._train()
            self._activations()
            self._server()
            self.stale = gr.Textbox(elem_classes="steer-hidden", show_label=False)
        self._connect()
        jobs.trainer.on_done = add_slider

    def _add(self, component: Any) -> Any:
        self.all.append(component)
        return component

    # ---- parts of the page ----

    def _sliders(self) -> None:
        with gr.Row(elem_classes="steer-head"):
            gr.Markdown("### Sliders")
            self.zero_all = self._add(
                gr.Button("All to 0", elem_classes="small-button", elem_id="steering-zero", scale=0, min_width=84, visible=False)
            )
            self.on = self._add(gr.Checkbox(label="Steering on", elem_id="steering-on", scale=0, min_width=140))
        self.empty = self._add(gr.HTML())
        for i in range(wording.MAX_ROWS):
            with gr.Row(visible=False, elem_classes="steer-row") as row:
                slider = gr.Slider(-1, 1, step=0.05, elem_id=f"steering-slider-{i}", scale=6, min_width=180)
                zero = gr.Button("0", elem_classes="refresh-button", scale=0, min_width=36)
                remove = gr.Button("✕", elem_classes="refresh-button", scale=0, min_width=36)
            self._add(row)
            self._add(slider)
            self.rows.append((row, slider, zero, remove))
        with gr.Row():
            self.choice = self._add(
                gr.Dropdown([], label="Add a vector", elem_classes="slim-dropdown", elem_id="steering-choice", scale=4)
            )
            self.add = gr.Button("Add", elem_classes="small-button", scale=1, min_width=80, elem_id="steering-add")
            self.refresh = gr.Button("↻", elem_classes="refresh-button", scale=0, min_width=36, elem_id="steering-refresh")

    def _expression(self) -> None:
        self.text = self._add(
            gr.Textbox(
                label="Expression",
                info="The same as text, for the API and the command line: mood:0.6 + succinctness:-0.3@10-20?response + !hedging",
                elem_id="steering-expression",
                lines=1,
                max_lines=4,
            )
        )
        self.note = self._add(gr.HTML(elem_id="steering-note"))

    def _advanced(self) -> None:
        with gr.Accordion("Advanced: layers, operation, scope", open=False, elem_classes="tgw-accordion"):
            self.term = self._add(gr.Dropdown([], label="Term", elem_classes="slim-dropdown", type="index"))
            with gr.Row():
                self.window = gr.Textbox(label="Layers", info=WINDOW, min_width=120)
                self.op = gr.Dropdown([OWN, *OPS], value=OWN, label="Operation", elem_classes="slim-dropdown", min_width=120)
                self.scope = gr.Textbox(label="Scope", info="all, prompt, response, thinking, answer, or 5-20", min_width=120)
            self.apply = gr.Button("Apply", elem_classes="small-button")
            self.term_note = self._add(gr.HTML())

    def _presets(self) -> None:
        gr.Markdown("### Presets")
        with gr.Row():
            self.preset = self._add(
                gr.Dropdown(
                    [], label="Preset", allow_custom_value=True, elem_classes="slim-dropdown", elem_id="steering-preset", scale=4
                )
            )
        with gr.Row():
            self.load = gr.Button("Load", elem_classes="small-button", min_width=60)
            self.save = gr.Button("Save", elem_classes="small-button", min_width=60, elem_id="steering-save-preset")
            self.delete = gr.Button("Delete", elem_classes="small-button", min_width=60)
        self.preset_note = self._add(gr.HTML())
        self.character = self._add(gr.Checkbox(label="Load this preset with the chat's character", elem_id="steering-character"))

    def _traits(self) -> None:
        gr.Markdown("### Traits to fit on this model")
        self.traits = self._add(
            gr.CheckboxGroup(
                [],
                label="A vector belongs to one model. These come with the package and have none for it yet:",
                elem_id="steering-traits",
            )
        )
        self.traits_note = self._add(gr.HTML())
        with gr.Row():
            self.fit = self._add(gr.Button(FIT, elem_classes="small-button", elem_id="steering-fit"))
            self.cancel = self._add(gr.Button("Cancel", elem_classes="small-button", elem_id="steering-cancel", visible=False))
        self.traits_problem = self._add(gr.HTML())
        self.progress = self._add(gr.HTML(elem_id="steering-progress"))

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
                    ["none", "quick", "full"],
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
        self.on.input(self.switch, [self.on], self.all, **quick)
        for i, (_, slider, zero, remove) in enumerate(self.rows):
            # always_last: a slider that is dragged on while a change is under way ends where it was let go
            in_step = [self.text, self.note, self.status]
            slider.input(functools.partial(self.slide, i), [slider], in_step, trigger_mode="always_last", **quick)
            zero.click(functools.partial(self.zero, i), None, self.all, **quick)
            remove.click(functools.partial(self.drop, i), None, self.all, **quick)
        self.zero_all.click(self.zeros, None, self.all, **quick)
        self.add.click(self.add_vector, [self.choice], self.all, **quick)
        self.refresh.click(self.view, None, self.all, **quick)
        self.text.submit(self.typed, [self.text], self.all, **quick)
        self.text.blur(self.left, [self.text], self.all, **quick)
        self.term.input(self.show_term, [self.term], [self.window, self.op, self.scope], **quick)
        self.apply.click(self.change_term, [self.term, self.window, self.op, self.scope], self.all, **quick)
        self.preset.input(self.choose_preset, [self.preset], [self.character], **quick)
        self.load.click(self.load_preset, [self.preset], self.all, **quick)
        self.save.click(self.save_preset, [self.preset], self.all, **quick)
        self.delete.click(self.delete_preset, [self.preset], self.all, **quick)
        watch: dict[str, Any] = {"concurrency_limit": None, **quick}
        self.fit.click(self.fit_traits, [self.traits], self.all, **quick).then(self.watch, None, self.all, **watch)
        start = [self.name, self.kind, self.level, self.count, self.positive, self.negative, self.overwrite]
        self.train.click(self.start_training, start, self.all, **quick).then(self.watch, None, self.all, **watch)
        for button in (self.cancel, self.stop):
            button.click(jobs.trainer.cancel, None, None, **quick)
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
            character.change(self.new_character, [character], self.all, **quick)
            self.character.input(self.bind_character, [self.character, self.preset, character], self.all, **quick)
        page = ui.gradio.get("interface")
        if page is not None:
            page.load(functools.partial(self.view, fresh=True), None, self.all, **quick).then(self.watch, None, self.all, **watch)
        tab = getattr(gr.context.Context, "block", None)
        if tab is not None and hasattr(tab, "select"):
            # a model may have come or gone meanwhile; sliders are drawn anew only if they moved elsewhere, since a slider that is
            # moved while it is being drawn would lose its move
            moving = {id(c) for c in (self.text, *(part for row in self.rows for part in row[:2]))}
            calm = [i for i, component in enumerate(self.all) if id(component) not in moving]
            glance = functools.partial(self.glance, calm)
            tab.select(glance, [self.text], [*(self.all[i] for i in calm), self.stale], **quick)
            self.stale.change(self.view, None, self.all, **quick)

    # ---- handlers ----

    @told()
    def switch(self, on: bool) -> None:
        settings().set_flag("on", on)
        follow()

    def slide(self, i: int, value: float) -> tuple[Any, Any, Any]:
        try:
            settings().change_term(i, strength=float(value))
            note = wording.note()
        except SpecError as error:
            note = wording.bad(str(error))
        follow()
        self._said.append(settings().expression)
        return settings().expression, note, wording.status(current_or_none())

    def zero(self, i: int) -> list[Any]:
        return self._with(lambda: settings().change_term(i, strength=0.0))

    def zeros(self) -> list[Any]:
        return self._with(lambda: settings().set_terms([replace(term, strength=0.0) for term in settings().terms]))

    def drop(self, i: int) -> list[Any]:
        return self._with(lambda: settings().set_terms([t for k, t in enumerate(settings().terms) if k != i]))

    @told()
    def add_vector(self, name: str | None) -> None:
        if not name:
            raise SpecError("choose a vector to add")
        settings().set_terms([*settings().terms, TermSpec(name, 0.0)])
        follow()

    def glance(self, calm: list[int], text: str) -> list[Any]:
        """What may have changed while the page showed another tab; ``calm``: the components in ``self.all`` that are set."""
        values = self.view()
        moved = (text or "").strip() != settings().expression
        return [*(values[i] for i in calm), str(time.monotonic_ns()) if moved else gr.update()]

    @told(keep="text")
    def typed(self, text: str) -> None:
        if (text or "").strip() == settings().expression:
            return
        settings().set_terms(parse(text or ""))
        follow()

    def left(self, text: str) -> list[Any]:
        """The box was left without Enter. A page that has not seen the sliders move holds an earlier text: that is no wish."""
        if (text or "").strip() != settings().expression and text in self._said:
            return self.view(problem=EARLIER, keep="text")
        return list(self.typed(text))

    def show_term(self, index: int | None) -> tuple[str, str, str]:
        terms = settings().terms
        if index is None or not 0 <= index < len(terms):
            return "", OWN, ""
        term = terms[index]
        return wording.window_text(term), term.op or OWN, term.scope or ""

    @told("term_note")
    def change_term(self, index: int | None, window: str, op: str, scope: str) -> None:
        terms = settings().terms
        if index is None or not 0 <= index < len(terms):
            raise SpecError("choose a term first")
        # through the grammar, which checks all of it
        layers = f"@{window.strip()}" if window.strip() else ""
        tail = f"?{scope.strip()}" if scope.strip() else ""
        checked = parse(f"x{layers}{tail}" + ("" if op in (OWN, None) else f"%{op}"))[0]
        settings().change_term(index, layers=checked.layers, op=checked.op, scope=checked.scope)
        follow()

    def choose_preset(self, name: str | None) -> Any:
        return name in settings().characters.values() if name else False

    @told("preset_note")
    def load_preset(self, name: str | None) -> None:
        settings().set_terms(settings().preset(name or ""))
        follow()

    @told("preset_note")
    def save_preset(self, name: str | None) -> None:
        settings().save_preset(name or "")

    @told("preset_note")
    def delete_preset(self, name: str | None) -> None:
        settings().delete_preset(name or "")

    @told("preset_note")
    def bind_character(self, bound: bool, preset: str | None, character: str | None) -> None:
        if not character:
            raise SpecError("the chat has no character: choose one in the Chat tab")
        if bound and preset not in settings().presets:
            raise SpecError("save the sliders as a preset first, or choose one")
        settings().set_character(character, preset if bound else None)

    def new_character(self, character: str | None) -> list[Any]:
        if settings().meet(character or ""):
            follow()
        return self.view()

    @told("traits_problem")
    def fit_traits(self, names: list[str] | None) -> None:
        if not names:
            raise SpecError("choose at least one trait to fit")
        link = current()
        for name in names:
            jobs.trainer.add(link, name, jobs.load_trait(name))

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
        at = [i for i, component in enumerate(self.all) if component in (self.progress, self.train_progress)]
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
            for plain, steered in replies.compare(current(), prompt or "", terms, max(1, min(int(length), MAX_COMPARE))):
                yield plain, steered, ""
        except SteerError as error:
            yield gr.update(), gr.update(), wording.bad(str(error))

    def show_activations(self, name: str | None) -> str:
        try:
            if not name:
                raise SpecError("choose a vector")
            return replies.activations(current(), name)
        except SteerError as error:
            return wording.bad(str(error))

    def flag(self, name: str, value: bool) -> list[Any]:
        return self._with(lambda: settings().set_flag(name, value))

    @told("server_note")
    def look_again(self) -> None:
        loader.devices.cache_clear()
        loader.adopt()

    def _with(self, change: Callable[[], None]) -> list[Any]:
        change()
        follow()
        return self.view()

    # ---- what is shown ----

    def view(self, *, problem: str = "", at: str = "", keep: str = "", show: str | None = None, fresh: bool = False) -> list[Any]:
        """A value for each of ``self.all``. ``problem``: what the last action came to, said in the note and ``at`` another
        component; ``keep``: the component that is left as it is; ``show``: the report to open; ``fresh``: the page has just
        been opened, so nobody has chosen anything in it."""
        link = current_or_none()
        names = wording.names_of(link)
        wording.first_use(names)
        terms = settings().terms
        missing = jobs.missing_traits(link) if link is not None else []
        if fresh:
            self._listed.clear()
        self._said.append(settings().expression)
        values: dict[Any, Any] = {
            self.status: wording.status(link),
            self.on: settings().on,
            self.empty: wording.rows_note(len(terms)),
            self.zero_all: gr.update(visible=bool(terms)),
            self.choice: gr.update(choices=names, value=next((n for n in names if n not in {t.vector for t in terms}), None)),
            self.text: settings().expression,
            self.note: wording.bad(problem) if problem else wording.note(),
            self.term: gr.update(choices=[f"{i + 1}. {t.vector}" for i, t in enumerate(terms)]),
            self.preset: gr.update(choices=sorted(settings().presets)),
            self.character: gr.update(),
            self.traits: gr.update(**self._list("traits", missing, missing), visible=bool(missing)),
            self.traits_note: wording.traits_note(link, missing),
            self.fit: gr.update(interactive=bool(missing), visible=bool(missing)),
            self.cancel: gr.update(visible=jobs.trainer.active),
            self.stop: gr.update(visible=jobs.trainer.active),
            self.progress: wording.progress(),
            self.train_progress: wording.progress(),
            self.shown: gr.update(choices=names, **({"value": show} if show or fresh else {})),
            self.along: gr.update(choices=names, **({"value": names[0] if names else None} if fresh else {})),
            self.term_note: "",
            self.preset_note: "",
            self.traits_problem: "",
            self.train_note: "",
            self.server_note: "",
            self.details: wording.details(link),
            self.api_too: settings().api_too,
            self.cpu_too: gr.update(value=settings().cpu_too, visible=settings().cpu_too or "CPU only" in loader.state.problem),
        }
        for i, (row, slider, _, _) in enumerate(self.rows):
            shown = i < len(terms)
            values[row] = gr.update(visible=shown)
            values[slider] = wording.slider_of(terms[i]) if shown else gr.update()
        if problem and at:
            values[getattr(self, at)] = wording.bad(problem)
        if keep:
            values[getattr(self, keep)] = gr.update()
        return [values[component] for component in self.all]

    def _list(self, key: str, choices: list[str], value: Any) -> dict[str, Any]:
        """Choices, and what is chosen of them where they are others than before: what the user has chosen stays."""
        if self._listed.get(key) == choices:
            return {}
        self._listed[key] = list(choices)
        return {"choices": choices, "value": value}


def follow() -> None:
    """Let the running reply follow what has just been set."""
    link = current_or_none()
    if link is not None:
        link.change_running(settings().active)
    elif hooks.applies():
        hooks.change_running(settings().active)


def add_slider(job: jobs.TrainJob) -> None:
    """A vector that has just been made gets a slider, at 0."""
    if all(term.vector != job.name for term in settings().terms):
        settings().set_terms([*settings().terms, TermSpec(job.name, 0.0)])
