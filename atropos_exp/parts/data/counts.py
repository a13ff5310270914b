"""How many rows became prompts, and why the others did not."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceCounts:
    """The rows of one source, or the sums over several. `num_rows` is the sum of all other fields."""

    num_rows: int  # in the files
    num_quarantined: int = 0  # bad rows, listed in quarantine.jsonl
    num_other_ability: int = 0  # left out by data.ability
    num_eval_overlap: int = 0  # the same text as an eval prompt
    num_overlong: int = 0  # more tokens than max_prompt_length
    num_beyond_cap: int = 0  # left out by data.max_prompts, before they were tokenised
    num_prompts: int = 0  # trained on

    def __post_init__(self) -> None:
        assert self.num_rows == sum(getattr(self, one.name) for one in fields(self)) - self.num_rows, asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataCounts:
    """The counts of a loader."""

    total: SourceCounts
    sources: tuple[tuple[str, SourceCounts], ...]  # in the order of data.weights
    shares: tuple[int, ...]  # prompts per epoch from each source
    num_copies: int  # prompts with the same text as an earlier one, up to case and spacing
    num_eval_rows: int  # good held-out rows that no training prompt equals
    num_eval_copies: int  # of them, with the same text as an earlier one
    num_eval_quarantined: int
    num_renamed_ids: int  # prompt ids that occurred twice and got a suffix
    notes: tuple[str, ...]  # what was guessed, and what is not used

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """One line of text per source, then what else there is to know."""
        lines = [
            f"{name}: {one.num_prompts} prompts of {one.num_rows} rows, {share} an epoch{_left_out(one)}"
            for (name, one), share in zip(self.sources, self.shares, strict=True)
        ]
        if self.num_copies:
            distinct = self.total.num_prompts - self.num_copies
            lines.append(f"{self.num_copies} prompts are copies of others: {distinct} distinct ones are trained on")
        if self.num_eval_copies:
            distinct = self.num_eval_rows - self.num_eval_copies
            lines.append(
                f"{self.num_eval_copies} of {self.num_eval_rows} held-out rows are copies of others: "
                f"intervals count the {distinct} distinct ones"
            )
        return [*lines, *self.notes]


def add(counts: Iterable[SourceCounts]) -> SourceCounts:
    """The sums, field by field."""
    rows = [asdict(one) for one in counts]
    return SourceCounts(**{field.name: sum(row[field.name] for row in rows) for field in fields(SourceCounts)})


def _left_out(counts: SourceCounts) -> str:
    words = {
        "num_quarantined": "quarantined",
        "num_other_ability": "of another ability",
        "num_eval_overlap": "also in the eval set",
        "num_overlong": "overlong",
        "num_beyond_cap": "beyond max_prompts",
    }
    parts = [f"{getattr(counts, name)} {text}" for name, text in words.items() if getattr(counts, name)]
    return f" (left out: {', '.join(parts)})" if parts else ""
