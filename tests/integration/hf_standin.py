"""A stand-in of Hugging Face's API, as far as its client library asks for it: repositories, commits, files, LFS, tags.

State is in memory. A commit is a dictionary from path to bytes; ``log`` has each request's method and path.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_FROM = 2000
"""Bytes, from which a file that is no text is kept by LFS, as safetensors are there."""
TOKEN = "hf_standin"


@dataclass
class Repository:
    """``commits``: sha to files, the newest last."""

    kind: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def commit(self, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha] = files
        self.messages.append(message)
        return sha

    def front(self) -> dict[str, Any]:
        text = self.commits[self.head].get("README.md", b"").decode()
        match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        return dict(yaml.safe_load(match[1])) if match else {}


class HuggingFace:
    """The server; ``url`` is what HF_ENDPOINT has to be."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.log: list[str] = []
        self.sizes: dict[str, int] = {}
        """What is claimed of a path in place of its size."""
        self.down = False
        self.on_preupload: Callable[[], object] = lambda: None
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextlib.contextmanager
    def running(self) -> Iterator[HuggingFace]:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HuggingFace

    def log_message(self, *arguments: Any) -> None: ...

    def answer(self, body: Any = None, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        self.answer({"error": message or code}, status, X_Error_Code=code, X_Error_Message=message or code)

    def handle_one(self) -> None:
        self.hub.log.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if self.command in ("POST", "PUT") else b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        if self.hub.down:
            self.refuse(400, message="down for repairs")
            return
        path = unquote(urlsplit(self.path).path)
        writes = path == "/api/repos/create" or "/commit/" in path or "/preupload/" in path or path.endswith("/objects/batch")
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.refuse(401, message="Invalid username or password.")
            return
        for pattern, method in _ROUTES:
            match = re.fullmatch(f"{self.command} {pattern}", f"{self.command} {path}")
            if match and self.command in method.__doc__.split():
                method(self, body, **match.groupdict())
                return
        self.refuse(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    # ---- routes: the docstring has the methods ----

    def found(self, repo: str, kind: str | None, revision: str | None = None) -> tuple[Repository, str] | None:
        repository = self.hub.repositories.get(repo)
        if repository is None or repository.kind != (kind or "models").rstrip("s"):
            self.refuse(404, "RepoNotFound", "Repository Not Found")
            return None
        sha = repository.head if revision in (None, "main") else revision
        matching = [one for one in repository.commits if one == sha]
        if not matching:
            self.refuse(404, "RevisionNotFound", "Revision Not Found")
            return None
        return repository, matching[0]

    def create(self, body: bytes) -> None:
        """POST"""
        said = json.loads(body)
        name = f"{said['organization']}/{said['name']}"
        if name in self.hub.repositories:
            self.answer({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
            return
        repository = self.hub.repositories[name] = Repository(said.get("type", "model"))
        repository.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.answer({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def info(self, body: bytes, kind: str, repo: str, revision: str | None = None) -> None:
        """GET"""
        if found := self.found(repo, kind, revision):
            repository, sha = found
            files = [{"rfilename": path} for path in repository.commits[sha]]
            self.answer({"_id": repo, "id": repo, "sha": sha, "siblings": files, "tags": repository.front().get("tags", [])})

    def tree(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        """GET"""
        if found := self.found(repo, kind, revision):
            repository, sha = found
            self.answer([self.entry(path, data) for path, data in sorted(repository.commits[sha].items())])

    def entry(self, path: str, data: bytes) -> dict[str, Any]:
        size = self.hub.sizes.get(path, len(data))
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        found: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": oid}
        if hashlib.sha256(data).hexdigest() in self.hub.objects:
            found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 130}
        return found

    def paths_info(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        """POST"""
        if found := self.found(repo, kind, revision):
            repository, sha = found
            text = body.decode()
            wanted = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
            files = repository.commits[sha]
            self.answer([self.entry(path, files[path]) for path in wanted if path in files])

    def resolve(self, body: bytes, repo: str, revision: str, path: str, kind: str | None = None) -> None:
        """GET HEAD"""
        if found := self.found(repo, kind, revision):
            repository, sha = found
            data = repository.commits[sha].get(path)
            if data is None:
                self.refuse(404, "EntryNotFound", "Entry not found")
                return
            digest = hashlib.sha256(data).hexdigest()
            common = {"X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
            if digest in self.hub.objects:  # elsewhere, as LFS files are
                common |= {"X_Linked_Size": str(len(data)), "X_Linked_Etag": f'"{digest}"'}
                self.answer(b"", 302, Location=f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{digest}", **common)
                return
            oid = self.entry(path, data)["oid"]
            self.answer(data, 200, ETag=f'"{oid}"', Content_Length=str(len(data)), **common)

    def cdn(self, body: bytes, digest: str) -> None:
        """GET HEAD"""
        data = self.hub.objects[digest]
        self.answer(data, 200, ETag=f'"{digest}"', Content_Length=str(len(data)))

    def validate(self, body: bytes) -> None:
        """POST"""
        content = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        front = yaml.safe_load(match[1]) if match else {}
        errors = []
        if not isinstance(front.get("license"), str) or not re.fullmatch(r"[a-z0-9.-]+", front["license"]):
            errors.append({"message": '"license" must be one of those known'})
        if not all(isinstance(tag, str) for tag in front.get("tags", [])):
            errors.append({"message": '"tags" must be texts'})
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        """POST"""
        self.hub.on_preupload()
        if found := self.found(repo, kind, revision):
            modes = []
            for file in json.loads(body)["files"]:
                lfs = file["path"].endswith(".safetensors") or (
                    file["size"] > LFS_FROM and not file["path"].endswith((".json", ".md"))
                )
                here = found[0].commits[found[1]].get(file["path"])
                oid = None if here is None else self.entry(file["path"], here)["oid"]
                modes.append({"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
            self.answer({"files": modes})

    def batch(self, body: bytes, repo: str, kind: str | None = None) -> None:
        """POST"""
        objects = []
        for one in json.loads(body)["objects"]:
            found: dict[str, Any] = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.objects:
                found["actions"] = {"upload": {"href": f"{self.hub.url}/upload/{one['oid']}", "header": {}}}
            objects.append(found)
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, digest: str) -> None:
        """PUT"""
        assert hashlib.sha256(body).hexdigest() == digest
        self.hub.objects[digest] = body
        self.answer({})

    def commit(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        """POST"""
        if found := self.found(repo, kind, revision):
            repository, sha = found
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            header = lines[0]["value"]
            if header.get("parentCommit", repository.head) != repository.head:
                self.refuse(412, message="A commit has happened since. Please refresh and try again.")
                return
            files = dict(repository.commits[sha])
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                else:
                    files[value["path"]] = self.hub.objects[value["oid"]]
            new = repository.commit(files, header["summary"])
            self.answer({"commitOid": new, "commitUrl": f"{self.hub.url}/{repo}/commit/{new}", "hookOutput": "", "success": True})

    def listing(self, body: bytes, kind: str) -> None:
        """GET"""
        query = parse_qs(urlsplit(self.path).query)
        wanted, word = set(query.get("filter", [])), query.get("search", [""])[0]
        found = []
        for name, repository in self.hub.repositories.items():
            front = repository.front()
            bases = front.get("base_model", [])
            tags = {*front.get("tags", []), *(f"base_model:{base}" for base in ([bases] if isinstance(bases, str) else bases))}
            if repository.kind == kind.rstrip("s") and wanted <= tags and word in name:
                found.append({"_id": name, "id": name, "modelId": name, "tags": sorted(tags), "likes": 0, "downloads": 0})
        self.answer(found[: int(query.get("limit", ["1000"])[0])])


_KIND, _REPO, _AT = "(?P<kind>models|datasets)", "(?P<repo>[^/]+/[^/]+)", "(?P<revision>[^/]+)"
_ROUTES = [
    ("/api/repos/create", _Handler.create),
    ("/api/validate-yaml", _Handler.validate),
    (f"/api/{_KIND}", _Handler.listing),
    (f"/api/{_KIND}/{_REPO}", _Handler.info),
    (f"/api/{_KIND}/{_REPO}/revision/{_AT}", _Handler.info),
    (f"/api/{_KIND}/{_REPO}/tree/{_AT}", _Handler.tree),
    (f"/api/{_KIND}/{_REPO}/paths-info/{_AT}", _Handler.paths_info),
    (f"/api/{_KIND}/{_REPO}/preupload/{_AT}", _Handler.preupload),
    (f"/api/{_KIND}/{_REPO}/commit/{_AT}", _Handler.commit),
    (rf"(?:/(?P<kind>datasets))?/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("/upload/(?P<digest>[0-9a-f]{64})", _Handler.upload),
    ("/cdn/(?P<digest>[0-9a-f]{64})", _Handler.cdn),
    (f"(?:/(?P<kind>datasets))?/{_REPO}/resolve/{_AT}/(?P<path>.+)", _Handler.resolve),
]
