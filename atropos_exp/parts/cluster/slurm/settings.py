"""What a job on Slurm asks for: the settings of `cluster=slurm`."""

import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Annotated, Self

from pydantic import Field, model_validator

from atropos_exp.config.settings import Count, Few, Settings
from atropos_exp.errors import UserError
from atropos_exp.parts.cluster.slurm.layout import Layout

# `sbatch` lines that follow from other settings: a second value would contradict the layout, or lose the signal.
OWN_LINES = {
    "nodes": "cluster.nodes",
    "ntasks": "cluster.ranks_per_node",
    "ntasks-per-node": "cluster.ranks_per_node",
    "gpus-per-node": "cluster.gpus_per_node",
    "gpus-per-task": "cluster.gpus_per_node",
    "cpus-per-task": "cluster.cpus_per_task",
    "mem": "cluster.mem_gb",
    "time": "cluster.time_minutes",
    "partition": "cluster.partition",
    "account": "cluster.account",
    "qos": "cluster.qos",
    "constraint": "cluster.constraint",
    "signal": "cluster.signal_seconds",
    "requeue": "cluster.requeue",
    "no-requeue": "cluster.requeue",
    "array": "cluster.array_parallelism",
}


class SlurmSettings(Settings):
    """What a job asks for, and what happens when it is interrupted; `conf/cluster/slurm.yaml` explains each key."""

    nodes: Annotated[int, Field(ge=1, le=10**5)]
    gpus_per_node: Annotated[int, Field(ge=0, le=1024, description="0: none")]
    ranks_per_node: Annotated[int | None, Field(ge=1, le=1024, description="null: one per GPU")]
    engine_gpus: Annotated[int, Field(ge=0, le=1024, description="0: shares the device of rank 0")]
    cpus_per_task: Few
    mem_gb: Annotated[float | None, Field(gt=0, le=1e6, description="GiB")]
    time_minutes: Count
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    signal_seconds: Annotated[int, Field(ge=1, le=65535)]
    requeue: bool
    max_failures: Count
    sbatch: list[str]
    srun: list[str]
    setup: list[str]
    python: str | None
    container_image: str | None
    container_mounts: list[str]
    array_parallelism: Annotated[int, Field(ge=1, le=10**5)]
    wait: bool
    dry_run: bool

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.signal_seconds >= 60 * self.time_minutes:
            problems.append(
                f"signal_seconds: got {self.signal_seconds}, which is no less than time_minutes={self.time_minutes}; "
                "the run would be told to stop as soon as it starts"
            )
        if self.ranks_per_node is not None and 0 < self.gpus_per_node < self.ranks_per_node:
            problems.append(
                f"ranks_per_node: got {self.ranks_per_node}, but a node has gpus_per_node={self.gpus_per_node} devices"
            )
        if self.engine_gpus and self.engine_gpus >= self.gpus_per_node:
            problems.append(
                f"engine_gpus: got {self.engine_gpus}, which leaves no device of gpus_per_node={self.gpus_per_node} "
                "on the first node to rank 0"
            )
        for option in self.sbatch:
            name = option.removeprefix("--").split("=", 1)[0]
            if not option.startswith("--") or " " in name:
                problems.append(f"sbatch: got {option!r}, expected --option or --option=value")
            elif name in OWN_LINES:
                problems.append(f"sbatch: --{name} is {OWN_LINES[name]}; set it there")
        if self.container_mounts and not self.container_image:
            problems.append("container_mounts: there is no container_image to mount into")
        if problems:
            raise UserError("\n".join(problems))
        return self

    @property
    def layout(self) -> Layout:
        """Which process runs where."""
        per_node = self.ranks_per_node or self.gpus_per_node or 1
        return Layout(
            nodes=self.nodes, ranks_per_node=per_node, gpus_per_node=self.gpus_per_node, engine_gpus=self.engine_gpus
        )

    @property
    def num_processes(self) -> int:
        """Trainer ranks on all nodes."""
        return self.layout.world_size

    @property
    def target_device(self) -> str:
        """What `device=auto` will find: this machine, where the job is typed, may have no GPU."""
        return "cuda" if self.gpus_per_node else "cpu"

    def preflight(self) -> list[str]:
        """What stands in the way of a submission. Inside a job the layout must be the one that was asked for."""
        world = os.environ.get("WORLD_SIZE")
        if world is not None:
            if int(world) != self.num_processes:
                return [f"nodes: the settings make {self.num_processes} ranks, but WORLD_SIZE is {world}"]
            return []
        if not self.dry_run and (missing := [tool for tool in ("sbatch", "srun") if shutil.which(tool) is None]):
            return [
                f"nodes: {' and '.join(missing)} not found, so there is no Slurm to submit to from here; type this on "
                "a login node, look with cluster.dry_run=true, or use cluster=local"
            ]
        return []

    def launch(self, command: Sequence[str], environ: Mapping[str, str] = os.environ) -> int | None:
        """None: this process is a rank that a job has started. A submission needs more, see `submit_run`."""
        assert "WORLD_SIZE" in environ, f"{command}: outside a job, a run is submitted"
        return None
