"""The base of this project's environments: an atroposlib `BaseEnv` that reads the run's configuration."""

import asyncio
import ipaddress
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig
from atroposlib.utils.cli import get_double_dash_flags
from pydantic import Field

from atropos_exp.envs.episode import Episode, scored_group
from atropos_exp.envs.run_settings import RunSettings, read_yaml
from atropos_exp.envs.sampler import EnvSampler, SampledTurn
from atropos_exp.envs.stream import Stream, StreamPosition
from atropos_exp.errors import UserError
from atropos_exp.types import SamplingParams

log = logging.getLogger(__name__)

# With Atropos' defaults (512 and 64) a large group or an evaluation would wait for its own requests.
MAX_REQUESTS, MAX_EVAL_REQUESTS = 4096, 1024


class RunEnvConfig(BaseEnvConfig):  # type: ignore[misc]
    """Configuration of an environment; whatever the run's configuration contains has its default there."""

    run_config: str | None = Field(default=None, description="config.yaml of the run folder")
    process_index: int = Field(default=0, description="Which of num_processes this one is, from 0")
    num_processes: int = Field(default=1, description="Processes of this environment, which share the data")
    temperature: float = Field(default=1.0, description="Of training rollouts")
    top_p: float = Field(default=1.0, description="Of training rollouts; 1 = off")
    top_k: int = Field(default=0, description="Of training rollouts; 0 = off")
    max_response_length: int = Field(default=256, description="Tokens of one completion")
    mask_truncated: bool = Field(default=False, description="Completions that were cut get no gradient")


class RunEnv(BaseEnv):  # type: ignore[misc]
    """Subclasses add `get_next_item`, `collect`, `evaluate`, and `prepare` if something takes long to load."""

    env_config_cls: ClassVar[type[RunEnvConfig]] = RunEnvConfig
    name: ClassVar[str]

    @classmethod
    def config_init(cls) -> tuple[RunEnvConfig, list[APIServerConfig]]:
        """The defaults of the environment and its server. atroposlib calls this before it parses the command line, so
        the run's path is looked up here. Servers are a list, because atroposlib ignores the base_url of a single one.
        """
        flags, file = _given()
        path = flags.get("env.run_config") or (file.get("env") or {}).get("run_config")
        server = {
            "server_type": "vllm",
            "base_url": "http://127.0.0.1:9004/v1",
            "api_key": "none",  # an empty one would take OPENAI_API_KEY, or fail
            "num_max_requests_at_once": MAX_REQUESTS,
            "num_requests_for_eval": MAX_EVAL_REQUESTS,
        }
        values: dict[str, Any] = {
            "wandb_name": cls.name,  # the API refuses an environment without a name
            "use_wandb": False,
            "total_steps": -1,  # the trainer's
            "max_batches_offpolicy": 1,
            "ensure_scores_are_not_same": False,  # the trainer counts such groups, as it does local ones
            "steps_per_eval": 0,  # the trainer evaluates the same prompts; above 0 the environment does too
        }
        if isinstance(path, str):
            settings = _settings(path)
            run, folder = settings.run, str(settings.model_folder())
            server |= {"model_name": folder, "tokenizer_name": folder}
            values |= {
                "run_config": path,
                "tokenizer_name": folder,
                "group_size": run.group_size,
                "max_num_workers": run.batch_size,  # a whole batch at a time; max_batches_offpolicy is the bound
                "max_token_length": run.max_prompt_length + run.max_response_length,
                "temperature": run.temperature,
                "top_p": run.top_p,
                "top_k": run.top_k,
                "max_response_length": run.max_response_length,
                "mask_truncated": settings.mask_truncated,
            }
        return cls.env_config_cls(**values), [APIServerConfig(**server)]

    @classmethod
    def main(cls) -> None:
        """The command line: serve, process or evaluate. A user's mistake ends it with one message and exit code 2."""
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        logging.getLogger("atroposlib").setLevel(logging.WARNING)
        logging.getLogger("atroposlib.envs.base").setLevel(logging.WARNING)  # else ten lines a second
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # scoring threads decode beside each other
        try:
            cls.cli()
        except UserError as error:
            print(f"{cls.name}: {error}", file=sys.stderr)
            raise SystemExit(2) from None

    def __init__(self, config: RunEnvConfig, server_configs: Any, slurm: bool = False, testing: bool = False) -> None:
        if config.run_config is None:
            raise UserError("env.run_config: it is missing; give --env.run_config RUN/config.yaml")
        if not 0 <= config.process_index < config.num_processes:
            raise UserError(
                f"env.process_index: got {config.process_index} of num_processes={config.num_processes}, "
                f"expected 0 to {config.num_processes - 1}"
            )
        flags, file = _given()
        if "env.use_wandb" not in flags and "use_wandb" not in (file.get("env") or {}):
            config.use_wandb = False  # atroposlib's process and evaluate turn it on
        self.settings = _settings(config.run_config)
        model_folder = self.settings.model_folder()
        super().__init__(config, server_configs, slurm, testing)
        self.tokenizer = self.settings.model.tokenizer(model_folder)
        self.stop_token_ids = self.settings.model.stop_token_ids(model_folder)  # once: it reads the whole tokenizer
        self.sampler = EnvSampler(self.server)
        self.stream = Stream(
            seed=self.settings.run.seed,
            process_index=config.process_index,
            num_processes=config.num_processes,
            tasks_per_step=self.settings.run.batch_size,
        )
        self.dropped: Counter[str] = Counter()  # rollouts whose failure cost their group, by reason

    def prepare(self) -> None:
        """Load what takes long. Runs once, in a thread, before the environment registers."""

    async def collect(self, item: Any) -> dict[str, Any] | None:
        """Sample and score one group; None if it was dropped."""
        raise NotImplementedError

    async def setup(self) -> None:
        await asyncio.to_thread(self.prepare)

    async def register_env(self) -> None:
        await super().register_env()
        self.stream.start(step=self.curr_step, env_id=self.env_id)

    async def add_train_workers(self) -> None:
        """Keep atroposlib from cancelling a worker. It counts a group that is being delivered twice, as a worker and in
        the queue, would take that for one too many, and would cancel and repeat the longest-running group."""
        config = self.config
        room = config.max_batches_offpolicy * self.derived_batch_size // config.group_size
        excess = len(self.workers) - min(self.max_num_workers, room - self.status_dict["queue_size"])
        num_delivering = len(self.workers) - len(self.running_items)
        if not 0 < excess <= num_delivering:
            await super().add_train_workers()

    async def collect_trajectories(self, item: Any) -> tuple[dict[str, Any] | None, list[Any]]:
        try:
            return await self.collect(item), []
        except Exception as error:  # atroposlib would log it and go on; here it is also counted by its cause
            self.drop(f"error:{type(_cause(error)).__name__}", detail=str(_cause(error)))
            if not hasattr(self, "env_id"):
                raise  # the command `process` would repeat the failure for ever
            return None, []

    def drop(self, reason: str, *, detail: str = "") -> None:
        """Count the reason why a whole group is dropped. A smaller group might wait in the API for ever, and an
        invented score would falsify the baseline."""
        if not self.dropped[reason]:
            log.warning("a group is dropped: %s%s (further ones are only counted)", reason, detail and f": {detail}")
        self.dropped[reason] += 1

    def training_params(self, place: StreamPosition) -> SamplingParams:
        """How completions of a training rollout are sampled."""
        config = self.config
        return SamplingParams(
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            max_tokens=config.max_response_length,
            stop_token_ids=self.stop_token_ids,
            seed=place.seed,
        )

    def group(
        self,
        episodes: list[Episode],
        scores: list[float],
        advantages: list[list[float]] | None = None,
        dropped: Sequence[str | None] | None = None,
    ) -> dict[str, Any]:
        """The episodes as the ScoredDataGroup that goes to the API. `dropped`: why an episode could not be scored; the
        trainer counts it and leaves it out, and its score means nothing. A smaller group might wait in the API for
        ever."""
        return scored_group(
            episodes,
            scores,
            temperature=self.config.temperature,
            mask_truncated=self.config.mask_truncated,
            advantages=advantages,
            dropped=dropped,
        )

    def decode(self, completions: list[SampledTurn]) -> list[str]:
        """The texts to be scored, decoded as in the trainer's local rollouts."""
        texts: list[str] = self.tokenizer.batch_decode(
            [completion.token_ids for completion in completions], skip_special_tokens=True
        )
        return texts

    def _post_json_with_compression(self, session: Any, url: str, payload: Any, *, minimum_size: int = 1024) -> Any:
        """Send without compression to an API on this machine: it would gain nothing and delay all other groups."""
        if not _is_this_machine(url):
            return super()._post_json_with_compression(session, url, payload, minimum_size=minimum_size)
        return session.post(url, data=json.dumps(payload).encode(), headers={"Content-Type": "application/json"})

    async def log_evaluation(
        self, metrics: dict[str, float], samples: list[dict[str, Any]], started: float, temperature: float, **more: int
    ) -> None:
        """Log an evaluation that began at `started` (of time.time()), with `temperature` and `more` as parameters."""
        await self.evaluate_log(
            metrics,
            start_time=started,
            end_time=time.time(),
            generation_parameters={
                "temperature": temperature,
                "max_new_tokens": self.config.max_response_length,
                **more,
            },
            samples=samples,
        )
        await self.wandb_log(dict(metrics))

    async def wandb_log(self, wandb_metrics: dict[str, Any] | None = None) -> None:
        dropped = {f"train/dropped_{reason}": float(num) for reason, num in self.dropped.items()}
        await super().wandb_log({**(wandb_metrics or {}), **dropped})

    async def create_rollout_table(self, wandb_metrics: dict[str, Any]) -> dict[str, Any]:
        return await super().create_rollout_table(wandb_metrics) if self.config.use_wandb else wandb_metrics

    async def add_rollouts_for_wandb(self, scored_data: Any, item: Any = None) -> None:
        if self.config.use_wandb:  # atroposlib would decode every group for nothing
            await super().add_rollouts_for_wandb(scored_data, item)


def _is_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def _given() -> tuple[dict[str, Any], dict[str, Any]]:
    """The flags of the command line, and the contents of the YAML file that --config names."""
    flags = get_double_dash_flags()
    name = flags.get("config")
    file = read_yaml(Path(name), "config") if isinstance(name, str) else {}
    return flags, file if isinstance(file, dict) else {}


@lru_cache(maxsize=4)
def _settings(path: str) -> RunSettings:
    """Cached: atroposlib asks for the defaults three times before it parses the command line."""
    return RunSettings.read(Path(path))


def _cause(error: BaseException) -> BaseException:
    """The error inside a `tenacity.RetryError`, else the error itself."""
    attempt = getattr(error, "last_attempt", None)
    inner = attempt.exception() if attempt is not None else None
    return error if inner is None else _cause(inner)
