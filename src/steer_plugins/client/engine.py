"""The engine over HTTP: a running llama-server with steering, whose weights are loaded once for everybody."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from ..engine.base import (
    Activations,
    GenerateRequest,
    Generation,
    GenerationStream,
    Progress,
    Prompt,
)
from ..engine.batching import wanted_positions
from ..engine.chat import ChatTemplate, check_messages, utf8
from ..engine.tokens import TokenEngine
from ..errors import DataError, EngineError, ModelError, SpecError, SteerError
from ..steering.terms import Steering
from .activations import decode_read
from .connection import Connection, EventStream, ServerRefusal
from .facts import ask
from .vectors import ServerVectors, content_name

if TYPE_CHECKING:
    from ..store.library import Library

T = TypeVar("T")

MAX_TEXTS = 64
"""Texts of one read or score request."""

MAX_READ = 128 << 20
"""About how many bytes of hidden states are asked for at once."""

_FINISH = {"eos": "stop", "word": "stop", "limit": "length"}


class ServerEngine(TokenEngine):
    """A model in a running llama-server with steering (``steer serve``), here or on another machine.

    Args:
        url: ``http://host:port``; the scheme may be left out.
        api_key: the server's ``--api-key``, if it has one.
        timeout: seconds without any response after which a request fails; also how long a server may take to load
            its model.
        library: where :meth:`steering` looks up names; the user's own by default.

    Raises:
        EngineError: nobody answers there, it is a server without steering, or it speaks another protocol version.
        ModelError: the server's model cannot be steered.

    Vectors are uploaded when a steering first needs them, and deleted by :meth:`close`. In architectures with
    ``info.last_layer_outputs_only`` the last layer can be read at the last token only (``positions`` ``"last"`` or ``[-1]``);
    other reads leave it out. Unlike an in-process engine, several replies may be streamed at once, and a live change acts on
    whatever token the server has come to.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 600.0, library: Library | None = None) -> None:
        self._connection: Connection | None = Connection(url, api_key=api_key, timeout=timeout)
        self.library = library
        self._running: list[ServerStream] = []
        self._template: ChatTemplate | None = None
        self._bos = ""
        self._pieces: dict[int, bytes] = {}
        try:
            self.facts = ask(self._connection)
            if self.facts.info is None:
                raise ModelError(self.facts.problem)
        except BaseException:
            self._connection.close()
            raise
        self.info = self.facts.info
        self.n_slots = self.facts.n_slots
        self._vectors = ServerVectors(self._connection, self.facts)

    @property
    def _http(self) -> Connection:
        if self._connection is None:
            raise EngineError("the engine is closed: make a new one")
        return self._connection

    @property
    def url(self) -> str:
        """Address of the server."""
        return self._http.url

    def status(self) -> dict[str, Any]:
        """What ``GET /steering`` answers now: model, vectors, running requests, memory."""
        return dict(self._http.get("/steering"))

    # ---- text ----

    def tokenize(self, prompt: Prompt, *, thinking: bool | None = None, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a prompt. Chats are rendered here, with the template the server has: its own rendering answers the
        last assistant message instead of closing it, and switches thinking on where the template's default is off."""
        if isinstance(prompt, str):
            tokens = self._tokenize(prompt, add_special=True)
        elif prompt and isinstance(prompt[0], dict):
            template = self._chat_template()
            text = template.render(check_messages(prompt), add_generation_prompt=add_generation_prompt, thinking=thinking)
            tokens = self._tokenize(text, add_special=not (self._bos and text.startswith(self._bos)))
        else:
            tokens = self._checked(prompt)  # type: ignore[arg-type]
        if not tokens:
            raise DataError("the prompt is empty")
        return tokens

    def detokenize(self, tokens: Sequence[int]) -> str:
        wanted = self._checked(tokens)
        self._learn_pieces([t for t in dict.fromkeys(wanted) if t not in self._pieces])
        return b"".join(self._pieces[t] for t in wanted).decode(errors="replace")

    def pieces(self, tokens: Sequence[int]) -> list[bytes]:
        wanted = self._checked(tokens)
        found = self._http.post("/tokenize", {"content": wanted, "with_pieces": True})["tokens"] if wanted else []
        return [item["piece"].encode() if isinstance(item["piece"], str) else bytes(item["piece"]) for item in found]

    def _tokenize(self, text: str | list[Any], *, add_special: bool, parse_special: bool = True) -> list[int]:
        if isinstance(text, str):
            utf8(text)
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return [int(t) for t in self._http.post("/tokenize", body)["tokens"]]

    def _continuation(self, text: str | Sequence[int]) -> list[int]:
        return self._tokenize(text, add_special=False) if isinstance(text, str) else self._checked(text)

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        for t in tokens:
            if not 0 <= int(t) < self.info.n_vocab:
                raise DataError(f"token id {t} is outside the vocabulary of {self.info.n_vocab}")
        return [int(t) for t in tokens]

    def _chat_template(self) -> ChatTemplate:
        if not self.info.has_chat_template:
            raise DataError(f"{self.info.name} carries no chat template: give a raw text prompt")
        if self._template is None:
            props = self.facts.props
            self._bos = str(props.get("bos_token") or "")
            self._template = ChatTemplate(str(props["chat_template"]), bos=self._bos, eos=str(props.get("eos_token") or ""))
        return self._template

    def _learn_pieces(self, tokens: list[int]) -> None:
        """Find out what tokens print. The server prints special tokens too: they are those whose text is not found as them
        unless special tokens are looked for."""
        if not tokens:
            return
        found = self._http.post("/tokenize", {"content": tokens, "with_pieces": True})["tokens"]
        pieces = {
            int(item["id"]): item["piece"].encode() if isinstance(item["piece"], str) else bytes(item["piece"]) for item in found
        }
        texts = {t: item["piece"] for t, item in zip(tokens, found, strict=True) if isinstance(item["piece"], str)}
        mixed = [part for t in texts for part in (texts[t], -1)]  # -1 parts the answers: ids go through as they are
        special, plain = (
            _split(self._tokenize(mixed, add_special=False, parse_special=parse)) if mixed else [] for parse in (True, False)
        )
        for t, as_special, as_text in zip(texts, special, plain, strict=True):
            if as_special == [t] and as_text != [t]:
                pieces[t] = b""
        self._pieces.update(pieces)

    def _fitting(self, tokens: list[int]) -> list[int]:
        if len(tokens) >= self.info.n_ctx:  # llama-server wants one place free, even where nothing is generated
            raise DataError(
                f"a text of {len(tokens)} tokens does not fit the context of {self.info.n_ctx}: "
                "shorten it or start the server with a larger -c"
            )
        return tokens

    def _pair(self, item: tuple[Prompt, str | list[int]], thinking: bool | None) -> tuple[list[int], int]:
        prompt = self.tokenize(item[0], thinking=thinking)
        return self._fitting(prompt + self._continuation(item[1])), len(prompt)

    # ---- steering ----

    def check(self, steering: Any) -> None:
        """Raise VectorError or SpecError for mistakes in a steering that can be found without asking the server."""
        self._vectors.check(Steering.of(steering))

    def request_fields(self, steering: Any) -> dict[str, Any]:
        """The fields that steer a request sent with another HTTP client.

        Args:
            steering: a Steering, a vector, or what else engines take.

        Returns:
            ``steering``, the list of terms of docs/http-protocol.md (also where it is empty), and ``steering_tags`` where a
            scope needs them. Vectors are uploaded first, where they are missing. May be called by several threads at once.

        Raises:
            VectorError: a vector does not fit the model, or the server has no room for it.
            SpecError: a scope that this model cannot have.
        """
        self._http  # noqa: B018  # raises when the engine is closed
        return self._vectors.fields(Steering.of(steering))

    def attempts(self, steering: Any) -> Iterator[dict[str, Any]]:
        """:meth:`request_fields`, and once more if the server turns out to have lost a vector meanwhile: it was restarted,
        or somebody deleted it there. Send a request with each, until one is not refused:

        >>> for fields in engine.attempts(steering):                # doctest: +SKIP
        ...     answer = post("/completion", {**body, **fields})
        ...     if answer.status_code != 400:
        ...         break

        Raises:
            VectorError, SpecError: as :meth:`request_fields`.
        """
        wanted = Steering.of(steering)
        fields = self.request_fields(wanted)
        yield fields
        if self.lost(fields):
            yield self.request_fields(wanted)

    def lost(self, fields: Mapping[str, Any]) -> bool:
        """True if the server lacks a vector of fields made by :meth:`request_fields`: make them anew, which uploads it again."""
        return self._vectors.lost(fields)

    def change(self, request_id: str, steering: Any) -> int | None:
        """Replace the steering of a running request, from its next token on.

        Args:
            request_id: the ``request_id`` that the request was sent with, or that the server gave it.
            steering: what engines take.

        Returns:
            The position of the first token that it acts on; None when the request has not begun, or has ended.

        Raises:
            VectorError, SpecError: as :meth:`request_fields`. ServerRefusal: a gate that the request did not begin with.
        """
        path = f"/steering/requests/{quote(request_id, safe='')}"
        try:
            answer = self._steered(steering, lambda fields: self._http.post(path, {"steering": fields["steering"]}))
        except ServerRefusal as refusal:
            if refusal.status not in (404, 409):
                raise
            return None
        return int(answer["from_position"][0])

    def _steered(self, steering: Any, send: Callable[[dict[str, Any]], T]) -> T:
        """Send a request with the fields of a steering, once more if the server has lost the vectors meanwhile."""
        refused: ServerRefusal | None = None
        for fields in self.attempts(steering):
            try:
                return send(fields)
            except ServerRefusal as refusal:
                if refusal.status != 400:
                    raise
                refused = refusal
        assert refused is not None
        raise refused

    # ---- reading ----

    def _read(
        self,
        pairs: list[tuple[list[int], int]],
        layers: Sequence[int] | None,
        site: str,
        positions: str | Sequence[int],
        stream: str,
        steering: Any,
        progress: Progress | None,
    ) -> list[Activations]:
        chosen = self._named_layers(layers, site, stream)
        rows, average = [], False
        for tokens, n_prompt in pairs:
            wanted, average = wanted_positions(positions, n_prompt, len(tokens))
            rows.append(1 if average else len(wanted))
        body: dict[str, Any] = {"site": site, "stream": stream}
        body["positions"] = positions if isinstance(positions, str) else [int(p) for p in positions]
        if chosen is not None:
            body["layers"] = chosen
        per_row = (self.info.n_layer if chosen is None else len(chosen)) * self.info.n_embd * 4
        per_row *= self.info.n_streams if stream == "all" else 1
        results: list[Activations] = []
        for first, last in _portions([n * per_row for n in rows], MAX_READ):
            prompts = [_prompt(tokens, n_prompt) for tokens, n_prompt in pairs[first:last]]
            data = self._steered(
                steering,
                lambda fields: self._http.post_for_bytes("/steering/read", {**body, "prompts": prompts, **fields}),  # noqa: B023
            )
            results += decode_read(data, last - first, site=site, average=average)
            if progress is not None:
                progress(last, len(pairs))
        return results

    def logprobs(
        self,
        items: Sequence[tuple[Prompt, str | list[int]]],
        *,
        steering: Any = None,
        thinking: bool | None = None,
        progress: Progress | None = None,
    ) -> list[npt.NDArray[np.float64]]:
        pairs = [self._pair(item, thinking) for item in items]
        results: list[npt.NDArray[np.float64]] = []
        for first, last in _portions([len(tokens) for tokens, _ in pairs], MAX_READ):
            part = [{"prompt": tokens[:n], "response": tokens[n:]} for tokens, n in pairs[first:last]]
            answer = self._steered(
                steering,
                lambda fields: self._http.post("/steering/logprobs", {"items": part, **fields}),  # noqa: B023
            )
            results += [np.array(row, np.float64) for row in answer["logprobs"]]
            if progress is not None:
                progress(last, len(pairs))
        if [len(r) for r in results] != [len(tokens) - n for tokens, n in pairs]:
            raise EngineError("the server answered with log probabilities of other tokens; it may be a different version")
        return results

    # ---- generating ----

    def stream(self, request: GenerateRequest) -> ServerStream:
        tokens = self._fitting(self.tokenize(request.prompt, thinking=request.thinking))
        return ServerStream(self, request, tokens)

    def steer_running(self, steering: Any) -> None:
        """Replace the steering of the reply that is being generated (the last one, if there are several), from the
        next token on.

        Raises:
            EngineError: nothing is being generated.
        """
        running = self._running[-1:]
        if not running:
            raise EngineError("no reply is being generated, so there is nothing to steer")
        running[0].steer(steering)

    def generate_many(self, requests: Sequence[GenerateRequest], *, progress: Progress | None = None) -> list[Generation]:
        streams = [self.stream(request) for request in requests]
        if not streams:
            return []
        done = 0
        pool = ThreadPoolExecutor(max_workers=min(self.n_slots, len(streams)))
        pending = {pool.submit(stream.run) for stream in streams}
        try:
            while pending:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                    done += 1
                    if progress is not None:
                        progress(done, len(streams))
        except BaseException:
            for stream in streams:  # an error, or Ctrl-C: nobody wants the others any more
                stream.cancel()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return [stream.result for stream in streams]

    def close(self) -> None:
        """Delete the uploaded vectors from the server and disconnect. The server keeps running."""
        if self._connection is None:
            return
        for stream in list(self._running):
            stream.cancel()
        self._vectors.close()
        self._connection.close()
        self._connection = None


class ServerStream(GenerationStream):
    """A reply of :class:`ServerEngine`; see :class:`GenerationStream`.

    The server does not wait to be asked for the next piece: a live change takes effect at the token that it has come to, and
    changes nothing when the server has finished already. :meth:`cancel` hangs up; other threads may call it too.
    """

    def __init__(self, engine: ServerEngine, request: GenerateRequest, prompt: list[int]) -> None:
        if request.max_tokens < 1:
            raise SpecError(f"max_tokens is {request.max_tokens}: ask for at least 1")
        if not request.temperature >= 0.0:
            raise SpecError(f"temperature {request.temperature} is out of range: 0 is greedy, 1 is the model's own spread")
        self._engine = engine
        self._steering = Steering.of(request.steering)
        self._probe = tuple(request.probe)
        engine.check(self._steering)  # complain now, not in the middle of a reply
        engine.check(list(self._probe))
        self.request_id = f"py-{uuid.uuid4().hex}"
        """The reply's name on the server, for ``POST /steering/requests/ID``."""
        self._body = {
            "prompt": prompt,
            "n_predict": min(request.max_tokens, engine.info.n_ctx - len(prompt)),
            "temperature": request.temperature,
            "top_k": request.top_k,
            "top_p": request.top_p,
            "min_p": request.min_p,
            "repeat_penalty": request.repeat_penalty,
            "repeat_last_n": 64,
            "seed": request.seed & 0x7FFFFFFF,
            "samplers": ["penalties", "top_k", "top_p", "min_p", "temperature"],
            "stop": [s for s in request.stop if s],
            "stream": True,
            "return_tokens": True,
            "cache_prompt": True,
            "request_id": self.request_id,
        }
        self._events: EventStream | None = None
        self._begun = self._cancelled = False
        self._changes: list[Any] = []  # live changes that came before the first token
        self.changed_from: list[int] = []
        """For each live change that found the reply still running: the position of the first token it acts on."""
        self._lock = threading.Lock()
        self.result = Generation("", [], list(prompt), "cancelled")

    def steer(self, steering: Any) -> None:
        wanted = Steering.of(steering)
        self._engine.check(wanted)
        with self._lock:
            if not self._begun:
                self._changes = [wanted]
                return
        self._change(wanted)

    def _change(self, steering: Any) -> None:
        position = self._engine.change(self.request_id, steering)
        if position is not None:  # else it has ended: no token is left to be steered
            self.changed_from.append(position)

    def cancel(self) -> None:
        self._cancelled = True
        events = self._events
        if events is not None:
            events.shutdown()

    def run(self) -> None:
        """Generate to the end."""
        for _ in self:
            pass

    def __iter__(self) -> Iterator[str]:
        if self._cancelled:
            return
        engine, reply = self._engine, self.result
        self._events = events = engine._steered(
            self._steering, lambda fields: engine._http.events("/completion", {**self._body, **fields, **self._probe_field()})
        )
        engine._running.append(self)
        try:
            held: list[int] = []  # tokens whose text has not come: half a character, or what may become a stop string
            final: dict[str, Any] | None = None
            for event in self._guarded(events):
                ids = [int(t) for t in event.get("tokens", ())]
                reply.tokens += ids
                held += ids
                if event.get("stop"):
                    final = event
                    break
                self._begin()
                if probed := event.get("steering_probe"):
                    self.projections = {v.name: float(probed[content_name(v)]) for v in self._probe}
                if text := event.get("content", ""):
                    held = []
                    reply.text += text
                    yield text
                if self._cancelled:
                    break
            if final is not None:
                if tail := self._finish(final, held):
                    yield tail
            elif not self._cancelled:
                raise EngineError(f"{engine.url} ended a reply without saying so: see whether the server still runs")
        finally:
            engine._running.remove(self)
            self._events = None
            events.close()

    def _probe_field(self) -> dict[str, Any]:
        return {"steering_probe": [self._engine._vectors.name_of(v) for v in self._probe]} if self._probe else {}

    def _guarded(self, events: EventStream) -> Iterator[dict[str, Any]]:
        """The events; a connection that we closed ourselves is not an error."""
        try:
            yield from events
        except SteerError:
            if not self._cancelled:
                raise

    def _begin(self) -> None:
        """The first token is there: the request can be changed from here on."""
        with self._lock:
            first, self._begun = not self._begun, True
            changes, self._changes = self._changes, []
        if first:
            for steering in changes:
                self._change(steering)

    def _finish(self, final: dict[str, Any], held: list[int]) -> str:
        """Complete the result; returns the text that the server still held back."""
        reply, reason = self.result, str(final.get("stop_type"))
        missing = int(final.get("tokens_predicted", len(reply.tokens))) - len(reply.tokens)
        if missing > 0:
            raise EngineError(f"{self._engine.url} did not send {missing} tokens of a reply; it may be a different version")
        if reason == "eos" and reply.tokens:
            reply.tokens.pop()
            held = held[:-1]
        tail = self._engine.detokenize(held) if held and reason != "word" else ""
        reply.text += tail
        reply.finish_reason = _FINISH.get(reason, "length")
        return tail


def _prompt(tokens: list[int], n_prompt: int) -> Any:
    return tokens if n_prompt == len(tokens) else {"prompt": tokens[:n_prompt], "response": tokens[n_prompt:]}


def _portions(weights: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Cut a run of texts into (first, last + 1) of at most MAX_TEXTS, and of a weight of about ``most``."""
    first, weight = 0, 0
    for i, w in enumerate(weights):
        if i > first and (i - first == MAX_TEXTS or weight + w > most):
            yield first, i
            first, weight = i, 0
        weight += w
    if first < len(weights):
        yield first, len(weights)


def _split(tokens: Sequence[int]) -> list[list[int]]:
    """Runs of tokens, each ended by -1."""
    runs: list[list[int]] = [[]]
    for t in tokens:
        if t == -1:
            runs.append([])
        else:
            runs[-1].append(t)
    return runs[:-1]
