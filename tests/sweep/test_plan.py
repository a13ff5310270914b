"""What a command line and a file of sweeps/ come to, before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from atropos_exp.config.origin import CONF_DIR
from atropos_exp.config.sources import Sources
from atropos_exp.errors import UserError
from atropos_exp.sweep.axes import Interval, override_text, plain_value
from atropos_exp.sweep.plan import Plan, plan_sweep
from atropos_exp.sweep.search_space import SearchPlan


def runs_of(plan: Plan) -> list[tuple[dict[str, object], int]]:
    return [(dict(run.values), run.seed) for run in plan.runs]


def refused(*overrides: str, config_dir: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        plan_sweep(overrides, Sources(own=config_dir))
    return str(caught.value)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A user's own configuration directory."""
    for group in ("sweeps", "experiment"):
        (tmp_path / group).mkdir()
    return tmp_path


def test_a_grid_of_the_command_line_pairs_every_point_with_every_seed() -> None:
    plan = plan_sweep(["advantage=grpo,rloo", "loss.clip_low=0.1,0.2", "seed=3,5", "trainer.max_steps=2"], Sources())
    expected = [
        ({"advantage": advantage, "loss.clip_low": clip}, seed)
        for advantage in ("grpo", "rloo") for clip in (0.1, 0.2) for seed in (3, 5)
    ]  # fmt: skip
    assert runs_of(plan) == expected
    assert [run.point for run in plan.runs] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert (plan.axes, plan.baseline) == (["advantage", "loss.clip_low"], 0)
    for run in plan.runs:
        config = run.config
        assert (config.seed, config.loss.clip_low, config.trainer.max_steps) == (
            run.seed,
            run.values["loss.clip_low"],
            2,
        )
        target = "RLOO" if run.values["advantage"] == "rloo" else "GRPO"
        assert config.advantage._target_.endswith("." + target)


def test_a_file_with_grid_zip_seeds_and_baseline(own: Path) -> None:
    (own / "sweeps" / "mine.yaml").write_text(
        "# @package _global_\nsweep:\n  grid:\n    advantage: [grpo, opo]\n"
        "  zip:\n    batch_size: [8, 4]\n    group_size: [4, 8]\n  seeds: [1, 2]\n"
        "  baseline: {advantage: opo, batch_size: 4}\n"
    )
    plan = plan_sweep(["+sweeps=mine"], Sources(own=own))
    pairs = [(8, 4), (4, 8)]
    assert runs_of(plan) == [
        ({"advantage": advantage, "batch_size": batch, "group_size": group}, seed)
        for advantage in ("grpo", "opo") for batch, group in pairs for seed in (1, 2)
    ]  # fmt: skip
    assert plan.baseline == 3
    # the command line wins over the file, seeds and axes alike
    plan = plan_sweep(["+sweeps=mine", "seed=9,10", "advantage=rloo,opo", "sweep.parallel=3"], Sources(own=own))
    assert {run.seed for run in plan.runs} == {9, 10}
    assert {run.values["advantage"] for run in plan.runs} == {"rloo", "opo"}
    assert plan.settings.parallel == 3


def test_hydras_own_sweeper_params_are_understood(own: Path) -> None:
    (own / "sweeps" / "plain.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n"
        "      advantage: grpo,rloo\n      seed: range(2)\n      trainer.max_steps: 7\n"
    )
    plan = plan_sweep(["+sweeps=plain"], Sources(own=own))
    assert runs_of(plan) == [({"advantage": name}, seed) for name in ("grpo", "rloo") for seed in (0, 1)]
    assert {run.checked.config.trainer.max_steps for run in plan.runs} == {7}


def test_globs_and_ranges() -> None:
    plan = plan_sweep(["advantage=glob(*grpo)", "seed=range(1,3)"], Sources())
    assert runs_of(plan) == [({"advantage": name}, seed) for name in ("dr_grpo", "grpo") for seed in (1, 2)]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["advantage=grpo,rlo"], ["advantage: unknown option 'rlo'. Did you mean 'rloo'?"]),
        (["seed=0,x"], ["seed: got 'x', expected a whole number [override 'seed=x']"]),
        (["loss.clip_low=0.1,-1,abc"], ["got -1", "[override 'loss.clip_low=-1']", "got 'abc'"]),
        (["batch_sise=1,2"], ["batch_sise: unknown key. Did you mean 'batch_size'?"]),
        (["trainer.learning_rate=interval(0,1)"], ["an interval, which a grid cannot list"]),
        (["seed=0,1", "sweep.parallel=0"], ["sweep.parallel: got 0, expected 1 to 256"]),
        (["seed=0,1", "sweep.paralel=2"], ["sweep.paralel: unknown key. Did you mean 'sweep.parallel'?"]),
        (["seed=0,1", "+sweep.zip={batch_size:[1,2],group_size:[4]}"], ["sweep.zip", "all of one length"]),
        (["batch_size=8,16", "+sweep.zip={batch_size:[1,2]}"], ["batch_size: got it in sweep.zip and again elsewhere"]),
        (["advantage=rloo", "+sweep.grid={advantage:[grpo]}"], ["got 'advantage=rloo', but the sweep varies"]),
        (["+sweep.grid={seed:[1,2]}"], ["seeds repeat a point, they go to sweep.seeds"]),
        (["seed=5", "sweep.seeds=[1,2]"], ["seed: got one, but sweep.seeds lists the seeds"]),
        (["advantage=grpo,rloo", "sweep.baseline={advantage:opo}"], ["is 0 of the points", "advantage=grpo"]),
        (["seed=range(20000)"], ["more than 10000 runs"]),
        (["sweep=optuna"], ["sweep.space: nothing to search"]),
        (["sweep=optuna", "seed=0,1"], ["the luckiest seed would win"]),
        (["sweep=optuna", "loss.clip_low=interval(-1,0.2)"], ["loss.clip_low: got -1"]),
        (["sweep=optuna", "loss=gspo,dr_grpo", "loss.clp=interval(0,1)"], ["loss.clp", "with gspo", "with dr_grpo"]),
        (["sweep=optuna", "trainer.learning_rate=tag(log,interval(0,1))"], ["both above 0 for a log scale"]),
        (["+sweeps=advantage_by_se"], ["sweeps: unknown option 'advantage_by_se'. Did you mean 'advantage_by_seed'?"]),
    ],
)  # fmt: skip
def test_a_mistake_anywhere_is_found_before_anything_starts(overrides: list[str], words: list[str]) -> None:
    try:
        message = refused(*overrides)
    except Exception as error:  # the base itself cannot be composed: the program lets Hydra's error be diagnosed
        from atropos_exp.assembly.check import mistakes_of
        from atropos_exp.config.diagnose import diagnose

        message = diagnose(error, overrides, Sources(), check=mistakes_of)
    for word in words:
        assert word in message, message


def test_mistakes_of_all_points_are_in_one_message() -> None:
    message = refused("loss.clip_low=-1,0.1,-2", "temperature=0.5,-3")
    for word in ("clip_low: got -1", "clip_low: got -2", "temperature: got -3"):
        assert word in message
    assert "got 0.1" not in message


def test_a_search_is_frozen_with_every_choice_of_groups(own: Path) -> None:
    (own / "experiment" / "mine.yaml").write_text("# @package _global_\nbatch_size: 8\n")
    line = ["sweep=optuna", "experiment=mine", "loss=ppo_clip,gspo",
            "trainer.learning_rate=tag(log,interval(1e-5,1e-3))",
            "trainer.num_mini_batches=int(interval(1,4))", "temperature=0.7,1.0"]  # fmt: skip
    plan = plan_sweep(line, Sources(own=own))
    assert plan.search is not None
    search = SearchPlan.from_json(plan.search.to_json())
    assert search.space["trainer.learning_rate"] == Interval(low=1e-5, high=1e-3, integer=False, log=True)
    assert search.space["trainer.num_mini_batches"] == Interval(low=1, high=4, integer=True, log=False)
    assert search.space["temperature"] == [0.7, 1.0]
    (own / "experiment" / "mine.yaml").write_text("# @package _global_\nbatch_size: 64\n")
    config = search.config({"loss": "gspo", "trainer.learning_rate": 2e-4, "trainer.num_mini_batches": 2,
                            "temperature": 0.7})  # fmt: skip
    assert config.loss._target_.endswith(".GSPO")
    assert (config.batch_size, config.trainer.learning_rate, config.temperature) == (8, 2e-4, 0.7)


def test_the_same_runs_have_the_same_identity_and_others_another() -> None:
    line = ["advantage=grpo,rloo", "seed=0,1"]
    same = plan_sweep([*line, "sweep.parallel=2", "logger=none"], Sources())
    assert plan_sweep(line, Sources()).identity == same.identity
    assert plan_sweep([*line, "batch_size=8"], Sources()).identity != same.identity
    assert plan_sweep(["advantage=grpo,rloo", "seed=0,2"], Sources()).identity != same.identity
    search = ["sweep=optuna", "trainer.learning_rate=interval(1e-5,1e-3)"]
    assert plan_sweep(search, Sources()).identity == plan_sweep([*search, "sweep.trials=99"], Sources()).identity


@pytest.mark.parametrize(
    "value", [None, True, 3, 1e-5, "grpo", "true", "it's a b", [1, "x y"], {"a": [0.5, None]}, "\\'"]
)
def test_yaml_values_survive_hydras_grammar(value: object) -> None:
    assert plain_value(override_text(value)) == value


@pytest.mark.parametrize("file", sorted(path.stem for path in (CONF_DIR / "sweeps").glob("*.yaml")))
def test_every_file_of_sweeps_plans(file: str) -> None:
    plan = plan_sweep([f"+sweeps={file}"], Sources())
    if plan.search is None:
        assert len(plan.runs) >= 9
        points = {run.point: dict(run.values) for run in plan.runs}
        listed = OmegaConf.load(CONF_DIR / "sweeps" / f"{file}.yaml").sweep.baseline
        assert plan.baseline is not None
        assert {key: points[plan.baseline][key] for key in listed} == dict(listed)
    else:
        assert set(plan.search.space) == set(plan.axes)
