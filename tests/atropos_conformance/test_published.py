"""Environments as others have published them, in an interpreter of their own with transformers 4, by the commands of
docs/atropos.md alone."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.helpers.experiments import metrics, run
from tests.helpers.older_transformers import environment
from tests.helpers.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ENVIRONMENTS = Path(__file__).parent / "environments"
STEPS = 10
SMALL = (
    "rollout=auto", "env=external", "batch_size=2", "group_size=4", "eval.num_prompts=0", "sync.canary_prompts=1",
    "engine.num_threads=1", f"trainer.max_steps={STEPS}", "atropos.start_timeout=240",
)  # fmt: skip


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("venv"))


def test_one_that_ignores_its_base_url_and_reads_data_of_its_own_folder(python: Path, tmp_path: Path) -> None:
    """environment with one server, data in its working directory, W&B without a key: trains, and its evaluation is
    recorded."""
    data = tmp_path / "data" / "questions"
    data.mkdir(parents=True)
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(10, 30) for b in range(10, 14)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "run"
    summary = run(
        folder, *SMALL, "env.name=single_server", f"env.python={python}", f"env.cwd={data.parent}",
        f"env.command=[{ENVIRONMENTS / 'single_server.py'}]", "logger=wandb", "logger.mode=offline",
        timeout=420,
    )  # fmt: skip
    log = (folder / "log/environment_single_server.log").read_text()
    assert summary["rollouts"] == {"atropos": 4 * 2 * STEPS, "local": 0, "dropped": {}}, log[-3000:]
    steps = metrics(folder)[1:]
    assert [step["atropos/rollouts_of_unknown_version"] for step in steps if "atropos/rollouts_of_unknown_version" in
            step] == []  # fmt: skip
    assert sum(step["length/truncated_fraction"] for step in steps) == 0, "five tokens are its own limit, not the run's"
    evaluated = [step["environment/single_server_0/eval_questions"] for step in steps
                 if "environment/single_server_0/eval_questions" in step]  # fmt: skip
    assert set(evaluated) == {80.0}
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 2, "the run's own, and the environment's"


def test_one_with_two_servers_that_tokenises_again(python: Path, tmp_path: Path) -> None:
    """environment with two servers that tokenises its texts again: trains, though the ledger knows few of them."""
    folder = tmp_path / "run"
    summary = run(
        folder, *SMALL, "env.name=server_pair", f"env.python={python}",
        f"env.command=[{ENVIRONMENTS / 'server_pair.py'}]", timeout=420,
    )  # fmt: skip
    assert summary["rollouts"] == {"atropos": 4 * 2 * STEPS, "local": 0, "dropped": {}}


def documented(name: str) -> list[str]:
    """The overrides of the command of docs/atropos.md that starts this environment."""
    lines = (ROOT / "docs/atropos.md").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("python -m ") and f"env.name={name} " in line]
    return shlex.split(line)[3:]


def test_the_environment_that_the_docs_show(tmp_path: Path) -> None:
    """environment of one's own, as docs/atropos.md shows it: trains, every rollout known to the ledger."""
    text = (ROOT / "docs/atropos.md").read_text()
    [block] = re.findall(r"```python\n(from atroposlib.*?)```", text, re.S)
    (tmp_path / "sums.py").write_text(block)
    folder = tmp_path / "run"
    summary = run(folder, *documented("sums"), *SMALL, f"env.cwd={tmp_path}", "logger=none", timeout=420)
    assert summary["rollouts"] == {"atropos": 4 * 2 * STEPS, "local": 0, "dropped": {}}
    assert sum(step["rollout/of_unknown_version"] for step in metrics(folder)[1:]) == 0
