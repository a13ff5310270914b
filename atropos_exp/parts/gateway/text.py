"""Text to token ids and back, with the model folder's tokenizer and chat template."""

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atropos_exp.parts.gateway.refusal import Refusal, invalid, unsupported
from atropos_exp.types import TokenIds


class Text:
    """The tokenizer of one model folder. It reads only files and runs no code of the folder."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # From the file: some tokenizer classes add tokens of their own, for which the model may have no row.
        added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens", ())
        self._special = {str(token["content"]): int(token["id"]) for token in added if token.get("special")}

    def encode(self, text: str, *, add_special_tokens: bool) -> TokenIds:
        """The token ids [P] of `text`."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=add_special_tokens), dtype=np.int32)

    def decode(self, token_ids: TokenIds, *, skip_special_tokens: bool) -> str:
        """The text of `token_ids` [R]."""
        text: str = self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=skip_special_tokens)
        return text

    def token_texts(self, token_ids: TokenIds) -> list[str]:
        """The text of each token by itself, special ones included."""
        return [self.decode(token_ids[at : at + 1], skip_special_tokens=False) for at in range(len(token_ids))]

    def special_token(self, text: str) -> int | None:
        """The id of the special token written `text`; None if there is none."""
        return self._special.get(text)

    def chat(
        self, messages: Any, *, tools: Any, add_generation_prompt: bool, continue_final_message: bool, extra: Any
    ) -> TokenIds:
        """The prompt [P] that the chat template makes of `messages`. Raises Refusal for what it cannot render."""
        from jinja2 import TemplateError

        template = self._tokenizer.chat_template
        if template is None:
            raise Refusal(400, "parameter", "the model has no chat template; use /v1/completions", param="messages")
        if tools is not None and "tools" not in str(template):
            raise unsupported("tools", tools, "the model's chat template does not show tools; leave it out")
        try:
            text = self._tokenizer.apply_chat_template(
                checked(messages),
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **extra,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            message = f"the chat template cannot render the messages: {type(error).__name__}: {error}"
            raise Refusal(400, "value", message, param="messages") from None
        return self.encode(text, add_special_tokens=False)

    def cut(self, token_ids: TokenIds, stops: Sequence[str], *, skip_special_tokens: bool) -> tuple[int, str] | None:
        """The smallest number of tokens whose text contains a stop string, and that string; None if there is none."""

        def found(num_tokens: int) -> list[tuple[int, int, str]]:
            text = self.decode(token_ids[:num_tokens], skip_special_tokens=skip_special_tokens)
            return [(text.find(stop), -len(stop), stop) for stop in stops if stop in text]

        if not found(len(token_ids)):
            return None
        # The text only grows with the tokens, so the first place can be bisected.
        num_tokens = bisect_left(range(len(token_ids)), True, lo=1, key=lambda num: bool(found(num)))
        return num_tokens, min(found(num_tokens))[2]


def checked(messages: Any) -> list[dict[str, Any]]:
    """The messages with their content as plain text. Raises Refusal if that is not possible."""
    if not isinstance(messages, list) or not messages:
        raise invalid("messages", messages, "a list of at least one message")
    rendered = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise invalid(f"messages[{index}]", message, "an object with a role")
        content = message.get("content")
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            if not all(isinstance(part, str) for part in parts):
                raise unsupported(f"messages[{index}].content", content, "only parts of type text are")
            content = "\n".join(part for part in parts if part is not None)
        elif content is not None and not isinstance(content, str):
            raise invalid(f"messages[{index}].content", content, "text")
        rendered.append({**message, "content": "" if content is None else content, **_calls(message)})
    return rendered


def _calls(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message's tool calls with arguments as objects: clients send JSON as text, and templates would encode that
    again. What is no JSON object stays text."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        return {}
    return {"tool_calls": [{**call, "function": _decoded(call.get("function"))} for call in calls]}


def _decoded(function: Any) -> Any:
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return function
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        return function
    return {**function, "arguments": arguments} if isinstance(arguments, dict) else function
