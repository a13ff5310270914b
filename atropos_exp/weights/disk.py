"""TODO."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from atropos_exp.weights.transport import Bucket, Laid, Message

if TYPE_CHECKING:
    pass


class DiskTransport(Laid):
    """One safetensors file, overwritten by each bucket, in a folder of its own."""

    FILE = "bucket.safetensors"
    on_device = False

    def __init__(self, parent: Path) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix="weights_", dir=parent))

    @property
    def inherited_fds(self) -> tuple[int, ...]:
        return ()

    def arguments(self, server: int) -> list[str]:
        return ["--weights-folder", str(self._folder)]

    def write(self, bucket: Bucket) -> Message:
        from safetensors.torch import save_file

        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in bucket}, self._folder / self.FILE)
        return {"file": self.FILE}

    def clear(self) -> None:
        (self._folder / self.FILE).unlink(missing_ok=True)

    def close(self) -> None:
        self.clear()
        with contextlib.suppress(FileNotFoundError):
            self._folder.rmdir()
