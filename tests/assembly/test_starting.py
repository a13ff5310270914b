"""What stands in the way of a start is said at once, in one message, and nothing is left behind."""

from __future__ import annotations

import shutil
import socket

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atropos_exp.parts.model.tiny import WEIGHTS
from tests.helpers.command_lines import answers_to

# Command lines, and what their messages must say. PORT is one at which another program listens.
REFUSALS: list[tuple[list[str], list[str]]] = [
    (["run_dir=/proc/x/y"], ["/proc/x: No such file or directory; mend it, or choose another"]),
    (["-m", "seed=0,1", "sweep.dir=/proc/x"], ["/proc/x: No such file or directory"]),
    (
        ["run_dir=../../files"],
        ["run_dir: ../../files is no run folder, and holds cut.parquet and 2 more; choose a new"],
    ),
    (["resume=../../files"], ["resume: ../../files is not a run folder"]),
    (["data.parquet_paths=~/nowhere.parquet"], ["~/nowhere.parquet does not exist (looked for /"]),
    # what only the machine knows, all at once
    (
        [
            *("data.parquet_paths=[../../files/cut.parquet,../../files/other.parquet]", "env.python=/bin/echo"),
            *("model=qwen2_5_0_5b_instruct", "gateway.port=PORT", "rollout=auto"),
        ],
        [
            "data.parquet_paths: ../../files/cut.parquet: cannot be read as Parquet",
            "data.parquet_paths: ../../files/other.parquet: wrong schema: column data_source is missing",
            "env.python: got '/bin/echo', but it is no Python interpreter; name the interpreter",
            "model.path: Qwen/Qwen2.5-0.5B-Instruct is not a folder here and could not be taken from",
            "gateway.port: cannot listen on 127.0.0.1:PORT: another program listens there",
        ],
    ),
    (
        ["-m", "data.parquet_paths=../../files/cut.parquet,../../files/other.parquet", "seed=0,1"],
        ["../../files/cut.parquet: cannot be read as Parquet", "../../files/other.parquet: wrong schema"],
    ),
    (["model.path=../../files/other.parquet"], ["other.parquet, which is a file; expected the folder of a Hugging"]),
    (["model.path=../../files/model"], ["is damaged or only half there", "Delete it and fetch the model again"]),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str, str]]:
    """Exit code, message and port of each of REFUSALS."""
    folder = tmp_path_factory.mktemp("refusals")
    files = folder / "files"
    files.mkdir()
    pq.write_table(pa.table({"question": ["1+1"]}), files / "other.parquet")
    (files / "cut.parquet").write_bytes((files / "other.parquet").read_bytes()[:200])
    shutil.copytree(WEIGHTS, files / "model")
    with open(files / "model" / "model.safetensors", "r+b") as weights:
        weights.truncate(1000)
    before = sorted(files.rglob("*"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        lines = [[word.replace("PORT", port) for word in arguments] for arguments, _ in REFUSALS]
        found = answers_to(lines, folder)
    assert sorted(files.rglob("*")) == before
    for _, one in found:
        assert (one / "out").read_text() == ""
        assert list((one / "empty").iterdir()) == [], "a refused run leaves nothing behind"
    return [(code, (one / "err").read_text(), port) for code, one in found]


@pytest.mark.parametrize("number", range(len(REFUSALS)), ids=[" ".join(arguments)[:60] for arguments, _ in REFUSALS])
def test_a_refusal_is_one_message(number: int, answers: list[tuple[int, str, str]]) -> None:
    code, message, port = answers[number]
    assert code == 2, message
    assert "Traceback" not in message
    for word in REFUSALS[number][1]:
        assert message.count(word.replace("PORT", port)) == 1, message
