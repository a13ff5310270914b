"""Everything that a configuration needs, examined before it costs anything. Slow examinations run side by side."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from omegaconf import DictConfig

from atropos_exp.assembly.check import Checked, check
from atropos_exp.assembly.head import preparation_problems
from atropos_exp.config.origin import Origin
from atropos_exp.config.typed import Mistake
from atropos_exp.doctor.line import Line, fail, ok, split_remedy, warn
from atropos_exp.doctor.machine import check_devices, check_disk, check_memory
from atropos_exp.doctor.material import check_material, check_model
from atropos_exp.doctor.network import check_atropos, check_ports
from atropos_exp.doctor.programs import check_engine, check_environment
from atropos_exp.doctor.slurm import check_slurm
from atropos_exp.doctor.tracking import check_tracking
from atropos_exp.doctor.versions import check_versions


def examine(config: DictConfig) -> Iterator[Line]:
    """Yield a line for everything examined, as soon as it is known."""
    yield from _guarded("versions", check_versions)
    checked, mistakes = check(config)
    if checked is None:
        yield from _mistakes(mistakes)
        return
    if problems := preparation_problems(checked.parts.data.prepare):
        yield from (fail("data", *split_remedy(problem)) for problem in problems)
        return
    yield ok("config", f"{checked.sizes.sequences:,} sequences a step, {checked.sizes.trained_tokens:,} tokens at most")
    yield from _looks(checked)


def _looks(checked: Checked) -> Iterator[Line]:
    model_lines, folder = check_model(checked)
    with ThreadPoolExecutor(4) as pool:
        material = pool.submit(_guarded, "data", lambda: _material(checked, folder))
        waiting: list[tuple[str, Callable[[], list[Line]]]] = [
            ("devices", lambda: check_devices(checked)),
            ("memory", lambda: check_memory(checked, folder) if folder else []),
            ("disk", lambda: check_disk(checked, folder)),
            ("ports", lambda: check_ports(checked)),
            ("engine", lambda: check_engine(checked)),
            ("atropos", lambda: check_atropos(checked)),
            ("environment", lambda: check_environment(checked)),
            ("tracking", lambda: check_tracking(checked)),
            ("slurm", lambda: check_slurm(checked)),
        ]
        futures: list[Future[list[Line]]] = [pool.submit(_guarded, topic, look) for topic, look in waiting]
        yield from model_lines
        for future in futures:
            yield from future.result()
        yield from material.result()


def _material(checked: Checked, folder: Path | None) -> list[Line]:
    if folder is None:
        text = "memory, tokenizer, data and reward were not looked at: the model is not here"
        return [warn("data", text, "fetch the model, then ask again")]
    return check_material(checked, folder)


def _guarded(topic: str, look: Callable[[], list[Line]]) -> list[Line]:
    """A look that breaks is a finding, and the others still speak."""
    try:
        return look()
    except Exception as error:
        return [fail(topic, f"the look at it broke: {type(error).__name__}: {error}", "report this as a defect")]


def _mistakes(mistakes: list[Mistake]) -> Iterator[Line]:
    origin = Origin.current()
    for mistake in mistakes:
        topic, (text, remedy) = mistake.path.split(".")[0] or "config", split_remedy(mistake.message)
        place = origin.of(mistake.path) if mistake.path else ""
        text = f"{mistake.path}: {text}" if mistake.path else text
        yield fail(topic, f"{text} [{place}]" if place else text, remedy)
    yield warn("config", "the rest was not looked at", "mend the configuration, then ask again")
