"""The wheel is whole: installed elsewhere, from another directory, it composes with the conf/ inside it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    # Without isolation: the build backend of this environment, so that no network is needed.
    command = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT))
    done = run(*command, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of a new environment with the wheel and, by reference, the packages of this one."""
    folder = tmp_path_factory.mktemp("elsewhere") / "env"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet")
    done = run(*pip, str(wheel), cwd=folder)
    assert done.returncode == 0, done.stderr
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth file is searched last, and .pth files in it (an editable install of this project) are not read.
    (site_packages / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_the_wheel_holds_what_a_run_needs_and_no_more(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {path.relative_to(ROOT).as_posix() for path in (ROOT / "conf").rglob("*.yaml")}
    assert {f"atropos_exp/{name}" for name in shipped} <= names
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in ("atropos_exp", "data_prep")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc" and not any(name.startswith(".") for name in path.parts)
    }
    assert sources <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"atropos_exp", "data_prep"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_composes_from_another_directory(installed: Path, tmp_path: Path) -> None:
    code = "import atropos_exp, data_prep; print(atropos_exp.__file__); print(data_prep.__file__)"
    where = run(str(installed / "python"), "-c", code, cwd=tmp_path).stdout.split()
    assert [Path(path).is_relative_to(installed.parent) for path in where] == [True, True]

    done = run(str(installed / "python"), "-m", "atropos_exp.run", "--cfg", "job", "seed=7", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\nseed: 7\n" in done.stdout
    assert "_target_: atropos_exp.parts.model.tiny.TinyModel" in done.stdout

    done = run(str(installed / "atropos-exp"), "--cfg", "job", "experiment=smollm2_reasoning", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\ngroup_size: 4\n" in done.stdout

    done = run(str(installed / "atropos-exp"), "+sweeps=advantage_by_lr", "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "trainer.learning_rate:" in done.stdout

    done = run(str(installed / "atropos-exp"), "sede=7", "device=tpu", cwd=tmp_path)
    assert done.returncode == 2
    assert "sede: unknown key. Did you mean 'seed'? [override 'sede=7']" in done.stderr
    assert "device: got 'tpu'" in done.stderr
    assert list(tmp_path.iterdir()) == []
