"""What stands in the way of a start on this machine: found before the run's folder is made, so that a run that cannot
start leaves nothing behind, and one that is continued stays as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from atropos_exp.assembly.check import Checked
from atropos_exp.assembly.head import preparation_problems
from atropos_exp.config.freeze import config_hash, resolved
from atropos_exp.errors import UserError
from atropos_exp.parts.data.settings import DataSettings
from atropos_exp.runs.checkpoints import newest_step
from atropos_exp.runs.files import run_status
from atropos_exp.runs.folder import find_run_folder

# What a checkpoint's position in the data, its random streams and its tensors depend on.
KEPT = (
    *("seed", "max_prompt_length", "model.lora.rank", "model.lora.alpha", "model.lora.target_modules"),
    *("data.weights", "data.format", "data.system_prompt", "data.chat_template_arguments", "data.ability"),
    "data.max_prompts",
)


def refuse_start(checked: Checked) -> None:
    """Raise UserError with all that stands in the way, a line each. Fetches the model; starts nothing."""
    refuse([*_told(lambda: _folder_problems(checked)), *machine_problems(checked)])


def refuse(problems: Sequence[str]) -> None:
    """Raise UserError if there are any."""
    if problems:
        lead = "This run cannot start:"
        raise UserError("\n  ".join([lead, *problems]) if len(problems) > 1 else f"{lead} {problems[0]}")


def machine_problems(checked: Checked) -> list[str]:
    """What stands in the way whatever folder the run gets, a line each."""
    parts = checked.parts
    problems = list(preparation_problems(parts.data.prepare))
    if isinstance(parts.data, DataSettings):  # a source of the user's own may know no files
        problems += parts.data.file_problems()
    problems += _told(lambda: _model_problems(checked), "model.")
    if parts.rollout.uses_atropos:
        problems += _told(lambda: _port_problems(checked))
        problems += parts.env.interpreter_problems(launches_atropos=parts.atropos.launch)
    return problems


def remarks(checked: Checked) -> Iterator[str]:
    """What is allowed, but hardly meant."""
    trainer, evaluation = checked.parts.trainer, checked.parts.eval
    if trainer.warmup_steps > trainer.max_steps:
        reached = trainer.max_steps / trainer.warmup_steps
        yield (
            f"trainer.warmup_steps is {trainer.warmup_steps:,}, but the run has only {trainer.max_steps:,} steps: the "
            f"learning rate ends at {reached:.2g} of trainer.learning_rate"
        )
    if evaluation.num_prompts and not checked.parts.data.has_eval:
        yield "data.eval_paths is empty: nothing is evaluated; name held-out prompts there (eval.num_prompts=0: none)"


def _told(find: Any, prefix: str = "") -> Iterator[str]:
    try:
        yield from find()
    except UserError as error:
        text = str(error)
        yield prefix + text if text.startswith("path: ") else text


def _folder_problems(checked: Checked) -> Iterator[str]:
    run = checked.run
    base = Path(run.output_dir).expanduser() / run.name
    folder = find_run_folder(base=base, run_dir=run.run_dir, resume=run.resume, config_hash=config_hash(checked.config))
    step = newest_step(folder / "checkpoints") if folder is not None else 0
    if folder is None or not step:
        return
    max_steps = checked.parts.trainer.max_steps
    if run_status(folder)[0] == "finished" and step >= max_steps:
        yield f"resume: the run in {folder} is finished after {step} steps; a larger trainer.max_steps trains on"
    try:
        before = OmegaConf.load(folder / "config.yaml")
    except OSError:
        return
    now = OmegaConf.create(resolved(checked.config))
    for key in KEPT:
        old, new = (_plain(OmegaConf.select(config, key)) for config in (before, now))
        if old != new:
            yield (
                f"{key}: got {_shown(new)}, but the checkpoint of the run in {folder} needs {_shown(old)}; restore it, "
                "or start a new run (resume=never)"
            )


def _plain(value: Any) -> Any:
    """One word and a list of it are the same setting."""
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return plain[0] if isinstance(plain, list) and len(plain) == 1 else plain


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)


def _model_problems(checked: Checked) -> Iterator[str]:
    from atropos_exp.parts.model import hf_folder
    from atropos_exp.parts.model.completeness import check_files

    folder = checked.parts.model.fetch()
    yield from hf_folder.token_problems(folder)
    check_files(folder)


def _port_problems(checked: Checked) -> Iterator[str]:
    checked.parts.gateway.listen(checked.parts.atropos.extra_ports).close()
    yield from ()
