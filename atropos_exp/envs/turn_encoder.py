"""Chat turns as token ids that continue a conversation: earlier turns are never re-encoded."""

from typing import Any

from atropos_exp.errors import UserError

_ANSWER = "@@answer@@"  # stands for the policy's turn while the template is rendered


class TurnEncoder:
    """Encodes an environment's messages with the chat template. `role`, such as user or tool, is that of the messages
    after the policy's turns. Raises UserError if the template cannot be used."""

    def __init__(
        self, tokenizer: Any, *, system_prompt: str | None, template_arguments: dict[str, Any], role: str
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("a conversation needs a tokenizer with a chat template, and this one has none")
        self._tokenizer = tokenizer
        self._system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        self._template_arguments = template_arguments
        self._role = role

    def first(self, message: str) -> list[int]:
        """The token ids of the first message, up to where the policy's turn begins."""
        return self._encode(self._render([*self._system, {"role": "user", "content": message}]))

    def following(self, message: str, *, last_token: int) -> list[int]:
        """The token ids between two turns of the policy: the end of its turn, `message`, the start of its next turn.
        `last_token` is the last that it sampled; if that is the template's end marker, it is not repeated."""
        conversation = [
            {"role": "user", "content": ""},
            {"role": "assistant", "content": _ANSWER},
            {"role": self._role, "content": message},
        ]
        _, answer, rest = self._render([*self._system, *conversation]).partition(_ANSWER)
        if not answer:
            raise UserError("the tokenizer's chat template does not write what the assistant said")
        ids = self._encode(rest)
        return ids[1:] if ids[:1] == [last_token] else ids

    def _render(self, conversation: list[dict[str, str]]) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True, **self._template_arguments
            )
        except Exception as error:  # Jinja's and the template's own errors
            roles = ", ".join(message["role"] for message in conversation)
            raise UserError(f"the tokenizer's chat template refuses the roles {roles}: {error}") from error
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
