"""`model=tiny`: the small Qwen2 that ships in this package (`tiny_weights/`, built by `data_prep/tiny_model.py`)."""

import hashlib
from pathlib import Path

from atropos_exp.errors import UserError
from atropos_exp.parts.model import hf_folder
from atropos_exp.parts.model.hub import HubModel

WEIGHTS = Path(__file__).parent / "tiny_weights"


class TinyModel(HubModel):
    """With `path: null` it is the copy in this package; with a path it is a `HubModel` like any other."""

    def fetch(self) -> Path:
        if self.path is not None:
            return super().fetch()
        check_manifest(WEIGHTS)
        return WEIGHTS

    def local_folder(self) -> Path | None:
        return WEIGHTS if self.path is None else super().local_folder()


def check_manifest(folder: Path) -> None:
    """Raise UserError unless every file has the sha256 that `manifest.json` lists."""
    sums = hf_folder.read_json(folder / "manifest.json")["sha256"]
    for name, expected in sums.items():
        path = folder / name
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no such file"
        if found != expected:
            raise UserError(
                f"the tiny model is damaged: {path} should have sha256 {expected}, got {found}. Install the package "
                "again, or rebuild it: python -m data_prep.tiny_model FOLDER"
            )
