"""Nothing in a policy is random: an update must compute what the engine computed when it sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig


def without_noise(config: PreTrainedConfig) -> dict[str, Any]:
    """What to set in `config`, nested like it, to switch off dropout and skipped layers, whatever they are called.

    The noise of routers is not touched: they have it in training mode only, and the size of it may say more.
    """
    zeros: dict[str, Any] = {}
    for name, value in vars(config).items():
        if hasattr(value, "model_type"):
            if inner := without_noise(value):
                zeros[name] = inner
        elif type(value) in (int, float) and value and "drop" in name:
            zeros[name] = 0.0
    return zeros


def override(config: PreTrainedConfig, values: dict[str, Any]) -> None:
    """Set `values`, nested as `without_noise` returns them."""
    for name, value in values.items():
        if isinstance(value, dict):
            override(getattr(config, name), value)
        else:
            setattr(config, name, value)


def evaluation_mode(module: nn.Module) -> None:
    """Switch to evaluation mode, in which some routers choose differently than in training mode. Gradients still flow.
    Only modules that checkpoint activations keep training mode, without which they would not."""
    for part in module.modules():
        part.training = bool(vars(part).get("gradient_checkpointing"))
