"""The HTTP face of engine `hf`: msgpack in, msgpack out, one route per verb of the client protocol."""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import mmap
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from atropos_exp.engine.hf_decode import Decoder
from atropos_exp.engine.hf_scheduler import Generation, Scheduler
from atropos_exp.engine.hf_weights import Refused, WeightStore
from atropos_exp.types import SamplingParams, TokenIds
from atropos_exp.wire import HEARTBEAT, MAX_MESSAGE_BYTES, WireError, flatten, pack, split, unpack
from atropos_exp.wire_tensors import Piece, read_piece

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

logger = logging.getLogger(__name__)

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Service:
    """What the routes do. Each takes a message and returns the future of the answer."""

    scheduler: Scheduler
    decoder: Decoder
    weights: WeightStore
    vocab_size: int
    max_sequence_length: int
    weights_fd: int | None
    weights_folder: Path | None
    heartbeat_seconds: float
    versions: Mapping[str, str]

    def generate(self, message: Message) -> Future[Message]:
        params = SamplingParams(
            temperature=_number(message, "temperature", 0.0, math.inf),
            top_p=_number(message, "top_p", 0.0, 1.0),
            top_k=int(_number(message, "top_k", 0, 1 << 31)),
            max_tokens=int(_number(message, "max_tokens", 1, self.max_sequence_length)),
            stop_token_ids=tuple(sorted({self._token(token) for token in message["stop_token_ids"]})),
            seed=int(_number(message, "seed", -(1 << 63), (1 << 64) - 1)),
        )
        if params.top_p == 0.0:
            raise Refused(400, "top_p must be above 0 (1 turns it off)")
        generation = Generation(
            prompts=self._sequences(message, room=params.max_tokens),
            params=params,
            num_samples=int(_number(message, "num_samples", 1, 1 << 20)),
            deadline=_deadline(message),
        )
        return self.scheduler.submit(generation)

    def score(self, message: Message) -> Future[Message]:
        sequences = self._sequences(message, room=0)
        temperature = _number(message, "temperature", 0.0, math.inf)
        num_top = int(_number({"num_top": 0, **message}, "num_top", 0, 1 << 31))

        def work() -> Message:
            scored = self.decoder.score_top(sequences, temperature=temperature, num_top=num_top)
            flat, lengths = flatten([one.logprobs for one in scored], np.float32)
            answer: Message = {"logprobs": flat, "lengths": lengths}
            if num_top:  # [sum of lengths, num_top]
                answer["top_token_ids"] = np.concatenate([one.top_token_ids for one in scored])
                answer["top_logprobs"] = np.concatenate([one.top_logprobs for one in scored])
            return answer

        return self.scheduler.score(work, deadline=_deadline(message))

    def health(self, message: Message) -> Future[Message]:
        """One real token, drawn by the model that serves."""
        prompt = np.zeros(1, dtype=np.int32)

        def work() -> Message:
            params = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, max_tokens=1, stop_token_ids=(), seed=0)
            probe = Generation(prompts=[prompt], params=params, num_samples=1, deadline=math.inf)
            drawn = self.scheduler.decode_now(probe)
            if not np.isfinite(drawn["logprobs"]).all():
                raise Refused(409, f"the model gives the logprob {drawn['logprobs'][0]}: its weights are not finite")
            return {"token_id": int(drawn["token_ids"][0]), "version": self.weights.version}

        return self.scheduler.probe(work, deadline=_deadline(message))

    def info(self, message: Message) -> Future[Message]:
        answer = {
            "version": self.weights.version,
            "problem": self.weights.problem,
            "expected": [[name, kind, list(shape)] for name, (kind, shape) in self.weights.expected().items()],
            "vocab_size": self.vocab_size,
            "max_sequence_length": self.max_sequence_length,
            "num_waiting": self.scheduler.num_waiting,
            "num_batches": self.scheduler.num_batches,
            "num_rows": self.scheduler.num_rows,
            "versions": dict(self.versions),
        }
        return _done(answer)

    def pause(self, message: Message) -> Future[Any]:
        return self.scheduler.pause(deadline=_deadline(message))

    def resume(self, message: Message) -> Future[Any]:
        self.scheduler.resume()
        return _done({})

    def begin(self, message: Message) -> Future[Any]:
        version = int(_number(message, "version", 0, 1 << 62))
        return self.scheduler.control(lambda: self.weights.begin(version), deadline=_deadline(message))

    def bucket(self, message: Message) -> Future[Any]:
        return self.scheduler.control(lambda: self._load_bucket(message), deadline=_deadline(message))

    def finish(self, message: Message) -> Future[Any]:
        return self.scheduler.control(self.weights.finish, deadline=_deadline(message))

    def abort(self, message: Message) -> Future[Any]:
        return self.scheduler.control(self.weights.abort, deadline=_deadline(message))

    def digests(self, message: Message) -> Future[Any]:
        return self.scheduler.control(lambda: {"digests": self.weights.digests()}, deadline=_deadline(message))

    def _load_bucket(self, message: Message) -> None:
        if "file" in message and self.weights_folder is not None:
            from safetensors.torch import load_file

            name = str(message["file"])
            if Path(name).name != name:
                raise Refused(400, f"not a file name: {name!r}")
            for key, tensor in load_file(self.weights_folder / name).items():
                self.weights.load(key, tensor)
        elif "pieces" in message and self.weights_fd is not None:
            size = int(_number(message, "num_bytes", 0, 1 << 50))
            pieces = [Piece.from_message(item, buffer_bytes=size) for item in message["pieces"]]
            buffer = mmap.mmap(self.weights_fd, max(size, 1))  # unmapped when the last view of it is gone
            for piece in pieces:
                self.weights.load(piece.name, read_piece(piece, buffer))
        else:
            raise Refused(
                400, f"this server was started for another weight transport; got {', '.join(sorted(message))}"
            )

    def _sequences(self, message: Message, *, room: int) -> list[TokenIds]:
        sequences = split(_array(message, "token_ids", np.int32), _array(message, "lengths", np.int64))
        if not sequences:
            raise Refused(400, "no prompt")
        flat = message["token_ids"]
        if len(flat) and (flat.min() < 0 or flat.max() >= self.vocab_size):
            raise Refused(400, f"token id {flat.min()}..{flat.max()} outside the vocabulary of {self.vocab_size}")
        for index, sequence in enumerate(sequences):
            if not 1 <= len(sequence) <= self.max_sequence_length - room:
                raise Refused(
                    400,
                    f"prompt {index} has {len(sequence)} tokens; with {room} to sample it must have between 1 and "
                    f"{self.max_sequence_length - room} (the engine was started for {self.max_sequence_length})",
                )
        return sequences

    def _token(self, token: Any) -> int:
        if type(token) is not int or not 0 <= token < self.vocab_size:
            raise Refused(400, f"stop token {token!r} outside the vocabulary of {self.vocab_size}")
        return token


def make_app(service: Service, *, token: str) -> Starlette:
    from starlette.applications import Starlette
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route

    expected = f"Bearer {token}".encode()

    def answer(status: int, message: Message) -> Response:
        return Response(pack(message), status_code=status, media_type="application/msgpack")

    def outcome(done: asyncio.Future[Any]) -> tuple[int, Message]:
        try:
            return 200, done.result() or {}
        except Refused as refusal:
            return refusal.status, {"status": refusal.status, "error": str(refusal)}
        except WireError as error:
            return 400, {"status": 400, "error": str(error)}
        except Exception as error:  # logged where it happened; the client raises it
            return 500, {"status": 500, "error": f"{type(error).__name__}: {error}"}

    def route(path: str, work: Callable[[Message], Future[Any]]) -> Route:
        async def endpoint(request: Request) -> Response:
            if not hmac.compare_digest(request.headers.get("authorization", "").encode(), expected):
                return answer(401, {"status": 401, "error": "wrong or missing token"})
            if int(request.headers.get("content-length", 0)) > MAX_MESSAGE_BYTES:
                return answer(413, {"status": 413, "error": f"a message has at most {MAX_MESSAGE_BYTES} bytes"})
            try:
                future = work(unpack(await request.body()))
            except Refused as refusal:
                return answer(refusal.status, {"status": refusal.status, "error": str(refusal)})
            except (WireError, KeyError, TypeError) as error:
                return answer(400, {"status": 400, "error": f"bad request: {error}"})
            done = asyncio.wrap_future(future)
            await asyncio.wait({done}, timeout=service.heartbeat_seconds)
            if done.done():
                return answer(*outcome(done))
            return StreamingResponse(alive_until(done), media_type="application/msgpack")

        return Route(path, endpoint, methods=["POST"])

    async def alive_until(done: asyncio.Future[Any]) -> AsyncIterator[bytes]:
        try:
            while not done.done():
                yield HEARTBEAT
                await asyncio.wait({done}, timeout=service.heartbeat_seconds)
            _, message = outcome(done)
            yield pack(message)
        finally:
            done.cancel()  # nothing if it has ended; else the client has gone and its rows need not be decoded

    return Starlette(
        routes=[
            route("/generate", service.generate),
            route("/score", service.score),
            route("/health", service.health),
            route("/info", service.info),
            route("/pause", service.pause),
            route("/resume", service.resume),
            route("/weights/begin", service.begin),
            route("/weights/bucket", service.bucket),
            route("/weights/finish", service.finish),
            route("/weights/abort", service.abort),
            route("/weights/digests", service.digests),
        ]
    )


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
