"""The webui's API: the ``steering`` field of its requests, and routes that list vectors and presets."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from steer_plugins.client import is_loopback
from steer_plugins.errors import SpecError, SteerError
from steer_plugins.steering.grammar import names_of, refuse_file
from steer_plugins.store.library import Library

from . import hooks, loader, webui, wishes
from .link import current, current_or_none
from .settings import settings

REQUESTS = ("ChatCompletionRequest", "CompletionRequest", "AnthropicRequest", "LogitsRequest")
"""The bodies that get the field: chat, completions, messages, logits."""

DESCRIPTION = (
    'Steering of this request: a text such as "mood:0.6 + succinctness:-0.3", a list of terms as JSON, '
    'or {"preset": "NAME"}. Left out: none, unless the Steering tab says otherwise.'
)

problem = ""
"""Why requests cannot carry the field, one sentence; "" when they can."""


def patch() -> None:
    """Give the request models the field, also where the API runs already, and add our routes."""
    global problem
    arguments = webui.shared().args
    if not (arguments.api or arguments.public_api):
        problem = "the API is off: start the webui with --api"
        return
    problem = ""
    typing = webui.module("api.typing")
    if all("steering" in getattr(typing, name).model_fields for name in REQUESTS):
        return
    runs = webui.loaded("api.script")
    models = {}
    for name in REQUESTS:
        plain = getattr(typing, name)
        models[plain] = with_steering(plain)
        setattr(typing, name, models[plain])
    script = webui.module("api.script")
    if runs:
        _retype_routes(script.app, models)
    _add_routes(script)


def _retype_routes(app: Any, models: dict[Any, Any]) -> None:
    """Make the routes anew that read one of ``models``, with its steered counterpart: their bodies were settled before us."""
    from fastapi.routing import APIRoute

    for i, route in enumerate(app.router.routes):
        if not isinstance(route, APIRoute):
            continue
        hints = route.endpoint.__annotations__
        changed = {name: models[kind] for name, kind in hints.items() if kind in models}
        if changed:
            hints.update(changed)
            app.router.routes[i] = APIRoute(
                route.path,
                route.endpoint,
                methods=route.methods,
                response_model=route.response_model,
                dependencies=route.dependencies,
                name=route.name,
            )


def with_steering(model: Any) -> Any:
    """A request model with the field ``steering``, checked while the body is read: before a stream has begun."""
    from pydantic import Field, create_model, model_validator

    def check_steering(self: Any) -> Any:
        try:
            self.steering = checked(self.steering)
            if self.steering and getattr(self, "echo", False) and getattr(self, "logprobs", None) is not None:
                raise SpecError("log-probabilities of a prompt are not steered: leave out echo, logprobs or steering")
        except SteerError as error:
            raise _refusal(model.__name__, str(error)) from None
        return self

    return create_model(
        model.__name__,
        __base__=model,
        __module__=model.__module__,
        __validators__={"check_steering": model_validator(mode="after")(check_steering)},
        steering=(Any, Field(default=None, description=DESCRIPTION)),
    )


def checked(value: Any) -> list[dict[str, Any]] | None:
    """The field as plain data, after everything that can be wrong with it has been looked for.

    Raises:
        SteerError: the text is wrong, a vector is missing or does not fit, or the loaded model cannot be steered.
    """
    if value is None:
        return None
    if not webui.enabled():
        raise SpecError("the steering extension is switched off: switch it on in the Session tab, or leave steering out")
    terms = wishes.terms_of(value, settings())
    if not (isinstance(value, dict) and "preset" in value):
        for name in names_of(terms):
            refuse_file(name)
    models = webui.module("models")
    if terms and hasattr(models, "load_model_if_idle_unloaded"):
        models.load_model_if_idle_unloaded()
    if hooks.applies():
        hooks.check(terms)
    elif any(term.strength != 0.0 for term in terms) or current_or_none() is not None:
        _reason_first()
        current().steering(terms)
    return [term.to_json() for term in terms]


def _reason_first() -> None:
    """Where our server is not in use, the reason says more than that the server cannot steer."""
    if webui.llama_server() is not None and current_or_none() is None and loader.state.problem:
        raise SpecError(loader.state.problem)


def _refusal(model: str, sentence: str) -> Exception:
    """An error that the webui's own handlers turn into status 400. (pydantic lets it pass: it is not a ValueError.)"""
    if model == "AnthropicRequest":
        error: Exception = webui.module("api.script").AnthropicError(message=sentence)
    else:
        error = webui.module("api.errors").InvalidRequestError(message=sentence, param="steering")
    return error


def facts() -> dict[str, Any]:
    """What ``GET /v1/internal/steering`` answers."""
    link = current_or_none()
    return {
        "steers": link is not None or hooks.applies(),
        "problem": "" if link is not None or hooks.applies() else loader.state.problem or _sentence(),
        "model": None if link is None else link.info.identity.to_dict(),
        "device": None if link is None else link.device,
        "server": None if link is None else link.engine.url,
        "vectors": vectors(),
        "presets": {name: [term.to_json() for term in terms] for name, terms in sorted(settings().presets.items())},
        "page": {"on": settings().on, "steering": settings().expression, "api_too": settings().api_too},
    }


def vectors() -> list[dict[str, Any]]:
    """The vectors of the library that the loaded model can use."""
    link = current_or_none()
    if link is None:
        return hooks.vectors()
    found = []
    for entry in Library().list(link.info.identity):
        try:
            vector = entry.read()
        except SteerError:
            continue
        found.append({"name": entry.name, "layers": vector.layers, "op": vector.op, "scope": vector.default_scope})
    return found


def _sentence() -> str:
    try:
        current()
    except SteerError as error:
        return str(error)
    return ""


def foreign(origin: str | None, host: str | None) -> bool:
    """Whether a request comes from a page of somebody else: neither of this server nor of a program on this machine.

    The webui lets pages of any origin read what its API answers; presets and the page's steering are nobody's business.
    """
    own = f"//{host or ''}"
    if not (webui.open_to_others() or getattr(webui.shared().args, "public_api", False)) and not is_loopback(own):
        return True  # it listens on this machine only: a name of elsewhere was pointed here by whoever owns that name
    if not origin:
        return False
    return urlsplit(origin).hostname != urlsplit(own).hostname and not is_loopback(origin)


def _add_routes(script: Any) -> None:
    from fastapi import Depends, HTTPException, Request

    def own_pages(request: Any) -> None:
        # who has a key was given it; without one, any page in the user's browser could ask
        asked = request.headers
        if not getattr(webui.shared().args, "api_key", None) and foreign(asked.get("origin"), asked.get("host")):
            why = "pages of another origin may not read the steering: start the webui with --api-key"
            raise HTTPException(status_code=403, detail=why)

    own_pages.__annotations__["request"] = Request  # the text of an annotation would be looked up in this module

    def steering() -> Any:
        return facts()

    def steering_vectors() -> Any:
        return {"vectors": vectors()}

    def steering_presets() -> Any:
        return {"presets": facts()["presets"]}

    guards = [Depends(script.verify_api_key), Depends(own_pages)]
    for path, answer in (("", steering), ("/vectors", steering_vectors), ("/presets", steering_presets)):
        script.app.add_api_route(f"/v1/internal/steering{path}", answer, methods=["GET"], dependencies=guards)
