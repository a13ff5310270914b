"""The HTTP interface of every engine server: msgpack in, msgpack out, one route for each request of `EngineClient`."""

from __future__ import annotations

import asyncio
import hmac
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from atropos_exp.errors import Refused, WireError
from atropos_exp.parts.engine.serving.backend import Backend
from atropos_exp.processes.wire import HEARTBEAT, MAX_MESSAGE_BYTES, Message, flatten, pack, split, unpack
from atropos_exp.types import SamplingParams, TokenIds, TokenScores

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

Encode = Callable[[Any], Message]  # from what a backend's future holds to the message of the answer


@dataclass(frozen=True, kw_only=True, eq=False)
class Service:
    """The routes' work. Each method checks a message, asks the backend, and returns the future of the result. Raises
    Refused or WireError for a wrong message."""

    backend: Backend
    heartbeat_seconds: float

    def generate(self, message: Message) -> Future[Message]:
        params = SamplingParams(
            temperature=_number(message, "temperature", 0.0, math.inf),
            top_p=_number(message, "top_p", 0.0, 1.0),
            top_k=int(_number(message, "top_k", 0, 1 << 31)),
            max_tokens=int(_number(message, "max_tokens", 1, self.backend.max_sequence_length)),
            stop_token_ids=tuple(sorted({self._token(token) for token in message["stop_token_ids"]})),
            seed=int(_number(message, "seed", -(1 << 63), (1 << 64) - 1)),
        )
        if params.top_p == 0.0:
            raise Refused(400, "top_p must be above 0 (1 turns it off)")
        prompts = self._sequences(message, room=params.max_tokens)
        num_samples = int(_number(message, "num_samples", 1, 1 << 20))
        first_prompt = int(_number({"first_prompt": 0, **message}, "first_prompt", 0, 1 << 40))
        return self.backend.generate(
            prompts, params, num_samples=num_samples, first_prompt=first_prompt, deadline=_deadline(message)
        )

    def score(self, message: Message) -> Future[list[TokenScores]]:
        sequences = self._sequences(message, room=0)
        temperature = _number(message, "temperature", 0.0, math.inf)
        num_top = min(int(_number({"num_top": 0, **message}, "num_top", 0, 1 << 31)), self.backend.vocab_size)
        return self.backend.score(sequences, temperature=temperature, num_top=num_top, deadline=_deadline(message))

    def info(self, message: Message) -> Future[Message]:
        facts = {
            "expected": [[name, kind, list(shape)] for name, (kind, shape) in self.backend.expected().items()],
            "hub_names": self.backend.hub_names,
            "vocab_size": self.backend.vocab_size,
            "max_sequence_length": self.backend.max_sequence_length,
        }
        return _done({**facts, **self.backend.info()})

    def resume(self, message: Message) -> Future[Message]:
        self.backend.resume()
        return _done({})

    def begin(self, message: Message) -> Future[Any]:
        version = int(_number(message, "version", 0, 1 << 62))
        return self.backend.begin(version, deadline=_deadline(message))

    def digests(self, message: Message) -> Future[Mapping[str, str]]:
        return self.backend.digests(on_device=message.get("on_device") is True, deadline=_deadline(message))

    def _sequences(self, message: Message, *, room: int) -> Sequence[TokenIds]:
        sequences = split(_array(message, "token_ids", np.int32), _array(message, "lengths", np.int64))
        if not sequences:
            raise Refused(400, "no prompt")
        flat = message["token_ids"]
        if len(flat) and (flat.min() < 0 or flat.max() >= self.backend.vocab_size):
            raise Refused(
                400, f"token id {flat.min()}..{flat.max()} outside the vocabulary of {self.backend.vocab_size}"
            )
        longest = self.backend.max_sequence_length
        for index, sequence in enumerate(sequences):
            if not 1 <= len(sequence) <= longest - room:
                raise Refused(
                    400,
                    f"prompt {index} has {len(sequence)} tokens; with {room} to sample it must have between 1 and "
                    f"{longest - room} (the engine was started for {longest})",
                )
        return sequences

    def _token(self, token: Any) -> int:
        if type(token) is not int or not 0 <= token < self.backend.vocab_size:
            raise Refused(400, f"stop token {token!r} outside the vocabulary of {self.backend.vocab_size}")
        return token


def make_app(service: Service, *, token: str) -> Starlette:
    """The web application. Requests must carry the bearer token. While a request waits, the answer's body begins with
    heartbeats, as long as the backend is moving."""
    from starlette.applications import Starlette
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route

    expected = f"Bearer {token}".encode()
    backend = service.backend

    def answer(message: Message) -> Response:
        return Response(pack(message), status_code=message.get("status", 200), media_type="application/msgpack")

    def problem(status: int, reason: object) -> Message:
        return {"status": status, "error": str(reason)}

    def outcome(done: asyncio.Future[Any], encode: Encode) -> Message:
        try:
            return encode(done.result())
        except Refused as refusal:
            return problem(refusal.status, refusal)
        except WireError as error:
            return problem(400, error)
        except Exception as error:  # logged where it happened; the client raises it
            return problem(500, f"{type(error).__name__}: {error}")

    def route(path: str, work: Callable[[Message], Future[Any]], encode: Encode = _whole) -> Route:
        async def endpoint(request: Request) -> Response:
            if not hmac.compare_digest(request.headers.get("authorization", "").encode(), expected):
                return answer(problem(401, "wrong or missing token"))
            if int(request.headers.get("content-length", 0)) > MAX_MESSAGE_BYTES:
                return answer(problem(413, f"a message has at most {MAX_MESSAGE_BYTES} bytes"))
            try:
                future = work(unpack(await request.body()))
            except Refused as refusal:
                return answer(problem(refusal.status, refusal))
            except (WireError, KeyError, TypeError) as error:
                return answer(problem(400, f"bad request: {error}"))
            done = asyncio.wrap_future(future)
            await asyncio.wait({done}, timeout=service.heartbeat_seconds)
            if done.done():
                return answer(outcome(done, encode))
            return StreamingResponse(alive_until(done, encode), media_type="application/msgpack")

        return Route(path, endpoint, methods=["POST"])

    async def alive_until(done: asyncio.Future[Any], encode: Encode) -> AsyncIterator[bytes]:
        try:
            while not done.done():
                if backend.is_moving():
                    yield HEARTBEAT
                await asyncio.wait({done}, timeout=service.heartbeat_seconds)
            yield pack(outcome(done, encode))
        finally:
            done.cancel()  # no effect if it has ended; otherwise the client has gone and its rows need not be decoded

    return Starlette(
        routes=[
            route("/generate", service.generate),
            route("/score", service.score, _scored),
            route("/health", lambda message: backend.probe(deadline=_deadline(message))),
            route("/info", service.info),
            route("/pause", lambda message: backend.pause(deadline=_deadline(message)), _nothing),
            route("/resume", service.resume),
            route("/sleep", lambda message: backend.sleep(deadline=_deadline(message))),
            route("/weights/begin", service.begin, _nothing),
            route("/weights/bucket", lambda message: backend.load(message, deadline=_deadline(message)), _nothing),
            route("/weights/finish", lambda message: backend.finish(deadline=_deadline(message)), _nothing),
            route("/weights/abort", lambda message: backend.abort(deadline=_deadline(message)), _nothing),
            route("/weights/digests", service.digests, lambda found: {"digests": dict(found)}),
        ]
    )


def _whole(message: Message) -> Message:
    return message


def _nothing(result: Any) -> Message:
    return {}


def _scored(rows: Sequence[TokenScores]) -> Message:
    flat, lengths = flatten([row.logprobs for row in rows], np.float32)
    answer: Message = {"logprobs": flat, "lengths": lengths}
    if rows[0].top_token_ids.shape[1]:  # [sum of lengths, num_top]
        answer["top_token_ids"] = np.concatenate([row.top_token_ids for row in rows])
        answer["top_logprobs"] = np.concatenate([row.top_logprobs for row in rows])
    return answer


def _done(answer: Message) -> Future[Message]:
    future: Future[Message] = Future()
    future.set_result(answer)
    return future


def _deadline(message: Message) -> float:
    return time.monotonic() + _number(message, "timeout_seconds", 0.0, math.inf)


def _number(message: Message, key: str, low: float, high: float) -> float:
    value = message[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise Refused(400, f"{key} must be a number from {low} to {high}; got {value!r}")
    return value


def _array(message: Message, key: str, dtype: type[np.generic]) -> Any:
    value = message[key]
    if not isinstance(value, np.ndarray) or value.dtype != dtype:
        raise Refused(400, f"{key} must be an array of {dtype.__name__}")
    return value
