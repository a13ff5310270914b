"""`Parts`: the settings of a run, one typed field per group of `conf/`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, get_type_hints

from typing_extensions import get_protocol_members, is_protocol

from atropos_exp.assembly.options import ClusterPart, DataPart, EnginePart, LoggerPart, RewardPart, RolloutPart
from atropos_exp.interfaces import AdvantageEstimator, PolicyLoss
from atropos_exp.parts.atropos.environment import Environment
from atropos_exp.parts.atropos.settings import AtroposSettings
from atropos_exp.parts.eval.held_out import HeldOut
from atropos_exp.parts.gateway.settings import GatewaySettings
from atropos_exp.parts.model.settings import ModelSettings
from atropos_exp.parts.trainer.fsdp2 import VerlFSDP2


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """One checked settings object per group: a Protocol where several options or a user's own can stand, the settings
    class where there is one option."""

    model: ModelSettings
    data: DataPart
    reward: RewardPart
    rollout: RolloutPart
    atropos: AtroposSettings
    env: Environment
    gateway: GatewaySettings
    engine: EnginePart
    advantage: AdvantageEstimator
    loss: PolicyLoss
    trainer: VerlFSDP2
    cluster: ClusterPart
    logger: LoggerPart
    eval: HeldOut


_TYPES: dict[str, type] = get_type_hints(Parts)


def lacking(group: str, part: object) -> str:
    """Why `part` cannot stand in `group`, as a message for the user; "" if it can."""
    wanted, name = _TYPES[group], f"{type(part).__module__}.{type(part).__qualname__}"
    if not is_protocol(wanted):
        return "" if isinstance(part, wanted) else f"got {name}, expected a subclass of {wanted.__qualname__}"
    missing = sorted(member for member in get_protocol_members(wanted) if not hasattr(part, member))
    if not missing:
        return ""
    return f"{name} has no {', '.join(missing)}, which {wanted.__qualname__} ({wanted.__module__}) asks for"


if TYPE_CHECKING:  # mypy compares the built-in options with the Protocol of their group
    from atropos_exp.parts.advantage.base import VerlAdvantage
    from atropos_exp.parts.cluster.local import Local
    from atropos_exp.parts.cluster.slurm.cluster import Slurm
    from atropos_exp.parts.data.verl import VerlData
    from atropos_exp.parts.engine.hf.settings import HFEngine
    from atropos_exp.parts.engine.sglang.settings import SGLangEngine
    from atropos_exp.parts.engine.vllm.settings import VLLMEngine
    from atropos_exp.parts.logger.console import Console
    from atropos_exp.parts.logger.none import NoLogger
    from atropos_exp.parts.logger.trackio import Trackio
    from atropos_exp.parts.logger.wandb import Wandb
    from atropos_exp.parts.loss.base import VerlPolicyLoss
    from atropos_exp.parts.reward.exact import Exact
    from atropos_exp.parts.reward.math_verify import MathVerify
    from atropos_exp.parts.reward.numeric import Numeric
    from atropos_exp.parts.reward.reasoning_gym import ReasoningGym
    from atropos_exp.parts.reward.reward_score import RewardScore
    from atropos_exp.parts.rollout.atropos import AtroposRollout
    from atropos_exp.parts.rollout.auto import AutoRollout
    from atropos_exp.parts.rollout.local import LocalRollout

    _advantages: tuple[type[AdvantageEstimator], ...] = (VerlAdvantage,)
    _clusters: tuple[type[ClusterPart], ...] = (Local, Slurm)
    _data: tuple[type[DataPart], ...] = (VerlData,)
    _engines: tuple[type[EnginePart], ...] = (HFEngine, SGLangEngine, VLLMEngine)
    _loggers: tuple[type[LoggerPart], ...] = (Console, NoLogger, Trackio, Wandb)
    _losses: tuple[type[PolicyLoss], ...] = (VerlPolicyLoss,)
    _rewards: tuple[type[RewardPart], ...] = (Exact, MathVerify, Numeric, ReasoningGym, RewardScore)
    _rollouts: tuple[type[RolloutPart], ...] = (AtroposRollout, AutoRollout, LocalRollout)
