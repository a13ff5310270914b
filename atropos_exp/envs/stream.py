"""Which task comes next when several processes share one stream of tasks and any of them may restart."""

from dataclasses import dataclass

from atropos_exp.runs.seeds import derive_seed


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamPosition:
    """A position of the stream, and the seed of what is sampled there."""

    position: int
    seed: int  # of all randomness of this task


class Stream:
    """Process i of n takes the positions i, n + i, 2 n + i, ..., so that no two processes share one.

    A process that starts at step s of the trainer begins at position s * `tasks_per_step`, rounded up to a multiple of
    n, so that a resumed run does not repeat its first tasks. Tasks that a process had taken ahead of the trainer when
    it died may repeat, but with other seeds. Equal arguments give equal positions.
    """

    def __init__(self, *, seed: int, process_index: int, num_processes: int, tasks_per_step: int) -> None:
        self._seed = seed
        self._process_index = process_index
        self._num_processes = num_processes
        self._tasks_per_step = tasks_per_step
        self.start(step=0, env_id=0)

    def start(self, *, step: int, env_id: int) -> None:
        """Start over at trainer step `step`. `env_id` is new for every process that registers, so the positions of a
        dead process are sampled with other seeds."""
        self._life = (env_id, step)
        self._block = -(-step * self._tasks_per_step // self._num_processes)

    def next(self) -> StreamPosition:
        """Take the next position."""
        position = self._block * self._num_processes + self._process_index
        self._block += 1
        return StreamPosition(position=position, seed=derive_seed(self._seed, "atropos", *self._life, position))
