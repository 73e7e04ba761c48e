"""Making steered models: what ``/api/create`` and ``steer ollama create`` check and change before Ollama stores them."""

from __future__ import annotations

import base64
import binascii
import contextlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer_plugins.errors import ModelError
from steer_plugins.paths import expand_path
from steer_plugins.steering.grammar import TermSpec, format_terms, is_file_name, steering_of
from steer_plugins.steering.vector import FILE_SUFFIXES

from . import expression, gotemplate
from .desk import find
from .errors import BadRequest, NotFound
from .expression import Terms
from .gguf import facts_of
from .model import STEERING, Model, Store
from .names import Name, parse_name

if TYPE_CHECKING:
    from steer_plugins.steering.vector import ModelIdentity, SteeringVector
    from steer_plugins.store.library import Library

MAX_VECTORS = 64 << 20
VECTORS = "vectors"
"""Our own key of the create body: vectors that the model carries, ``{name: base64 of a vector file}``."""

CARRY = "carry"
"""Our own key of the create body: the model carries the vectors that it uses from the library."""


@dataclass
class Prepared:
    """``body``: what Ollama gets; ``vectors``: files to store with the model; ``steering``: its own, or None."""

    name: Name
    body: dict[str, Any]
    steering: str | None = None
    vectors: dict[str, bytes] = field(default_factory=dict)


def prepare(body: Mapping[str, Any], store: Store, library: Library, *, own: bool = False) -> Prepared:
    """Check a create body and put the combined steering into it. Nothing is stored.

    ``own``: no Ollama will run the model, so its TEMPLATE has to be understood here in any case.

    Raises:
        SteerError: an expression, a vector or a TEMPLATE is wrong.
    """
    name = parse_name(body.get("model") or body.get("name"))
    out = dict(body)
    _check_kinds(body)
    vectors = decoded(out.pop(VECTORS, None))
    carry = bool(out.pop(CARRY, False))
    parameters = body.get("parameters") or {}
    licenses = [body["license"]] if isinstance(body.get("license"), str) else list(body.get("license") or ())
    carried = [text for text in (expression.of_license(one) for one in licenses if isinstance(one, str)) if text is not None]
    base = _base(body, store)
    lines = expression.of_parameters(parameters.get(STEERING))
    terms = base.terms if base is not None else None
    if not lines and not carried and not vectors and not carry:
        if terms or own:
            _check_template(body)
        return Prepared(name, out, None if terms is None else format_terms(terms))
    terms = expression.combine_lines(terms, lines)
    for text in carried:
        terms = expression.combine(terms, text)
    _check_template(body)
    expression.refuse_files(terms or ())
    steering = format_terms(terms or ())
    weights = _weights(body, base, store)
    if weights is not None:
        found = check_vectors(terms or (), weights, base, vectors, library)
        if carry:
            vectors = {**{key: vector_bytes(vector) for key, vector in found.items()}, **vectors}
    elif carry:
        raise BadRequest("the vectors can be carried only when the base model is here: create that one first")
    out["parameters"] = {**parameters, STEERING: steering}
    kept = [one for one in licenses if not isinstance(one, str) or expression.of_license(one) is None]
    if base is not None and base.carriers:
        kept.append(expression.as_license(steering))  # the base's own lines come along, and the last one counts
    out.pop("license", None)
    if kept:
        out["license"] = kept
    return Prepared(name, out, None if terms is None else steering, vectors)


def _check_kinds(body: Mapping[str, Any]) -> None:
    """Raise BadRequest for a key of another kind than Ollama takes."""
    checks: dict[str, tuple[str, Callable[[Any], bool]]] = {
        **dict.fromkeys(("from", "system", "template", "quantize"), ("a text", lambda value: isinstance(value, str))),
        **dict.fromkeys(("files", "adapters", "parameters"), ("an object", lambda value: isinstance(value, Mapping))),
        "license": ("a text or a list", lambda value: isinstance(value, str | list)),
    }
    for key, (what, fits) in checks.items():
        if body.get(key) is not None and not fits(body[key]):
            raise BadRequest(f"{key} must be {what}")


def decoded(value: Any) -> dict[str, bytes]:
    """The vector files of a body. Raises BadRequest."""
    from steer_plugins.steering.vector import check_name

    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise BadRequest("vectors is an object of names and base64 vector files")
    found: dict[str, bytes] = {}
    for name, text in value.items():
        try:
            found[check_name(str(name))] = base64.b64decode(text, validate=True)
        except (binascii.Error, TypeError, ValueError):
            raise BadRequest(f"the vector {str(name)[:60]!r} is not base64") from None
    if sum(map(len, found.values())) > MAX_VECTORS:
        raise BadRequest(f"the vectors of a model may take {MAX_VECTORS >> 20} MiB")
    return found


def check_vectors(
    terms: Terms, weights: Path, base: Model | None, vectors: Mapping[str, bytes], library: Library
) -> dict[str, SteeringVector]:
    """Look up every vector of a steering for a model, as a request would. Raises SteerError."""
    from steer_plugins.store.identity import identity_of_gguf

    identity = identity_of_gguf(weights)
    model = base or Model(parse_name("new"), weights, "", 0, 0.0)
    found: dict[str, SteeringVector] = {}
    with tempfile.TemporaryDirectory(prefix="steer-ollama-") as folder:
        given = {}
        for number, (name, data) in enumerate(vectors.items()):
            given[name] = Path(folder) / f"{number}.safetensors"
            given[name].write_bytes(data)
        model = replace(model, vectors={**model.vectors, **given})

        def look_up(name: str) -> SteeringVector:
            found[name] = find(model, name, identity, library)
            return found[name]

        for name in given:
            look_up(name)
        steering_of(terms, look_up)
    return found


def carry_files(
    steering: Terms, folder: Path, identity: ModelIdentity | None, library: Library
) -> tuple[Terms, dict[str, bytes]]:
    """Turn the files that a steering names (relative to ``folder``) into vectors that the model carries.

    Returns:
        the steering with names in their place, and the vector files.

    Raises:
        SteerError: a file is missing, or does not fit the model.
    """
    terms: list[TermSpec] = []
    files: dict[str, bytes] = {}
    for term in steering:
        if is_file_name(term.vector) or term.vector.lower().endswith(FILE_SUFFIXES):
            path = expand_path(term.vector)
            vector = library.resolve(str(path if path.is_absolute() else folder / path), identity)
            name = _free_name(path.stem, vector, files)
            files[name] = vector_bytes(vector.replace(name=name))
            term = replace(term, vector=name)
        terms.append(term)
    return tuple(terms), files


def vector_bytes(vector: SteeringVector) -> bytes:
    """A vector as the file that holds it."""
    from steer_plugins.store.vectorfile import write_vector

    with tempfile.TemporaryDirectory(prefix="steer-ollama-") as folder:
        path = Path(folder) / "vector.safetensors"
        write_vector(vector, path)
        return path.read_bytes()


def _free_name(stem: str, vector: SteeringVector, taken: Mapping[str, bytes]) -> str:
    import re

    from steer_plugins.errors import VectorError
    from steer_plugins.steering.vector import check_name

    base = re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-._") or "vector"
    name, number = base, 2
    while name in taken and taken[name] != vector_bytes(vector.replace(name=name)):
        name, number = f"{base}-{number}", number + 1
    try:
        return check_name(name)
    except VectorError:
        return f"c-{vector.content_hash[:24]}"


def _base(body: Mapping[str, Any], store: Store) -> Model | None:
    source = body.get("from")
    if not isinstance(source, str) or not source:
        return None
    try:
        return store.get(source)
    except (NotFound, BadRequest):
        return None  # Ollama pulls it, or says what is wrong with it


def _weights(body: Mapping[str, Any], base: Model | None, store: Store) -> Path | None:
    """The GGUF that the model will have, where it is known before it exists."""
    if base is not None:
        return base.gguf
    found = []
    for digest in (body.get("files") or {}).values():
        path = store.blob(str(digest))
        with contextlib.suppress(ModelError):  # no GGUF: Ollama converts it
            if path is not None and facts_of(path).architecture != "clip":  # a projector's
                found.append(path)
    return found[0] if len(found) == 1 else None


def _check_template(body: Mapping[str, Any]) -> None:
    template = body.get("template")
    if not template:
        return
    try:
        gotemplate.Template(str(template))
    except gotemplate.TemplateError as error:
        raise BadRequest(f"TEMPLATE line {error.line}: {error.reason}") from None
