"""What a page shows and what it wishes, as JSON: ``page.js`` draws the one and sends the other.

Each answer has the whole state and the next number of one count. A page draws an answer only when its number is higher than that
of what it shows. A page repeats its wishes until an answer says that they have arrived; what has arrived is not done twice.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from steer_plugins.errors import SpecError, SteerError
from steer_plugins.steering.grammar import TermSpec, from_json, parse
from steer_plugins.steering.vector import SteeringVector, check_name

from . import hooks, jobs, replies, webui, wording
from .link import Link, current, current_or_none
from .settings import settings

MAX_TEXT = 1 << 16
"""Characters that a page may send at once."""
MAX_WISHES = 500
MAX_PAGES = 200
"""Pages whose last wish is remembered."""
MAX_NUMBER = 1 << 53

_PAGE = re.compile(r"[0-9a-f]{8,40}")


@dataclass
class _Page:
    """``done``: number of the last wish that has arrived. ``said``: what some of them came to."""

    done: int = 0
    said: list[dict[str, Any]] = field(default_factory=list)


class Pages:
    """All pages that are open. May be used by several threads at once."""

    def __init__(self) -> None:
        self.run = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._number = 0
        self._pages: OrderedDict[str, _Page] = OrderedDict()

    def answer(self, text: str) -> str:
        """Do what a page wishes and tell it what to show.

        Args:
            text: JSON, ``{"page": hex, "wishes": [{"n": 1, "do": "move", …}]}``; see :data:`DEEDS`.

        Returns:
            JSON: the state, ``number``, and of this page ``arrived`` and ``said``. ``""`` for a text that no page of ours sends.
        """
        try:
            name, wishes = _read(text)
        except (ValueError, TypeError, KeyError, RecursionError):
            return ""
        with self._lock:
            page = self._pages.setdefault(name, _Page())
            self._pages.move_to_end(name)
            while len(self._pages) > MAX_PAGES:
                self._pages.popitem(last=False)
            if page.done == 0 and wishes:  # after a restart, or a very long time
                page.done = wishes[0]["n"] - 1
            before = settings().active
            for wish in wishes:
                if wish["n"] > page.done:
                    page.done = wish["n"]
                    page.said = [*page.said[-20:], *_do(wish)]
            if settings().active != before:
                follow()
            self._number += 1
            own = {"run": self.run, "number": self._number, "page": name, "arrived": page.done, "said": page.said}
            return json.dumps({**own, **state()}, ensure_ascii=False)


pages = Pages()


def _read(text: str) -> tuple[str, list[dict[str, Any]]]:
    if not isinstance(text, str) or len(text) > MAX_TEXT:
        raise ValueError("too long")
    data = json.loads(text)
    name, wishes = data["page"], data["wishes"]
    if not _PAGE.fullmatch(name) or not isinstance(wishes, list) or len(wishes) > MAX_WISHES:
        raise ValueError("not of a page")
    for wish in wishes:
        if type(wish["n"]) is not int or not 0 < wish["n"] < MAX_NUMBER or wish["do"] not in DEEDS:
            raise ValueError("no wish")
    return name, sorted(wishes, key=lambda wish: wish["n"])


def _do(wish: dict[str, Any]) -> list[dict[str, Any]]:
    """Carry out a wish; returns what is to be said about it, beside what was pressed (``at``)."""
    said: dict[str, Any] = {"n": wish["n"], "at": wish["do"], "bad": True}
    try:
        good = DEEDS[wish["do"]](wish)
        return [{**said, "bad": False, "text": good}] if good else []
    except SteerError as error:
        found = re.match(r"at character (\d+) of ", str(error))
        return [{**said, "text": str(error), **({"character": int(found[1])} if found else {})}]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return [{**said, "text": f"the page sent what cannot be read ({type(error).__name__}): reload it"}]


# ---- deeds ----


def keyed(terms: list[TermSpec]) -> list[str]:
    """A name for each term that stays its own when others come and go: the vector's, and which one of that name it is."""
    seen: dict[str, int] = {}
    keys = []
    for term in terms:
        seen[term.vector] = seen.get(term.vector, 0) + 1
        keys.append(f"{term.vector}#{seen[term.vector]}")
    return keys


def _index(key: str) -> int:
    keys = keyed(settings().terms)
    if key not in keys:
        raise SpecError(f"the slider of {key.rpartition('#')[0]!r:.80} is not there any more: it was removed in another window")
    return keys.index(key)


def _move(wish: dict[str, Any]) -> None:
    settings().change_term(_index(wish["key"]), strength=float(wish["value"]))


def _shape(wish: dict[str, Any]) -> None:
    """Layers, operation and scope, through the grammar, which checks all of them."""
    i = _index(wish["key"])
    layers, op, scope = (str(wish[part]).strip() for part in ("layers", "op", "scope"))
    try:
        checked = parse("x" + (f"@{layers}" if layers else "") + (f"?{scope}" if scope else ""))[0]
    except SpecError:
        given = " and ".join(f"{what} {value!r:.40}" for what, value in (("layers", layers), ("scope", scope)) if value)
        raise SpecError(f"{given} cannot be read: layers are written as 10-20 or 12, a span of tokens as 5-20") from None
    whole = {**settings().terms[i].to_json(), "layers": checked.layers, "scope": checked.scope, "op": op or None}
    if op not in ("floor", "cap"):
        whole.pop("level", None)
    changed = from_json([{k: list(v) if k == "layers" else v for k, v in whole.items() if v is not None}])[0]
    settings().change_term(i, layers=changed.layers, op=changed.op, scope=changed.scope, level=changed.level)


def _drop(wish: dict[str, Any]) -> None:
    i = _index(wish["key"])
    settings().set_terms([term for k, term in enumerate(settings().terms) if k != i])


def _write(wish: dict[str, Any]) -> None:
    settings().set_terms(parse(str(wish["text"])))


def _zero(wish: dict[str, Any]) -> None:
    settings().set_terms([replace(term, strength=0.0) for term in settings().terms])


def _add(wish: dict[str, Any]) -> None:
    if not wish["name"]:
        raise SpecError("choose a vector to add")
    settings().set_terms([*settings().terms, TermSpec(str(wish["name"]), 0.0)])


def _save(wish: dict[str, Any]) -> str:
    there = str(wish["name"]).strip() in settings().presets
    name = settings().save_preset(str(wish["name"]))
    return f"replaced the preset {name!r}" if there else f"saved as {name!r}"


def _forget(wish: dict[str, Any]) -> str:
    settings().preset(str(wish["name"]))
    settings().delete_preset(str(wish["name"]))
    return f"deleted the preset {wish['name']!r}"


def _bind(wish: dict[str, Any]) -> None:
    who = character()
    if not who:
        raise SpecError("the chat has no character in instruct mode: choose another mode in the Chat tab")
    if wish["value"] and not settings().loaded:
        raise SpecError("save the sliders as a preset first, or choose one")
    settings().set_character(who, settings().loaded if wish["value"] else None)


def _fit(wish: dict[str, Any]) -> None:
    names = [str(name) for name in wish["names"]][: jobs.MAX_JOBS]
    if not names:
        raise SpecError("choose at least one trait to fit")
    link = current()
    for name in names:
        vector = _facts(check_name(name))
        guess = vector is not None and vector.calibration is None  # its calibration was cancelled, or failed
        jobs.trainer.add(link, name, jobs.load_trait(name), overwrite=guess)


def _imitate(wish: dict[str, Any]) -> None:
    """Make a slider of whom the chat is with."""
    name, text = jobs.prompt_of_chat(settings().character)
    if not text:
        raise SpecError("the chat has neither a character's description nor a system message: write one first")
    jobs.trainer.add(current(), name, jobs.SystemPrompt(text))


def _delete(wish: dict[str, Any]) -> str:
    """Delete a vector of the library; its sliders go with it."""
    link, name = current(), check_name(str(wish["name"]))
    link.library.remove(name, link.info.identity)
    settings().set_terms([term for term in settings().terms if term.vector != name])
    return f"deleted the vector {name!r}"


DEEDS: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "on": lambda wish: settings().set_flag("on", wish["value"] is True),
    "move": _move,
    "shape": _shape,
    "drop": _drop,
    "write": _write,
    "zero": _zero,
    "add": _add,
    "load": lambda wish: settings().load_preset(str(wish["name"])),
    "save": _save,
    "forget": _forget,
    "bind": _bind,
    "fit": _fit,
    "imitate": _imitate,
    "cancel": lambda wish: jobs.trainer.cancel(),
    "delete": _delete,
}
"""What a page may wish, by the word in ``do``."""


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


def character() -> str:
    """Whom the chat is with; "" in instruct mode, which has no character."""
    state = getattr(webui.shared(), "persistent_interface_state", {})
    return "" if state.get("mode") == "instruct" else settings().character


# ---- what is shown ----


def state() -> dict[str, Any]:
    """All that every page shows alike, as plain data."""
    link = current_or_none()
    names = wording.names_of(link)
    wording.first_use(names)
    now = settings()
    terms = list(now.terms)
    active = now.active
    good, wrong = wording.acting(link, active)
    who = character()
    return {
        "status": wording.status(link),
        "ready": link is not None or hooks.applies(),
        "on": now.on,
        "active": len(good),
        "text": now.expression,
        "note": [now.problem, *wrong] if now.problem else wrong,
        "terms": [_term(key, term) for key, term in zip(keyed(terms), terms, strict=True)],
        "names": names,
        "presets": sorted(now.presets),
        "loaded": now.loaded,
        "changed": now.loaded in now.presets and now.presets[now.loaded] != terms,
        "character": who,
        "bound": now.characters.get(who, ""),
        "traits": [] if link is None else [_trait(name) for name in jobs.missing_traits(link)],
        "imitable": "" if link is None else jobs.prompt_of_chat(now.character)[0],
        "fell": replies.fell_apart(),
        "jobs": wording.progress(),
        "step": wording.step(),
        "busy": jobs.trainer.active,
        "stopping": jobs.trainer.stopping,
    }


def _term(key: str, term: TermSpec) -> dict[str, Any]:
    vector = _facts(term.vector)
    poles = jobs.poles_of(vector) if vector is not None else None
    reach = max(1.0, abs(term.strength))
    return {
        "key": key,
        "name": term.vector,
        "value": term.strength,
        "reach": reach,
        "poles": poles,
        "removes": (term.op or (vector.op if vector else None)) == "project",
        "provisional": vector is not None and vector.calibration is None,
        "layers": wording.window_text(term),
        "has": jobs.layers_of(vector) if vector is not None else "",
        "op": term.op or "",
        "scope": term.scope or "",
        "own": None if vector is None else {"op": vector.op, "scope": vector.default_scope},
        "missing": vector is None,
        "trait": term.vector in jobs.bundled_traits(),
    }


def _facts(name: str) -> SteeringVector | None:
    """The vector that the loaded model has under a name."""
    link = current_or_none()
    try:
        if link is None:
            return hooks.resolve([TermSpec(name)]).terms[0].vector if hooks.applies() else None
        return _vector_of(link, name)
    except SteerError:
        return None


def _vector_of(link: Link, name: str) -> SteeringVector:
    """Out of the library; read again only when its file has changed."""
    path = link.library.path(name, link.info.identity)
    if not path.is_file():
        return link.library.get(name, link.info.identity)  # of a hub, or an error with the sentence for it
    return _cached(link.library, name, link.info.identity, path.stat().st_mtime_ns)


@functools.lru_cache(64)
def _cached(library: Any, name: str, identity: Any, changed: int) -> SteeringVector:
    return library.get(name, identity)


@functools.cache
def _trait(name: str) -> dict[str, str]:
    poles = jobs.load_trait(name).poles
    return {"name": name, "negative": poles["negative"], "positive": poles["positive"]}
