"""From a command line to everything that a sweep will run, composed and checked before anything starts."""

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from atropos_exp.assembly.check import Checked, check, mistakes_of
from atropos_exp.config.build import build
from atropos_exp.config.diagnose import COMPOSE_ERRORS, diagnose
from atropos_exp.config.freeze import config_hash, resolved
from atropos_exp.config.origin import Origin, report
from atropos_exp.config.sources import Sources
from atropos_exp.errors import UserError
from atropos_exp.runs.sweep_folder import describe_point
from atropos_exp.sweep.axes import (
    SEED,
    CommandLine,
    override_text,
    parse_command_line,
    parse_space,
    plain_value,
)
from atropos_exp.sweep.search_space import Composer, SearchPlan, plan_search
from atropos_exp.sweep.settings import GridSweep, OptunaSweep

MOST_RUNS = 10_000  # a typo in a range must not fill a disk


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """One run of a grid, whose configuration has been checked."""

    point: int
    values: Mapping[str, Any]
    seed: int
    checked: Checked  # of the point, under the first seed

    @property
    def config(self) -> DictConfig:
        """The run's configuration."""
        return _seeded(self.checked.config, self.seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A whole sweep, with every configuration checked."""

    settings: GridSweep | OptunaSweep
    settings_node: dict[str, Any]
    identity: str
    checked: Checked  # one of its runs
    axes: list[str]
    baseline: int | None
    runs: list[PlannedRun]  # [] of a search
    search: SearchPlan | None


def plan_sweep(overrides: Sequence[str], sources: Sources) -> Plan:
    """Compose and check every run of a sweep.

        plan = plan_sweep(["advantage=grpo,rloo", "seed=0,1,2"], Sources())  # six runs of two points

    Raises UserError with every mistake of every run, or what Hydra raises if not even the base can be composed.
    """
    failed: list[tuple[str, ...]] = []  # overrides of runs that Hydra cannot compose

    def composer(point: Mapping[str, str]) -> tuple[DictConfig, Origin] | None:
        own = (*line.fixed, *(f"{key}={text}" for key, text in point.items()))
        try:
            config = sources.compose(own, with_hydra=True)
        except COMPOSE_ERRORS:
            failed.append(own)
            return None
        choices = {group: option for group, option in config.hydra.runtime.choices.items() if option}
        without_sweep = OmegaConf.masked_copy(config, [str(key) for key in config if key not in ("hydra", "sweep")])
        return without_sweep, Origin(overrides=own, choices=choices, folders=sources.folders, name=sources.name)

    with sources.opened():
        loader = GlobalHydra.instance().config_loader()
        line = parse_command_line(overrides, loader)
        base = sources.compose(line.fixed, with_hydra=True)
        line = _with_params(line, base)
        settings: GridSweep | OptunaSweep = _settings(base, line)
        if isinstance(settings, OptunaSweep):
            plan = _plan_search(settings, line, base, composer, loader)
        else:
            plan = _plan_grid(settings, line, base, composer)
    if failed:
        messages = dict.fromkeys(diagnose(UserError(""), overrides, sources, check=mistakes_of) for overrides in failed)
        raise UserError("\n".join(messages))
    assert plan is not None
    return plan


def _with_params(line: CommandLine, base: DictConfig) -> CommandLine:
    """`hydra.sweeper.params` of a file, below what the command line sweeps."""
    params: Any = OmegaConf.to_container(base.hydra.sweeper.params or OmegaConf.create({}))
    given = {text.split("=", 1)[0].lstrip("+") for text in line.fixed}
    swept, fixed = {}, []
    for key, value in params.items():
        if key in given:
            continue
        if isinstance(value, str) and ("," in value or "(" in value):
            swept[key] = parse_space(key, value)
        else:
            fixed.append(f"{key}={value}")
    return CommandLine(fixed=(*fixed, *line.fixed), swept={**swept, **line.swept})


def _settings(base: DictConfig, line: CommandLine) -> Any:
    try:
        settings = build(base.sweep, "sweep")
    except UserError as error:
        raise UserError(f"Wrong configuration: {error}") from error
    own = settings.space if isinstance(settings, OptunaSweep) else {**settings.grid, **settings.zip}
    mistakes = []
    for text in line.fixed:
        key = text.split("=", 1)[0].lstrip("+")
        if key in own:
            mistakes.append(f"{key}: got '{text}', but the sweep varies it; give a list, or take it out of the sweep")
    if SEED in own:
        mistakes.append("seed: got it among the values to vary; seeds repeat a point, they go to sweep.seeds")
    if isinstance(settings, GridSweep):
        twice = [key for key in settings.zip if key in settings.grid or key in line.swept]
        mistakes += [f"{key}: got it in sweep.zip and again elsewhere; it can vary in one way" for key in twice]
        if settings.seeds and any(text.startswith("seed=") for text in line.fixed):
            mistakes.append("seed: got one, but sweep.seeds lists the seeds; use sweep.seeds=[...] or seed=0,1,2")
    if mistakes:
        raise UserError("\n  ".join(["Wrong configuration:", *mistakes]))
    return settings


def _plan_grid(settings: GridSweep, line: CommandLine, base: DictConfig, composer: Composer) -> Plan | None:
    swept: dict[str, tuple[str, ...]] = {}
    for key, texts in {**{key: parse_space(key, item) for key, item in settings.grid.items()}, **line.swept}.items():
        if not isinstance(texts, tuple):
            raise UserError(f"{key}: got an interval, which a grid cannot list; use values, range(...) or sweep=optuna")
        swept[key] = texts
    seed_texts = swept.pop(SEED, ())
    num_seeds = len(seed_texts) or len(settings.seeds) or 1
    axes = [[{key: text} for text in texts] for key, texts in swept.items()]  # keys that change together, with texts
    if settings.zip:
        rows = zip(*settings.zip.values(), strict=True)
        axes.append([dict(zip(settings.zip, map(override_text, row), strict=True)) for row in rows])
    num_points = math.prod(map(len, axes))
    if num_points * num_seeds > MOST_RUNS:
        raise UserError(f"sweep: {num_points} points x {num_seeds} seeds are more than {MOST_RUNS} runs")
    _refuse_repeated({SEED: seed_texts, **swept})
    points = [{key: text for setting in choice for key, text in setting.items()} for choice in itertools.product(*axes)]
    seeds = [plain_value(text) for text in seed_texts] or settings.seeds or [base.seed]
    values = [{key.lstrip("+"): plain_value(text) for key, text in point.items()} for point in points]
    runs: list[PlannedRun] = []
    messages: list[str] = []
    for number, point in enumerate(points):
        composed = composer(point)
        if composed is None:
            continue
        config, origin = composed
        # What is wrong with a seed is wrong at every point, and the other way round.
        found = [(seed, *check(_seeded(config, seed))) for seed in (seeds if not runs else seeds[:1])]
        for seed, _, mistakes in found:
            if mistakes:
                messages.append(report(mistakes, replace(origin, overrides=(*origin.overrides, f"seed={seed}"))))
        checked = found[0][1]
        if checked is not None:
            runs += [PlannedRun(point=number, values=values[number], seed=seed, checked=checked) for seed in seeds]
    if messages:
        raise UserError("\n".join(dict.fromkeys(messages)))
    if len(runs) < len(points) * len(seeds):
        return None  # the composer kept what it could not compose
    parts = [[sorted((key, repr(item)) for key, item in run.values.items()), seeds, config_hash(run.checked.config)]
             for run in runs[:: len(seeds)]]  # fmt: skip
    return Plan(
        settings=settings, settings_node=resolved(base.sweep), identity=_identity(parts), checked=runs[0].checked,
        axes=[key.lstrip("+") for axis in axes for key in axis[0]], baseline=_baseline(settings, values), runs=runs,
        search=None,
    )  # fmt: skip


def _refuse_repeated(swept: Mapping[str, Sequence[str]]) -> None:
    """Raise UserError for a value that a key takes twice: it would run twice, and count as evidence of its own."""
    mistakes = []
    for key, texts in swept.items():
        written: dict[str, list[str]] = {}  # by what is read: 1e-4 and 0.0001 are one value
        for text in texts:
            value = plain_value(text)
            written.setdefault(repr(float(value) if type(value) is int else value), []).append(text)
        mistakes += [
            f"{key}: got {same[0]} {len(same)} times, expected values that differ"
            for same in written.values()
            if len(same) > 1
        ]
    if mistakes:
        raise UserError("\n  ".join(["Wrong configuration:", *mistakes]))


def _plan_search(
    settings: OptunaSweep, line: CommandLine, base: DictConfig, composer: Composer, loader: Any
) -> Plan | None:
    space = {key: parse_space(key, item) for key, item in settings.space.items()} | dict(line.swept)
    if SEED in space:
        raise UserError("seed: a search cannot vary it: the luckiest seed would win; compare its best points in a grid")
    if not space:
        raise UserError("sweep.space: nothing to search; give a key such as trainer.learning_rate an interval")
    groups = [key for key in space if loader.get_group_options(key)]
    found = plan_search(space, groups, composer)
    if found is None:
        return None
    search, checked = found
    identity = _identity([search.to_json(), settings.sampler_seed])
    return Plan(
        settings=settings, settings_node=resolved(base.sweep), identity=identity, checked=checked,
        axes=list(search.space), baseline=None, runs=[], search=search,
    )  # fmt: skip


def _identity(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _seeded(config: DictConfig, seed: Any) -> DictConfig:
    own = config.copy()
    own.seed = seed
    return own


def _baseline(settings: GridSweep, points: Sequence[Mapping[str, Any]]) -> int:
    if settings.baseline is None:
        return 0
    wanted = settings.baseline
    found = [at for at, point in enumerate(points) if all(point.get(key) == wanted[key] for key in wanted)]
    if len(found) == 1:
        return found[0]
    listed = [describe_point(point) for point in points]
    if len(listed) > 12:
        listed[12:] = [f"... {len(listed) - 12} more"]
    raise UserError(
        f"sweep.baseline: {describe_point(wanted)} is {len(found)} of the points, expected one of: {'; '.join(listed)}"
    )
