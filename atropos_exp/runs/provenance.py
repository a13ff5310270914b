"""Where a run's numbers come from: the commit, and the versions of libraries."""

import importlib.metadata
import platform
import subprocess
from contextlib import suppress
from pathlib import Path

from atropos_exp import __version__

PACKAGES = ("torch", "verl", "transformers", "hydra-core", "omegaconf", "vllm", "sglang", "atroposlib")


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and the installed libraries that decide the numbers."""
    found = {"python": platform.python_version(), "atropos_exp": __version__}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_commit() -> str | None:
    """Return the commit of the checkout that this package runs from, with "+changes" if it was edited; None outside
    one.
    """
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    folder = Path(__file__).parent
    result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return result.stdout.strip()
