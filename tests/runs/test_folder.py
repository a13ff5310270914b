"""Which folder a run gets: a new one, or the unfinished one of the same configuration."""

import json

import pytest

from atropos_exp.errors import UserError
from atropos_exp.runs.folder import open_run_folder


@pytest.fixture
def start(tmp_path):
    """Opens run folders under tmp_path; all are let go at the end."""
    opened = []

    def open_one(*, config_hash="a", run_dir=None, resume="auto"):
        folder = open_run_folder(
            output_dir=tmp_path, name="demo", run_dir=run_dir, resume=resume, config_hash=config_hash
        )
        opened.append(folder)
        return folder

    yield open_one
    for folder in opened:
        folder.lock.close()


def finish(folder, status):
    (folder.path / "summary.json").write_text(json.dumps({"status": status}))


def test_an_unfinished_run_of_the_same_configuration_is_continued(start):
    first = start()
    first.lock.close()
    again = start()
    assert (again.path, again.resumed) == (first.path, True)
    again.lock.close()
    finish(first, "stopped")
    third = start()
    assert third.path == first.path


def test_a_finished_or_other_or_running_one_is_not(start):
    first = start()
    second = start()
    assert second.path != first.path, "it is locked by a living run"
    first.lock.close()
    assert start(config_hash="b").path not in (first.path, second.path)
    finish(first, "finished")
    assert not start().resumed, "one is finished, the other is running"
    assert not start(resume="never").resumed


def test_a_path_continues_that_folder_whatever_its_configuration(start, tmp_path):
    first = start()
    first.lock.close()
    continued = start(config_hash="b", resume=str(first.path))
    assert (continued.path, continued.resumed) == (first.path, True)
    assert json.loads((first.path / "run.json").read_text())["config_hash"] == "a"
    with pytest.raises(UserError, match="is not a run folder"):
        start(resume=str(tmp_path))


def test_a_fixed_folder_says_why_it_cannot_be_used(start, tmp_path):
    fixed = str(tmp_path / "here")
    first = start(run_dir=fixed)
    with pytest.raises(UserError, match="in use by process"):
        start(run_dir=fixed)
    first.lock.close()
    with pytest.raises(UserError, match="another configuration"):
        start(run_dir=fixed, config_hash="b")
    with pytest.raises(UserError, match="already holds a run"):
        start(run_dir=fixed, resume="never")
    assert start(run_dir=fixed).resumed
