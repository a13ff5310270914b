"""What all `model=` options share: their settings, and facts about the model's folder."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from atropos_exp.config.lora import LoraSettings
from atropos_exp.config.settings import Settings
from atropos_exp.errors import UserError
from atropos_exp.parts.model import hf_folder

_COMMIT = re.compile(r"[0-9a-f]{40}")


class ModelSettings(Settings):
    """The settings of `conf/model`, whose YAML explains each. Importing it loads neither torch nor transformers."""

    path: str | None
    revision: str | None
    trust_remote_code: bool
    dtype: Literal["auto", "float32", "bfloat16"]
    attn_implementation: Literal["auto", "packed", "sdpa", "eager", "flash_attention_2", "flash_attention_3"]
    gradient_checkpointing: bool
    lora: LoraSettings
    suggested_learning_rate: Annotated[float, Field(ge=0, le=10)]  # the default of trainer.learning_rate

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.trust_remote_code and not _COMMIT.fullmatch(self.revision or ""):
            raise UserError(
                "trust_remote_code: got true, which runs Python code that comes with the model, so model.revision must "
                f"be a commit (40 hexadecimal digits); it is {self.revision!r}. Read that code, then pin its commit"
            )
        return self

    def fetch(self) -> Path:
        """A local Hugging Face folder with config, safetensors and fast tokenizer; may download. Raises UserError."""
        raise NotImplementedError

    def local_folder(self) -> Path | None:
        """The folder that `fetch` would return if it is on this machine already, else None. Uses no network."""
        raise NotImplementedError

    def context_length(self) -> int | None:
        """The longest sequence in tokens; None if that takes a download to know."""
        folder = self.local_folder()
        return hf_folder.context_length(folder) if folder is not None else None

    def preflight(self, *, max_prompt_length: int, max_response_length: int, device: str) -> list[str]:
        """What would go wrong later, one message each. It starts and downloads nothing."""
        messages = []
        folder = self.local_folder()
        if folder is not None:
            messages += hf_folder.problems(folder)
        context_length = None if messages else self.context_length()
        needed = max_prompt_length + max_response_length
        if context_length is not None and needed > context_length:
            messages.append(
                f"max_prompt_length + max_response_length is {max_prompt_length} + {max_response_length} = {needed} "
                f"tokens, but the context of the model is {context_length}; lower one of them"
            )
        if self.attn_implementation.startswith("flash_attention") and not device.startswith("cuda"):
            messages.append(
                f"attn_implementation: got {self.attn_implementation}, which needs an NVIDIA GPU, but device is "
                f"{device}; use auto"
            )
        return messages + self.own_problems()

    def own_problems(self) -> list[str]:
        """What else would go wrong with one option; part of `preflight`."""
        return []

    def compute_dtype(self, device: str) -> str:
        """float32 or bfloat16. `auto` is bfloat16 on a GPU, and float32 on a CPU, where bfloat16 is often slower."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if device.startswith("cuda") else "float32"

    def tokenizer(self, folder: Path) -> Any:
        """The fast tokenizer of a fetched folder, a `transformers.PreTrainedTokenizerFast`. Raises UserError."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=self.trust_remote_code, local_files_only=True
        )
        if not tokenizer.is_fast:
            raise UserError(f"{folder} has no fast tokenizer (tokenizer.json), which rollouts need")
        return tokenizer

    def stop_token_ids(self, folder: Path) -> tuple[int, ...]:
        """All tokens that end a turn."""
        return hf_folder.stop_token_ids(folder)
