"""A run on one node and on two, as a user types it; and what `dry_run` prints."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.experiments import final_state, metrics, run, summary
from tests.slurm.slurm_cluster import ON_SLURM, Cluster, output

LEARNING = (
    "rollout=auto", "batch_size=16", "group_size=8", "trainer.max_steps=20", "eval.num_prompts=128",
    "eval.samples_per_prompt=0", "trainer.learning_rate=${model.suggested_learning_rate}",
)  # fmt: skip
SAME = ("reward/mean", "loss/policy", "grad/norm", "policy/entropy", "eval/arithmetic/accuracy")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process of this machine."""
    folder = tmp_path_factory.mktemp("local") / "run"
    run(folder, "trainer.max_steps=3")
    return folder


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["cluster.nodes=2", "cluster.gpus_per_node=2", "cluster.partition=main", "cluster.account=root"],
        [
            *("cluster.gpus_per_node=4", "cluster.engine_gpus=1", "cluster.mem_gb=2.5", "cluster.constraint=stand_in"),
            *("cluster.qos=normal", "cluster.sbatch=[--exclusive,'--comment=two words']", "batch_size=3"),
            *("cluster.srun=['--cpu-bind=none']", "cluster.setup=['ulimit -c 0']", "cluster.requeue=false"),
            *("cluster.container_image=/images/a.sqsh", "cluster.container_mounts=['/a:/b','/c:/c']"),
        ],
    ],
    ids=["plain", "two nodes", "everything"],
)
def test_a_dry_run_prints_what_sbatch_accepts(cluster: Cluster, tmp_path: Path, overrides: list[str]) -> None:
    cluster.wait_until_empty()
    done = cluster.type(*ON_SLURM, "cluster.dry_run=true", f"output_dir={tmp_path / 'out'}", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    script = tmp_path / "job.sh"
    script.write_text(done.stdout)
    test = subprocess.run(
        ["sbatch", "--test-only", str(script)], env=cluster.environment, capture_output=True, text=True, timeout=60
    )
    assert test.returncode == 0 and "to start at" in test.stderr, test.stderr
    assert not (tmp_path / "out" / "demo").exists(), "nothing is left behind"
    assert cluster.output("squeue", "-h") == ""
    assert subprocess.run(["bash", "-n", str(script)], timeout=30).returncode == 0
    if len(overrides) == 4:
        assert "2 node(s) x 2 task(s), 4 trainer rank(s)" in done.stdout
        assert "node 1 task 1: rank 3, GPU 1 of 2, log/rank_3.log" in done.stdout
    elif overrides:
        for line in (
            *(
                "#SBATCH --mem=2560M",
                "#SBATCH --constraint=stand_in",
                "#SBATCH --comment='two words'",
                "#SBATCH --no-req",
            ),
            *("#SBATCH --exclusive", "--cpu-bind=none", "ulimit -c 0", "--container-mounts=/a:/b,/c:/c"),
            *("node 0 task 3: waits; its device is the engine's", "engine, started by rank 0, GPU(s) 3 to 3 of 4"),
        ):
            assert line in done.stdout, line


def test_one_node_and_two_nodes_learn(cluster: Cluster, tmp_path: Path) -> None:
    """Both at the same time, by way of Atropos, which each starts for itself. 2 x 2 ranks, over gloo."""
    names, nodes = ("one", "two"), ((), ("cluster.nodes=2", "cluster.ranks_per_node=2"))
    folders = [tmp_path / name / "run" for name in names]
    jobs = [cluster.submit(folder, *own, *LEARNING) for folder, own in zip(folders, nodes, strict=True)]
    assert cluster.wait_for_end(*jobs, seconds=600) == ["COMPLETED"] * 2, "\n".join(map(output, folders))
    for folder, ranks in zip(folders, (1, 4), strict=True):
        rows, told = metrics(folder), summary(folder)
        assert (told["status"], told["steps"], told["rollouts"]["atropos"]) == ("finished", 20, 20 * 128)
        assert f"{ranks} (data-parallel {ranks})" in (folder / "log" / "rank_0.log").read_text()
        before, after = (rows[at]["eval/arithmetic/accuracy"] for at in (0, -1))
        # 128 prompts: accuracies whose 95 % intervals are far apart
        assert before < 0.5 and after > before + 0.2, (before, after)


def test_one_node_gives_what_this_machine_gives(cluster: Cluster, tmp_path: Path, local: Path) -> None:
    folder = tmp_path / "out" / "run"
    done = cluster.type(
        *ON_SLURM, f"output_dir={folder.parent}", f"run_dir={folder}", "cluster.gpus_per_node=1",
        "trainer.max_steps=3", timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "COMPLETED" in done.stdout and "finished after 1 attempt(s)" in done.stdout
    assert summary(folder)["status"] == "finished"
    ours, theirs = metrics(folder), metrics(local)
    for left, right in zip(ours, theirs, strict=True):
        assert [left.get(name) for name in SAME] == [right.get(name) for name in SAME]
    assert final_state(folder) == final_state(local), "bit for bit"
    assert {path.name for path in (folder / "log").iterdir()} >= {"rank_0.log", "engine.log"}
    again = cluster.type(*ON_SLURM, f"run_dir={folder}", f"output_dir={folder.parent}", "trainer.max_steps=3")
    assert again.returncode == 2 and "is finished" in again.stderr


def test_two_nodes_with_two_ranks_each(cluster: Cluster, tmp_path: Path, local: Path) -> None:
    """On the rollouts of the local run, whose journal lies in the folder: the numbers are those of one rank."""
    folder = tmp_path / "out" / "run"
    shutil.copytree(local / "rollouts", folder / "rollouts")
    job = cluster.submit(
        folder, "cluster.nodes=2", "cluster.gpus_per_node=2", "cluster.partition=main", "trainer.max_steps=3"
    )
    assert cluster.wait_for_end(job, seconds=400) == ["COMPLETED"], output(folder)
    assert summary(folder)["status"] == "finished"
    rows = list(zip(metrics(folder), metrics(local), strict=True))
    assert len(rows) == 4
    for ours, theirs in rows:
        for name in SAME:
            if theirs.get(name) is None:
                assert ours.get(name) is None, name
            else:
                assert math.isclose(ours[name], theirs[name], rel_tol=1e-4, abs_tol=1e-6), name
    assert {f"rank_{rank}.log" for rank in range(4)} <= {path.name for path in (folder / "log").iterdir()}
    assert "4 (data-parallel 4)" in (folder / "log" / "rank_0.log").read_text()
    launcher = (folder / "slurm" / f"{job}_0_log.out").read_text()
    assert "node 1 task 1: rank 3" in launcher
    (start, end) = (json.loads(line) for line in (folder / "slurm" / "attempts.jsonl").read_text().splitlines())
    assert len(start["nodes"]) == 2 and end["how"] == "finished"


def test_every_process_gets_its_place_and_the_devices_that_slurm_gave(cluster: Cluster, tmp_path: Path) -> None:
    """Two jobs side by side on one node, so that the second one's devices are not the first ones of the machine."""
    from atropos_exp.config.build import build
    from atropos_exp.parts.cluster.slurm.jobs import JobSpec, submit

    code = (
        "import os, pathlib, sys, time\n"
        "names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'CUDA_VISIBLE_DEVICES')\n"
        "names += ('ATROPOS_EXP_ENGINE_DEVICES', 'MASTER_ADDR', 'OMP_NUM_THREADS', 'SLURMD_NODENAME')\n"
        "text = ' '.join(os.environ.get(name, '-') for name in names)\n"
        "pathlib.Path(sys.argv[1], 'rank' + os.environ['RANK']).write_text(text)\n"
        "time.sleep(4)\n"
        "sys.exit(2)\n"  # wrong use: final, and FAILED in Slurm
    )
    overrides = {
        "nodes": 2, "gpus_per_node": 4, "engine_gpus": 1, "cpus_per_task": 1, "time_minutes": 5,
        "sbatch": ["--nodelist=node[3-4]"],
    }  # fmt: skip
    settings = build({**plain_settings(), **overrides}, "cluster")
    os.environ["SLURM_CONF"] = cluster.environment["SLURM_CONF"]
    ids = []
    try:
        for number in range(2):
            folder = tmp_path / f"job{number}"
            folder.mkdir()
            job = JobSpec(name="places", arguments=("-c", code, str(folder)), run_folder=folder)
            ids += submit([job], settings, folder=folder / "slurm")
    finally:
        del os.environ["SLURM_CONF"]
    assert cluster.wait_for_end(*ids, seconds=120) == ["FAILED", "FAILED"]
    assert cluster.output("sacct", "-X", "-n", "-P", "-o", "ExitCode", "-j", ",".join(ids)).split() == ["2:0", "2:0"]
    seen = []
    for number in range(2):
        rows = [(tmp_path / f"job{number}" / f"rank{rank}").read_text().split() for rank in range(7)]
        assert [row[:4] for row in rows] == [
            *([str(rank), str(rank), "7", "3"] for rank in range(3)),
            *([str(3 + local), str(local), "7", "4"] for local in range(4)),
        ]
        assert len({row[4] for row in rows}) == 1, "the same devices of each node"
        devices = rows[0][4].split(",")
        assert len(devices) == 4
        assert rows[0][5] == devices[-1] and {row[5] for row in rows[1:]} == {"-"}, "the engine's own device"
        assert {row[6] for row in rows} == {"127.0.0.1"} and len({row[7] for row in rows[:3]}) == 1
        assert [row[8] for row in rows] == ["node3"] * 3 + ["node4"] * 4
        seen += devices
    assert sorted(seen) == [str(device) for device in range(8)]


def test_what_slurm_refuses_is_said_in_its_words(cluster: Cluster, tmp_path: Path) -> None:
    done = cluster.type(*ON_SLURM, f"output_dir={tmp_path}", "cluster.partition=nowhere")
    assert done.returncode == 2
    assert "invalid partition specified: nowhere" in done.stderr and "Traceback" not in done.stderr


def plain_settings() -> dict[str, object]:
    import yaml

    from atropos_exp.config.origin import CONF_DIR

    found: dict[str, object] = yaml.safe_load((CONF_DIR / "cluster" / "slurm.yaml").read_text())
    return found
