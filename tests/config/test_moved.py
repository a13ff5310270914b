"""A run or a sweep that was begun before the parts moved says so once, where it is, and what to do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

import pytest
from omegaconf import OmegaConf

from atropos_exp.config.build import MOVED, find_class
from atropos_exp.config.command_line import hydra_main
from atropos_exp.errors import UserError
from atropos_exp.runs.sweep_folder import Request, SweepFolder
from atropos_exp.sweep.__main__ import main as sweep_main

WHAT_TO_DO = "Start a new run, or continue this one with the version that wrote it"


def refuse(*given: object) -> NoReturn:
    pytest.fail(f"it went on, with {given}")


@pytest.mark.parametrize("folder", MOVED)
def test_a_class_of_each_folder_that_moved(folder: str) -> None:
    group = "env" if folder == "atropos" else folder
    with pytest.raises(
        UserError, match=rf"got 'atropos_exp\.{folder}\.file\.Class': .* before the parts moved"
    ) as raised:
        find_class(f"atropos_exp.{folder}.file.Class", group)
    assert WHAT_TO_DO in str(raised.value)


def test_a_class_that_never_was_is_another_mistake() -> None:
    with pytest.raises(UserError, match="others are refused"):
        find_class("atropos_exp.report.page.Page", "engine")


def test_a_frozen_run_of_then_is_refused_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    nodes = {"engine": "engine.hf.HF", "loss": "loss.ppo_clip.PPOClip", "cluster": "cluster.local.Local"}
    config = {group: {"_target_": f"atropos_exp.{target}"} for group, target in nodes.items()}
    OmegaConf.save(OmegaConf.create({"seed": 1, **config, "run_dir": str(tmp_path)}), path)
    monkeypatch.setattr(sys, "argv", ["run", "--frozen", str(path)])
    with pytest.raises(SystemExit) as ended:
        hydra_main(refuse, refuse, refuse)()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}: engine._target_: got 'atropos_exp.engine.hf.HF'") and line.endswith(WHAT_TO_DO)


@pytest.mark.parametrize("command", ["resume", "status", "wait"])
def test_a_sweep_of_then_is_refused_once(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = SweepFolder(tmp_path)
    sweep.write_request(
        Request(
            kind="grid", identity="x", name="old", created="", command=[], cwd=str(tmp_path), axes=[], baseline=0,
            settings={"_target_": "atropos_exp.sweep.settings.GridSweep"},
            cluster={"_target_": "atropos_exp.cluster.local.Local", "num_processes": 1},
        )
    )  # fmt: skip
    assert sweep_main([command, str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / 'sweep.json'}: cluster._target_: got") and line.endswith(WHAT_TO_DO)
