"""Who may import whom, who may import the heavy libraries and when, and how large a file and a folder may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter

import pytest
import yaml

from tests.helpers.paths import CONF, ROOT

PACKAGES = ("atropos_exp", "data_prep")
# A room is a file or a folder at the top of atropos_exp. It may import what stands left of it and, as long as that
# makes no circle, its neighbours between two `>`. `parts/<a>` never imports `parts/<b>`.
ORDER = """errors types > interfaces metrics batching processes > weights runs loop > config > parts > export report
           > sweep envs assembly > doctor run"""
LEVEL = {room: level for level, rooms in enumerate(ORDER.split(">")) for room in rooms.split()}
DATA_PREP_MAY_IMPORT = (
    "errors", "types", "interfaces", "processes.locks", "runs.atomic", "runs.manifest", "config", "parts.data",
    "parts.reward",
)  # fmt: skip
MAY_IMPORT_DATA_PREP = ("assembly", "doctor", "envs", "run")
MAX_LINES, MAX_ENTRIES = 300, {"": 18, "parts/engine": 12}

# Library -> the only files and folders that may import it.
OWNERS = {
    "verl": "parts/advantage/base.py parts/loss/base.py parts/model/hub.py parts/reward/reward_score.py parts/trainer/",
    "transformers": "parts/model/ parts/engine/hf/ parts/trainer/ parts/gateway/text.py data_prep/tiny_model.py",
    "tokenizers": "parts/model/ data_prep/tiny_model.py",
    "peft": "parts/trainer/ parts/model/",
    "tensordict": "parts/trainer/",
    "gguf": "parts/model/",
    "huggingface_hub": "parts/model/ parts/data/",
    "datasets": "parts/data/",
    "pyarrow": "parts/data/ runs/ data_prep/",
    "atroposlib": "envs/",
    "pandas": "",
    "ray": "",
    "sympy": "",
    "wandb": "parts/logger/",
    "trackio": "parts/logger/ report/dashboard/",
    "wandb_workspaces": "report/dashboard/",
    "rich": "parts/logger/ sweep/table.py",
    "optuna": "sweep/",
    "starlette": "parts/engine/serving/",
    "uvicorn": "parts/engine/serving/",
    "aiohttp": "parts/gateway/",
    "uvloop": "parts/gateway/",
    "httpx": "parts/engine/ parts/model/hub.py parts/atropos/",
    "vllm": "parts/engine/vllm/",
    "sglang": "parts/engine/sglang/",
    "reasoning_gym": "parts/reward/ data_prep/",
    "math_verify": "parts/reward/",
    "hydra": "config/ sweep/",
    "omegaconf": "config/ sweep/ doctor/ run.py assembly/",
    "submitit": "parts/cluster/slurm/",
}
# What composes and checks a configuration imports none of these.
HEAVY = ("torch", "verl", "transformers", "peft", "tensordict", "datasets", "ray", "wandb", "vllm", "sglang", "optuna",
         "reasoning_gym", "math_verify", "sympy", "pyarrow", "pandas", "starlette", "uvicorn", "submitit")  # fmt: skip
LIGHT_ROOMS = ("errors", "types", "interfaces", "metrics", "batching", "processes", "runs", "loop", "config")

Sources = dict[str, str]  # dotted name of a module -> its text


def sources() -> Sources:
    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return {name: path.read_text(encoding="utf-8") for name, path in zip(names, paths, strict=True)}


@cache
def statements(text: str) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]


def imports(text: str, modules: Sources) -> Iterator[tuple[int, str]]:
    """(line, module) of everything that a file imports: at its top, in a function, for type checkers."""
    for node in statements(text):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        else:
            assert node.level == 0, "a relative import hides the room"
            for alias in node.names:  # `from atropos_exp import types` names a module too
                full = f"{node.module}.{alias.name}"
                yield node.lineno, full if full in modules else str(node.module)


def room(module: str) -> str:
    """`run`, `weights`, `parts.loss`; "" of what is not in a room of atropos_exp."""
    package, *inside = module.split(".")
    return ".".join(inside[: 2 if inside[:1] == ["parts"] else 1]) if package == "atropos_exp" else ""


def is_of(module: str, names: tuple[str, ...]) -> bool:
    return any(f"{module}.".startswith(f"atropos_exp.{name}.") for name in names)


def wrong_directions(modules: Sources) -> list[str]:
    """Imports that point upwards, from one part to another, or between the packages where they may not."""
    found = []
    for module, text in modules.items():
        for line, target in imports(text, modules):
            here, there = room(module), room(target)
            if target.startswith("data_prep") and module.startswith("atropos_exp"):
                wrong = not is_of(module, MAY_IMPORT_DATA_PREP)
            elif module.startswith("data_prep"):
                wrong = target.startswith("atropos_exp") and not is_of(target, DATA_PREP_MAY_IMPORT)
            elif not here or not there or here == there:
                wrong = False
            else:
                levels = [LEVEL[name.split(".")[0]] for name in (here, there)]
                wrong = levels[1] > levels[0] or (here.startswith("parts.") and there.startswith("parts."))
            if wrong:
                found.append(f"{module}:{line} imports {target}")
    return found


def circles(modules: Sources) -> list[str]:
    """One circle of modules and one of rooms, where there is any."""
    files = {name: {to for _, to in imports(text, modules) if to in modules} - {name} for name, text in modules.items()}
    rooms: dict[str, set[str]] = {}
    for name, targets in files.items():
        rooms.setdefault(room(name), set()).update({room(to) for to in targets} - {"", room(name)})
    rooms.pop("", None)
    return [*circle(files), *circle(rooms)]


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def foreign_libraries(modules: Sources) -> list[str]:
    found = []
    for module, text in modules.items():
        file = f"{module.replace('.', '/').removeprefix('atropos_exp/')}.py"
        for line, target in imports(text, modules):
            owners = OWNERS.get(target.split(".")[0])
            if owners is not None and not file.startswith(tuple(owners.split())):
                found.append(f"{module}:{line} imports {target}, which is for {owners or 'nobody'}")
    return found


def test_imports_point_downward() -> None:
    assert wrong_directions(sources()) == []


def test_there_is_no_import_circle() -> None:
    assert circles(sources()) == []


def test_a_library_has_few_importers() -> None:
    assert foreign_libraries(sources()) == []


def test_every_room_has_its_place_in_the_order() -> None:
    assert {room(module).split(".")[0] for module in sources()} - {""} == set(LEVEL)


def test_the_loop_knows_no_part_and_no_framework() -> None:
    modules = sources()
    found = {target for _, target in imports(modules["atropos_exp.loop"], modules)}
    outside = {name for name in found if name.split(".")[0] not in sys.stdlib_module_names}
    assert outside <= {f"atropos_exp.{name}" for name in ("batching", "errors", "interfaces", "metrics", "types")}


def test_composing_imports_no_framework() -> None:
    """The rooms below the parts and every class that a YAML file names, one after another in a fresh process."""
    light = [module for module in sources() if room(module) in LIGHT_ROOMS]
    targets = [yaml.safe_load(path.read_text()).get("_target_", "") for path in CONF.glob("*/*.yaml")]
    named = {target.rpartition(".")[0] for target in targets} - {""}
    assert len(light) > 30 and len(named) > 30
    code = (
        "import importlib, sys\n"
        f"for name in {[*light, *sorted(named), 'atropos_exp.run']!r}:\n"
        "    before = set(sys.modules)\n"
        "    importlib.import_module(name)\n"
        f"    heavy = {{found.split('.')[0] for found in set(sys.modules) - before}} & set({HEAVY!r})\n"
        "    if heavy: print(name, 'imports', *sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_an_option_lies_in_the_folder_of_its_group() -> None:
    elsewhere = {"env": "parts.atropos", "sweep": "sweep"}
    wrong = []
    for path in sorted(CONF.glob("*/*.yaml")):
        group, target = path.parent.name, yaml.safe_load(path.read_text(encoding="utf-8")).get("_target_")
        if group in ("experiment", "sweeps"):
            continue  # they choose options, and are none
        place = elsewhere.get(group, f"parts.{group}")
        if not str(target).startswith(f"atropos_exp.{place}."):
            wrong.append(f"{path.relative_to(ROOT)}: {target} is not in {place}")
    assert wrong == []


def test_files_and_folders_are_small() -> None:
    files = [path for folder in (*PACKAGES, "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}
    for folder, most in MAX_ENTRIES.items():
        entries = {path.name for path in (ROOT / "atropos_exp" / folder).iterdir()} - {"__init__.py", "__pycache__"}
        assert len(entries) <= most, (folder, sorted(entries))


def test_no_path_of_one_machine() -> None:
    machine = ["/" + name + "/" for name in ("work", "farm", "home", "Users", "mnt")]
    folders = [ROOT / name for name in (*PACKAGES, "conf", "docs", "sweeps", "tests", ".ci")]
    suffixes = (".py", ".yaml", ".md", ".html")
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in suffixes]
    files += [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.txt"), ROOT / "Makefile", ROOT / ".ci" / "run"]
    assert [str(path) for path in files if any(name in path.read_text(encoding="utf-8") for name in machine)] == []


GSPO, GRPO = "atropos_exp.parts.loss.gspo", "atropos_exp.parts.advantage.grpo"


@pytest.mark.parametrize(
    ("module", "code", "broken"),
    [
        ("atropos_exp.types", "from atropos_exp.metrics import x", True),
        ("atropos_exp.metrics", "from atropos_exp.types import x", False),
        ("atropos_exp.metrics", f"from {GSPO} import x", True),
        ("atropos_exp.metrics", "def f():\n    import atropos_exp.loop", True),
        ("atropos_exp.metrics", "from atropos_exp import loop", True),
        ("atropos_exp.metrics", "if TYPE_CHECKING:\n    from atropos_exp.loop import x", True),
        ("atropos_exp.metrics", "from atropos_exp.batching import x", False),
        ("atropos_exp.parts.loss.base", f"from {GSPO} import x", False),
        (GSPO, f"from {GRPO} import x", True),
        (GSPO, "from atropos_exp.sweep.driver import x", True),
        (GSPO, "from atropos_exp.loop import x", False),
        ("atropos_exp.envs.base", "from atropos_exp.run import x", True),
        ("atropos_exp.sweep.driver", "from atropos_exp.doctor.after import x", True),
        ("atropos_exp.run", f"from {GSPO} import x", False),
        ("atropos_exp.parts.data.loader", "import data_prep.gsm8k", True),
        ("atropos_exp.envs.base", "from data_prep.arithmetic import x", False),
        ("data_prep.gsm8k", f"from {GSPO} import x", True),
        ("data_prep.gsm8k", "from atropos_exp.parts.reward.exact import x", False),
    ],
)
def test_a_planted_import_is_seen(module: str, code: str, broken: bool) -> None:
    assert bool(wrong_directions({"atropos_exp.loop": "", GSPO: "", GRPO: "", module: code})) is broken


def test_planted_circles_and_foreign_libraries_are_seen() -> None:
    back = "if TYPE_CHECKING:\n    from atropos_exp.metrics import x"
    assert circles({"atropos_exp.metrics": "from atropos_exp import batching", "atropos_exp.batching": back}) != []
    two = {"atropos_exp.runs.a": "import atropos_exp.weights.a", "atropos_exp.weights.a": ""}
    assert circles(two) == []
    other = {"atropos_exp.weights.b": "import atropos_exp.runs.b", "atropos_exp.runs.b": ""}
    assert circles(two | other) == ["runs <- weights <- runs"] or circles(two | other) == ["weights <- runs <- weights"]
    assert foreign_libraries({"atropos_exp.loop": "import torch, verl.utils"}) != []
    assert foreign_libraries({"atropos_exp.parts.trainer.engine": "import verl.utils"}) == []
    assert foreign_libraries({"atropos_exp.parts.advantage.base2": "import verl"}) != []
