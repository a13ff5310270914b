"""An interpreter with transformers 4, as most published environments need: `environment` makes it in seconds."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

PACKAGES = (
    "transformers<5",
    "huggingface_hub<1",
    "tokenizers<0.23",
    "datasets<=5.0.1",
)  # what transformers 4 pins; the rest is shared


def environment(folder: Path) -> Path:
    """The interpreter of a new environment in `folder`: transformers 4 and what it needs in older versions, everything
    else from this interpreter's own environment. Skips the test if pip cannot fetch them."""
    venv.create(folder, with_pip=False, symlinks=True)
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages, *PACKAGES],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    if done.returncode != 0:
        pytest.skip(f"pip cannot install {', '.join(PACKAGES)}: {done.stderr.strip()[-300:]}")
    (packages / "everything_else.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"
