"""Who may import whom, who may import the heavy libraries and when, and how long a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from atropos_exp.config.origin import CONF_DIR
from atropos_exp.config.root import GROUPS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("atropos_exp", "data_prep")
PARTS = {*GROUPS, "report", "sharding", "sweep"}  # `env` is in atropos/
# Entry points and what composes the parts for them; a folder counts with all that is in it.
TOP = {"run", "submission", "assembly", "assembly_atropos", "assembly_material", "export", "report.__main__",
       "atropos.envs", "sweep_start", "sweep.__main__", "doctor", "dashboard"}  # fmt: skip
LOOP = {"loop"}
MAX_LINES = 300

# Library -> who may import it: a file, or a folder with all its files. Everything else asks one of these.
OWNERS = {
    # verl: its engine, its estimators, its losses, its copy_to_local, its scorers
    "verl": ("trainer/", "advantage/", "loss/", "model/", "parts/reward/reward_score.py"),
    "transformers": ("model/", "engine/hf", "trainer/", "parts/gateway/text.py", "data_prep/tiny_model"),
    "tokenizers": ("model/", "data_prep/tiny_model"),
    "peft": ("trainer/", "model/"),
    "tensordict": ("trainer/", "advantage/", "loss/"),
    "gguf": ("model/",),
    "huggingface_hub": ("model/", "data/"),
    "datasets": ("data/",),
    "pyarrow": ("data/", "journal.py", "run_files.py", "report/", "data_prep/"),
    "atroposlib": ("atropos/",),
    "pandas": (),
    "ray": (),
    "wandb": ("logger/wandb",),
    "rich": ("logger/", "sweep/table.py"),
    "optuna": ("sweep/search.py", "sweep/worker.py"),
    "wandb_workspaces": ("dashboard/",),
    "trackio": ("logger/trackio", "dashboard/"),
    "starlette": ("engine/",),
    "uvicorn": ("engine/",),
    "aiohttp": ("gateway/",),
    "uvloop": ("gateway/",),
    "httpx": ("engine/", "parts/model/hub.py", "atropos/"),
    "vllm": ("engine/vllm",),
    "sglang": ("engine/sglang",),
    "reasoning_gym": ("reward/", "data_prep/"),
    "math_verify": ("reward/",),
    "sympy": ("reward/",),
    "hydra": ("config", "sweep/axes.py", "sweep/plan.py"),
    "omegaconf": ("config", "run.py", "assembly.py", "sweep/", "doctor/"),
    "submitit": ("cluster/slurm",),
}
# Composing a configuration must import none of these, so a module that settings import may not at its top.
HEAVY = {"torch", "verl", "transformers", "peft", "tensordict", "datasets", "ray", "wandb", "vllm", "sglang", "optuna",
         "reasoning_gym", "math_verify", "sympy", "pyarrow", "pandas", "starlette", "uvicorn", "submitit"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Import:
    """One module that a file imports."""

    module: str
    line: int
    lazy: bool  # inside a function


def source_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports(tree: ast.AST, lazy: bool = False) -> Iterator[Import]:
    """Of a file or a part of it; what only type checkers read is left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module=alias.name, line=node.lineno, lazy=lazy)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            for alias in node.names:  # `from atropos_exp import types` names a module too
                base = node.module or ""
                yield Import(module=f"{base}.{alias.name}" if base in PACKAGES else base, line=node.lineno, lazy=lazy)
        yield from imports(node, lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def inside(path: Path) -> str:
    """Path within its package, with "data_prep/" kept to tell the two apart."""
    relative = path.relative_to(ROOT).as_posix()
    return relative.removeprefix("atropos_exp/")


def layer(name: str) -> int:
    """Of a dotted name inside atropos_exp: types 0, pure modules 1, parts 2, the loop 3, entry points 4."""
    first = name.split(".")[0]
    if any(f"{name}.".startswith(f"{top}.") for top in TOP):
        return 4
    if first in LOOP:
        return 3
    if first in PARTS:
        return 2
    return 0 if first == "types" else 1


def violations(file: str, tree: ast.AST) -> list[str]:
    """Imports of one file of atropos_exp that point upwards or sideways."""
    name = file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    found = []
    for item in imports(tree):
        package, _, target = item.module.partition(".")
        if package == "data_prep" and layer(name) < 4:
            found.append(f"{file}:{item.line} imports data_prep")
        if package != "atropos_exp" or not target or name == "__init__":
            continue
        same_part = layer(name) == layer(target) == 2 and name.split(".")[0] == target.split(".")[0]
        same_level = layer(name) == layer(target) in (1, 4)
        skips_parts = name in LOOP and layer(target) == 2
        if skips_parts or not (same_part or same_level or layer(target) < layer(name)):
            found.append(f"{file}:{item.line} (layer {layer(name)}) imports {target} (layer {layer(target)})")
    return found


@pytest.mark.parametrize("path", source_files(), ids=inside)
def test_imports_point_downward(path: Path) -> None:
    if path.is_relative_to(ROOT / "atropos_exp"):
        assert violations(inside(path), ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "path", [path for path in source_files() if path.is_relative_to(ROOT / "data_prep")], ids=inside
)
def test_data_prep_knows_pure_modules_and_rewards_only(path: Path) -> None:
    for item in imports(ast.parse(path.read_text())):
        package, _, target = item.module.partition(".")
        if package == "atropos_exp":
            assert layer(target) <= 1 or target.split(".")[0] in ("reward", "data"), f"line {item.line}: {item.module}"


@pytest.mark.parametrize("path", source_files(), ids=inside)
def test_a_library_has_few_importers(path: Path) -> None:
    for item in imports(ast.parse(path.read_text())):
        owners = OWNERS.get(item.module.split(".")[0])
        if owners is not None:
            assert inside(path).startswith(owners), f"line {item.line} imports {item.module}, which is for {owners}"


@pytest.mark.parametrize("path", source_files(), ids=inside)
def test_pure_modules_import_frameworks_only_inside_functions(path: Path) -> None:
    name = inside(path).removesuffix(".py").replace("/", ".")
    if layer(name) in (0, 1, 3):
        for item in imports(ast.parse(path.read_text())):
            assert item.lazy or item.module.split(".")[0] not in HEAVY, f"line {item.line} imports {item.module}"


def test_the_loop_knows_no_part_and_no_framework() -> None:
    allowed = {"atropos_exp", *sys.stdlib_module_names}
    for item in imports(ast.parse((ROOT / "atropos_exp" / "loop.py").read_text())):
        assert item.module.split(".")[0] in allowed, item.module


def test_settings_import_no_framework() -> None:
    """Every class that a YAML file names, in one fresh process."""
    targets = sorted({line.split()[1] for path in CONF_DIR.glob("*/*.yaml") for line in path.read_text().splitlines()
                      if line.startswith("_target_:")})  # fmt: skip
    assert len(targets) >= 11
    code = (
        "import importlib, sys\n"
        f"for target in {targets!r}:\n"
        "    before = set(sys.modules)\n"
        "    importlib.import_module(target.rpartition('.')[0])\n"
        f"    heavy = {{name.split('.')[0] for name in set(sys.modules) - before}} & {HEAVY!r}\n"
        "    if heavy: print(target, sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


@pytest.mark.parametrize(
    ("file", "code", "broken"),
    [
        ("types.py", "from atropos_exp.metrics import x", True),
        ("metrics.py", "from atropos_exp.types import x", False),
        ("metrics.py", "from atropos_exp.parts.loss.gspo import x", True),
        ("metrics.py", "def f():\n    import atropos_exp.loop", True),
        ("metrics.py", "from atropos_exp import loop", True),
        ("parts/loss/gspo.py", "from atropos_exp.parts.loss.base import x", False),
        ("parts/loss/gspo.py", "from atropos_exp.parts.advantage.grpo import x", True),
        ("parts/loss/gspo.py", "from atropos_exp.loop import x", True),
        ("parts/loss/gspo.py", "if TYPE_CHECKING:\n    from atropos_exp.parts.trainer.settings import x", False),
        ("loop.py", "from atropos_exp.parts.loss.gspo import x", True),
        ("loop.py", "from atropos_exp.batching import x", False),
        ("run.py", "from atropos_exp.parts.loss.gspo import x", False),
        ("report/__main__.py", "from atropos_exp.loop import x", False),
        ("parts/data/loader.py", "import data_prep.gsm8k", True),
        ("envs/single_turn.py", "from atropos_exp.parts.reward.pool import x", False),
        ("parts/reward/pool.py", "from atropos_exp.envs.episode import x", True),
    ],
)
def test_the_test_sees_violations(file: str, code: str, broken: bool) -> None:
    assert bool(violations(file, ast.parse(code))) is broken


@pytest.mark.parametrize("path", [*source_files(), *sorted((ROOT / "tests").rglob("*.py"))], ids=inside)
def test_a_file_is_one_noun(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_no_path_of_one_machine() -> None:
    machine = ["/" + name + "/" for name in ("work", "farm", "home", "Users", "mnt")]
    folders = [ROOT / name for name in (*PACKAGES, "conf", "docs", "sweeps", "tests", ".ci")]
    files = [
        path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".yaml", ".md", ".html")
    ]
    files += [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.txt"), ROOT / "Makefile", ROOT / ".ci" / "run"]
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert [name for name in machine if name in text] == [], path
