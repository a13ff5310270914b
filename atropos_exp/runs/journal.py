"""The rollout journal: the groups of one step, on disk before the update that uses them. Imports pyarrow when needed.

    write_journal(path, Journal(step=12, groups=groups, dropped=dropped, state=source.state()))
    journal = read_journal(path)  # equal to what was written, bit for bit; None if there is no intact file

A parquet row is a rollout (open it with pandas); the groups, the drop counts and the source's state after the step
travel in the file's metadata, with a digest over everything.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from atropos_exp.runs.atomic import replacing
from atropos_exp.types import Dropped, Finish, Rollout, RolloutGroup

if TYPE_CHECKING:
    from pyarrow import Array, Table

log = logging.getLogger(__name__)

FORMAT = 3
_LISTS: Mapping[str, type[np.generic]] = {
    "token_ids": np.int32,
    "trained": np.bool_,
    "logprobs": np.float32,
    "advantages": np.float32,
    "reference_logprobs": np.float32,
}
_SCALARS: Mapping[str, str] = {  # of pyarrow
    "reward": "float64",
    "finish": "string",
    "policy_version": "int64",
    "zero_advantage": "bool",
    "temperature": "float64",
    "supervised": "bool",
    "by_engine": "bool",
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Journal:
    """What one step was trained on, and where the rollout source stood after it."""

    step: int
    groups: list[RolloutGroup]
    dropped: Dropped
    state: Mapping[str, Any] = field(default_factory=dict)  # JSON: the rollout source's, after this step


def write_journal(path: Path, journal: Journal) -> None:
    """Write the journal to `path` atomically; it is on the disk on return."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rollouts = [rollout for group in journal.groups for rollout in group.rollouts]
    head = json.dumps(
        {
            "format": FORMAT,
            "step": journal.step,
            "groups": [[group.prompt_id, group.source, len(group.rollouts)] for group in journal.groups],
            "dropped": dict(journal.dropped.reasons),
            "state": dict(journal.state),
        }
    )
    group_of_rollout = [at for at, group in enumerate(journal.groups) for _ in group.rollouts]
    columns: dict[str, Array] = {
        "group": pa.array(group_of_rollout, pa.int32()),
        "prompt_id": pa.array([journal.groups[at].prompt_id for at in group_of_rollout], pa.string()),
    }
    for name, alias in _SCALARS.items():
        values = [rollout.finish.value if name == "finish" else getattr(rollout, name) for rollout in rollouts]
        columns[name] = pa.array(values, pa.type_for_alias(alias))
    for name, dtype in _LISTS.items():
        kind = pa.large_list(pa.from_numpy_dtype(dtype))
        columns[name] = pa.array([getattr(rollout, name) for rollout in rollouts], kind)
    metadata = {"atropos_exp.head": head, "atropos_exp.digest": _digest(head, rollouts)}
    with replacing(path) as draft:
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), draft, compression="zstd")


def read_journal(path: Path) -> Journal | None:
    """Return the journal at `path`; None if there is none or if it is damaged, which a warning then names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        return None
    try:
        table = pq.read_table(path)
        metadata = table.schema.metadata or {}
        head = metadata[b"atropos_exp.head"].decode()
        facts = json.loads(head)
        if facts["format"] != FORMAT:
            log.warning(
                "rollout journal %s counts as absent: it has format %s, this version reads %d",
                path, facts["format"], FORMAT,
            )  # fmt: skip
            return None
        journal = _from_table(facts, table)
        found = _digest(head, [rollout for group in journal.groups for rollout in group.rollouts])
        if found != metadata[b"atropos_exp.digest"].decode():
            raise ValueError("its digest does not match its content")
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:  # what a torn or altered file raises
        log.warning("rollout journal %s is damaged and counts as absent: %s", path, error)
        return None
    return journal


def _from_table(head: dict[str, Any], table: Table) -> Journal:
    fields = {name: [array if array is None else array.copy() for array in table[name].to_numpy()] for name in _LISTS}
    fields |= {name: table[name].to_pylist() for name in _SCALARS}
    fields["finish"] = [Finish(value) for value in fields["finish"]]
    rollouts = [Rollout(**dict(zip(fields, row, strict=True))) for row in zip(*fields.values(), strict=True)]
    if sum(num for _, _, num in head["groups"]) != len(rollouts):
        raise ValueError(f"it names {head['groups']} groups and holds {len(rollouts)} rollouts")
    rest = iter(rollouts)
    groups = [
        RolloutGroup(prompt_id=prompt_id, source=source, rollouts=tuple(next(rest) for _ in range(num)))
        for prompt_id, source, num in head["groups"]
    ]
    return Journal(step=head["step"], groups=groups, dropped=Dropped(reasons=head["dropped"]), state=head["state"])


def _digest(head: str, rollouts: Sequence[Rollout]) -> str:
    """blake2b over the head and every field of every rollout, with lengths, so that nothing can slide over."""
    digest = hashlib.blake2b(head.encode(), digest_size=16)
    for part in _parts(rollouts):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _parts(rollouts: Sequence[Rollout]) -> Iterator[bytes]:
    for rollout in rollouts:
        yield np.float64(rollout.reward).tobytes()
        flags = (rollout.policy_version, rollout.zero_advantage, rollout.supervised, rollout.by_engine)
        yield " ".join([rollout.finish.value, *map(str, flags)]).encode()
        yield b"absent" if rollout.temperature is None else np.float64(rollout.temperature).tobytes()
        for name, dtype in _LISTS.items():
            array = getattr(rollout, name)
            yield b"absent" if array is None else np.ascontiguousarray(array, dtype).tobytes()
