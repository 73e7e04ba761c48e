"""A hub in a Hugging Face repository, read at a commit and written in one commit, through the client library of Hugging Face."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from ..errors import HubError, SteerError
from .publish import Folder
from .signing import SecretKey
from .sources import INDEX, FolderSource, Progress, Source

TAG = "steer-plugins-vector"
"""What repositories that are hubs are tagged with."""

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
    """Names of repositories that are tagged as hubs. Raises HubError."""
    client = _client()
    try:
        found = client.HfApi().list_models(filter=TAG, search=" ".join(words) or None, limit=limit)
        return [model.id for model in found]
    except Exception as error:
        raise _failed("Hugging Face", error) from None


def publish_to(
    url: str, key: SecretKey, card: dict[str, Any], contents: dict[str, Path], *, name: str | None = None, days: int | None = None
) -> dict[str, Any]:
    """Publish to a repository, made if it is not there, in one commit; returns the entry. Raises HubError."""
    source, client = HuggingFaceSource(url), _client()
    api = client.HfApi()
    try:
        api.create_repo(source.repo, repo_type=source.kind, exist_ok=True)
        there = set(api.list_repo_files(source.repo, repo_type=source.kind))
    except Exception as error:
        raise _failed(url, error) from None
    with tempfile.TemporaryDirectory(prefix="steer-hub-") as place:
        folder = Path(place) / source.repo.split("/")[1]
        folder.mkdir()
        if INDEX in there:
            source.refresh()
            source.fetch(INDEX, folder / INDEX, most=512 << 20)
        entry = Folder(folder, key).publish(card, contents, name=name, days=days)
        (folder / "README.md").write_text(_readme(source.repo, entry), "utf-8")
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


def _readme(repo: str, entry: dict[str, Any]) -> str:
    """The model card that Hugging Face shows and searches."""
    front = [f"license: {entry['licence'].lower() if ' ' not in entry['licence'] else 'other'}", "library_name: steer-plugins"]
    front += [f"base_model: {entry['base_model']}"] if entry["base_model"] else []
    front += ["tags:", f"- {TAG}", "- activation-steering", *(f"- {tag}" for tag in entry["tags"])]
    lines = "\n".join(front)
    return (
        f"---\n{lines}\n---\n\n# {repo.split('/')[1]}\n\n{entry['description']}\n\n"
        f"A hub of steering vectors for [steer-plugins](https://github.com/steer-plugins/steer-plugins):\n\n"
        f"    steer hub add hf://{repo}\n    steer hub pull {entry['name']}\n\n"
        f"Signed by `{entry['key']}`.\n"
    )


def _client() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise SteerError("hf:// needs the package huggingface_hub: install it with: pip install 'steer-plugins[hub]'") from None
    return huggingface_hub


def _failed(what: str, error: Exception) -> HubError:
    return HubError(f"{what} cannot be used: {type(error).__name__}, {' '.join(str(error).split()):.300}")
