"""An unmodified BaseEnv without a model: a few short groups, then groups with a sequence of max_token_length + 1."""

from __future__ import annotations

import random
from typing import Any

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig

SHORT_GROUPS = 4


class GrowingEnv(BaseEnv):
    name = "growing"

    @classmethod
    def config_init(cls) -> tuple[BaseEnvConfig, list[APIServerConfig]]:
        return BaseEnvConfig(wandb_name=cls.name, use_wandb=False), [APIServerConfig()]

    async def setup(self) -> None:
        self.made = 0

    async def get_next_item(self) -> int:
        self.made += 1
        return self.made

    async def collect_trajectories(self, item: int) -> tuple[dict[str, Any], list[Any]]:
        length = 12 if item <= SHORT_GROUPS else self.config.max_token_length + 1
        tokens = [[random.randrange(5, 384) for _ in range(length)] for _ in range(self.config.group_size)]
        return {
            "tokens": tokens,
            "masks": [[-100] * 6 + row[6:] for row in tokens],
            "scores": [float(at) for at in range(len(tokens))],
            "inference_logprobs": [[1.0] * 6 + [-5.0] * (length - 6) for _ in tokens],
        }, []

    async def evaluate(self, *args: Any, **kwargs: Any) -> None: ...


if __name__ == "__main__":
    GrowingEnv.cli()
