"""A small W&B server and a reader of W&B's offline files, so that tests see what W&B would."""

from __future__ import annotations

import gzip
import json
import re
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ENTITY = {"id": "entity", "name": "team"}
PROJECT = {"id": "project", "name": "project", "entity": ENTITY}


class WandbServer(ThreadingHTTPServer):
    """Enough of W&B's GraphQL and file-stream interface for wandb 0.31 to run online. Keeps what it is sent."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.runs: dict[str, dict[str, Any]] = {}
        self.bodies: list[bytes] = []
        self.hang = threading.Event()  # set: accept connections, answer nothing
        self.errors = 0  # answer so many requests with status 500
        self.num_errors = 0  # those answered so
        self.over = threading.Event()

    def die(self) -> None:
        """Answer nobody any more; open connections break off."""
        self.over.set()
        self.shutdown()
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def run(self, run_id: str) -> dict[str, Any]:
        return self.runs.setdefault(run_id, {"history": {}, "config": {}, "summary": {}, "finished": None})

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables.get("name") or variables.get("runId") or variables.get("run")
        if "upsertBucket" in query:
            return {"upsertBucket": self.upsert(str(name), variables)}
        if "createRunFiles" in query:
            files = [{"name": f, "uploadUrl": f"{self.url}/upload/{f}"} for f in variables.get("files") or []]
            return {"createRunFiles": {"runID": str(name), "uploadHeaders": [], "files": files}}
        if "model(" in query and "bucket(" in query:
            return {"model": {"id": "m", "name": "project", "entity": ENTITY, "bucket": self.bucket(str(name))}}
        if "viewer" in query:
            viewer = {"id": "u", "entity": "team", "username": "user", "flags": "{}", "teams": {"edges": []}}
            return {"viewer": viewer, "serverInfo": {"cliVersionInfo": {"max_cli_version": "9"}, "features": []}}
        return {}

    def upsert(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        is_new = name not in self.runs
        run = self.run(name)
        run |= {
            key: variables[key]
            for key in ("groupName", "displayName", "jobType", "tags")
            if variables.get(key) is not None
        }
        if variables.get("config"):
            run["config"] = json.loads(variables["config"])
        bucket = {"id": name, "name": name, "displayName": name, "description": "", "sweepName": ""}
        bucket |= {"historyLineCount": len(run["history"]), "config": json.dumps(run["config"]), "project": PROJECT}
        return {"bucket": bucket, "inserted": is_new}

    def bucket(self, name: str) -> dict[str, Any] | None:
        if name not in self.runs:
            return None
        run = self.runs[name]
        history = [run["history"][key] for key in sorted(run["history"])]
        tail = json.dumps([json.dumps(row) for row in history[-1:]])
        return {
            "id": name, "name": name, "historyLineCount": len(history), "eventsLineCount": 0, "logLineCount": 0,
            "historyTail": tail, "eventsTail": "[]", "config": json.dumps(run["config"]),
            "summaryMetrics": json.dumps(run["summary"]), "tags": [], "wandbConfig": '{"t": 1}',
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_GET(self) -> None:
        self.reply({})

    def do_PUT(self) -> None:
        self.receive()
        self.reply({})

    def do_POST(self) -> None:
        body = self.receive()
        if self.server.errors > 0:
            self.server.errors -= 1
            self.server.num_errors += 1
            self.send_error(500)
            return
        if self.path.endswith("/graphql"):
            request = json.loads(body)
            query = re.sub(r"\s+", " ", request["query"])
            self.reply({"data": self.server.answer(query, request.get("variables") or {})})
        elif self.path.endswith("/file_stream"):
            self.stream(self.server.run(self.path.split("/")[-2]), json.loads(body))
            self.reply({"exitcode": None, "limits": {}})
        else:
            self.reply({})

    def stream(self, run: dict[str, Any], message: dict[str, Any]) -> None:
        for name, chunk in (message.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                for at, line in enumerate(chunk["content"]):
                    run["history"][chunk["offset"] + at] = json.loads(line)
            elif name == "wandb-summary.json":
                run["summary"] = json.loads(chunk["content"][-1])
        if "complete" in message:
            run["finished"] = message.get("exitcode")

    def receive(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.bodies.append(body)
        return body

    def reply(self, content: dict[str, Any]) -> None:
        if self.server.hang.is_set():
            while self.server.hang.is_set() and not self.server.over.wait(0.1):
                pass
            self.close_connection = True
            return
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def new_wandb_server() -> Iterator[Callable[..., WandbServer]]:
    """`new_wandb_server(port)`: another one, also on the port of one that has died."""
    started = []

    def start(port: int = 0) -> WandbServer:
        server = WandbServer(port)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.die()


@pytest.fixture
def wandb_server(new_wandb_server: Callable[..., WandbServer]) -> WandbServer:
    return new_wandb_server()


@pytest.fixture
def read_wandb_offline() -> Callable[[Path], dict[str, Any]]:
    """Reads the one offline run under a run folder: its config, history, summary, metric axes and exit code."""

    def read(folder: Path) -> dict[str, Any]:
        (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
        return _read_records(path)

    return read


def _read_records(path: Path) -> dict[str, Any]:
    from wandb.proto import wandb_internal_pb2

    found: dict[str, Any] = {"history": [], "config": {}, "summary": {}, "axes": {}, "exit": None, "run": None}

    def values(items: Any) -> dict[str, Any]:
        return {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}

    for data in _frames(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = record.run
            found["config"] |= values(record.run.config.update)
        elif kind == "config":
            found["config"] |= values(record.config.update)
        elif kind == "history":
            found["history"].append(values(record.history.item))
        elif kind == "summary":
            found["summary"] |= values(record.summary.update)
        elif kind == "metric":
            found["axes"][record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found


def _frames(content: bytes) -> Iterator[bytes]:
    """LevelDB's log format: blocks of 32 KiB, records of (crc, length, kind), split ones joined. Torn tails end it."""
    assert content[:4] == b":W&B"
    at, parts = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        crc, length, kind = struct.unpack("<IHB", content[at : at + 7])
        data = content[at + 7 : at + 7 + length]
        if kind == 0 or len(data) < length:
            return
        assert zlib.crc32(data, zlib.crc32(bytes([kind]))) == crc
        at += 7 + length
        parts = data if kind in (1, 2) else parts + data
        if kind in (1, 4):
            yield parts
