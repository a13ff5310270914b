"""`engine.transport=disk`: weights through a file, for machines without shared memory, or to look at what was sent."""

import contextlib
import tempfile
from pathlib import Path

from atropos_exp.processes.wire import Message
from atropos_exp.weights.transport import Bucket, StoredTransport


class DiskTransport(StoredTransport):
    """One safetensors file, overwritten by each bucket, in a new folder inside `log_folder`."""

    FILE = "bucket.safetensors"
    on_device = False

    def __init__(self, log_folder: Path) -> None:
        log_folder.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix="weights_", dir=log_folder))

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
