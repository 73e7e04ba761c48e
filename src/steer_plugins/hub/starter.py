"""The starter set, an index that comes with the project: vectors for the demo model, used where nothing was added or pulled."""

from __future__ import annotations

from pathlib import Path

from ..atomic import file_sha256
from ..errors import HubError
from ..steering.vector import ModelIdentity, SteeringVector
from ..store.vectorfile import read_vector
from .index import read_index
from .sources import file_name


def starter_folder() -> Path:
    """Inside the installed package, or in the project's tree. Raises HubError where it is missing."""
    here = Path(__file__).resolve().parent.parent
    for folder in (here / "starter", here.parent.parent / "examples" / "hub"):
        if (folder / "index.json").is_file():
            return folder
    raise HubError("the starter set is missing from this installation: reinstall steer-plugins")


def starter_vector(name: str, identity: ModelIdentity) -> SteeringVector | None:
    """The set's vector of that name for this model, called ``name`` alone; None where the set has none.

    Raises:
        HubError: the set is missing or damaged.
    """
    folder = starter_folder()
    index = read_index(folder / "index.json", "the starter set")
    try:
        found = [e for e in index.entries if e["kind"] == "vector" and e["name"] == f"starter/{name}" and _fits(e, identity)]
    finally:
        index.close()
    if not found:
        return None
    sha256 = found[-1]["files"]["vector"]["sha256"]
    path = folder / file_name(sha256, "safetensors")
    if not path.is_file() or file_sha256(path) != sha256:
        raise HubError(f"the starter set's {name} is not what its index says: reinstall steer-plugins")
    return read_vector(path).replace(name=name)


def _fits(entry: dict[str, object], identity: ModelIdentity) -> bool:
    model = entry["model"]
    return isinstance(model, dict) and ModelIdentity.from_dict(model).key == identity.key
