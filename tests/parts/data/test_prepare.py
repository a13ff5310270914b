"""A prepared folder: built once, whole or not at all, by one process at a time, and checked when used again."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from atropos_exp.errors import UserError
from atropos_exp.parts.data.fingerprint import content_hash
from atropos_exp.parts.data.settings import PrepareSettings
from data_prep.arithmetic import Arithmetic
from data_prep.cli import main
from data_prep.folder import build_into
from data_prep.prepare import configure, ensure, preflight

SMALL = {"num_train": 40, "num_test": 10}


def wanted(folder: Path, builder: str = "arithmetic", **arguments: Any) -> PrepareSettings:
    return PrepareSettings(builder=builder, folder=str(folder), arguments={**SMALL, **arguments})


def test_ensure_builds_once_and_tells_what_it_built(tmp_path: Path) -> None:
    folder = ensure(wanted(tmp_path / "data"))
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "test.parquet", "train.parquet"]
    about = json.loads((folder / "manifest.json").read_text())["about"]
    assert about["builder"] == "arithmetic" and about["builder_version"] == 1 and about["seed"] == 0
    assert about["arguments"] == {"operations": "+", "digits": 2, "seed": 0, **SMALL}
    assert about["counts"]["num_train"] == 40 and about["counts"]["num_test"] == 10
    for name, rows in (("train.parquet", 40), ("test.parquet", 10)):
        expected = {"num_rows": rows, "content_hash": content_hash(pq.read_table(folder / name))}
        assert about["tables"][name] == expected
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert ensure(wanted(tmp_path / "data", digits=2)) == folder  # a default spelled out is the same choice
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_each_choice_of_arguments_has_its_own_folder(tmp_path: Path) -> None:
    folders = {ensure(wanted(tmp_path, **changes)) for changes in ({}, {"seed": 1}, {"digits": 3}, {"num_test": 11})}
    assert len(folders) == 4 and all((folder / "manifest.json").is_file() for folder in folders)


def test_equal_arguments_give_equal_content_anywhere(tmp_path: Path) -> None:
    first, second = ensure(wanted(tmp_path / "a")), ensure(wanted(tmp_path / "b"))
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    folder = ensure(wanted(tmp_path))
    data = bytearray((folder / "train.parquet").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "train.parquet").write_bytes(data)
    with pytest.raises(
        UserError, match=r"changed since it was built: train\.parquet is damaged: .*; remove the folder"
    ):
        ensure(wanted(tmp_path))


def test_another_data_set_or_other_files_are_not_overwritten(tmp_path: Path) -> None:
    build_into(tmp_path / "set", Arithmetic(**SMALL), deadline_s=5, say=print)
    with pytest.raises(UserError, match=r"set: holds another data set: digits was 2, asked for 3; name another folder"):
        build_into(tmp_path / "set", Arithmetic(digits=3, **SMALL), deadline_s=5, say=print)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("important")
    with pytest.raises(UserError, match=r"mine is there and is no data set of this program"):
        build_into(tmp_path / "mine", Arithmetic(**SMALL), deadline_s=5, say=print)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "important"


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Arithmetic, "gold", lambda self, row: "7")
    with pytest.raises(UserError, match="reward self-test failed"):
        ensure(wanted(tmp_path / "data"))
    assert [path.name for path in (tmp_path / "data").iterdir() if path.suffix != ".lock"] == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the data set cannot be written: .*"):
        ensure(wanted(tmp_path / "file" / "data"))


def test_waiting_for_another_writer_ends(tmp_path: Path) -> None:
    folder = ensure(wanted(tmp_path))
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    said: list[str] = []
    with (tmp_path / f".{folder.name}.lock").open("a+") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        start = time.monotonic()
        with pytest.raises(
            UserError, match=rf"waited 0 s for process {os.getpid()} to build {folder.name} \(lock .*\.lock\)"
        ):
            ensure(wanted(tmp_path), deadline_s=0.3, say=said.append)
        assert 0.3 <= time.monotonic() - start < 5
    assert len(said) == 1 and "waiting for process" in said[0]
    assert ensure(wanted(tmp_path), deadline_s=0.3) == folder  # released: built again


WRITER = """
import sys, time
from atropos_exp.parts.data.settings import PrepareSettings
from data_prep import folder as module
from data_prep.prepare import ensure
build = module._build
def slow(*args):
    open(sys.argv[2], "a").write("built\\n")
    time.sleep(float(sys.argv[3]))
    return build(*args)
module._build = slow
arguments = {"num_train": 40, "num_test": 10}
ensure(PrepareSettings(builder="arithmetic", folder=sys.argv[1], arguments=arguments), deadline_s=60)
"""


def start_writer(folder: Path, log: Path, seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(folder), str(log), str(seconds)])


def test_two_writers_build_once_and_a_killed_one_blocks_nobody(tmp_path: Path) -> None:
    log = tmp_path / "log"
    dead = start_writer(tmp_path / "data", log, 60.0)
    deadline = time.monotonic() + 30
    while not log.exists():
        assert time.monotonic() < deadline and dead.poll() is None, "the first writer never began"
        time.sleep(0.05)
    dead.send_signal(signal.SIGKILL)
    dead.wait(timeout=10)
    writers = [start_writer(tmp_path / "data", log, 0.5) for _ in range(2)]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    assert log.read_text() == "built\n" * 2  # the killed one's, and one of the two
    assert ensure(wanted(tmp_path / "data")).is_dir()


@pytest.mark.parametrize(
    ("builder", "arguments", "message"),
    [
        ("arithmetik", {}, "data.prepare.builder: got 'arithmetik', expected arithmetic, reasoning_gym, "),
        ("arithmetic", {"digit": 3}, "data.prepare.arguments.digit: unknown key. Did you mean 'arguments.digits'?"),
        ("arithmetic", {"digits": "three"}, "data.prepare.arguments.digits: got 'three', expected a whole number"),
        ("arithmetic", {"digits": 12}, "data.prepare.arguments.digits: got 12, expected 1 to 9"),
        ("reasoning_gym", {"tasks": []}, "data.prepare.arguments.tasks: got [], expected different names"),
        ("gsm8k", {"max_train": 0}, "data.prepare.arguments.max_train: got 0, expected at least 1"),
    ],
)
def test_mistakes_are_told_before_anything_is_built(builder: str, arguments: dict[str, Any], message: str) -> None:
    (problem,) = preflight(PrepareSettings(builder=builder, folder="nowhere", arguments=arguments))
    assert problem.startswith(message)


def test_arguments_keep_their_defaults() -> None:
    assert configure("arithmetic", {"digits": 3}) == Arithmetic(digits=3)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--out", str(tmp_path / "out"), "--num-train", "40", "--num-test", "10", "--operations", "+-"]
    assert main(Arithmetic, options) == 0
    assert f"{tmp_path}/out/train.parquet: 40 rows, content " in capsys.readouterr().out
    assert main(Arithmetic, options) == 0  # there already
    assert main(Arithmetic, [*options, "--seed", "9"]) == 2
    assert "holds another data set: seed was 0, asked for 9" in capsys.readouterr().err
    assert main(Arithmetic, ["--digits", "x"]) == 2
    assert "digits: got 'x', expected a whole number" in capsys.readouterr().err


def test_a_run_trains_on_what_was_prepared(tmp_path: Path, tokenizer: Any, settings: Any) -> None:
    prepare = wanted(tmp_path / "data")
    chosen = settings(prepare=prepare)
    folder = ensure(prepare)
    loader = chosen.loader(
        tokenizer, seed=0, max_prompt_length=32, max_response_length=8, run_folder=tmp_path, prepared_folder=folder
    )
    held_out = chosen.eval_prompts(tokenizer, num_prompts=10, max_prompt_length=32, prepared_folder=folder)
    trained = loader.take(40)
    assert len({prompt.text for prompt in trained}) == 40 and len(held_out) == 10
    assert {prompt.text for prompt in trained}.isdisjoint(prompt.text for prompt in held_out)
    assert held_out[0].prompt_id.startswith("arithmetic/test/")
    assert chosen.has_eval and chosen.preflight() == []
