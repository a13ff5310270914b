"""One sampling request inside the vLLM server, from its rows to the arrays of its answer."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from atropos_exp.parts.engine.serving import queue
from atropos_exp.processes.wire import Message, flatten
from atropos_exp.types import Floats, TokenIds


@dataclass(kw_only=True, eq=False)
class Generation(queue.Generation):
    """One request and the rows of it that vLLM has finished."""

    number: int = field(default_factory=itertools.count(1).__next__)  # unique in this server

    def __post_init__(self) -> None:
        # vLLM takes a seed of 63 bits for each row; those of one request differ and do not depend on other requests.
        self.seeds = [int(key) >> 1 for key in self.keys()]
        self.token_ids: list[TokenIds] = [np.zeros(0, np.int32)] * self.num_rows
        self.logprobs: list[Floats] = [np.zeros(0, np.float32)] * self.num_rows
        self.stopped_N = np.zeros(self.num_rows, dtype=np.bool_)
        self.left = set(range(self.num_rows))  # rows that have not ended

    @property
    def is_truncated(self) -> bool:
        """Whether top-p or top-k cuts the distribution: vLLM's logprobs are then of what is left, renormalised."""
        return self.params.temperature > 0 and (self.params.top_p < 1.0 or self.params.top_k > 0)

    def request_id(self, row: int) -> str:
        """vLLM's name of a row."""
        return f"{self.number}-{row}"

    def take(self, row: int, completion: Any) -> None:
        """Store a finished row. `completion`: vLLM's CompletionOutput."""
        self.token_ids[row] = np.array(completion.token_ids, dtype=np.int32)
        flat = completion.logprobs
        first = np.array(flat.start_indices, dtype=np.int64)  # the sampled token comes first at every position
        self.logprobs[row] = np.array(flat.logprobs, dtype=np.float32)[first]
        assert len(self.token_ids[row]) == len(self.logprobs[row])
        self.stopped_N[row] = completion.finish_reason == "stop"
        self.left.discard(row)

    def sequences(self) -> list[TokenIds]:
        """The prompt and completion of every row, as one sequence."""
        return [np.concatenate([self.prompt_of(row), self.token_ids[row]]) for row in range(self.num_rows)]

    def rescored(self, scores: Sequence[Floats]) -> None:
        """Replace the logprobs by those under the whole distribution. `scores`: of `sequences`, [T - 1] each."""
        self.logprobs = [score[len(score) - len(ids) :] for score, ids in zip(scores, self.token_ids, strict=True)]

    def answer(self, version: int) -> Message:
        """The answer, once every row has ended. `version`: of the policy that sampled it."""
        token_ids, lengths = flatten(self.token_ids, np.int32)
        logprobs, _ = flatten(self.logprobs, np.float32)
        return {
            "token_ids": token_ids,
            "logprobs": logprobs,
            "lengths": lengths,
            "stopped": self.stopped_N,
            "versions": np.full(self.num_rows, version, dtype=np.int64),
        }
