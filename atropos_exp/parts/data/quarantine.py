"""Bad rows: each is recorded in quarantine.jsonl, and too many are refused."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from atropos_exp.errors import UserError
from atropos_exp.parts.data.source import RawSource
from atropos_exp.runs.atomic import write_atomic

FILE_NAME = "quarantine.jsonl"


def write_quarantine(run_folder: Path, sources: Iterable[RawSource]) -> None:
    """Replace the file by a line {file, row, reason, content} per bad row."""
    lines = [json.dumps(asdict(bad), ensure_ascii=False, default=repr) for source in sources for bad in source.bad]
    if lines:
        write_atomic(run_folder / FILE_NAME, "".join(f"{line}\n" for line in lines).encode("utf-8", errors="replace"))


def refuse_too_many_bad(sources: Sequence[RawSource], max_bad_fraction: float) -> None:
    """Raise UserError if a source has more bad rows than allowed, or only bad ones."""
    for source in sources:
        num_rows = sum(stamp.num_rows for stamp in source.files)
        allowed = int(max_bad_fraction * num_rows + 1e-9)
        if len(source.bad) > allowed:
            first = "; ".join(f"{bad.file} row {bad.row}: {bad.reason}" for bad in source.bad[:3])
            more = f"; and {len(source.bad) - 3} more" if len(source.bad) > 3 else ""
            raise UserError(
                f"data: {len(source.bad)} of {num_rows} rows of {source.name} are bad, more than the {allowed} that "
                f"data.max_bad_fraction={max_bad_fraction} allows: {first}{more}; "
                f"mend them ({FILE_NAME} in the run folder lists them all) or raise data.max_bad_fraction"
            )
