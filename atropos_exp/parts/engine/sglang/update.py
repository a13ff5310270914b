"""Weight updates of the SGLang server: the account, the scheduler's process, and the proof that no old key or value is
left."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from atropos_exp.errors import Refused
from atropos_exp.parts.engine.sglang.loader import LENGTH_BYTES, LOADER, answer_bytes, read_answer
from atropos_exp.processes.wire import Message
from atropos_exp.weights.account import UpdateAccount
from atropos_exp.weights.digest import Digests
from atropos_exp.weights.receiver import BucketSource
from atropos_exp.weights.tensors import layout, write_bucket

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


class SchedulerUpdate:
    """Loads into SGLang's scheduler what `account` admits.

        await update.begin(7)
        await update.load(message)  # for every bucket
        await update.finish()  # version 7 is served

    All of it runs on the engine's event loop. What does not fit raises Refused.
    """

    def __init__(
        self,
        engine: Any,
        account: UpdateAccount,
        source: BucketSource,
        *,
        num_cached: Callable[[], Awaitable[int]],
    ) -> None:
        """`num_cached`: how many tokens of the sentinel prompt the prefix cache has; afterwards it has all of them."""
        self._manager = engine.tokenizer_manager
        self._device = "cpu" if engine.server_args.device == "cpu" else "cuda"
        self._num_ranks: int = engine.server_args.tp_size
        self._account = account
        self._source = source
        self._num_cached = num_cached
        # Whether the scheduler's answers are read: with tensor parallelism they would be those of the first of several.
        self._answers = self._num_ranks == 1
        self._resident: frozenset[str] | None = None  # names of tensors that can be read back, once asked for
        self._names: set[str] = set()  # that came in this update
        self._arrived = Digests()  # of what came and cannot be read back
        self._memory: Tensor | None = None  # seen by the scheduler's process too; kept for the time of an update
        self.num_resident = 0  # of the last digests, those of tensors that the model uses
        self.num_cache_proofs = 0

    async def begin(self, version: int) -> None:
        """Start an update, whatever became of the last one."""
        self._account.begin(version)
        if self._account.problem is None:
            with self._account.spent("prefixes"):
                await self._num_cached()  # from now on the sentinel is in the prefix cache
        if self._resident is None:
            self._resident = await self._find_resident()
        self._names = set()
        self._arrived = Digests()

    async def load(self, message: Message) -> None:
        """Load one bucket in the scheduler's process."""
        assert self._resident is not None, "begin comes first"
        for name, kind in self._source.kinds(message):
            self._account.admit(name, kind)
        bucket = list(self._source.read(message))
        self._arrived.add([(name, tensor) for name, tensor in bucket if name not in self._resident])
        own = [(name, tensor) for name, tensor in bucket if name not in self._account.aliases]
        for name, _ in bucket:
            self._account.received(name)
        if own:
            await self._ask({}, own)
        self._names.update(name for name, _ in bucket)

    async def finish(self) -> None:
        """Accept the update if every tensor has arrived and no old key or value can be read any more."""
        self._account.check_complete()
        try:
            await self._check_tied()
            with self._account.spent("flush"):
                flushed = await self._manager.flush_cache()
            if not flushed.success:
                raise Refused(500, f"SGLang could not flush its prefix cache: {flushed.message}")
            with self._account.spent("prefixes"):
                num_cached = await self._num_cached()
            if num_cached:
                raise Refused(500, f"the prefix cache still gives {num_cached} tokens of older weights")
        except Exception:
            await self.abort()
            raise
        self.num_cache_proofs += 1
        self._account.finish()
        self._release()

    async def abort(self) -> None:
        """Abandon the update and release its memory."""
        self._account.abort()
        self._release()

    async def digests(self, *, on_device: bool) -> Mapping[str, str]:
        """The digest of each expected tensor that came: as the model holds it where that can be read back, otherwise as
        it arrived."""
        wanted = [name for name in self._names if name in self._account.expected]
        found = await self._held([name for name in wanted if name in (self._resident or ())], on_device=on_device)
        self.num_resident = len(found)
        arrived = self._arrived.read()
        return found | {name: arrived[name] for name in wanted if name not in found}

    async def _check_tied(self) -> None:
        for alias in self._names & set(self._account.aliases):
            owner = self._account.aliases[alias]
            arrived = self._arrived.read()
            held = arrived | await self._held([owner] if owner not in arrived else [], on_device=self._source.on_device)
            if held[alias] != held[owner]:
                raise Refused(400, f"{alias} is tied to {owner}, but the two were sent with different values")

    async def _find_resident(self) -> frozenset[str]:
        """Nothing where no answer of SGLang's can be read: then a load that fails ends its process, and digests are of
        what came."""
        answer = await self._ask({"kinds": self._account.kinds}) if self._answers else None
        if answer is None:
            self._answers = False
            logger.warning("no tensor can be read back from SGLang: digests are of what arrived here")
            return frozenset()
        return frozenset(answer["names"])

    async def _held(self, names: Sequence[str], *, on_device: bool) -> dict[str, str]:
        """Digests of resident tensors."""
        if not names:
            return {}
        request = {"kinds": self._account.kinds, "digests": list(names), "on_device": on_device}
        answer = await self._ask(request)
        if not self._account.is_open:
            self._release()
        if answer is None:
            raise Refused(500, "SGLang gave no digests")
        return dict(answer["digests"])

    async def _ask(
        self, request: Mapping[str, Any], bucket: Sequence[tuple[str, Tensor]] = ()
    ) -> dict[str, Any] | None:
        """The answer of `loader.load` in the scheduler's process, which gets the bucket's tensors; None: none.

        They go there as one tensor of bytes: for each tensor SGLang would need a handle. It must be this process's own
        memory, since a handle of another's cannot be passed on."""
        import torch
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput
        from sglang.srt.utils import MultiprocessingSerializer

        pieces, num_bytes = layout(bucket)
        room = answer_bytes(list(self._account.kinds))
        memory, self._memory = self._memory, None  # lost if this is cancelled: the scheduler may still write there
        with self._account.spent("copy"):
            if memory is None or len(memory) < room + num_bytes:
                memory = torch.empty(room + num_bytes, dtype=torch.uint8, device=self._device)
            memory[:LENGTH_BYTES].zero_()
            write_bucket(bucket, pieces, memory[room:])
            if self._device == "cuda":
                torch.cuda.synchronize()
        whole = {**request, "answers": self._answers, "answer_bytes": room}
        if bucket:
            whole["pieces"] = [piece.to_message() for piece in pieces]
        named = [(json.dumps(whole), memory)]
        serialized = [MultiprocessingSerializer.serialize(named) for _ in range(self._num_ranks)]
        with self._account.spent("load" if bucket else "digests"):
            success, reason = await self._manager.update_weights_from_tensor(
                UpdateWeightsFromTensorReqInput(
                    serialized_named_tensors=serialized, load_format=LOADER, flush_cache=False
                ),
                None,
            )
            answer = read_answer(memory) if success else {"error": reason}
        if answer is not None and "error" in answer:
            what = f"did not load {bucket[0][0]} .." if bucket else "gave no digests"
            raise Refused(500, f"SGLang {what}: {answer['error']}")
        if answer is None and bucket and self._answers:
            raise Refused(500, f"SGLang did not say that it loaded {bucket[0][0]} ..")
        self._memory = memory
        return answer

    def _release(self) -> None:
        """Give the memory of the buckets back."""
        self._memory = None
        if self._device == "cuda":
            import torch

            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()
