"""Composes configurations for the doctor, and plants what it should find."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from atropos_exp.assembly.check import Checked, validate
from atropos_exp.config.origin import CONF_DIR
from atropos_exp.doctor.before import examine
from atropos_exp.doctor.line import Level, Line
from atropos_exp.parts.model.tiny import WEIGHTS


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
        return compose("config", overrides=list(overrides))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of the module's configurations: data are built once."""
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture
def checked(folder: Path) -> Callable[..., Checked]:
    """A checked configuration; local rollouts unless it says otherwise."""
    return lambda *overrides: validate(composed(f"output_dir={folder}", "rollout=local", *overrides))


@pytest.fixture
def doctor(folder: Path) -> Callable[..., list[Line]]:
    """All lines of a configuration."""
    return lambda *overrides: list(examine(composed(f"output_dir={folder}", "rollout=local", *overrides)))


@pytest.fixture
def finding() -> Callable[..., Line]:
    """The one line of this topic and level; its remedy is not empty."""

    def find(lines: list[Line], topic: str, level: Level = Level.fail) -> Line:
        found = [line for line in lines if line.topic == topic and line.level is level]
        assert len(found) == 1, "\n".join(map(str, lines))
        assert found[0].remedy
        return found[0]

    return find


@pytest.fixture
def changed_model(tmp_path: Path) -> Callable[..., Path]:
    """A copy of `tiny` with another chat template, and entries of its JSON files replaced."""

    def change(*, template: str | None = None, **files: dict[str, Any]) -> Path:
        target = tmp_path / "model"
        shutil.copytree(WEIGHTS, target)
        if template is not None:
            (target / "chat_template.jinja").write_text(template)
        for name, entries in files.items():
            path = target / f"{name}.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | entries))
        return target

    return change


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has no package at all."""
    target = tmp_path_factory.mktemp("venv") / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(target)], check=True, timeout=120)
    return target / "bin" / "python"
