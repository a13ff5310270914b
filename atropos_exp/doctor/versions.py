"""The installed libraries, compared with those that this package was written for."""

import importlib.metadata
import sys
from collections.abc import Mapping
from pathlib import Path

from atropos_exp.doctor.line import Line, fail, ok, warn
from atropos_exp.runs.provenance import versions

_ROOT = Path(__file__).resolve().parents[2]
NAME = "atropos-exp"


def check_versions() -> list[Line]:
    """Compare Python and every requirement with its range, and what decides the numbers with the tested versions."""
    lines = [_python()]
    wrong = [text for requirement in requirements() if (text := _problem(requirement))]
    lines += [fail("versions", text, f"pip install -c constraints.txt {wanted!r}") for text, wanted in wrong]
    deciding = versions()
    del deciding["python"], deciding["atropos_exp"]
    moved = _moved(deciding)
    if moved:
        remedy = "install what constraints.txt lists, or run `make test` to see whether these do"
        lines.append(warn("versions", f"not the tested set: {', '.join(moved)}", remedy))
    if not wrong and not moved:
        lines.append(ok("versions", ", ".join(f"{name} {version}" for name, version in deciding.items())))
    return lines


def requirements() -> list[str]:
    """Return this package's requirements without extras: of its metadata, or of a checkout's pyproject.toml."""
    import tomllib

    project = _ROOT / "pyproject.toml"
    if project.is_file():
        found: list[str] = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
        return found
    try:
        listed = importlib.metadata.requires(NAME) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [requirement for requirement in listed if "extra ==" not in requirement]


def _python() -> Line:
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        return ok("python", f"{version} ({sys.executable})")
    return fail("python", f"{version}, expected 3.11 or 3.12", "make PYTHON=python3.12")


def _problem(requirement: str) -> tuple[str, str] | None:
    """(what is wrong, the requirement to install)."""
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    if wanted.marker is not None and not wanted.marker.evaluate():
        return None
    try:
        found = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{wanted.name} is not installed, expected {wanted.specifier or 'any version'}", str(wanted)
    if wanted.specifier.contains(found.split("+")[0], prereleases=True):
        return None
    return f"{wanted.name} is {found}, expected {wanted.specifier}", str(wanted)


def _moved(deciding: Mapping[str, str]) -> list[str]:
    """Libraries that decide the numbers and are not at their tested version."""
    tested = _ROOT / "constraints.txt"
    if not tested.is_file():
        return []
    pins = dict(line.split("==", 1) for line in tested.read_text(encoding="utf-8").splitlines() if "==" in line)
    pins = {name.lower().replace("_", "-"): version.split(";")[0].strip() for name, version in pins.items()}
    return [
        f"{name} {version} (tested: {pins[name]})"
        for name, version in deciding.items()
        if name in pins and version.split("+")[0] != pins[name]
    ]
