"""From messages to token ids, by the tokenizer's chat template or as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from atropos_exp.errors import UserError
from atropos_exp.parts.data.settings import DataSettings
from atropos_exp.types import TokenIds

if TYPE_CHECKING:
    import pyarrow as pa

_CHUNK = 2048  # prompts tokenised at a time: keeps the tokenizer's threads busy and memory flat


class Encoder:
    """Encodes prompts. `format=chat` applies the chat template with the generation prompt; `format=plain` joins the
    contents with blank lines."""

    def __init__(self, settings: DataSettings, tokenizer: Any) -> None:
        """Raises UserError if the format is chat and the tokenizer has no chat template."""
        if settings.format == "chat" and not getattr(tokenizer, "chat_template", None):
            raise UserError("data.format=chat needs a tokenizer with a chat template, and this one has none; use plain")
        self._tokenizer = tokenizer
        self._format = settings.format
        self._system_prompt = settings.system_prompt
        self._template_arguments = settings.chat_template_arguments

    def texts(self, prompts: pa.Array) -> list[str]:
        """Each row's messages as the text that the model reads."""
        conversations = [self._with_system(messages) for messages in prompts.to_pylist()]
        if self._format == "plain":
            return ["\n\n".join(message["content"] for message in messages) for messages in conversations]
        try:
            texts: list[str] = self._tokenizer.apply_chat_template(
                conversations, tokenize=False, add_generation_prompt=True, **self._template_arguments
            )
        except Exception as error:  # Jinja's and the template's own errors
            raise UserError(
                f"the tokenizer's chat template refuses the prompts: {error}; "
                f"roles used: {', '.join(sorted({one['role'] for messages in conversations for one in messages}))}"
            ) from error
        return texts

    def encode(self, prompts: pa.Array) -> list[TokenIds]:
        """Token ids [P] of each row. Plain text gets the tokenizer's special tokens; a chat template has its own."""
        ids: list[TokenIds] = []
        for start in range(0, len(prompts), _CHUNK):
            ids.extend(self._tokenise(self.texts(prompts.slice(start, _CHUNK))))
        return ids

    def _tokenise(self, texts: Sequence[str]) -> list[TokenIds]:
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=self._format == "plain",
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # overlong prompts are counted, so no warning is needed
        )
        return [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]

    def _with_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """The messages with the run's system prompt, if it has one, in place of the row's own."""
        if self._system_prompt is None:
            return messages
        rest = [message for message in messages if message["role"] != "system"]
        return [{"role": "system", "content": self._system_prompt}, *rest]
