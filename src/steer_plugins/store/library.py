"""The library: a folder for each user, in it a folder for each model, in it a file for each vector."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_data_path

from ..atomic import write_atomically
from ..errors import VectorError
from ..paths import expand_path
from ..steering.grammar import refuse_file
from ..steering.vector import FILE_SUFFIXES, ModelIdentity, SteeringVector, check_name, is_hub_name
from .features import read_feature, split_name
from .formats import Facts, read_any
from .pulled import Item, Pulled
from .vectorfile import read_vector, write_vector

_SUFFIX = ".safetensors"


class MissingVector(VectorError):
    """The library has no vector of this name for this model; ``str()`` is :func:`missing_sentence`."""


def missing_sentence(name: str, identity: ModelIdentity | None) -> str:
    """What every surface says when a vector is missing: which one, for which model, and how to fit it or to pull it."""
    model = f"for this model ({identity.label})" if identity else "in the library"
    way_out = f"pull it with: steer hub pull {name}" if is_hub_name(name) else f"fit it with: steer train {name}"
    return f"no vector {name!r} {model}: {way_out}"


def default_root() -> Path:
    """Where vectors are kept: ``STEER_LIBRARY``, else the place this system has for a user's data."""
    named = os.environ.get("STEER_LIBRARY")
    if named:
        return expand_path(named).absolute()
    return user_data_path("steer-plugins", appauthor=False, roaming=True) / "vectors"


@dataclass(frozen=True)
class Entry:
    """A vector in the library: its name, its file, and the model of its folder (None if ``model.json`` is unreadable).

    ``read_pulled``: for what came from a hub, reads it with its hash compared.
    """

    name: str
    path: Path
    identity: ModelIdentity | None
    read_pulled: Callable[[], SteeringVector] | None = None

    def read(self) -> SteeringVector:
        """The vector, under the name of its file; a pulled one keeps its publisher's. Raises VectorError."""
        if self.read_pulled is not None:
            return self.read_pulled()
        vector = read_vector(self.path)
        return vector if vector.name == self.name else vector.replace(name=self.name)


class Library:
    """Vectors by model and name. Nothing is created before the first :meth:`put`."""

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        self.root = default_root() if root is None else Path(root)
        self.pulled = Pulled(self.root / "hub")

    def path(self, name: str, identity: ModelIdentity) -> Path:
        """The file of a vector, whether it exists or not; of ``owner/name``, what was pulled.

        Raises VectorError for a bad name, MissingVector for one that was not pulled.
        """
        if is_hub_name(name):
            return self.pulled.vector_file(self._item(name, identity))
        return self.root / identity.key / (check_name(name) + _SUFFIX)

    def get(self, name: str, identity: ModelIdentity, *, force: bool = False) -> SteeringVector:
        """The vector ``name`` of the model. Raises MissingVector, or VectorError if the file does not fit the model."""
        if is_hub_name(name):
            return _fitted(self.pulled.read(self._item(name, identity)), identity, force)
        path = self.path(name, identity)
        if not path.is_file():
            raise MissingVector(missing_sentence(name, identity))
        return _fitted(Entry(name, path, identity).read(), identity, force)

    def put(self, vector: SteeringVector, identity: ModelIdentity, *, overwrite: bool = False, force: bool = False) -> Path:
        """Store ``vector`` for the model and return its file. A vector without an identity gets the model's.

        Raises VectorError if it does not fit the model, or if the name is taken and ``overwrite`` is not set.
        """
        vector.check_fits(identity, force=force)
        path = self.path(vector.name, identity)
        if path.exists() and not overwrite:
            raise VectorError(f"the library already has {vector.name!r} for {identity.label}: remove it or choose a name")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            card = path.parent / "model.json"
            if not card.exists():
                write_atomically(card, (json.dumps(identity.to_dict(), indent=2) + "\n").encode())
        except OSError as error:
            raise VectorError(f"cannot write to the library {self.root}: {error.strerror or error}") from None
        write_vector(vector.replace(identity=identity), path)
        return path

    def pull(self, reference: str, identity: ModelIdentity | None = None) -> Item:
        """Fetch ``owner/name``, ``owner/name@version`` or ``owner/name@sha256`` from the indexes that were added, and keep it.

        The vector is then found as ``owner/name`` everywhere. Raises HubError, and nothing is kept, for all that does not hold.
        """
        from ..hub.hub import Hub

        return Hub(self).pull(reference, identity=identity)

    def list(self, identity: ModelIdentity | None = None) -> list[Entry]:
        """The vectors of one model, or of all, sorted by model and name, then what was pulled. Vector files are not opened."""
        folders = [self.root / identity.key] if identity else sorted(self.root.iterdir()) if self.root.is_dir() else []
        entries = []
        for folder in folders:
            if not folder.is_dir():
                continue
            model = identity or _read_card(folder / "model.json")
            for path in sorted(folder.glob(f"*{_SUFFIX}")):
                if _is_name(path.stem):  # half-written and foreign files are nobody's vectors
                    entries.append(Entry(path.stem, path, model))
        for item in self.pulled.vectors(identity=identity):
            path = self.pulled.path(item.files["vector"])
            entries.append(Entry(item.name, path, item.model, functools.partial(self.pulled.read, item)))
        return entries

    def remove(self, name: str, identity: ModelIdentity) -> None:
        """Delete a vector. Raises MissingVector if there is none, VectorError for one that was pulled."""
        if is_hub_name(name):
            raise VectorError(f"{name!r} was pulled from a hub: remove it with: steer hub remove {name}")
        try:
            self.path(name, identity).unlink()
        except FileNotFoundError:
            raise MissingVector(missing_sentence(name, identity)) from None
        except OSError as error:
            raise VectorError(f"cannot remove {name!r} from the library: {error.strerror or error}") from None

    def resolve(
        self,
        spec: str | os.PathLike[str],
        identity: ModelIdentity | None,
        *,
        names_only: bool = False,
        force: bool = False,
    ) -> SteeringVector:
        """The vector for a library name or a path to a file of any known format.

        A name that the library has for this model, ``owner/name`` that was pulled, or a feature of an autoencoder
        (``talk#smell``) comes first; ``./mood`` always is a file. Nothing is fetched from anywhere. Without an identity, a
        name is looked up for all models and must be of one only.

        Args:
            names_only: refuse files: whoever can send a request must not open files here.
            force: accept a vector whose model differs in its norms only; it is returned under the identity of this one.

        Raises:
            MissingVector: there is neither.
            SpecError: a file where only names are allowed.
            VectorError: the vector belongs to another model, or cannot be read.
        """
        text = os.fspath(spec)
        if names_only:
            refuse_file(text)
        if identity is not None and (feature := split_name(text)) and (names_only or not Path(text).is_file()):
            return read_feature(self.root, *feature, identity)
        if isinstance(spec, str) and is_hub_name(text) and (names_only or self.pulled.vectors(text) or not Path(text).is_file()):
            item = self._item(text, identity)
            vector = self.pulled.read(item)
            return vector if identity is None else _fitted(vector, identity, force)
        if names_only:
            check_name(text)
        if _is_name(text):
            if identity is not None and self.path(text, identity).is_file():
                return self.get(text, identity, force=force)
            if identity is None:
                found = [entry for entry in self.list() if entry.name == text]
                if len(found) > 1:
                    models = ", ".join(entry.identity.label if entry.identity else entry.path.parent.name for entry in found)
                    raise VectorError(f"{text!r} is in the library for several models ({models}): name one with --model")
                if found:
                    return found[0].read()
        path = expand_path(text)
        if names_only or (not path.is_file() and _is_name(text) and path.suffix.lower() not in FILE_SUFFIXES):
            raise MissingVector(missing_sentence(text, identity))
        vector = read_any(path, Facts(identity=identity))
        return vector if identity is None else _fitted(vector, identity, force)

    def _item(self, name: str, identity: ModelIdentity | None) -> Item:
        """What was pulled under a name, for this model. Raises MissingVector, or VectorError if a model has to be named."""
        found = self.pulled.vectors(name)
        fitting = [item for item in found if identity is None or (item.model and item.model.mismatch(identity) is None)]
        if len(fitting) > 1:
            models = ", ".join(item.model.label for item in fitting if item.model)
            raise VectorError(f"{name!r} was pulled for several models ({models}): name one with --model")
        if not fitting and len(found) == 1:
            return found[0]  # for another model: what fits it not is said by name, or forced
        if not fitting:
            raise MissingVector(missing_sentence(name, identity))
        return fitting[0]


def _fitted(vector: SteeringVector, identity: ModelIdentity, force: bool) -> SteeringVector:
    vector.check_fits(identity, force=force)
    # A forced vector belongs to this model from here on, so that no engine has to be told about the force again.
    return vector if vector.identity in (None, identity) or not force else vector.replace(identity=identity)


def _is_name(text: str) -> bool:
    try:
        check_name(text)
    except VectorError:
        return False
    return True


def _read_card(path: Path) -> ModelIdentity | None:
    try:
        if path.stat().st_size > 1 << 20:
            return None
        return ModelIdentity.from_dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, RecursionError, VectorError):
        return None
