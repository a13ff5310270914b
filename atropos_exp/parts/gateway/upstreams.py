"""The engine's servers together: which one gets a request, and which one replaces a server that is gone."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from atropos_exp.parts.gateway.counters import Counters
from atropos_exp.parts.gateway.refusal import Refusal
from atropos_exp.parts.gateway.upstream import Answer, Upstream
from atropos_exp.types import SamplingParams, TokenIds, TokenScores

Value = TypeVar("Value")
BLOCK_TOKENS = 64  # prefixes are remembered in multiples of this
MAX_PREFIXES = 1 << 17  # remembered; the oldest are forgotten
MAX_AHEAD_ROWS = 64  # a server this much busier than the idlest gets no request because of its cache
AVOID_SECONDS = 5.0  # for how long a server that was gone is asked last


class Upstreams:
    """One or more servers of the same weights, used by one event loop.

    A prompt of which at least half has been seen goes to the server that has that prefix in its cache; any other to the
    one that has the fewest completions in progress. If that server is gone, the request goes to the next.
    """

    def __init__(self, servers: Sequence[Upstream], counters: Counters) -> None:
        self._servers = tuple(servers)
        self._counters = counters
        self._rows = [0] * len(servers)  # in work
        self._total = [0] * len(servers)  # rows so far: breaks ties
        self._avoid_until = [0.0] * len(servers)  # of time.monotonic()
        self._known: OrderedDict[int, int] = OrderedDict()  # hash of a prefix -> server

    async def close(self) -> None:
        """Close all connections."""
        for server in self._servers:
            await server.close()

    async def generate(
        self, prompts: tuple[TokenIds, ...], params: SamplingParams, *, num_samples: int, seconds: float
    ) -> Answer:
        """See `Upstream.generate`. All rows of a request are drawn by one server."""

        def work(server: Upstream, seconds: float) -> Awaitable[Answer]:
            return server.generate(prompts, params, num_samples=num_samples, seconds=seconds)

        return await self._ask(prompts[0], len(prompts) * num_samples, work, seconds)

    async def score(self, sequence: TokenIds, *, num_top: int, temperature: float, seconds: float) -> TokenScores:
        """See `Upstream.score`."""

        def work(server: Upstream, seconds: float) -> Awaitable[TokenScores]:
            return server.score(sequence, num_top=num_top, temperature=temperature, seconds=seconds)

        return await self._ask(sequence, 1, work, seconds)

    async def check(self) -> None:
        """Raise Refusal unless at least one server generates a real token now."""
        outcomes = await asyncio.gather(*(server.check() for server in self._servers), return_exceptions=True)
        errors = [outcome for outcome in outcomes if outcome is not None]
        if len(errors) == len(outcomes):
            raise errors[0]

    async def problem(self) -> str | None:
        """Why no server answers, or None if one does."""
        problems = await asyncio.gather(*(server.problem() for server in self._servers))
        return None if None in problems else problems[0]

    async def _ask(
        self, prompt: TokenIds, rows: int, work: Callable[[Upstream, float], Awaitable[Value]], seconds: float
    ) -> Value:
        """The result of `work` by the best server, or by the next ones if it is gone."""
        deadline = time.monotonic() + seconds
        if len(self._servers) == 1:
            return await work(self._servers[0], seconds)
        keys = prefix_keys(prompt)
        order = self._order(keys, len(prompt))
        for place, number in enumerate(order):
            self._rows[number] += rows
            self._total[number] += rows
            try:
                answer = await work(self._servers[number], max(1.0, deadline - time.monotonic()))
            except Refusal as refusal:
                if refusal.reason != "engine" or place == len(order) - 1:
                    raise
                self._avoid_until[number] = time.monotonic() + AVOID_SECONDS
                self._counters.add("failovers")
            else:
                self._remember(keys, number)
                return answer
            finally:
                self._rows[number] -= rows
        raise AssertionError("the last one returns or raises")

    def _order(self, keys: Sequence[tuple[int, int]], length: int) -> list[int]:
        now = time.monotonic()
        order = sorted(
            range(len(self._servers)),
            key=lambda number: (self._avoid_until[number] > now, self._rows[number], self._total[number]),
        )
        known = next(
            (self._known[key] for key, seen in reversed(keys) if 2 * seen >= length and key in self._known), None
        )
        if (
            known is not None
            and self._avoid_until[known] <= now
            and self._rows[known] <= self._rows[order[0]] + MAX_AHEAD_ROWS
        ):
            order.remove(known)
            order.insert(0, known)
        return order

    def _remember(self, keys: Sequence[tuple[int, int]], number: int) -> None:
        for key, _ in keys:
            self._known[key] = number
            self._known.move_to_end(key)
        while len(self._known) > MAX_PREFIXES:
            self._known.popitem(last=False)


def prefix_keys(prompt: TokenIds) -> list[tuple[int, int]]:
    """(hash, number of tokens) of the prompt's first block, of its first two blocks, and so on up to the whole."""
    import xxhash

    state = xxhash.xxh3_64()
    keys = []
    for start in range(0, len(prompt), BLOCK_TOKENS):
        block = prompt[start : start + BLOCK_TOKENS]
        state.update(block.tobytes())
        keys.append((state.intdigest(), start + len(block)))
    return keys
