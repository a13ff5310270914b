"""What was read and tokenised once is not read and tokenised again, by whatever process."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atropos_exp.errors import UserError
from atropos_exp.parts.data import cache as cache_module
from atropos_exp.parts.data.tokens import SEGMENT_ROWS

Make = Callable[..., Any]
WORDS = [f"word {number:02d}" for number in range(20)]


@pytest.fixture
def words(tmp_path: Path, rows_of: Make, write_rows: Make) -> Path:
    path: Path = write_rows(tmp_path / "words.parquet", rows_of(WORDS), row_group_size=7)
    return path


def files(tmp_path: Path) -> dict[Path, tuple[int, int]]:
    """The files in the cache, each with what tells whether it was written anew."""
    found = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def facts(loader: Any, number: int = 20) -> list[Any]:
    prompts = loader.take(number)
    return [(one.prompt_id, one.text, one.ground_truth, one.token_ids.tolist(), one.extra_info) for one in prompts]


def test_the_second_start_writes_nothing_and_gives_the_same(
    words: Path, tmp_path: Path, rows_of: Make, write_rows: Make, open_loader: Make
) -> None:
    test = write_rows(tmp_path / "test.parquet", rows_of(["t1", "t2"], split="test"))
    first = open_loader(parquet_paths=words, eval_paths=test)
    before, expected, state = files(tmp_path), facts(first), first.state()
    again = open_loader(parquet_paths=words, eval_paths=test)
    assert files(tmp_path) == before and len(before) > 0
    again.restore(state)  # position and fingerprints
    again = open_loader(parquet_paths=words, eval_paths=test)
    assert facts(again) == expected and str(again.counts) == str(first.counts)


def test_what_token_ids_depend_on_makes_new_ones(
    words: Path, tmp_path: Path, open_loader: Make, settings: Make, tokenizer: Any
) -> None:
    open_loader(parquet_paths=words)
    for number, changes in enumerate(({"format": "plain"}, {"system_prompt": "Hi"}, {}), start=2):
        open_loader(parquet_paths=words, **changes, max_prompt_length=900, seed=number, max_prompts=19)
        assert len(list((tmp_path / "cache").glob("tokens-*"))) == min(number, 3)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["word"])
    loader = settings(parquet_paths=words).loader(
        other, seed=0, max_prompt_length=99, max_response_length=9, run_folder=tmp_path
    )
    prompt = {one.text: one for one in loader.take(20)}["word 07"]
    assert other.decode(prompt.token_ids) == "<user>word 07</s><assistant>"
    assert len(prompt.token_ids) == 1 + 1 + 3 + 1 + 1  # "word" is one token now
    assert len(list((tmp_path / "cache").glob("tokens-*"))) == 4
    assert len(list((tmp_path / "cache").glob("rows-*"))) == 1


def test_whatever_is_damaged_is_made_again(
    words: Path, tmp_path: Path, open_loader: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = facts(open_loader(parquet_paths=words))
    names = {path.name for path in files(tmp_path)}
    assert names > {"rows.arrow", "keys.npy", "ids.npy", "ability.npy", "starts.npy", "manifest.json", "000000.tokens"}
    for path in files(tmp_path):
        whole = path.read_bytes()
        for damage in (whole[:-1], whole[:5], b"", bytes([*whole[:-1], whole[-1] ^ 1]) if whole else b"x", None):
            if damage == whole:
                continue
            path.unlink()
            if damage is not None:
                path.write_bytes(damage)
            capfd.readouterr()
            assert facts(open_loader(parquet_paths=words)) == expected, (path, damage)
            assert path.read_bytes() == whole
            assert damage is None or "made again" in capfd.readouterr().out


def test_changed_rows_are_never_taken_from_the_cache(
    words: Path, rows_of: Make, write_rows: Make, open_loader: Make
) -> None:
    open_loader(parquet_paths=words)
    stat = words.stat()
    write_rows(words, rows_of([*WORDS[:-1], "Word 19"]), row_group_size=7)
    os.utime(words, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same name, size and time
    assert "Word 19" in {one[1] for one in facts(open_loader(parquet_paths=words))}


def test_a_cache_that_cannot_be_written_is_named(words: Path, tmp_path: Path, open_loader: Make) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache: .*file/inside cannot be written: .*name another folder"):
        open_loader(parquet_paths=words, cache=tmp_path / "file" / "inside")


def test_the_longest_unused_makes_room(
    tmp_path: Path, rows_of: Make, write_rows: Make, open_loader: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write_rows(tmp_path / f"{name}.parquet", rows_of([f"{name}{i}" for i in range(50)])) for name in "abc"]

    def entries() -> set[Path]:
        return {path for path in (tmp_path / "cache").iterdir() if path.is_dir()}

    open_loader(parquet_paths=paths[0])
    old = entries()
    open_loader(parquet_paths=paths[1])
    newer = entries() - old
    monkeypatch.setattr(cache_module, "MAX_BYTES", 1)
    open_loader(parquet_paths=paths[2])
    assert entries() > old | newer  # all were used today
    for folder in old:
        os.utime(folder, (1, 1))
    (last,) = [path for path in entries() - old - newer if path.name.startswith("rows")]
    (last / "manifest.json").unlink()
    assert len(facts(open_loader(parquet_paths=paths[2]), 50)) == 50
    assert not old & entries() and newer < entries()


def _load(open_loader: Make, path: Path, answers: Any) -> None:
    answers.put(facts(open_loader(parquet_paths=path), 40))


def test_processes_share_the_work_and_a_killed_one_blocks_nobody(tmp_path: Path, open_loader: Make) -> None:
    """One is killed after its first segment of two; two others then start at once."""
    number = SEGMENT_ROWS + 500
    messages = [[{"role": "user", "content": f"{i} {i * 7919}"}] for i in range(number)]
    table = pa.table(
        {"prompt": messages, "data_source": ["x"] * number, "reward_model": [{"ground_truth": "1"}] * number}
    )
    path = tmp_path / "many.parquet"
    pq.write_table(table, path)
    fork = multiprocessing.get_context("fork")
    answers = fork.SimpleQueue()

    def start() -> Any:
        process = fork.Process(target=_load, args=(open_loader, path, answers), daemon=True)
        process.start()
        return process

    first, deadline = start(), time.monotonic() + 60
    while not list((tmp_path / "cache").glob("tokens-*/000000.tokens")):
        assert time.monotonic() < deadline and first.is_alive()
        time.sleep(0.005)
    os.kill(first.pid, signal.SIGKILL)
    first.join(10)
    segment = next((tmp_path / "cache").glob("tokens-*/000000.tokens")).stat().st_ino
    others = [start(), start()]
    results = [answers.get() for _ in others]
    for process in others:
        process.join(30)
        assert process.exitcode == 0
    assert results[0] == results[1] == facts(open_loader(parquet_paths=path), 40)
    assert next((tmp_path / "cache").glob("tokens-*/000000.tokens")).stat().st_ino == segment
    assert not list((tmp_path / "cache").rglob(".*.tmp"))
