"""How many groups are sampled at once: atroposlib's own accounting, but for groups on their way to the queue."""

from __future__ import annotations

import asyncio

import pytest

from atropos_exp.envs.base import RunEnv, RunEnvConfig

BATCH, GROUP = 32, 4  # rollouts, so eight groups are a batch


class Groups(RunEnv):
    """As atroposlib has it in the middle of a batch: no servers, no API."""

    name = "groups"

    def __init__(self, *, num_sampled: int, num_delivering: int, num_in_queue: int) -> None:
        self.config = RunEnvConfig(group_size=GROUP, batch_size=BATCH, max_batches_offpolicy=1)
        self.max_num_workers = BATCH // GROUP
        self.status_dict = {"queue_size": num_in_queue, "self_queue_size": num_in_queue}
        self.eval_runner, self.curr_step = None, 1
        self.workers_added_list: list[int] = []
        self.backlog: list[str] = []
        self.sampled = [asyncio.create_task(asyncio.sleep(60)) for _ in range(num_sampled)]
        delivering = [asyncio.create_task(asyncio.sleep(60)) for _ in range(num_delivering)]
        self.workers = {*self.sampled, *delivering}
        self.running_items = {
            str(number): {"item": f"old {number}", "worker": worker, "start_time": 0.0}
            for number, worker in enumerate(self.sampled)
        }
        self.num_drawn = 0

    async def get_next_item(self) -> str:
        self.num_drawn += 1
        return f"new {self.num_drawn}"

    async def evaluate(self) -> None:
        raise AssertionError("nobody asks for it here")

    async def handle_env(self, item_uuid: str) -> None:
        await asyncio.sleep(60)


@pytest.mark.parametrize(
    ("num_sampled", "num_delivering", "num_in_queue", "num_cancelled", "num_drawn"),
    [
        (5, 1, 3, 0, 0),  # the group that is delivered is in the queue already
        (3, 2, 4, 0, 0),  # one of two is
        (5, 0, 3, 0, 0),  # a batch exactly
        (4, 0, 2, 0, 2),  # room for two more
        (6, 0, 4, 2, 0),  # other environments have filled the queue: atroposlib takes two back
    ],
)
def test_a_group_being_delivered_costs_no_other(
    num_sampled: int, num_delivering: int, num_in_queue: int, num_cancelled: int, num_drawn: int
) -> None:
    async def scenario() -> tuple[int, int, int]:
        groups = Groups(num_sampled=num_sampled, num_delivering=num_delivering, num_in_queue=num_in_queue)
        await groups.add_train_workers()
        await asyncio.sleep(0)
        return sum(task.cancelled() for task in groups.sampled), groups.num_drawn, len(groups.backlog)

    assert asyncio.run(scenario()) == (num_cancelled, num_drawn, num_cancelled)
