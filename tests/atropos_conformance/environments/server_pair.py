"""Another manner of published environments: two servers by default, with which atroposlib refuses every --openai flag,
and sequences that are tokenised again from their text, which takes transformers 4."""

from __future__ import annotations

from typing import Any

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig
from atroposlib.utils.tokenize_for_trainer import tokenize_for_trainer


class ServerPairEnv(BaseEnv):
    name = "server_pair"

    @classmethod
    def config_init(cls) -> tuple[BaseEnvConfig, list[APIServerConfig]]:
        servers = [APIServerConfig(base_url=f"http://localhost:900{at}/v1", api_key="x") for at in (1, 2)]
        servers = [servers[0], servers[1]]
        return BaseEnvConfig(use_wandb=True), servers

    async def setup(self) -> None:
        self.made = 0

    async def get_next_item(self) -> int:
        self.made += 1
        return self.made

    async def collect_trajectories(self, item: int) -> tuple[dict[str, Any], list[Any]]:
        asked = [{"role": "user", "content": f"{10 + item % 40}+{10 + item % 30}="}]
        answer = await self.server.chat_completion(messages=asked, n=self.config.group_size, max_tokens=8)
        group: dict[str, Any] = {"tokens": [], "masks": [], "scores": []}
        for at, choice in enumerate(answer.choices):
            messages = [*asked, {"role": "assistant", "content": choice.message.content}]
            encoded = tokenize_for_trainer(self.tokenizer, messages)
            group["tokens"].append(encoded["tokens"])
            group["masks"].append(encoded["masks"])
            group["scores"].append(float(at))
        return group, []

    async def evaluate(self, *args: Any, **kwargs: Any) -> None: ...


if __name__ == "__main__":
    ServerPairEnv.cli()
