"""Every YAML file that ships: it composes, builds, and sets every field of its class exactly once, with a comment."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from pydantic import ValidationError

from atropos_exp.assembly.check import check, validate
from atropos_exp.config.build import build, find_class
from atropos_exp.config.freeze import config_hash
from atropos_exp.config.origin import CONF_DIR, Origin
from atropos_exp.config.root import GROUPS, RunConfig
from tests.helpers.paths import ROOT

OPTIONS = sorted((path.parent.name, path.stem) for path in CONF_DIR.glob("*/*.yaml") if path.parent.name in GROUPS)
SWEEPS = sorted(("sweep", path.stem) for path in CONF_DIR.glob("sweep/*.yaml"))  # no part of a run, so no group of one
EXPERIMENTS = sorted(path.stem for path in CONF_DIR.glob("experiment/*.yaml"))


def composed(*overrides: str) -> Any:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
        return compose("config", overrides=list(overrides))


def test_every_group_has_options() -> None:
    assert {group for group, _ in OPTIONS} == set(GROUPS)


@pytest.mark.parametrize(("group", "option"), [*OPTIONS, *SWEEPS])
def test_option_builds_and_sets_every_field(group: str, option: str) -> None:
    node = composed(f"{group}={option}")[group]
    settings = find_class(node["_target_"], group)
    assert set(node) - {"_target_"} == set(settings.model_fields)
    for name, field in settings.model_fields.items():
        assert field.is_required(), f"{name}: defaults live in {group}/{option}.yaml alone"
    built = build(node, group)
    assert type(built) is settings
    for name in settings.model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(built, name, getattr(built, name))


@pytest.mark.parametrize(("group", "option"), [*OPTIONS, *SWEEPS])
def test_option_explains_every_key(group: str, option: str) -> None:
    text = (CONF_DIR / group / f"{option}.yaml").read_text()
    assert_explained(text, f"{group}/{option}.yaml")


def test_root_explains_every_key() -> None:
    text = (CONF_DIR / "config.yaml").read_text()
    root = text[text.index("name: demo") : text.index("hydra: #")]
    assert_explained(root, "config.yaml")
    assert set(yaml.safe_load(root)) == set(RunConfig.model_fields)


def assert_explained(text: str, file: str) -> None:
    """A leaf has a trailing comment, or its section does."""
    section_explained = False
    for line in text.splitlines():
        code = line.split("#")[0].rstrip()
        if not code.strip() or code.startswith(("_target_", "defaults")) or code.lstrip().startswith("- "):
            continue
        if not code.startswith(" "):
            section_explained = "#" in line and code.endswith(":")
        assert "#" in line or section_explained or code.endswith(":"), f"{file}: no comment on {code.strip()!r}"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_is_consistent(experiment: str) -> None:
    # Something may be missing here (hub weights, a prepared data set, vLLM); sizes and types may not be wrong.
    _, mistakes = check(composed(f"experiment={experiment}", "device=cpu"))
    missing = [mistake for mistake in mistakes if mistake.message.startswith("engine=vllm needs an interpreter")]
    wrong = [mistake for mistake in mistakes if mistake.path.split(".")[0] not in ("data", "model")]
    assert [mistake for mistake in wrong if mistake not in missing] == []


def test_the_default_run_is_valid_and_demo_is_the_default_run() -> None:
    default, demo = composed(), composed("experiment=demo")
    checked = validate(default, Origin(overrides=(), choices={}, folders=(CONF_DIR,)))
    assert {field.name for field in fields(checked.parts)} == set(GROUPS)
    assert config_hash(default) == config_hash(demo)


def test_an_experiment_overrides_the_base_and_the_command_line_overrides_both() -> None:
    assert composed("experiment=smollm2_reasoning").group_size == 4
    assert composed("experiment=smollm2_reasoning", "group_size=2").group_size == 2


def test_composing_and_validating_imports_no_framework() -> None:
    script = """
import sys
from hydra import compose, initialize_config_dir
from pydantic import ValidationError

from atropos_exp.assembly.check import validate
from atropos_exp.config.origin import CONF_DIR
with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
    for overrides in {overrides!r}:
        validate(compose("config", overrides=overrides))
print(sorted({{name.split(".")[0] for name in sys.modules}} & {heavy!r}))
"""
    heavy = {"torch", "verl", "transformers", "ray", "datasets", "vllm", "sglang", "wandb", "reasoning_gym", "sympy"}
    overrides = [[], ["logger=wandb"], ["advantage=rloo", "loss=gspo"]]
    code = script.format(overrides=overrides, heavy=heavy)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_sweep_files_are_options_of_the_group_sweeps() -> None:
    files = sorted((ROOT / "sweeps").glob("*.yaml"))
    assert files
    for file in files:
        assert file.read_text().startswith("# @package _global_\n# "), f"{file.name}: the first lines say what it asks"
        assert composed(f"+sweeps={file.stem}").sweep != composed().sweep
