"""The gateway against the engine alone, on this machine: added latency, requests per second, memory.

    python benchmarks/gateway.py                     the whole of it, about three minutes
    python benchmarks/gateway.py --requests 3000     shorter
    python benchmarks/gateway.py --json              for programs

Engine and gateway are real processes with the model `tiny`; this process only sends requests. Both are asked for the
same: one prompt of 6 tokens, 2 new ones, over kept connections. Absolute figures hold for this machine and whatever
else runs on it; the ratios hold further.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
import yaml

from atropos_exp.config.origin import CONF_DIR
from atropos_exp.parts.engine.hf.settings import HFEngine
from atropos_exp.parts.gateway.settings import GatewaySettings
from atropos_exp.parts.model.tiny import WEIGHTS
from atropos_exp.processes.wire import HEARTBEAT, pack, unpack

PROMPT = [21, 15, 22, 33, 15, 22]
NEW_TOKENS = 2
LEDGER_TOKENS = 25_000  # full after 500 requests, so that its growth is part of the warm-up


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server and the bytes of one request to it."""

    port: int
    path: str
    headers: str
    bodies: Iterator[bytes]

    def request(self) -> bytes:
        body = next(self.bodies)
        head = f"POST {self.path} HTTP/1.1\r\nHost: x\r\n{self.headers}Content-Length: {len(body)}\r\n\r\n"
        return head.encode() + body


class Connection:
    """One kept HTTP connection, one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(self, request: bytes) -> bytes:
        self._writer.write(request)
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        if b"transfer-encoding: chunked" in head:  # the engine's sign that it takes long
            body = b""
            while size := int(await self._reader.readuntil(b"\r\n"), 16):
                body += (await self._reader.readexactly(size + 2))[:-2]
            await self._reader.readexactly(2)
        else:
            body = await self._reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
        if not head.startswith(b"http/1.1 200"):
            raise RuntimeError(f"{head[:40]!r} {body[:300]!r}")
        return body

    def close(self) -> None:
        self._writer.close()


def engine_target(address: str, token: str) -> Target:
    def bodies() -> Iterator[bytes]:
        for seed in itertools.count():
            yield pack(
                {
                    "token_ids": np.array(PROMPT, dtype=np.int32),
                    "lengths": np.array([len(PROMPT)]),
                    "num_samples": 1,
                    "temperature": 1.0,
                    "top_p": 1.0,
                    "top_k": 0,
                    "max_tokens": NEW_TOKENS,
                    "stop_token_ids": [],
                    "seed": seed,
                    "timeout_seconds": 60.0,
                }
            )

    port = int(address.rsplit(":", 1)[1])
    return Target(port=port, path="/generate", headers=f"Authorization: Bearer {token}\r\n", bodies=bodies())


def gateway_target(address: str) -> Target:
    body = {
        "prompt": {"prompt_token_ids": PROMPT},
        "logprobs": 0,
        "n": 1,
        "max_tokens": NEW_TOKENS,
        "temperature": 1.0,
        "ignore_eos": True,
    }
    port = int(address.rsplit(":", 1)[1])
    return Target(
        port=port,
        path="/generate",
        headers="Content-Type: application/json\r\n",
        bodies=itertools.repeat(json.dumps(body).encode()),
    )


async def latencies(engine: Target, gateway: Target, count: int) -> tuple[list[float], list[float]]:
    """Seconds of single requests, in turns, so that whatever else runs here meets both."""
    connections = [(target, await Connection.open(target.port)) for target in (engine, gateway)]
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(count):
        for index, (target, connection) in enumerate(connections):
            request = target.request()
            start = time.perf_counter()
            await connection.ask(request)
            seconds[index].append(time.perf_counter() - start)
    for _, connection in connections:
        connection.close()
    return seconds


async def throughput(target: Target, count: int, num_connections: int) -> float:
    """Requests per second over many connections, each sending the next as soon as it has its answer."""
    connections = [await Connection.open(target.port) for _ in range(num_connections)]
    turns = iter(range(count))

    async def work(connection: Connection) -> None:
        for _ in turns:
            await connection.ask(target.request())

    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for connection in connections:
            group.create_task(work(connection))
    seconds = time.perf_counter() - start
    for connection in connections:
        connection.close()
    return count / seconds


def cpu_seconds(pid: int) -> float:
    """That a process has used so far, whatever else the machine did meanwhile."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def settings(name: str, cls: Any, **changes: Any) -> Any:
    values = yaml.safe_load((CONF_DIR / f"{name}.yaml").read_text())
    del values["_target_"]
    return cls(**{**values, **changes})


async def measure(engine: Any, client: Any, *, requests: int, connections: int) -> dict[str, float]:
    alone, through = (
        engine_target(engine.replicas[0].process.address, engine.replicas[0].process.token),
        gateway_target(client.address),
    )
    connection = await Connection.open(alone.port)
    answer = unpack((await connection.ask(alone.request())).lstrip(HEARTBEAT))
    assert len(answer["token_ids"]) == NEW_TOKENS
    connection.close()
    warm_up = max(600, requests // 10)
    await throughput(alone, 200, connections)
    await throughput(through, warm_up, connections)
    engine_s, gateway_s = await latencies(alone, through, min(500, requests // 10))
    before = client.counters()
    rates: dict[str, list[float]] = {"engine": [], "gateway": []}
    pids = {"engine": engine.replicas[0].process.pid, "gateway": client.process.pid}
    used = dict.fromkeys(pids, 0.0)
    rounds = 10
    for _ in range(rounds):  # in turns, see above
        rates["engine"].append(await throughput(alone, max(50, requests // rounds // 5), connections))
        for name, pid in pids.items():
            used[name] -= cpu_seconds(pid)
        rates["gateway"].append(await throughput(through, requests // rounds, connections))
        for name, pid in pids.items():
            used[name] += cpu_seconds(pid)
    after = client.counters()
    pairs = zip(engine_s, gateway_s, strict=True)
    return {
        "engine_latency_ms": 1e3 * statistics.median(engine_s),
        "gateway_latency_ms": 1e3 * statistics.median(gateway_s),
        "added_latency_ms": 1e3 * statistics.median(gateway - engine for engine, gateway in pairs),
        "engine_requests_per_s": statistics.median(rates["engine"]),
        "gateway_requests_per_s": statistics.median(rates["gateway"]),
        "throughput_ratio": statistics.median(rates["gateway"]) / statistics.median(rates["engine"]),
        "engine_cpu_ms_per_request": 1e3 * used["engine"] / (requests // rounds * rounds),
        "gateway_cpu_ms_per_request": 1e3 * used["gateway"] / (requests // rounds * rounds),
        "requests": after["requests"] - before["requests"],
        "connections": connections,
        "rss_before_mib": before["rss_bytes"] / 2**20,
        "rss_after_mib": after["rss_bytes"] / 2**20,
        "ledger_entries": after["ledger_entries"],
        "ledger_evicted": after["ledger_evicted"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=50_000, help="through the gateway, after the warm-up")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder)
        engine = settings("engine/hf", HFEngine, num_threads=1).start(
            model_folder=WEIGHTS, device="cpu", log_folder=log, max_sequence_length=64
        )
        try:
            chosen = settings("gateway/default", GatewaySettings, ledger_tokens=LEDGER_TOKENS)
            client = chosen.start(
                doors=chosen.listen(()),
                endpoints=[engine.endpoint],
                model_folder=WEIGHTS,
                model_name="tiny",
                stop_token_ids=(),
                max_sequence_length=64,
                seed=0,
                log_folder=log,
            )
            try:
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    found = runner.run(
                        measure(engine, client, requests=options.requests, connections=options.connections)
                    )
            finally:
                client.stop()
        finally:
            engine.stop()
    if options.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:<28}{value:>12,.2f}")


if __name__ == "__main__":
    main()
