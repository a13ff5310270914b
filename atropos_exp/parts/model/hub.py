"""`model=…` from the Hugging Face hub, a local folder, or HDFS."""

import logging
import os
import re
from pathlib import Path

from atropos_exp.errors import UserError
from atropos_exp.parts.model import hf_folder
from atropos_exp.parts.model.settings import ModelSettings

_logger = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt", "*.model"]


class HubModel(ModelSettings):
    """`path` is a hub id (`org/name`), a folder, or an `hdfs://` address. A folder of that name wins over the hub."""

    def fetch(self) -> Path:
        """The model's folder; what the hub's cache lacks is downloaded. Raises UserError."""
        folder = self._download()
        messages = hf_folder.problems(folder)
        if messages:
            raise UserError("; ".join(messages))
        if "auto_map" in hf_folder.read_json(folder / "config.json"):
            _check_code(folder, self.trust_remote_code)
        return folder

    def local_folder(self) -> Path | None:
        """None if it must be downloaded from the hub or copied from HDFS first. A path that cannot be a hub id is
        returned even if it does not exist."""
        folder = _as_folder(self._path)
        if self._path.startswith("hdfs://"):
            return None
        if folder.is_dir() or not _is_hub_id(self._path):
            return folder.resolve()
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self._path, "config.json", revision=self.revision)
        if not isinstance(cached, str):
            return None
        # A download that was cut short leaves config.json without the weights: `fetch` completes it.
        return None if hf_folder.problems(Path(cached).parent) else Path(cached).parent

    def _download(self) -> Path:
        """The folder on this machine, downloaded or copied if necessary."""
        import httpx
        from huggingface_hub import snapshot_download

        path, revision = self._path, self.revision
        if path.startswith("hdfs://"):
            from verl.utils.fs import copy_to_local

            folder = Path(copy_to_local(path.rstrip("/")))
        else:
            folder = _as_folder(path)
        if folder.is_dir():
            return folder.resolve()
        if not _is_hub_id(path):
            raise UserError(f"path: got {path}, expected a folder that exists, or a hub id such as org/name")
        cached = self.local_folder()
        if cached is not None and cached.name == revision:  # a commit never changes
            return cached
        patterns = [*_FILES, "*.py"] if self.trust_remote_code else _FILES
        try:
            return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
        except (OSError, ValueError, httpx.HTTPError) as error:  # the hub's own errors are all one of these
            reason = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0].rstrip('.')}"
            if cached is not None:
                _logger.warning(
                    "could not ask the hub for the newest %s (%s); using the one in the cache", path, reason
                )
                return cached
            raise UserError(
                f"path: {path} is not a folder here and could not be taken from the Hugging Face hub "
                f"(revision {revision or 'main'}): {reason}. Check the name, the network, and HF_TOKEN if the model is "
                "gated; or give the path of a downloaded copy"
            ) from error

    @property
    def _path(self) -> str:
        if not self.path:
            raise UserError("path: got nothing, expected a hub id such as org/name, or a folder")
        return self.path

    def own_problems(self) -> list[str]:
        if self.revision and self.path and not self.trust_remote_code and _as_folder(self.path).is_dir():
            return [f"revision: got {self.revision}, but model.path is a folder, which has none; remove it"]
        return []


def _check_code(folder: Path, trust_remote_code: bool) -> None:
    """Raise UserError for a model that needs Python code of its own, unless that is trusted."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except ValueError as error:
        raise UserError(
            f"{folder} needs Python code of its own, which is not run: set model.trust_remote_code=true and pin "
            f"model.revision if you trust it ({str(error).splitlines()[0]})"
        ) from error


def _as_folder(path: str) -> Path:
    return Path(os.path.expanduser(path))


def _is_hub_id(path: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return _HUB_ID.fullmatch(path) is not None
