"""Checkpoints: the newest intact one is found, damaged ones are named, old ones go last. One rank and several."""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from atropos_exp.errors import UserError
from atropos_exp.processes.ranks import Ranks
from atropos_exp.runs import manifest
from atropos_exp.runs.checkpoints import CheckpointError, Checkpoints, open_checkpoint
from tests.runs.checkpoint_cases import FILES, assert_intact, names, save, state_of, writer


def test_the_newest_comes_back_with_its_state(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    checkpoints = save(folder, 5, 10)
    found = checkpoints.latest()
    assert found is not None
    assert (found.folder, found.step) == (folder / "step_000010", 10)
    assert found.state == {"cursor": {"epoch": 1, "index": 320}, "learning_rate": 10 / 3}
    assert assert_intact(folder) == 10


def test_nothing_to_find(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "absent", keep=1).latest() is None


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 100, 1_000_000, keep=3)
    assert names(tmp_path) == ["step_000003", "step_000100", "step_1000000"]
    with pytest.raises(UserError, match="at least 1"):
        Checkpoints(tmp_path, keep=0)


def test_leftovers_of_a_crash_are_never_read_and_cleaned_by_the_next_save(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step_000001", tmp_path / "tmp.step_000002.abc")
    assert assert_intact(tmp_path) == 1
    save(tmp_path, 3)
    assert names(tmp_path) == ["step_000001", "step_000003"]


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, 1, 2)
    checkpoints.save(2, writer(2), {**state_of(2), "again": True})
    assert names(tmp_path) == ["step_000001", "step_000002"]
    found = checkpoints.latest()
    assert found is not None and found.state["again"] is True


def test_a_replaced_checkpoint_is_found_if_the_crash_came_between_the_two_renames(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "step_000002").rename(tmp_path / "old.step_000002.abc")
    assert assert_intact(tmp_path) == 2
    save(tmp_path, 3)
    assert names(tmp_path) == ["step_000001", "step_000003"]


@pytest.mark.parametrize("file", [*FILES, manifest.MANIFEST])
@pytest.mark.parametrize("harm", ["flip_first", "flip_middle", "flip_last", "truncate", "empty", "append", "remove"])
def test_harm_to_any_file_is_named_and_the_one_before_is_used(tmp_path: Path, file: str, harm: str) -> None:
    checkpoints = save(tmp_path, 1, 2)
    path = tmp_path / "step_000002" / file
    data = bytearray(path.read_bytes())
    if harm == "remove":
        path.unlink()
    else:
        if harm.startswith("flip"):
            data[{"first": 0, "middle": len(data) // 2, "last": -1}[harm.removeprefix("flip_")]] ^= 1
        path.write_bytes({"truncate": data[:-1], "empty": b"", "append": data + b"\n"}.get(harm, bytes(data)))
    assert assert_intact(tmp_path) == 1
    found = checkpoints.latest()
    assert found is not None and found.step == 1
    assert list(checkpoints.damaged) == [tmp_path / "step_000002"]
    assert file in checkpoints.damaged[tmp_path / "step_000002"]
    with pytest.raises(manifest.DamagedError, match=file):
        open_checkpoint(tmp_path / "step_000002")


def test_every_single_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / "step_000001" / manifest.MANIFEST
    data = path.read_bytes()
    for position in range(len(data)):
        harmed = bytearray(data)
        harmed[position] ^= 1 << position % 7
        path.write_bytes(harmed)
        with pytest.raises(manifest.DamagedError):
            manifest.read(path.parent)
    path.write_bytes(data)
    assert assert_intact(tmp_path) == 1


def test_damaged_ones_stay_until_a_newer_one_is_there_and_do_not_count_as_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, keep=3)
    (tmp_path / "step_000003" / "trainer.json").write_bytes(b"")
    checkpoints = Checkpoints(tmp_path, keep=2)
    found = checkpoints.latest()
    assert found is not None and found.step == 2
    assert names(tmp_path) == ["step_000001", "step_000002", "step_000003"]
    checkpoints.save(4, writer(4), state_of(4))
    assert names(tmp_path) == ["step_000002", "step_000004"]


def test_a_later_step_does_not_push_out_the_one_just_saved(tmp_path: Path) -> None:
    save(tmp_path, 20)
    checkpoints = save(tmp_path, 10, keep=1)
    assert names(tmp_path) == ["step_000010", "step_000020"]
    assert checkpoints.latest() is not None


def test_the_last_one_has_to_fit_a_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    for free, fits in ((sum(FILES.values()) - 1, False), (sum(FILES.values()), True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if fits:
            checkpoints.save(2, writer(2), state_of(2))
        else:
            with pytest.raises(CheckpointError, match=r"no room for the checkpoint of step 2: .* it needs 0\.00 GB"):
                checkpoints.save(2, writer(2), state_of(2))
            assert names(tmp_path) == ["step_000001"]


def test_an_error_of_the_writer_that_is_no_io_error_passes_through(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, 1)
    with pytest.raises(KeyError, match="bug"):
        checkpoints.save(2, lambda folder: {}["bug"], state_of(2))
    assert names(tmp_path) == ["step_000001"]


# Several ranks, as threads: rank 0 answers through a place that every other rank reads in turn.


class Place:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=20)
        self.value: Any = None


@dataclass(frozen=True, kw_only=True)
class ThreadRanks(Ranks):
    place: Place

    def broadcast(self, value: Any) -> Any:
        if self.is_zero:
            self.place.value = value
        self.place.barrier.wait()
        result = self.place.value
        self.place.barrier.wait()
        return result


def on_ranks(size: int, folder: Path, work: Callable[[int, Checkpoints], Any]) -> list[Any]:
    place, results = Place(size), [None] * size

    def run(rank: int) -> None:
        try:
            ranks = ThreadRanks(rank=rank, world_size=size, place=place)
            results[rank] = work(rank, Checkpoints(folder, keep=2, ranks=ranks))
        except Exception as error:
            results[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    return results


def test_all_ranks_write_into_one_folder_and_resume_from_one_checkpoint(tmp_path: Path) -> None:
    seen: list[Path] = []

    def work(rank: int, checkpoints: Checkpoints) -> Any:
        def write(folder: Path) -> None:
            seen.append(folder)
            if rank == 0:
                writer(4)(folder)

        path = checkpoints.save(4, write, state_of(4))
        return path, checkpoints.latest()

    results = on_ranks(3, tmp_path, work)
    assert len(seen) == 3 and len(set(seen)) == 1
    assert results[0] == results[1] == results[2]
    assert results[1][0] == tmp_path / "step_000004"
    assert results[2][1].state == state_of(4)
    assert names(tmp_path) == ["step_000004"]


@pytest.mark.parametrize("when", ["before", "while", "after"])
def test_a_full_disk_of_rank_0_is_an_error_on_every_rank(
    tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    if when == "before":
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))

    def work(rank: int, checkpoints: Checkpoints) -> Any:
        def write(folder: Path) -> None:
            if rank == 0:
                writer(2)(folder)
                if when == "while":
                    raise OSError(errno.ENOSPC, "No space left on device")
                if when == "after":
                    (folder / manifest.MANIFEST).mkdir()  # the manifest cannot be written

        return checkpoints.save(2, write, state_of(2))

    results = on_ranks(2, tmp_path, work)
    assert [type(result) for result in results] == [CheckpointError, CheckpointError]
    assert str(results[0]) in str(results[1]), "every rank says what it was"
    assert names(tmp_path) == ["step_000001"]
