"""The in-process engine: llama-cpp-python's bindings on a patched llama.cpp."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import native
from ..errors import DataError, EngineError, SpecError
from ..runtime import activate, ensure_runtime
from ..runtime.rpc import join, joined, parse_workers
from ..steering.gate import Gate
from ..steering.terms import Steering
from ..steering.vector import SteeringVector
from .base import (
    Activations,
    GenerateRequest,
    Generation,
    ModelInfo,
    Progress,
    Prompt,
    as_steering,
)
from .batching import TokenText, log_softmax, log_softmax_at, read_texts, run_texts, wanted_positions
from .gates import check_gates, decide
from .model import LoadedModel, shared_log
from .reply import GrowingReply, prefill
from .session import Session, SessionLimits, cleaned
from .steered import check_fits
from .stream import LocalStream
from .tokens import TokenEngine

DEFAULT_CTX = 4096
"""Context of one request unless asked otherwise: a model that advertises a million tokens does not take them."""


class LocalEngine(TokenEngine):
    """A GGUF model in this process.

    Args:
        model: path of a GGUF file, or of any shard of a split one; the default model when None.
        n_ctx: context length of one request in tokens; at most the model's, 4096 by default.
        n_gpu_layers: layers to offload, -1 for all; none by default, all with ``rpc``.
        n_threads: CPU threads; the machine's cores by default.
        n_batch: tokens computed at once.
        n_parallel: requests computed side by side by the calls that take several.
        runtime: ``patched``, ``stock`` (the unmodified llama.cpp of the bindings) or a folder with libraries; by default
            ``STEER_RUNTIME``, else the patched one where there is one. A process can load one only.
        rpc: workers (``host:port,host:port``, each a ``steer worker``) that hold layers of the model. They stay with this
            process, which ends when one of them does: ggml does not go on without it.
        verbose: print llama.cpp's log.

    Raises:
        RuntimeMissing: no patched llama.cpp, or another one is loaded already.
        ModelError: the file cannot be used.

    Contexts are made when first needed: one for :meth:`stream`, one for :meth:`generate_many`, one for reading and scoring.
    They share the weights. Not thread safe.
    """

    mixed_positions = True
    has_distributions = True

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        n_ctx: int | None = None,
        n_gpu_layers: int | None = None,
        n_threads: int | None = None,
        n_batch: int = 512,
        n_parallel: int = 8,
        runtime: str | os.PathLike[str] | None = None,
        rpc: str | None = None,
        verbose: bool = False,
    ) -> None:
        for name, value in (("n_ctx", n_ctx), ("n_threads", n_threads), ("n_batch", n_batch), ("n_parallel", n_parallel)):
            if value is not None and value < 1:
                raise EngineError(f"{name} is {value}: it must be at least 1")
        workers = parse_workers(rpc) if rpc is not None else []
        llama_cpp = activate(ensure_runtime(wish=runtime))
        if n_gpu_layers is None:
            n_gpu_layers = -1 if workers else 0
        if workers or (joined() and n_gpu_layers):
            join(llama_cpp, workers)
        shared_log(llama_cpp).verbose = verbose
        if model is None:
            from ..runtime.demo_model import default_model_path

            model = default_model_path()
        self._open: LoadedModel | None = LoadedModel(llama_cpp, Path(model), n_gpu_layers=n_gpu_layers)
        self._c = llama_cpp
        n_ctx_model = self._model.n_ctx_train or DEFAULT_CTX
        cores = os.cpu_count() or 4
        self._n_ctx = min(n_ctx if n_ctx is not None else DEFAULT_CTX, n_ctx_model)
        self._n_threads = n_threads if n_threads is not None else (cores if cores <= 4 else cores // 2)
        self._n_threads_batch = n_threads if n_threads is not None else cores
        self._n_batch = min(n_batch, self._n_ctx)
        self._n_parallel = 1 if self._model.steering.one_sequence else n_parallel
        self._sessions: dict[str, Session] = {}
        self._running: LocalStream | None = None
        self._read_callback: tuple[Callable[[native.ReadRows], None], list[int], str] | None = None
        steer = self._model.steer
        self.info = ModelInfo(
            path=str(self._model.path),
            identity=self._model.identity,
            architecture=self._model.identity.architecture,
            n_layer=steer.n_layer,
            n_embd=steer.n_embd,
            n_streams=steer.n_streams,
            n_ctx=self._n_ctx,
            n_vocab=self._model.n_vocab,
            sites=steer.sites,
            last_layer_outputs_only=steer.last_layer_outputs_only,
            has_chat_template=self._model.template is not None,
            name=self._model.identity.name or self._model.path.stem,
        )

    @property
    def _model(self) -> LoadedModel:
        if self._open is None:
            raise EngineError("the engine is closed: make a new one")
        return self._open

    # ---- contexts ----

    def _session(self, kind: str, n_ctx: int = 0) -> Session:
        """The context for a kind of work, made anew when it is too small."""
        model = self._model
        session = self._sessions.get(kind)
        need = max(n_ctx, min(512, self._n_ctx))
        if kind == "one":
            need = self._n_ctx
        if session is not None and session.limits.n_ctx >= need:
            return session
        if session is not None:
            session.close()
            del self._sessions[kind]
        need = min(self._n_ctx, -(-need // 256) * 256)
        limits = SessionLimits(
            n_ctx=need,
            n_seq=1 if kind == "one" else self._n_parallel + (kind == "texts"),
            unified=kind == "texts" or model.steering.unified,
            n_batch=self._n_batch,
            n_threads=self._n_threads,
            n_threads_batch=self._n_threads_batch,
        )
        self._sessions[kind] = session = Session(model, limits)
        return session

    # ---- text ----

    def tokenize(self, prompt: Prompt, *, thinking: bool | None = None, add_generation_prompt: bool = True) -> list[int]:
        return self._model.tokenize(prompt, thinking=thinking, add_generation_prompt=add_generation_prompt)

    def detokenize(self, tokens: Sequence[int]) -> str:
        return self._model.detokenize(tokens)

    def pieces(self, tokens: Sequence[int]) -> list[bytes]:
        return [self._model.piece(token, special=True) for token in tokens]

    def _fitting(self, tokens: list[int], room: int = 0) -> list[int]:
        if len(tokens) + room > self._n_ctx:
            raise DataError(
                f"a text of {len(tokens)} tokens does not fit the context of {self._n_ctx}: shorten it or use a larger --n-ctx"
            )
        return tokens

    def _pair(self, item: tuple[Prompt, str | list[int]], thinking: bool | None) -> tuple[list[int], int]:
        prompt = self.tokenize(item[0], thinking=thinking)
        continuation = self._model.continuation(item[1])
        return self._fitting(prompt + continuation), len(prompt)

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
        named = self._named_layers(layers, site, stream)
        chosen = list(range(self.info.n_layer)) if named is None else named
        each = positions if isinstance(positions, list) and positions and isinstance(positions[0], str) else None
        texts = []
        for (tokens, n_prompt), spot in zip(pairs, each or [positions] * len(pairs), strict=True):
            wanted, average = wanted_positions(spot, n_prompt, len(tokens))
            texts.append(TokenText(tokens, n_prompt, wanted, [], average))
        if not texts:
            return []
        done = 0

        def report(n: int, total: int) -> None:
            if progress is not None:
                progress(done + n, len(texts))

        results: dict[int, Activations] = {}
        for decided, chosen_texts in self._parted(as_steering(steering), [t.tokens[: t.n_prompt] for t in texts]):
            session = self._session("texts", max(len(t.tokens) for t in texts))
            part = [texts[i] for i in chosen_texts]
            with cleaned(session):
                found = read_texts(session, part, decided, layers=chosen, site=site, stream=stream, progress=report)
            results.update(zip(chosen_texts, found, strict=True))
            done += len(part)
        return [results[i] for i in range(len(texts))]

    def logprobs(
        self,
        items: Sequence[tuple[Prompt, str | list[int]]],
        *,
        steering: Any = None,
        thinking: bool | None = None,
        progress: Progress | None = None,
    ) -> list[npt.NDArray[np.float64]]:
        pairs = [self._pair(item, thinking) for item in items]
        results = [np.zeros(len(tokens) - n_prompt, np.float64) for tokens, n_prompt in pairs]

        def keep(i: int, place: int, logits: npt.NDArray[np.float32]) -> None:
            tokens, n_prompt = pairs[i]
            results[i][place] = log_softmax_at(logits, tokens[n_prompt + place])

        self._score(pairs, keep, steering, progress)
        return results

    def distributions(
        self,
        items: Sequence[tuple[Prompt, str | list[int]]],
        *,
        steering: Any = None,
        thinking: bool | None = None,
        progress: Progress | None = None,
    ) -> list[npt.NDArray[np.float32]]:
        pairs = [self._pair(item, thinking) for item in items]
        results = [np.zeros((len(tokens) - n_prompt, self.info.n_vocab), np.float32) for tokens, n_prompt in pairs]

        def keep(i: int, place: int, logits: npt.NDArray[np.float32]) -> None:
            results[i][place] = log_softmax(logits)

        self._score(pairs, keep, steering, progress)
        return results

    def _score(
        self,
        pairs: Sequence[tuple[list[int], int]],
        keep: Callable[[int, int, npt.NDArray[np.float32]], None],
        steering: Any,
        progress: Progress | None,
    ) -> None:
        """Call ``keep(pair, place, logits)`` with what predicts each token after the prompt; ``place`` counts from 0."""
        texts = [TokenText(tokens, n, [], list(range(n - 1, len(tokens) - 1))) for tokens, n in pairs]
        done = 0

        def report(n: int, total: int) -> None:
            if progress is not None:
                progress(done + n, len(texts))

        for decided, chosen in self._parted(as_steering(steering), [t.tokens[: t.n_prompt] for t in texts]):
            session = self._session("texts", max(len(t.tokens) for t in texts))

            def on_logits(k: int, position: int, logits: npt.NDArray[np.float32], chosen: list[int] = chosen) -> None:
                keep(chosen[k], position + 1 - texts[chosen[k]].n_prompt, logits)

            with cleaned(session):
                session.steer.set_captures([], [])
                run_texts(session, [texts[i] for i in chosen], decided, on_logits=on_logits, progress=report)
            done += len(chosen)

    # ---- gates ----

    def _decided(self, steering: Steering, prompts: Sequence[Sequence[int]]) -> list[Steering]:
        """The steering of each prompt (token ids) after its gates were decided, in a pass of its own."""
        check_gates(steering, self.info)

        def read(texts: Sequence[list[int]], gate: Gate, before: Steering) -> list[npt.NDArray[np.float32]]:
            pairs = [(text, len(text)) for text in texts]
            found = self._read(pairs, [gate.layer], gate.site, gate.positions, "mean", before, None)
            return [one.values[gate.layer][0] for one in found]

        for gate in steering.gates:
            check_fits(gate.vector, self._model)
        return decide(steering, prompts, read)

    def _parted(self, steering: Steering, prompts: Sequence[Sequence[int]]) -> list[tuple[Steering, list[int]]]:
        """Prompts (indices) by the steering that their gates leave them."""
        if not steering.gates or not prompts:
            return [(steering.decided({}), list(range(len(prompts))))] if prompts else []
        parts: dict[tuple[int, ...], tuple[Steering, list[int]]] = {}
        for i, decided in enumerate(self._decided(steering, prompts)):
            parts.setdefault(tuple(map(id, (t.vector for t in decided))), (decided, []))[1].append(i)
        return list(parts.values())

    # ---- generating ----

    def stream(self, request: GenerateRequest) -> LocalStream:
        if self._running is not None:
            raise EngineError("a reply is still being generated: finish or cancel it, or use generate_many")
        tokens = self._fitting(self.tokenize(request.prompt, thinking=request.thinking), room=1)
        (decided,) = self._decided(as_steering(request.steering), [tokens])
        return LocalStream(self, self._session("one"), replace(request, steering=decided), tokens)

    def steer_running(self, steering: Any) -> None:
        """Replace the steering of the reply that is being generated, from its next token on.

        Raises:
            EngineError: nothing is being generated.
        """
        if self._running is None:
            raise EngineError("no reply is being generated, so there is nothing to steer")
        self._running.steer(steering)

    def generate_many(self, requests: Sequence[GenerateRequest], *, progress: Progress | None = None) -> list[Generation]:
        jobs = []
        for request in requests:
            tokens = self._fitting(self.tokenize(request.prompt, thinking=request.thinking), room=1)
            jobs.append((request, tokens))
        if not jobs:
            return []
        jobs = self._gated(jobs)
        longest = max(len(tokens) + max(request.max_tokens, 1) for request, tokens in jobs)
        session = self._session("many", min(longest, self._n_ctx))
        results: list[Generation | None] = [None] * len(jobs)
        # prompts that begin alike run at the same time, so that the beginning can be copied
        waiting = sorted(range(len(jobs)), key=lambda i: jobs[i][1], reverse=True)
        free = list(range(session.limits.n_seq))[::-1]
        active: dict[int, tuple[int, GrowingReply]] = {}
        done = 0
        with cleaned(session):
            try:
                while waiting or active:
                    # new prompts go in together, apart from the tokens of running replies, so that neither changes
                    # the batch shapes the other sees
                    starting = []
                    while waiting and free:
                        i, slot = waiting.pop(), free.pop()
                        reply = GrowingReply(session, slot, jobs[i][0], jobs[i][1], self._n_ctx)
                        active[slot] = (i, reply)
                        starting.append(reply)
                    if starting:
                        prefill(session, starting)
                    running = [reply for _, reply in active.values() if reply not in starting and not reply.finished]
                    if running:
                        entries = [reply.next_entry() for reply in running]
                        session.decode(entries)
                        for k, reply in enumerate(running):
                            reply.sample(k)
                    for slot, (i, reply) in list(active.items()):
                        if reply.finished:
                            results[i] = reply.result()
                            reply.close()
                            if not self._model.shares_tokens:
                                session.forget(slot)
                            del active[slot]
                            free.append(slot)
                            done += 1
                            if progress is not None:
                                progress(done, len(jobs))
            finally:
                for _, reply in active.values():
                    reply.close()
            for slot in range(session.limits.n_seq):  # what a call gives must not depend on the one before it
                session.forget(slot)
        return [r for r in results if r is not None]

    def _gated(self, jobs: list[tuple[GenerateRequest, list[int]]]) -> list[tuple[GenerateRequest, list[int]]]:
        """The requests with their gates decided; those with the same steering are read together."""
        alike: dict[Steering, list[int]] = {}
        for i, (request, _) in enumerate(jobs):
            steering = as_steering(request.steering)
            if steering.gates:
                alike.setdefault(steering, []).append(i)
        result = list(jobs)
        for steering, members in alike.items():
            for i, decided in zip(members, self._decided(steering, [jobs[i][1] for i in members]), strict=True):
                result[i] = (replace(jobs[i][0], steering=decided), jobs[i][1])
        return result

    # ---- callbacks ----

    def on_read(
        self,
        callback: Callable[[native.ReadRows], None] | None,
        *,
        layers: Sequence[int] | None = None,
        site: str = "resid_post",
    ) -> None:
        """Call ``callback(rows)`` with the hidden states of each token that :meth:`stream` computes; None removes it.

        It runs after each ubatch (one token, while a reply is generated), outside the compute graph. In models that keep
        output tokens only in their last layer, that layer cannot be watched. Tokens that come from the cache are not seen.
        """
        session = self._session("one")
        if callback is None:
            session.steer.on_read(None)
            session.steer.set_captures([], [])
            self._read_callback = None
            return
        self._check_site(site)
        top = self.info.n_layer - (1 if self.info.last_layer_outputs_only else 0)
        chosen = list(range(top)) if layers is None else sorted({int(il) for il in layers})
        bad = [il for il in chosen if not 0 <= il < top]
        if bad or not chosen:
            what = f"layer {bad[0]} cannot be watched" if bad else "no layer was named"
            raise SpecError(f"{what}: this model allows 0 to {top - 1}")
        session.steer.set_captures(chosen, [native.SITES[site]] * len(chosen), keep=False)
        session.steer.on_read(callback)
        self._read_callback = (callback, chosen, site)

    def on_add(self, callback: Callable[[native.AddTokens], None] | None, vectors: Sequence[SteeringVector] = ()) -> None:
        """Call ``callback(tokens)`` before each ubatch of :meth:`stream`; None removes it.

        The callback fills ``tokens.c[:, j]``: how much of ``vectors[j]`` each token gets, in units of strength, on top of
        the request's own steering. (``tokens.g[:, j]`` is for vectors with op project or clamp.) Prompts are not reused
        from the cache while a callback is set, because what it applied is not known.
        """
        session = self._session("one")
        if callback is None:
            session.steer.on_add(None)
            session.edits_unknown = False
            session.unpin()
            return
        session.unpin()
        ids = session.pin(vectors)

        def spread(tokens: native.AddTokens) -> None:
            n = len(tokens.positions)
            view = native.AddTokens(
                sequences=tokens.sequences,
                positions=tokens.positions,
                c=np.zeros((n, len(ids)), np.float32),
                g=np.zeros((n, len(ids)), np.float32),
            )
            callback(view)
            for j, id_ in enumerate(ids):
                tokens.c[:, id_] += view.c[:, j]
                tokens.g[:, id_] += view.g[:, j]

        session.steer.on_add(spread)
        session.edits_unknown = True

    def stats(self) -> native.SteerStats:
        """Native counters of the context behind :meth:`stream`."""
        return self._session("one").steer.stats()

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()
        if self._open is not None:
            self._open.close()
            self._open = None
