"""The tab's part for shared vectors: search the indexes that are known, look at a card, pull, and a slider is there.

Nothing is fetched but by its buttons. Where others can reach the page, no index can be added: an address names what this machine
reads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from steer_plugins.errors import SpecError, SteerError
from steer_plugins.steering.grammar import TermSpec

from . import webui, wording
from .link import Link, current
from .settings import settings

if TYPE_CHECKING:
    from steer_plugins.hub.hub import Hub, Offer
    from steer_plugins.store.pulled import Item

LIMIT = 50
"""Results that are listed."""


class Pull:
    """A pull under way, in a thread of its own. ``item`` or ``problem`` is set when it is over."""

    def __init__(self, link: Link, index: str, name: str) -> None:
        self.stage, self.share = "looking it up", 0.0
        self.said: list[str] = []
        self.item: Item | None = None
        self.problem = ""
        self._args = link, index, name
        self._thread = threading.Thread(target=self._run, daemon=True, name="steering pulls a vector")
        self._thread.start()

    def over(self, seconds: float) -> bool:
        """Whether it is over, after waiting so long for that."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        from steer_plugins.hub.safety import safety_check

        link, index, name = self._args
        try:
            with webui.busy():
                check = safety_check(link.library, lambda: self._engine(link), force=False, say=self.said.append)
                identity = link.info.identity
                self.item = hub_of(link).pull(name, identity=identity, index=index, check=check, progress=self._progress)
        except SteerError as error:
            self.problem = str(error)
        except Exception as error:  # nobody waits for this thread, and the user has to know
            self.problem = f"{type(error).__name__}: {error}"
            webui.log(f"pulling {name} failed, {self.problem}", error=True)

    def _engine(self, link: Link) -> Any:
        self.stage, self.share = "measuring what it does to this model", 1.0
        return link.engine

    def _progress(self, done: int, total: int) -> None:
        self.stage, self.share = "fetching", done / total if total else 1.0


class Panel:
    """The components, and what they do. ``refresh``: gives a value for each of the whole tab's components."""

    def __init__(self) -> None:
        with gr.Accordion("Shared vectors: search and pull", open=False, elem_id="steering-shared"):
            with gr.Row():
                self.words = gr.Textbox(label="Search", placeholder="cheerful", scale=4, elem_id="steering-hub-words")
                self.search = gr.Button(
                    "Search", elem_classes="small-button", scale=0, min_width=90, elem_id="steering-hub-search"
                )
            self.found = gr.Dropdown([], label="Found", elem_classes="slim-dropdown", elem_id="steering-hub-found")
            self.card = gr.HTML(elem_id="steering-hub-card")
            self.pull = gr.Button("Pull", elem_classes="small-button", elem_id="steering-hub-pull")
            self.note = gr.HTML(elem_id="steering-hub-note")
            with gr.Row():
                self.address = gr.Textbox(
                    label="Add an index",
                    info="A folder, a web address, git+https:// or hf://owner/name; its key is trusted from then on",
                    scale=4,
                    elem_id="steering-hub-address",
                )
                self.add = gr.Button("Add", elem_classes="small-button", scale=0, min_width=90, elem_id="steering-hub-add")
                self.update = gr.Button(
                    "Update", elem_classes="small-button", scale=0, min_width=90, elem_id="steering-hub-update"
                )

    def connect(self, view: Any, everything: list[Any], options: dict[str, Any]) -> None:
        """Connect the components; ``view`` gives a value for each of ``everything``, once something was pulled."""
        listed = [self.found, self.card, self.note]
        self.search.click(self.look, [self.words], listed, **options)
        self.words.submit(self.look, [self.words], listed, **options)
        self.found.change(self.show, [self.found], [self.card], **options)
        done = self.pull.click(self.fetch, [self.found], [self.note], concurrency_limit=None, **options)
        done.then(view, None, everything, **options)
        self.add.click(self.add_index, [self.address], [self.note], **options)
        self.update.click(self.update_indexes, None, [self.note], **options)

    # ---- handlers ----

    def look(self, words: str) -> tuple[Any, str, str]:
        """What the words find, what fits the loaded model first."""
        try:
            link = current()
            key = link.info.identity.key
            offers, total = hub_of(link).search((words or "").split(), identity=link.info.identity, limit=LIMIT)
        except SteerError as error:
            return gr.update(choices=[], value=None), "", wording.bad(str(error))
        choices = [(_label(offer, key), f"{offer.index} {offer.entry['name']}") for offer in offers]
        said = f"{total} found" + (f", the first {LIMIT} are listed" if total > LIMIT else "")
        return gr.update(choices=choices, value=None), "", f'<p class="steer-quiet">{said}.</p>'

    def show(self, chosen: str | None) -> str:
        """The card of what is chosen, with its dose curve."""
        if not chosen:
            return ""
        try:
            link = current()
            hub, offer = _offer(link, chosen)
            return _card(hub.card(offer), offer)
        except SteerError as error:
            return wording.bad(str(error))

    def fetch(self, chosen: str | None) -> Iterator[str]:
        """Pull what is chosen; its slider is there afterwards, at 0."""
        try:
            if not chosen:
                raise SpecError("choose what to pull: search first")
            link = current()
            _, offer = _offer(link, chosen)
            pull = Pull(link, offer.index, offer.entry["name"])
            while not pull.over(0.3):
                yield _bar(offer.label, pull)
            if pull.item is None:
                raise SpecError(pull.problem)
            yield _kept(link, pull.item, pull.said)
        except SteerError as error:
            yield wording.bad(str(error))

    def add_index(self, address: str) -> str:
        """Know one more index."""
        try:
            if webui.open_to_others():
                raise SpecError("others can reach this page, so it adds no index: add it with: steer hub add ADDRESS")
            if not (address or "").strip():
                raise SpecError("write the address of an index: a folder, a web address, git+https:// or hf://owner/name")
            hub = hub_of(current())
            alias = hub.add(address.strip())
            record = hub.indexes()[alias]
        except SteerError as error:
            return wording.bad(str(error))
        return f'<p class="steer-quiet">{escape(alias)}: {record["count"]} entries, signed by {escape(record["key"])}.</p>'

    def update_indexes(self) -> str:
        """Fetch the known indexes anew."""
        try:
            hub = hub_of(current())
            changed = hub.update()
            newer = [f"{item.name} {offer.entry['version']}" for item, offer in hub.outdated()]
        except SteerError as error:
            return wording.bad(str(error))
        said = f"{', '.join(changed)} changed" if changed else "nothing has changed"
        return f'<p class="steer-quiet">{escape(said + (": newer: " + ", ".join(newer) if newer else ""))}.</p>'


def hub_of(link: Link) -> Hub:
    """The hubs of the loaded model's library. Raises SteerError."""
    from steer_plugins.hub.hub import Hub

    return Hub(link.library)


def _offer(link: Link, chosen: str) -> tuple[Hub, Offer]:
    # what a page sends is looked up, never believed
    index, _, name = str(chosen).partition(" ")
    hub = hub_of(link)
    return hub, hub.find(name, identity=link.info.identity, index=index)


def _label(offer: Offer, key: str) -> str:
    entry = offer.entry
    trait = entry["trait"]
    what = f"{trait['negative']} / {trait['positive']}" if trait else entry["description"][:60]
    whose = (
        ""
        if offer.row.model in ("", key)
        else f" · for {entry['model']['name'] or entry['model']['architecture']}, not this model"
    )
    return f"{entry['name']} {entry['version']} · {entry['kind']} · {what}{whose}"


def _card(card: dict[str, Any], offer: Offer) -> str:
    from steer_plugins.report.card import card_text, curve_chart

    drawn = curve_chart(card["calibration"]) if card["calibration"] else ""
    text = card_text(card, key=offer.entry["key"], index=offer.index, curve=not drawn)
    return f'<div class="steer-charts">{drawn}<pre class="steer-card">{escape(text)}</pre></div>'


def _bar(label: str, pull: Pull) -> str:
    return (
        f'<div class="steer-job"><b>{escape(label)}</b> {escape(pull.stage)}'
        f'<div class="steer-bar"><i style="width:{100 * pull.share:.0f}%"></i></div></div>'
    )


def _kept(link: Link, item: Item, said: list[str]) -> str:
    """Put it to use, and say what became of it."""
    if item.kind == "vector":
        if all(term.vector != item.name for term in settings().terms):
            settings().set_terms([*settings().terms, TermSpec(item.name, 0.0)])
        what = "its slider is there, at 0"
    elif item.kind == "preset":
        from steer_plugins.hub.contents import preset_terms

        terms = preset_terms(link.library.pulled.checked(item.files["preset"], item.name), item.label)
        what = f"it is the preset {settings().add_preset(item.name.replace('/', ' '), terms)}"
    elif item.kind == "gate":
        what = f"write it into an expression: mood?response{{{item.name}}}"
    else:
        what = f"fit it with: steer train {item.name.split('/')[1]} --trait {item.name}"
    told = "".join(f'<pre class="steer-card">{escape(text)}</pre>' for text in said)
    return f'<div class="steer-job done"><b>{escape(item.label)}</b> pulled: {escape(what)}</div>{told}'
