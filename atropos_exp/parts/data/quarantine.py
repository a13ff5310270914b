"""Bad rows: each is recorded in quarantine.jsonl, and too many are refused."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from atropos_exp.errors import UserError
from atropos_exp.parts.data.rows import BadRow
from atropos_exp.parts.data.source import RawSource
from atropos_exp.runs.atomic import replacing

FILE_NAME = "quarantine.jsonl"


def write_quarantine(run_folder: Path, sources: Iterable[RawSource]) -> None:
    """Replace the file by a line {file, row, reason, content} per bad row."""
    files = [file for source in sources for file in source.files if file.num_bad]
    if files:
        with replacing(run_folder / FILE_NAME) as draft, open(draft, "w", encoding="utf-8", errors="replace") as out:
            for bad in (bad for file in files for bad in file.bad_rows()):
                out.write(json.dumps(asdict(bad), ensure_ascii=False) + "\n")


def refuse_too_many_bad(sources: Sequence[RawSource], max_bad_fraction: float) -> None:
    """Raise UserError if a source has more bad rows than allowed, or only bad ones."""
    for source in sources:
        allowed = int(max_bad_fraction * source.num_rows + 1e-9)
        if source.num_bad > allowed:
            by_reason: dict[str, BadRow] = {}
            for file in source.files:
                for bad in file.bad_rows():
                    by_reason.setdefault(bad.reason, bad)
            shown = list(by_reason.values())[:3]
            first = "; ".join(f"{bad.file} row {bad.row}: {bad.reason}" for bad in shown)
            more = f"; and {source.num_bad - len(shown)} more" if source.num_bad > len(shown) else ""
            raise UserError(
                f"data: {source.num_bad} of {source.num_rows} rows of {source.name} are bad, more than the {allowed} "
                f"that data.max_bad_fraction={max_bad_fraction} allows: {first}{more}; "
                f"mend them ({FILE_NAME} in the run folder lists them all) or raise data.max_bad_fraction"
            )
