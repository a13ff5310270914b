"""Which process of a job runs where, with which rank and which devices."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from atropos_exp.processes.child import ENGINE_DEVICES


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """The place of one task of srun: its node, rank and device."""

    node: int  # 0: the first node, where rank 0, the engine, the gateway and Atropos run
    local: int  # number of the task on its node
    rank: int | None  # of the trainer; None: it only keeps a device of the engine


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How the tasks of a job are spread over its nodes.

    Each node has `ranks_per_node` tasks; on the first node the last `engine_gpus` of them are no trainer ranks.
    """

    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    engine_gpus: int

    @property
    def idle_tasks(self) -> int:
        """Tasks of the first node whose device belongs to the engine."""
        return max(0, self.ranks_per_node + self.engine_gpus - self.gpus_per_node) if self.engine_gpus else 0

    @property
    def world_size(self) -> int:
        """Trainer ranks on all nodes."""
        return self.nodes * self.ranks_per_node - self.idle_tasks

    def ranks_on(self, node: int) -> int:
        """Return the number of trainer ranks on a node."""
        return self.ranks_per_node - (self.idle_tasks if node == 0 else 0)

    def place(self, node: int, local: int) -> Place:
        """Return the place of a task by its node and its number there."""
        if local >= self.ranks_on(node):
            return Place(node=node, local=local, rank=None)
        before = node * self.ranks_per_node - (self.idle_tasks if node else 0)
        return Place(node=node, local=local, rank=before + local)

    def places(self) -> Iterator[Place]:
        """Return all places, node by node."""
        for node in range(self.nodes):
            for local in range(self.ranks_per_node):
                yield self.place(node, local)

    def environment(self, place: Place, *, address: str, port: int, given: Mapping[str, str]) -> dict[str, str]:
        """Return the variables that torch.distributed and the rank need. CUDA_VISIBLE_DEVICES stays as Slurm `given`
        it.
        """
        assert place.rank is not None
        found = {
            "RANK": str(place.rank),
            "LOCAL_RANK": str(place.local),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.ranks_on(place.node)),
            "GROUP_RANK": str(place.node),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
        }
        if "OMP_NUM_THREADS" not in given:
            found["OMP_NUM_THREADS"] = given.get("SLURM_CPUS_PER_TASK", "1")
        visible = [name for name in given.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        if place.rank == 0 and self.engine_gpus and visible:
            found[ENGINE_DEVICES] = ",".join(visible[-self.engine_gpus :])
        return found

    def describe(self, *, address: str = "<address of the first node>") -> list[str]:
        """Return a line per process, for people."""
        shown = f"{self.nodes} node(s) x {self.ranks_per_node} task(s), {self.world_size} trainer rank(s)"
        lines = [shown, f"rendezvous {address}, a free port of it, found when the job starts"]
        devices = self.gpus_per_node
        for place in self.places():
            own = f"GPU {place.local} of {devices}" if devices else "CPU"
            if place.rank is None:
                lines.append(f"node {place.node} task {place.local}: waits; its device is the engine's")
            else:
                lines.append(
                    f"node {place.node} task {place.local}: rank {place.rank}, {own}, log/rank_{place.rank}.log"
                )
        if self.engine_gpus:
            own = f"GPU(s) {devices - self.engine_gpus} to {devices - 1} of {devices}"
        else:
            own = "shares GPU 0 with rank 0" if devices else "CPU"
        lines.append(f"node 0: engine, started by rank 0, {own}, log/engine.log")
        lines.append("node 0: gateway, reward workers and Atropos processes, started by rank 0")
        return lines
