"""The gateway's client of one of the engine's servers: every call is one exchange with a deadline."""

import asyncio
from dataclasses import asdict, dataclass, fields

import aiohttp
import numpy as np
from numpy.typing import NDArray

from atropos_exp.errors import WireError
from atropos_exp.parts.gateway.refusal import Refusal
from atropos_exp.processes.wire import HEARTBEAT, Message, flatten, pack, unpack
from atropos_exp.types import Floats, Mask, SamplingParams, TokenIds, TokenScores

RETRY_SECONDS = 2  # sent as Retry-After while the engine is gone
HEALTH_SECONDS = 1.0  # how long an answer about the engine's health is valid
CONNECT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Answer:
    """N completions, laid end to end: those of the first prompt, of the second, and so on."""

    token_ids: TokenIds  # [sum of lengths]
    logprobs: Floats
    lengths: NDArray[np.int64]  # [N]
    stopped: Mask  # [N]
    versions: NDArray[np.int64]  # [N]


class Upstream:
    """One server of an engine. Every failure is a Refusal that says what was wrong."""

    def __init__(self, address: str, token: str | None, *, silence_seconds: float) -> None:
        """A server that sends nothing for `silence_seconds`, not even a heartbeat, counts as hung."""
        self._address = address
        self._silence_seconds = silence_seconds
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60.0),
            headers={"Authorization": f"Bearer {token}"} if token else {},
            auto_decompress=False,
            trust_env=False,  # a proxy has no business on loopback
        )
        self._checked_at = -np.inf
        self._check: asyncio.Task[None] | None = None
        self._problem: str | None = None

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def generate(
        self, prompts: tuple[TokenIds, ...], params: SamplingParams, *, num_samples: int, seconds: float
    ) -> Answer:
        """`num_samples` completions of each prompt, within `seconds`."""
        flat, lengths = flatten(prompts, np.int32)
        message = {"token_ids": flat, "lengths": lengths, "num_samples": num_samples, **asdict(params)}
        answer = await self._exchange("/generate", message, seconds)
        return Answer(**{one.name: answer[one.name] for one in fields(Answer)})

    async def score(self, sequence: TokenIds, *, num_top: int, temperature: float, seconds: float) -> TokenScores:
        """Logprobs of `sequence`'s own tokens and of the `num_top` likeliest at each position, within `seconds`."""
        flat, lengths = flatten([sequence], np.int32)
        message = {"token_ids": flat, "lengths": lengths, "temperature": temperature, "num_top": num_top}
        answer = await self._exchange("/score", message, seconds)
        none = np.zeros((len(answer["logprobs"]), 0))  # what the engine leaves out when it is not asked for any
        return TokenScores(
            logprobs=answer["logprobs"],
            top_token_ids=answer.get("top_token_ids", none.astype(np.int32)),
            top_logprobs=answer.get("top_logprobs", none.astype(np.float32)),
        )

    async def check(self) -> None:
        """Raise Refusal unless the server generates a real token now."""
        await self._exchange("/health", {}, self._silence_seconds)

    async def problem(self) -> str | None:
        """Why the server does not answer, or None if it does. Concurrent callers share one request to it."""
        loop = asyncio.get_running_loop()
        if loop.time() - self._checked_at > HEALTH_SECONDS:
            if self._check is None:
                self._check = loop.create_task(self._ask())
            await asyncio.shield(self._check)
        return self._problem

    async def _ask(self) -> None:
        try:
            await self._exchange("/info", {}, self._silence_seconds)
            self._problem = None
        except Refusal as refusal:
            self._problem = str(refusal)
        finally:
            self._checked_at = asyncio.get_running_loop().time()
            self._check = None

    async def _exchange(self, path: str, message: Message, seconds: float) -> Message:
        timeout = aiohttp.ClientTimeout(
            total=seconds + 5.0,  # the engine itself gives up at the deadline
            sock_connect=CONNECT_SECONDS,
            sock_read=min(seconds + 5.0, self._silence_seconds),
        )
        try:
            async with self._session.post(
                self._address + path, data=pack({**message, "timeout_seconds": seconds}), timeout=timeout
            ) as response:
                status, body = response.status, await response.read()
        except TimeoutError:
            why = f"no sign of life for {self._silence_seconds:g} s (gateway.engine_silence_seconds): it hangs"
            raise _gone(why) from None
        except aiohttp.ClientError as error:
            raise _gone(f"{type(error).__name__} {error}") from None
        try:
            answer = unpack(body.lstrip(HEARTBEAT))
        except WireError as error:
            raise _gone(f"it answered {status} and {body[:80]!r}: {error}") from None
        if "error" in answer:
            if answer["status"] == 400:
                raise Refusal(400, "value", f"the engine: {answer['error']}")
            raise _gone(f"it answered {answer['status']}: {answer['error']}")
        return answer


def _gone(why: str) -> Refusal:
    return Refusal(503, "engine", f"the engine did not answer; {why}", retry_seconds=RETRY_SECONDS)
