"""Model files, tokenizer, data and reward, tried on real rows."""

import contextlib
import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atropos_exp.assembly.check import Checked
from atropos_exp.doctor.line import Line, fail, ok, split_remedy, warn
from atropos_exp.errors import UserError
from atropos_exp.interfaces import PromptLoader
from atropos_exp.parts.data.counts import DataCounts
from atropos_exp.types import Prompt, RewardFailure

_ROWS = 16  # that the reward is tried on
_MANY_OVERLONG = 0.2  # share of rows
_PROBE = "probeanswer"
_WRONG = "There is no answer in this text."
# Forms in which a reference answer may be expected.
_FORMS = ("{}", "#### {}", "\\boxed{{{}}}", "<answer>{}</answer>", "The answer is \\boxed{{{}}}.")


def check_model(checked: Checked) -> tuple[list[Line], Path | None]:
    """Examine the model's settings, and its folder if it is on this machine already; nothing is downloaded."""
    model = checked.parts.model
    folder: Path | None = model.local_folder()
    if folder is None:
        path, remedy = model.path, f"once, with a network: hf download {model.path}"
        if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
            text = f"{path} is not on this machine, and HF_HUB_OFFLINE forbids to fetch it"
            return [fail("model", text, remedy)], None
        text = f"{path} is not on this machine; the run downloads it while it holds devices"
        return [warn("model", text, remedy)], None
    try:
        folder = Path(model.fetch())
    except UserError as error:
        return [fail("model", *split_remedy(str(error)))], None
    return [ok("model", str(folder))], folder


def check_material(checked: Checked, folder: Path) -> list[Line]:
    """Examine tokenizer, data and reward, in this order, as each needs the one before."""
    try:
        tokenizer = checked.parts.model.tokenizer(folder)
    except (UserError, OSError, ValueError) as error:
        return [fail("tokenizer", f"{folder} does not load: {error}", "copy the model again, tokenizer.json included")]
    lines = check_tokenizer(checked, folder, tokenizer)
    loader, found = _load(checked, tokenizer)
    lines += found
    if loader is None:
        return lines
    prompts = loader.take(_ROWS)
    return [*lines, *check_bos(tokenizer, prompts), *check_reward(checked, prompts)]


def check_tokenizer(checked: Checked, folder: Path, tokenizer: Any) -> list[Line]:
    """Examine whether a turn ends with a token at which sampling stops, and whether the model has a row for each
    token.
    """
    from atropos_exp.parts.model.hf_folder import vocab_size

    lines = []
    try:
        stops = checked.parts.model.stop_token_ids(folder)
    except UserError as error:
        return [fail("tokenizer", str(error), "set eos_token_id in generation_config.json")]
    rows = vocab_size(folder)
    # a special token of the tokenizer's class that no text of the model holds is common, and harmless
    known = {*range(rows), *tokenizer.all_special_ids}
    beyond = [token for token, at in tokenizer.get_vocab().items() if at not in known]
    if beyond:
        text = f"{len(beyond)} of its tokens, such as {beyond[0]!r}, have no row among the model's {rows}"
        lines.append(fail("tokenizer", text, "use the tokenizer of this model"))
    if checked.parts.data.format == "chat" and tokenizer.chat_template:
        lines += _turn_end(tokenizer, stops)
    names = ", ".join(repr(tokenizer.convert_ids_to_tokens(stop)) for stop in stops)
    return lines or [ok("tokenizer", f"{len(tokenizer)} tokens; sampling stops at {names}")]


def _turn_end(tokenizer: Any, stops: Sequence[int]) -> list[Line]:
    conversation = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
    except Exception as error:  # Jinja's and the template's own errors: the finding itself
        remedy = "mend chat_template.jinja, or data.format=plain"
        return [fail("tokenizer", f"the chat template fails: {error}", remedy)]
    tail = tokenizer.encode(text.rpartition(_PROBE)[2], add_special_tokens=False)
    if tail and tail[0] in stops:
        return []
    after = repr(tokenizer.decode(tail[:1])) if tail else "nothing"
    text = f"the chat template ends an answer with {after}, at which sampling does not stop: answers run to the limit"
    return [
        fail("tokenizer", text, "add the id of the template's end of turn to eos_token_id in generation_config.json")
    ]


def check_bos(tokenizer: Any, prompts: Sequence[Prompt]) -> list[Line]:
    """Examine whether both the template and the tokenizer add a beginning-of-sequence token."""
    bos = tokenizer.bos_token_id
    twice = [prompt for prompt in prompts if bos is not None and list(prompt.token_ids[:2]) == [bos, bos]]
    if not twice:
        return []
    text = f"{len(twice)} of {len(prompts)} prompts begin with {tokenizer.bos_token!r} twice"
    remedy = "take it out of the chat template or the rows, or add_bos_token: false in tokenizer_config.json"
    return [fail("tokenizer", text, remedy)]


def _load(checked: Checked, tokenizer: Any) -> tuple[PromptLoader | None, list[Line]]:
    """The loader, or None; built data is kept, as the run wants it too."""
    from atropos_exp.assembly.head import prepared_data

    run, data = checked.run, checked.parts.data
    try:
        with tempfile.TemporaryDirectory() as quarantine, contextlib.redirect_stdout(io.StringIO()):
            loader = data.loader(
                tokenizer,
                seed=run.seed,
                max_prompt_length=run.max_prompt_length,
                max_response_length=run.max_response_length,
                run_folder=Path(quarantine),
                prepared_folder=prepared_data(data.prepare),
            )
    except UserError as error:
        return None, [fail("data", *split_remedy(str(error)))]
    if not isinstance(loader.counts, DataCounts):  # of a user's own source, which need not count rows
        return loader, [ok("data", str(loader.counts))]
    total = loader.counts.total
    text = "; ".join(loader.counts.lines())
    if total.num_overlong > _MANY_OVERLONG * total.num_rows:
        share = total.num_overlong / total.num_rows
        return loader, [warn("data", f"{share:.0%} of the rows are too long: {text}", "raise max_prompt_length")]
    if total.num_prompts < run.batch_size:
        text = f"{text}: fewer prompts than a step has ({run.batch_size})"
        return loader, [warn("data", text, "more data, or a lower batch_size")]
    return loader, [ok("data", text)]


def check_reward(checked: Checked, prompts: Sequence[Prompt]) -> list[Line]:
    """Score real rows: the reference answer, in one of its usual forms, must beat a text without an answer."""
    from atropos_exp.parts.reward.pool import RewardPool

    reward = checked.parts.reward
    name = type(reward).__name__
    items = [(form.format(prompt.ground_truth), prompt) for prompt in prompts for form in _FORMS]
    items += [(_WRONG, prompt) for prompt in prompts]
    try:
        with RewardPool(reward, num_workers=1, timeout_seconds=reward.timeout_seconds) as pool:
            scores = pool.score(items)
    except UserError as error:
        return [fail("reward", *split_remedy(str(error).partition("\n")[0]))]
    failures = [score.reason for score in scores if isinstance(score, RewardFailure)]
    if len(failures) == len(scores):
        return [fail("reward", f"{name} scores nothing: {failures[0]}", "choose the reward that these data want")]
    numbers = [float("nan") if isinstance(score, RewardFailure) else score for score in scores]
    best = [max(numbers[at : at + len(_FORMS)]) for at in range(0, len(prompts) * len(_FORMS), len(_FORMS))]
    wrong = numbers[len(prompts) * len(_FORMS) :]
    num_right = sum(right > other for right, other in zip(best, wrong, strict=True))
    text = f"{name}: {num_right} of {len(prompts)} reference answers score above a text without an answer"
    if failures:
        text += f"; {len(failures)} of {len(scores)} answers got no score ({failures[0]})"
    remedy = "choose the reward that these data want (reward=...), and look at reward_model.ground_truth of some rows"
    if num_right == 0:
        return [fail("reward", f"{text}: every rollout would look alike", remedy)]
    if num_right < 0.9 * len(prompts) or failures:
        return [warn("reward", text, remedy)]
    return [ok("reward", text)]
