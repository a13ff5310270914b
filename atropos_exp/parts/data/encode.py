"""From messages to token ids, by the tokenizer's chat template or as plain text."""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from atropos_exp.errors import UserError
from atropos_exp.parts.data.settings import DataSettings
from atropos_exp.types import TokenIds

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray


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

    def identity(self, rows: str) -> str:
        """A hash of everything that the token ids of the prompts `rows` depend on."""
        import xxhash

        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        versions = [version(name) for name in ("tokenizers", "transformers")]
        form = [self._format, self._system_prompt, self._template_arguments, self._tokenizer.chat_template]
        hasher = xxhash.xxh3_64(json.dumps([rows, versions, form], sort_keys=True, default=str).encode())
        if backend is not None:
            core = json.loads(backend.to_str())
            rest = {name: core[name] for name in core if name not in ("truncation", "padding")}  # as last called
            hasher.update(json.dumps([rest, repr(self._tokenizer.special_tokens_map)]).encode())
        else:
            with tempfile.TemporaryDirectory() as folder:
                self._tokenizer.save_pretrained(folder)
                for path in sorted(Path(folder).rglob("*.*")):
                    hasher.update(path.read_bytes())
        return hasher.hexdigest()

    def encode(self, prompts: pa.Array) -> tuple[NDArray[np.int32], TokenIds]:
        """The number of tokens of each row, and the ids of all rows one after the other. Plain text gets the
        tokenizer's special tokens; a chat template has its own. Raises UserError for a prompt without a token."""
        texts = self.texts(prompts)
        rows = self._tokenise(texts)
        for text, ids in zip(texts, rows, strict=True):
            if not len(ids):
                raise UserError(f"data: the tokenizer gives no token for a prompt: {text!r}")
        lengths = np.fromiter((len(ids) for ids in rows), np.int32, count=len(rows))
        return lengths, np.concatenate(rows)

    def _tokenise(self, texts: list[str]) -> list[TokenIds]:
        encoded = self._tokenizer(
            texts,
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
