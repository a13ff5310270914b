"""An Atropos environment: chains of sums over several turns with a calculator between, optionally with credit by turn.

python -m atropos_exp.envs.multi_turn_calculator serve --env.run_config RUN/config.yaml \
    --env.token_advantages true --env.rollout_server_url … --openai.base_url …
"""

import asyncio
import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from atropos_exp.processes.startup import no_collections, tokenizers_only

if __name__ == "__main__":
    with tokenizers_only(), no_collections():
        import atroposlib.envs.base  # noqa: F401

from atropos_exp.envs.base import RunEnv, RunEnvConfig
from atropos_exp.envs.calculator_chain import Chain, Dialogue, draw_chain, turn_credit
from atropos_exp.envs.episode import Episode
from atropos_exp.envs.sampler import SampledTurn
from atropos_exp.envs.stream import StreamPosition
from atropos_exp.envs.turn_encoder import TurnEncoder
from atropos_exp.errors import UserError
from atropos_exp.parts.eval.held_out import eval_metrics
from atropos_exp.runs.seeds import derive_seed
from atropos_exp.types import SamplingParams


class CalculatorConfig(RunEnvConfig):
    """The environment's own settings."""

    num_sums: int = Field(default=2, ge=1, le=8, description="Of a chain; with two of `tiny`, 33 tokens suffice")
    max_turns: int = Field(default=4, ge=1, description="Of the policy; a turn that asks the calculator counts")
    tool_role: str = Field(default="user", description="Role of the calculator in the chat template: user or tool")
    token_advantages: bool = Field(default=False, description="Send token-level advantages: credit by turn")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainTask:
    """One chain, which every episode of a group works on."""

    place: StreamPosition
    chain: Chain


class CalculatorEnv(RunEnv):
    """An episode's score is the fraction of its sums that were answered right."""

    name: ClassVar[str] = "multi_turn_calculator"
    env_config_cls: ClassVar[type[RunEnvConfig]] = CalculatorConfig

    def prepare(self) -> None:
        self.encoder = TurnEncoder(
            self.tokenizer,
            system_prompt=self.settings.data.system_prompt,
            template_arguments=self.settings.data.chat_template_arguments,
            role=self.config.tool_role,
        )
        longest = len(self.encoder.first("99+99="))
        if longest >= self.config.max_token_length:
            raise UserError(
                f"the first sum takes {longest} tokens, which leaves none of the {self.config.max_token_length} that "
                "max_prompt_length + max_response_length of the run allow to a whole episode; raise one of them"
            )

    async def get_next_item(self) -> ChainTask:
        place = self.stream.next()
        seed = derive_seed(self.settings.run.seed, "calculator", place.position)
        return ChainTask(place=place, chain=draw_chain(seed, self.config.num_sums, held_out=False))

    async def collect(self, item: ChainTask) -> dict[str, Any] | None:
        params = self.training_params(item.place)
        played = await self.play(item.chain, params, num_episodes=self.config.group_size, split="train")
        if any(not episode.turns or min(map(len, episode.turns)) == 0 for episode, _ in played):
            self.drop("empty_completion")
            return None
        episodes = [episode for episode, _ in played]
        dialogues = [dialogue for _, dialogue in played]
        advantages = None
        if self.config.token_advantages:
            advantages = [episode.spread(row) for episode, row in zip(episodes, turn_credit(dialogues), strict=True)]
        group = self.group(episodes, [one.num_right / one.chain.num_sums for one in dialogues], advantages)
        if self.config.include_messages:
            group["messages"] = [
                [{"role": "user", "content": self.tokenizer.decode(episode.tokens)}] for episode in episodes
            ]
        return group

    async def play(
        self, chain: Chain, params: SamplingParams, *, num_episodes: int, split: str
    ) -> list[tuple[Episode, Dialogue]]:
        """Play `num_episodes` of one chain. They share the first prompt and diverge after it."""
        opening = self.encoder.first(chain.question(0))
        room = self.config.max_token_length - len(opening)
        first = replace(params, max_tokens=min(params.max_tokens, room))
        starts = await self.sampler.complete(opening, first, num_samples=num_episodes, split=split)
        return list(
            await asyncio.gather(
                *(
                    self._go_on(chain, start, replace(params, seed=derive_seed(params.seed, "episode", index)), split)
                    for index, start in enumerate(starts)
                )
            )
        )

    async def _go_on(
        self, chain: Chain, start: SampledTurn, params: SamplingParams, split: str
    ) -> tuple[Episode, Dialogue]:
        episode, dialogue = Episode(), Dialogue(chain)
        episode.add_context(start.prompt_ids)
        episode.add_completion(start)
        message = dialogue.reply(self.decode([start])[0])
        while message is not None and len(episode.turns) < self.config.max_turns:
            context = self.encoder.following(message, last_token=episode.tokens[-1])
            room = self.config.max_token_length - len(episode) - len(context)
            if room < 1:
                break
            turn = replace(
                params,
                seed=derive_seed(params.seed, len(episode.turns)),
                max_tokens=min(params.max_tokens, room),
            )
            answer = (await self.sampler.complete([*episode.tokens, *context], turn, num_samples=1, split=split))[0]
            episode.add_context(context)
            episode.add_completion(answer)
            message = dialogue.reply(self.decode([answer])[0])
        return episode, dialogue

    async def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Greedy accuracy on chains of held-out sums: of whole chains, and of each sum in the chain."""
        started = time.time()
        chains = [
            draw_chain(derive_seed(0, "held-out calculator", index), self.config.num_sums, held_out=True)
            for index in range(self.settings.eval.num_prompts)
        ]
        params = replace(self.training_params(StreamPosition(position=0, seed=0)), temperature=0.0, top_p=1.0, top_k=0)
        async with asyncio.timeout(self.config.worker_timeout):
            played = await asyncio.gather(*(self.play(chain, params, num_episodes=1, split="eval") for chain in chains))
        dialogues = [dialogue for ((_, dialogue),) in played]
        metrics: dict[str, float] = {}
        if dialogues:
            right = np.array([dialogue.by_sum for dialogue in dialogues])
            metrics |= eval_metrics(name="calculator", correct=np.asarray(right.all(axis=1)))
            for index in range(self.config.num_sums):
                metrics |= eval_metrics(name=f"calculator_sum_{index + 1}", correct=right[:, index])
        samples = [
            {"operands": dialogue.chain.operands, "right": dialogue.answered,
             "text": self.tokenizer.decode(episode.tokens)}
            for ((episode, dialogue),) in played
        ]  # fmt: skip
        await self.log_evaluation(metrics, samples, started, temperature=0.0)
        return metrics


if __name__ == "__main__":
    CalculatorEnv.main()
