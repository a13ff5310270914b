"""Servers with the settings that ship, on one thread. As a program it starts one and waits to be killed:

engines.py OPTION MODEL_FOLDER LOG_FOLDER
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from atropos_exp.config.origin import CONF_DIR
from atropos_exp.parts.engine.servers import Servers
from tests.helpers.paths import ROOT


def engine_settings(option: str, **changes: Any) -> Any:
    values = yaml.safe_load((CONF_DIR / f"engine/{option}.yaml").read_text())
    module, name = values.pop("_target_").rsplit(".", 1)
    return getattr(importlib.import_module(module), name)(**{**values, "num_threads": 1, **changes})


def start_engine(
    option: str,
    log_folder: Path,
    model_folder: Path,
    *,
    max_length: int,
    device: str = "cpu",
    adapter: Any = None,
    **changes: Any,
) -> Servers:
    """`adapter`: rank and target modules of LoRA matrices that it is sent by themselves."""
    model: dict[str, Any] = {} if adapter is None else {"lora": adapter}
    if adapter is not None:
        changes["lora"] = "adapter"
    client: Servers = engine_settings(option, **changes).start(
        model_folder=model_folder, device=device, log_folder=log_folder, max_sequence_length=max_length, **model
    )
    return client


def start_random(option: str, folder: Path, model: Any, *, max_length: int, **changes: Any) -> Servers:
    """A float32 server of this model; its files and logs are in `folder`."""
    model.save_pretrained(folder / "model")
    return start_engine(option, folder, folder / "model", max_length=max_length, **{"dtype": "float32", **changes})


def start_in_another_process(option: str, model_folder: Path, log_folder: Path) -> subprocess.Popen[str]:
    """Its first line is the id of the server that it started."""
    return start_python(str(Path(__file__)), option, str(model_folder), str(log_folder))


def start_python(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=environment)


def first_number(parent: subprocess.Popen[str]) -> int:
    assert parent.stdout is not None
    line = parent.stdout.readline()
    assert line, "the process printed nothing; its error is above"
    return int(line)


if __name__ == "__main__":
    client = start_engine(sys.argv[1], Path(sys.argv[3]), Path(sys.argv[2]), max_length=32)
    print(client.replicas[0].process.pid, flush=True)
    time.sleep(600)
