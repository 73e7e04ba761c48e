"""A hub in a Hugging Face repository, read at a commit and written in one commit, through the client library of Hugging Face."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from ..errors import HubError, SteerError
from .index import MAX_INDEX_BYTES, read_index
from .publish import Folder
from .schema import model_of
from .signing import SecretKey
from .sources import INDEX, FolderSource, Progress, Source

TAG = "steer-plugins-vector"
"""What repositories that are hubs are tagged with."""
MAX_ROWS = 200
"""Entries, base models and tags that the card of a repository shows."""
_LICENCES = frozenset(
    "apache-2.0 mit cc0-1.0 cc-by-4.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-nc-nd-4.0 bsd-2-clause "
    "bsd-3-clause gpl-2.0 gpl-3.0 agpl-3.0 lgpl-3.0 mpl-2.0 unlicense isc zlib".split()
)
_ADDRESS = re.compile(
    r"hf://(?P<dataset>datasets/)?(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<at>[\w./-]{1,100}))?"
)


class HuggingFaceSource(Source):
    """``url``: ``hf://owner/name``, ``hf://datasets/owner/name``, each also with ``@revision``."""

    def __init__(self, url: str) -> None:
        match = _ADDRESS.fullmatch(url)
        if match is None:
            raise HubError(f"{url!r:.200} is not a repository: write hf://owner/name, or hf://owner/name@revision")
        self.url = url
        self.repo, self._at = match["repo"], match["at"]
        self.kind = "dataset" if match["dataset"] else "model"

    def refresh(self) -> None:
        """Find the commit to read at."""
        client = _client()
        try:
            info = client.HfApi().repo_info(self.repo, repo_type=self.kind, revision=self._at)
        except Exception as error:  # the client has many, and httpx's besides
            raise _failed(self.url, error) from None
        self.revision = info.sha

    def _fetch(self, name: str, target: Path, most: int, resume: bool, progress: Progress | None) -> None:
        if self.revision is None:
            self.refresh()
        client = _client()
        with tempfile.TemporaryDirectory(prefix="steer-hub-") as folder:
            try:
                api = client.HfApi()
                found = api.get_paths_info(self.repo, [name], repo_type=self.kind, revision=self.revision)
                if not found:
                    raise HubError(f"the hub {self.url} has no file {name}")
                if found[0].size > most:
                    raise HubError(f"{name} in {self.url} has {found[0].size} bytes: at most {most} are taken")
                client.hf_hub_download(self.repo, name, repo_type=self.kind, revision=self.revision, local_dir=folder)
            except HubError:
                raise
            except Exception as error:
                raise _failed(self.url, error) from None
            FolderSource(Path(folder)).fetch(name, target, most=most, progress=progress)


def search_repositories(words: list[str], limit: int) -> list[str]:
    """Addresses (``hf://...``) of repositories that are tagged as hubs, at most ``limit``. Raises HubError."""
    api = _client().HfApi()
    asked = {"filter": TAG, "search": " ".join(words) or None, "limit": limit}
    try:
        found = [f"hf://{model.id}" for model in api.list_models(**asked)]
        found += [f"hf://datasets/{dataset.id}" for dataset in api.list_datasets(**asked)]
    except Exception as error:
        raise _failed("Hugging Face", error) from None
    return found[:limit]


def publish_to(
    url: str, key: SecretKey, card: dict[str, Any], contents: dict[str, Path], *, name: str | None = None, days: int | None = None
) -> dict[str, Any]:
    """Publish to a repository, made if it is not there, in one commit; returns the entry. Raises HubError."""
    source, client = HuggingFaceSource(url), _client()
    if "@" in url:
        raise HubError(f"{url!r:.200} names a revision: what is published becomes the newest, so leave it out")
    api = client.HfApi()
    try:
        api.create_repo(source.repo, repo_type=source.kind, exist_ok=True)
        source.refresh()
        there = set(api.list_repo_files(source.repo, repo_type=source.kind, revision=source.revision))
    except HubError:
        raise
    except Exception as error:
        raise _failed(url, error) from None
    with tempfile.TemporaryDirectory(prefix="steer-hub-") as place:
        folder = Path(place) / source.repo.split("/")[1]
        folder.mkdir()
        if INDEX in there:
            source.fetch(INDEX, folder / INDEX, most=MAX_INDEX_BYTES)
        entry = Folder(folder, key).publish(card, contents, name=name, days=days)
        with contextlib.closing(read_index(folder / INDEX, url)) as index:
            keeper = index.header["key"]
        if keeper != str(key.public):
            raise HubError(f"the index in {url} is kept by {keeper}: publish to a checkout of it, and ask its keeper to sign")
        (folder / "README.md").write_text(_readme(url, folder / INDEX), "utf-8")
        (folder / ".lock").unlink(missing_ok=True)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        added = [client.CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in paths]
        try:
            api.create_commit(
                source.repo,
                added,
                repo_type=source.kind,
                commit_message=f"{entry['name']}@{entry['version']}",
                parent_commit=source.revision,
            )
        except Exception as error:
            raise _failed(url, error) from None
    return entry


def _readme(url: str, index: Path) -> str:
    """The model card that Hugging Face shows and searches: front matter of all entries, and a table of the first ones."""
    read = read_index(index, "the index")
    licences: set[str] = set()
    bases: set[str] = set()
    tags, rows = {TAG, "activation-steering"}, list[str]()
    for entry in read.entries:
        licences.add(entry["licence"])
        bases |= {entry["base_model"]} - {None}
        tags.update(entry["tags"])
        if len(rows) < MAX_ROWS:
            model = model_of(entry)
            cells = (entry["name"], entry["version"], entry["kind"], entry["description"], model.label if model else "any")
            rows.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    front = [*_licence(licences), "library_name: steer-plugins"]
    if bases:
        front += ["base_model:", *(f"- {json.dumps(base)}" for base in sorted(bases)[:MAX_ROWS])]
    front += ["tags:", *(f"- {json.dumps(tag)}" for tag in sorted(tags)[:MAX_ROWS])]
    count = read.header["count"]
    if count > len(rows):
        rows.append(f"\n{count - len(rows)} more are in its index.")
    lines, table = "\n".join(front), "\n".join(rows)
    return (
        f"---\n{lines}\n---\n\n# {url.split('/')[-1]}\n\n"
        f"A hub of steering vectors for [steer-plugins](https://github.com/steer-plugins/steer-plugins):\n\n"
        f"    steer hub add {url}\n    steer hub search\n\n"
        f"| name | version | kind | what it does | model |\n|---|---|---|---|---|\n{table}\n\n"
        f"Signed by `{read.header['key']}`.\n"
    )


def _licence(licences: set[str]) -> list[str]:
    """Hugging Face knows few licences, by names of its own; all others are "other" and named beside."""
    one = next(iter(licences)).lower() if len(licences) == 1 else ""
    known = re.sub(r"-(?:only|or-later)$", "", one)
    if known in _LICENCES:
        return [f"license: {known}"]
    return ["license: other", f"license_name: {json.dumps('-'.join(one.split()) or 'several')}"]


def _cell(text: str) -> str:
    """Text that is only text in a table of Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>|#!&~])", r"\\\1", " ".join(text.split()))


def _client() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise SteerError("hf:// needs the package huggingface_hub: install it with: pip install 'steer-plugins[hub]'") from None
    return huggingface_hub


def _failed(what: str, error: BaseException) -> HubError:
    while type(error) is RuntimeError and error.__cause__ is not None:  # of an upload's thread
        error = error.__cause__
    return HubError(f"{what} cannot be used: {type(error).__name__}, {' '.join(str(error).split()):.300}")
