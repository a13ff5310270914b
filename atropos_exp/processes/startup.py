"""What a program does with Python's imports before it imports much: large libraries, and a package's rightful place."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location

from atropos_exp.processes.child import IMPORT_ROOT


def load_own(package: str) -> None:
    """Import `package` from beside this one, where a folder of that name in the working directory would hide it."""
    folder = IMPORT_ROOT / package
    if package in sys.modules or not folder.is_dir():
        return
    spec = spec_from_file_location(package, folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec is not None and spec.loader is not None
    module = sys.modules[package] = module_from_spec(spec)
    spec.loader.exec_module(module)


@contextmanager
def no_collections() -> Iterator[None]:
    """Do not collect garbage in this block.

    What an import creates stays for good, and visiting it again and again takes a fifth of the time of importing torch,
    transformers and verl.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def tokenizers_only() -> Iterator[None]:
    """Hide PyTorch from transformers, if that is first imported in this block.

    It then offers its tokenizers only, which saves three seconds of computation and 270 MB on a CPU. Other code may
    import PyTorch afterwards. Without effect where PyTorch is imported already.
    """
    if "torch" in sys.modules:
        yield
        return
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would warn that there is no PyTorch
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]
