"""An environment as many published ones are: one APIServerConfig instead of a list (so atroposlib ignores its base
URL), data in a folder of the working directory, a limit and a W&B name of no interest to others, evaluations."""

from __future__ import annotations

from typing import Any

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig
from datasets import load_dataset


class SingleServerEnv(BaseEnv):
    name = "single_server"

    @classmethod
    def config_init(cls) -> tuple[BaseEnvConfig, APIServerConfig]:
        config = BaseEnvConfig(group_size=8, use_wandb=True, max_token_length=512, steps_per_eval=2)
        return config, APIServerConfig(model_name="some/model", base_url="http://localhost:9001/v1", api_key="x")

    async def setup(self) -> None:
        self.rows = load_dataset("questions", split="train")
        self.next = 0

    async def get_next_item(self) -> dict[str, Any]:
        self.next += 1
        return dict(self.rows[self.next % len(self.rows)])

    async def collect_trajectories(self, item: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
        async with self.server.managed_server(tokenizer=self.tokenizer) as managed:
            answer = await managed.chat_completion(
                messages=[{"role": "user", "content": item["question"]}],
                n=self.config.group_size,
                max_tokens=5,
                temperature=1.0,
            )
            nodes = managed.get_state()["nodes"]
        texts = [choice.message.content for choice in answer.choices]
        return {
            "tokens": [node.tokens for node in nodes],
            "masks": [node.masked_tokens for node in nodes],
            "inference_logprobs": [node.logprobs for node in nodes],
            # by the number of the answer too, so that scores are rarely all equal
            "scores": [float(text == item["answer"]) + at / 8 for at, text in enumerate(texts)],
        }, []

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        await self.evaluate_log({"eval/questions": float(len(self.rows))}, samples=[], verbose=False)


if __name__ == "__main__":
    SingleServerEnv.cli()
