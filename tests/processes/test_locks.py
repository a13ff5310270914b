"""Locks on files: one holder, visible to those who ask, free as soon as the holder closes it or is killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from atropos_exp.processes.locks import held, is_held, try_hold

HOLDER = """
import sys, time
from pathlib import Path
from atropos_exp.processes.locks import try_hold
lock = try_hold(Path(sys.argv[1]), holder="the child")
print("held", flush=True)
time.sleep(60)
"""


def test_one_holder_until_it_closes(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_held(path) and not path.exists()
    lock = try_hold(path, holder="first")
    assert lock is not None
    assert is_held(path) and try_hold(path, holder="second") is None
    assert path.read_text() == "first"
    lock.close()
    assert not is_held(path)
    with held(path):
        assert is_held(path)
    assert not is_held(path)
    again = try_hold(path)
    assert again is not None and path.read_text() == "first"  # no holder given: the text stays
    again.close()


def test_a_killed_holder_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == b"held\n"
            assert is_held(path) and path.read_text() == "the child"
        finally:
            child.kill()
            child.wait(10)
    assert not is_held(path)
