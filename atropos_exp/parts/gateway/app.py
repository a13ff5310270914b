"""The HTTP application: its routes, who may call them, how errors are answered, and what is counted."""

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from aiohttp import web

from atropos_exp.errors import WireError
from atropos_exp.interfaces import JSON
from atropos_exp.parts.gateway.admin import Admin
from atropos_exp.parts.gateway.counters import prometheus
from atropos_exp.parts.gateway.dialects import openai, sglang, vllm
from atropos_exp.parts.gateway.refusal import Refusal
from atropos_exp.parts.gateway.sampler import Sampler
from atropos_exp.processes.wire import Message, pack, unpack

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.Response]]


class App:
    """The gateway's routes. Environments must send `client_token` (None: nothing), the trainer `private_token`."""

    def __init__(
        self, sampler: Sampler, admin: Admin, *, model_name: str, client_token: str | None, private_token: str
    ) -> None:
        self._sampler = sampler
        self._admin = admin
        self._counters = sampler.counters
        self._model_name = model_name
        self._client_token = None if client_token is None else f"Bearer {client_token}".encode()
        self._private_token = f"Bearer {private_token}".encode()
        self._started = int(time.time())

    def make(self, *, max_body_bytes: int) -> web.Application:
        """The aiohttp application. Larger bodies than `max_body_bytes` are answered with 413."""
        app = web.Application(client_max_size=max_body_bytes)
        add = app.router.add_route
        add("POST", "/v1/completions", self._guarded(self._json(self._completions)))
        add("POST", "/v1/chat/completions", self._guarded(self._json(self._chat)))
        for slash in ("/", "//"):  # the second: base URLs that end in a slash
            add("POST", f"{slash}generate", self._guarded(self._json(self._generate)))
            add("GET", f"{slash}health", self._guarded(self._health, open_to_all=True))
        add("GET", "/v1/models", self._guarded(self._models))
        add("GET", "/health_generate", self._guarded(self._health_generate))
        add("POST", "/ledger/lookup", self._guarded(self._binary(self._admin.lookup), private=True))
        add("POST", "/hold", self._guarded(self._binary(self._admin.hold), private=True))
        add("POST", "/release", self._guarded(self._binary(self._admin.release), private=True))
        add("GET", "/counters", self._guarded(self._read_counters, private=True))
        add("GET", "/refusals", self._guarded(self._read_refusals, private=True))
        add("GET", "/metrics", self._guarded(self._metrics))
        add("*", "/{path:.*}", self._guarded(self._unknown))
        return app

    def _guarded(self, handler: Handler, *, private: bool = False, open_to_all: bool = False) -> Handler:
        """`handler` behind a check of the token; every outcome becomes an answer and a count."""
        expected = self._private_token if private else None if open_to_all else self._client_token

        async def guarded(request: web.Request) -> web.Response:
            if not private:
                self._counters.add("requests")
            try:
                if expected is not None:
                    got = request.headers.get("Authorization", "").encode()
                    if not hmac.compare_digest(got, expected):
                        raise Refusal(401, "token", "wrong or missing bearer token")
                return await handler(request)
            except Refusal as refusal:
                return self._refused(refusal)
            except web.HTTPRequestEntityTooLarge as error:
                return self._refused(Refusal(413, "body", f"the body is too large: {error.text}"))
            except asyncio.CancelledError:
                self._counters.add("disconnected")
                raise
            except Exception as error:  # the sender gets the error, the log its traceback
                logger.exception("%s failed", request.path)
                self._counters.add("internal_errors")
                message = f"{type(error).__name__}: {error}"
                return _json({"error": {"message": message, "type": "server_error", "param": None, "code": None}}, 500)

        return guarded

    def _refused(self, refusal: Refusal) -> web.Response:
        if self._counters.totals[f"refused_{refusal.reason}"] == 0:
            logger.warning("refused (the first for this reason, %s): %s", refusal.reason, refusal)
            self._counters.first_refusals[refusal.reason] = str(refusal)
        self._counters.add(f"refused_{refusal.reason}")
        response = _json(refusal.body(), refusal.status)
        if refusal.retry_seconds is not None:
            response.headers["Retry-After"] = str(refusal.retry_seconds)
        return response

    def _json(self, work: Callable[[JSON], Awaitable[Any]]) -> Handler:
        async def handler(request: web.Request) -> web.Response:
            raw = await request.read()
            try:
                body = orjson.loads(raw)
            except orjson.JSONDecodeError as error:
                raise Refusal(400, "body", f"the body is not JSON: {error}") from None
            if not isinstance(body, dict):
                raise Refusal(400, "body", f"the body must be a JSON object; got {type(body).__name__}")
            self._counters.begin()
            try:
                return _json(await work(body))
            finally:
                self._counters.end()

        return handler

    def _binary(self, work: Callable[[Message], Message]) -> Handler:
        async def handler(request: web.Request) -> web.Response:
            unlimited = request.clone(client_max_size=0)  # the trainer asks about batches of any size
            try:
                message = unpack(await unlimited.read())
            except WireError as error:
                raise Refusal(400, "body", str(error)) from None
            self._admin.check(message)
            return web.Response(body=pack(work(message)), content_type="application/msgpack")

        return handler

    async def _completions(self, body: JSON) -> JSON:
        self._counters.add("requests_completions")
        return await openai.completions(self._sampler, self._model_name, body)

    async def _chat(self, body: JSON) -> JSON:
        self._counters.add("requests_chat")
        return await openai.chat(self._sampler, self._model_name, body)

    async def _generate(self, body: JSON) -> Any:
        if body.keys() & {"input_ids", "text", "sampling_params"}:
            self._counters.add("requests_generate_sglang")
            return await sglang.generate(self._sampler, body)
        self._counters.add("requests_generate_vllm")
        return await vllm.generate(self._sampler, body)

    async def _models(self, request: web.Request) -> web.Response:
        self._counters.add("requests_models")
        return _json(openai.models(self._model_name, self._sampler.max_sequence_length, self._started))

    async def _health(self, request: web.Request) -> web.Response:
        self._counters.add("requests_health")
        problem = await self._sampler.upstream.problem()
        if problem is not None:
            raise Refusal(503, "engine", problem)
        return _json({"status": "ok", "holding": self._admin.gate.is_holding})

    async def _health_generate(self, request: web.Request) -> web.Response:
        self._counters.add("requests_health")
        await self._sampler.upstream.check()
        return _json({"status": "ok"})

    async def _read_counters(self, request: web.Request) -> web.Response:
        return _json(self._admin.values())

    async def _read_refusals(self, request: web.Request) -> web.Response:
        return _json(self._counters.first_refusals)

    async def _metrics(self, request: web.Request) -> web.Response:
        self._counters.add("requests_other")
        return web.Response(text=prometheus(self._admin.values()))

    async def _unknown(self, request: web.Request) -> web.Response:
        self._counters.add("requests_other")
        raise Refusal(404, "route", f"no such route: {request.method} {request.path}")


def _json(answer: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(answer), status=status, content_type="application/json")
