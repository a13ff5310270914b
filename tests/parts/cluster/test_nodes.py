"""Ranks on nodes that share no model cache: one of each node fetches, and a failure of one is heard by all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from atropos_exp.processes.ports import HeldPort
from tests.helpers.paths import ROOT

# argv: the folder that stands for this node's disk, and whether its download fails. Prints what `find` gave and how
# often it had to download.
RANK = """
import sys
from pathlib import Path
from atropos_exp.parts.trainer.distributed import join_process_group
join_process_group("cpu", timeout_s=60.0)
from atropos_exp.processes.ranks import Ranks
from atropos_exp.errors import UserError
model, downloads = Path(sys.argv[1]) / "model", 0
def find():
    global downloads
    if not model.is_dir():
        downloads += 1
        if sys.argv[2] == "fails":
            raise OSError("no route to the hub")
        model.mkdir(parents=True)
    return model
try:
    print(Ranks.of_environment().folder_on_every_node(find), downloads)
except UserError as error:
    print(error)
"""


def run_ranks(places: list[tuple[Path, int]], *, failing: Path | None = None, relative: bool = False) -> list[str]:
    """One process per (disk, local rank), working in its disk if `relative`; their outputs in order of rank."""
    port = HeldPort()
    processes = []
    for rank, (disk, local) in enumerate(places):
        own = {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": len(places), "MASTER_ADDR": "127.0.0.1"}
        environment = {**os.environ, "MASTER_PORT": str(port.number), "PYTHONPATH": str(ROOT)}
        environment |= {name: str(value) for name, value in own.items()}
        how = "fails" if disk == failing else "works"
        disk.mkdir(exist_ok=True)
        command = [sys.executable, "-W", "ignore", "-c", RANK, "." if relative else str(disk), how]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=disk))
    try:
        return [process.communicate(timeout=200)[0].strip() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_one_node_fetches_for_all_that_see_its_folder(tmp_path: Path) -> None:
    first, second = tmp_path / "node0", tmp_path / "node1"
    found = run_ranks([(first, 0), (second, 0)])
    # This machine's one disk shows rank 0's folder to all, as a shared file system does: nobody else looks.
    assert found == [f"{first / 'model'} 1", f"{first / 'model'} 0"]


def test_a_node_that_does_not_see_the_folder_fetches_its_own(tmp_path: Path) -> None:
    """A relative path is seen from a rank's own working directory only: a stand-in for a disk of its own."""
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    found = run_ranks([(nodes[0], 0), (nodes[1], 0), (nodes[1], 1)], relative=True)
    assert found == ["model 1", "model 1", "model 0"]
    assert all((node / "model").is_dir() for node in nodes)


def test_a_failure_on_one_node_is_heard_by_all(tmp_path: Path) -> None:
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    found = run_ranks([(nodes[0], 0), (nodes[1], 0)], failing=nodes[1], relative=True)
    assert found == ["rank 1: OSError: no route to the hub"] * 2
