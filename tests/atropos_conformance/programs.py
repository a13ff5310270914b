"""The processes of a test: the real API server, a trainer, scripted environments. Every wait has a deadline."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from atropos_exp.processes.ports import HeldPort
from tests.atropos_conformance import trainer
from tests.atropos_conformance.trainer import Request, Step

HERE = Path(__file__).resolve().parent
MARK = "CONFORMANCE_RUN"
START_SECONDS = 240.0  # of a trainer until it has registered, beside other tests
STEP_SECONDS = 120.0


def wait_for(condition: Callable[[], Any], what: str, seconds: float, *, why: Callable[[], str] = str) -> Any:
    """What `condition` gives once it is true. `why`: told when it is not in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}\n{why()}"
        time.sleep(0.05)
    return value


class Api:
    """`run-api` on a loopback port of its own, which it keeps when it is killed and started again."""

    def __init__(self, folder: Path) -> None:
        self._held = HeldPort()
        self.port = self._held.number
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / f"api_{self.port}.log"
        limits = httpx.Limits(max_keepalive_connections=0)  # the server may be another one the next time
        self._http = httpx.Client(base_url=self.url, timeout=30.0, trust_env=False, limits=limits)
        self.start()

    def start(self) -> None:
        words = ["-m", "atroposlib.cli.run_api", "--host", "127.0.0.1", "--port", str(self.port)]
        with self._log.open("ab") as output:
            self._process = subprocess.Popen([sys.executable, *words], stdout=output, stderr=output)
        wait_for(self._answers, "the API answers", START_SECONDS, why=self._log.read_text)

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(30)

    def close(self) -> None:
        self.kill()
        self._http.close()

    def get(self, path: str, body: Any = None) -> Any:
        response = self._http.request("GET", path, json=body)
        assert response.status_code == 200, response.text
        return response.json() if "json" in response.headers["content-type"] else response.text

    def post(self, path: str, body: Any) -> Any:
        """NaN and infinity too, as an environment's JSON has them."""
        headers = {"content-type": "application/json"}
        response = self._http.post(path, content=json.dumps(body).encode(), headers=headers)
        assert response.status_code == 200, response.text
        return response.json()

    def send(self, *groups: dict[str, Any]) -> Any:
        """Groups in one call, so that the API sees all of them or none when it is asked for a batch."""
        return self.post("/scored_data_list", list(groups))

    @property
    def is_registered(self) -> bool:
        return bool(self.get("/info")["batch_size"] != -1)

    def _answers(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self._http.get("/").status_code == 200
        return False


class Run:
    """A run of the trainer in the background, in a process group of its own."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.folder = request.folder
        request.folder.parent.mkdir(parents=True, exist_ok=True)
        self._log = request.folder.parent / f"{request.folder.name}.log"
        words, environment = trainer.command(request)
        self._mark = uuid.uuid4().hex  # in the environment of all that it starts
        with self._log.open("ab") as output:
            self.process = subprocess.Popen(
                words,
                env={**environment, MARK: self._mark},
                cwd=HERE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def steps(self) -> list[Step]:
        return trainer.steps(self.folder)

    def wait_until(self, condition: Callable[[], Any], what: str, seconds: float = STEP_SECONDS) -> Any:
        def check() -> Any:
            value = condition()
            assert value or self.process.poll() is None, f"the run ended before: {what}\n{self.output[-4000:]}"
            return value

        return wait_for(check, what, seconds, why=lambda: self.output[-4000:])

    def wait_for_steps(self, number: int, seconds: float = STEP_SECONDS) -> list[Step]:
        self.wait_until(lambda: trainer.num_steps(self.folder) >= number, f"{number} steps", seconds)
        return self.steps()

    def wait(self, seconds: float) -> int:
        """The exit code."""
        wait_for(lambda: self.process.poll() is not None, "the run ends", seconds, why=lambda: self.output[-4000:])
        return self.process.wait(0)

    def family(self) -> list[int]:
        """Every process that it started, directly or not, and itself; also those that lost their parent."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"{MARK}={self._mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def programs(self, name: str) -> list[int]:
        """Its processes that are the program `name` of trainer.PROGRAMS, not those that watch over one."""
        return [pid for pid in self.family() if trainer.is_program(name, command_line(pid))]

    def kill(self) -> None:
        """kill -9 of the trainer alone."""
        self.process.kill()
        self.process.wait(30)

    def stop(self) -> None:
        """After a test: end what is left of it."""
        for pid in self.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(30)


class Environment:
    """A scripted environment process: registers as BaseEnv does, then sends what it is told."""

    def __init__(self, api_url: str, *, group_size: int = 4, min_batch_allocation: float | None = None) -> None:
        options = {"group_size": group_size, "min_batch_allocation": min_batch_allocation}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "environments" / "scripted.py"), api_url, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        answer = self._answer()
        assert answer["status"] == "success", answer
        self.env_id = int(answer["env_id"])
        self.registration = answer

    def send(self, *groups: dict[str, Any]) -> Any:
        """All in one call; what the API answered."""
        return self.call("POST", "/scored_data_list", [{**group, "env_id": self.env_id} for group in groups])

    def call(self, method: str, path: str, body: Any = None) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"method": method, "path": path, "body": body}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(30)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()  # it has deadlines of its own
        assert line, f"the scripted environment ended with exit code {self._process.wait(30)}"
        return json.loads(line)


def command_line(pid: int) -> list[str]:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        words = []
    return [word.decode(errors="replace") for word in words if word] or [""]
