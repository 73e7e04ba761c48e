"""A hub on a web server: any that hands out files. Redirects stay on the host that was named; answers are bounded."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

import requests

from ..errors import HubError
from .sources import Progress, Source, copy_bounded

TIMEOUT = (10.0, 60.0)
"""Seconds for a connection, and of silence after which an answer is given up."""
MAX_REDIRECTS = 5
_BLOCK = 1 << 16


class WebSource(Source):
    """``url``: the folder that ``index.json`` lies in."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if not parts.hostname or parts.query or parts.fragment or parts.username or parts.password:
            raise HubError(f"{url!r:.200} is not a hub's address: write http(s)://host/folder/ without a name, password or query")
        self.url = url.removesuffix("index.json").rstrip("/") + "/"
        self._session = requests.Session()

    def refresh(self) -> None:
        """Nothing to do: each file is asked for anew."""

    def _fetch(self, name: str, target: Path, most: int, resume: bool, progress: Progress | None) -> None:
        start = target.stat().st_size if resume and target.is_file() else 0
        start = start if 0 < start < most else 0
        url = urljoin(self.url, quote(name))
        try:
            response = self._get(url, {"Range": f"bytes={start}-"} if start else {})
            with response:
                if response.status_code == 206 and start:
                    if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                        raise HubError(f"{url} answers with another part than it was asked for")
                elif response.status_code == 200:
                    start = 0
                elif response.status_code == 416:
                    start = -1
                else:
                    raise HubError(f"the hub {self.url} has no file {name} (it answers {response.status_code})")
                if start >= 0:
                    length = response.headers.get("Content-Length", "")
                    total = start + int(length) if length.isdigit() and len(length) < 20 else most
                    if total > most:
                        raise HubError(f"{url} has {total} bytes: at most {most} are taken")
                    # the last block of an answer that breaks off is kept, too
                    response.raw.enforce_content_length = False
                    copy_bounded(response.iter_content(_BLOCK), target, most, total, url, progress, start=start)
                    if length.isdigit() and target.stat().st_size < total:
                        raise HubError(f"cannot fetch all of {url}: it broke off, call again to go on with it")
            if start < 0:  # what is here is no beginning of what is there
                target.unlink()
                self._fetch(name, target, most, False, progress)
        except requests.RequestException as error:
            reason = str(error.args[0] if error.args else error)
            raise HubError(f"cannot fetch {url}: {type(error).__name__}, {' '.join(reason.split()):.200}") from None
        except OSError as error:
            raise HubError(f"cannot write {target}: {error.strerror or error}") from None

    def _get(self, url: str, headers: dict[str, str]) -> requests.Response:
        """The answer to a GET, after redirects within the host."""
        # not packed: a part of a packed file could not be gone on with
        asked = {"Accept-Encoding": "identity", **headers}
        for _ in range(MAX_REDIRECTS + 1):
            response = self._session.get(url, headers=asked, timeout=TIMEOUT, stream=True, allow_redirects=False)
            if response.status_code not in (301, 302, 303, 307, 308):
                return response
            target = urljoin(url, response.headers.get("Location", ""))
            response.close()
            if _origin(target) != _origin(url):
                raise HubError(
                    f"the hub {self.url} redirects to another host ({urlsplit(target).netloc or target:.100}), which is refused"
                )
            url = target
        raise HubError(f"the hub {self.url} redirects more than {MAX_REDIRECTS} times")


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    try:
        return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return parts.scheme, None, None
