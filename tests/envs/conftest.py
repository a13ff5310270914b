"""The model tiny behind a real engine and gateway, runs' config files, and programs: the API and environments."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from atropos_exp.config.origin import CONF_DIR
from atropos_exp.parts.engine.hf.settings import HFEngine
from atropos_exp.parts.engine.servers import Servers
from atropos_exp.parts.gateway.settings import GatewaySettings
from atropos_exp.parts.model.tiny import WEIGHTS
from atropos_exp.processes.ports import HeldPort
from tests.helpers.paths import ROOT

STOP = 1  # <|end|>
# A third digit and <|end|> do not both fit: answers of 100 and more are cut.
SMALL = ("batch_size=4", "group_size=12", "max_response_length=3", "temperature=0.9", "top_p=0.98", "top_k=50",
         "rollout.mask_truncated=true", "eval.num_prompts=48", "eval.samples_per_prompt=3", "seed=5")  # fmt: skip
LONGEST = 32 + 3  # max_prompt_length + max_response_length
START_SECONDS = 120


@dataclass(kw_only=True)
class Program:
    """A process of a test, with its output in a file."""

    process: subprocess.Popen[bytes]
    log: Path

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = START_SECONDS) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still there after {seconds} s:\n{self.text()}")

    def wait_for(self, condition: Callable[[], Any], what: str, seconds: float = START_SECONDS) -> Any:
        """What `condition` gives as soon as it is true."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            ended = self.process.poll()
            assert ended is None, f"ended with exit code {ended} before {what}:\n{self.text()}"
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}:\n{self.text()}"
            time.sleep(0.1)
        return value

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)


@dataclass(kw_only=True)
class Programs:
    folder: Path
    running: list[Program] = field(default_factory=list)
    _ports: list[HeldPort] = field(default_factory=list)

    def start(self, *argv: str) -> Program:
        log = self.folder / f"program_{len(self.running)}.log"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *argv], stdout=output, stderr=subprocess.STDOUT, cwd=self.folder, env=environment
            )
        self.running.append(Program(process=process, log=log))
        return self.running[-1]

    def environment(self, module: str, mode: str, run_config: Path, gateway: str, *flags: str) -> Program:
        return self.start(
            *("-m", f"atropos_exp.envs.{module}", mode, "--env.run_config", str(run_config)),
            *("--openai.base_url", f"{gateway}/v1", *flags),
        )

    def api(self) -> Api:
        self._ports.append(HeldPort())
        port = self._ports[-1].number
        program = self.start("-m", "atroposlib.cli.run_api", "--host", "127.0.0.1", "--port", str(port))
        api = Api(url=f"http://127.0.0.1:{port}", program=program)
        program.wait_for(api.answers, "the API's first answer")
        return api


@dataclass(kw_only=True)
class Api:
    """The real API, used as a trainer uses it."""

    url: str
    program: Program

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/info", timeout=2, trust_env=False).is_success
        except httpx.TransportError:
            return False

    def get(self, path: str) -> Any:
        return httpx.get(self.url + path, timeout=60, trust_env=False).raise_for_status().json()

    def register(self, *, batch_size: int, starting_step: int, num_steps: int) -> None:
        registration = {
            "wandb_group": "", "wandb_project": "", "batch_size": batch_size, "max_token_len": LONGEST + 1,
            "checkpoint_dir": "", "save_checkpoint_interval": 10, "starting_step": starting_step,
            "num_steps": num_steps,
        }  # fmt: skip
        httpx.post(f"{self.url}/register", json=registration, timeout=60, trust_env=False).raise_for_status()
        assert self.get("/batch") == {"batch": None}  # lets environments register

    def has_environment(self, env_id: int) -> bool:
        request = httpx.Request("GET", f"{self.url}/status-env", json={"env_id": env_id})
        with httpx.Client(timeout=60, trust_env=False) as client:
            return client.send(request).is_success

    def batch(self, environment: Program) -> list[dict[str, Any]]:
        """The groups of the next batch."""
        groups: list[dict[str, Any]] = environment.wait_for(lambda: self.get("/batch")["batch"], "a batch")
        return groups


@pytest.fixture(scope="session")
def helpers() -> Any:
    """What the tests need of this file (conftest cannot be imported)."""
    from types import SimpleNamespace

    return SimpleNamespace(SMALL=SMALL, STOP=STOP, LONGEST=LONGEST, WEIGHTS=WEIGHTS)


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    values = yaml.safe_load((CONF_DIR / "engine/hf.yaml").read_text())
    del values["_target_"]
    client = HFEngine(**{**values, "num_threads": 1}).start(
        model_folder=WEIGHTS, device="cpu", log_folder=tmp_path_factory.mktemp("engine"), max_sequence_length=LONGEST
    )
    yield client
    client.stop()


@pytest.fixture(scope="session")
def gateway(engine: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address."""
    values = yaml.safe_load((CONF_DIR / "gateway/default.yaml").read_text())
    del values["_target_"]
    settings = GatewaySettings(**values)
    client = settings.start(
        doors=settings.listen(()),
        endpoints=[engine.endpoint],
        model_folder=WEIGHTS,
        model_name="tiny",
        stop_token_ids=(STOP,),
        max_sequence_length=LONGEST,
        seed=5,
        log_folder=tmp_path_factory.mktemp("gateway"),
    )
    yield client.address
    client.stop()


@pytest.fixture(scope="session")
def write_config(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """write_config(*overrides) -> the config.yaml of a run, as `run.py` leaves it."""
    from hydra import compose, initialize_config_dir

    from atropos_exp.config.freeze import save_config

    data = tmp_path_factory.mktemp("outputs")

    def write(*overrides: str) -> Path:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
            config = compose("config", overrides=[*SMALL, f"output_dir={data}", *overrides])
        path = tmp_path_factory.mktemp("run") / "config.yaml"
        save_config(config, path)
        return path

    return write


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    started = Programs(folder=tmp_path)
    yield started
    for program in reversed(started.running):
        program.kill()
