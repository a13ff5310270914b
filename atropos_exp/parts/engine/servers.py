"""The `Engine` that a run talks to: one server, or several of the same model (data-parallel sampling)."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import pairwise

from atropos_exp.errors import EngineError
from atropos_exp.interfaces import WeightReceiver
from atropos_exp.parts.engine.client import EngineClient
from atropos_exp.parts.engine.update import together, update
from atropos_exp.types import Endpoint, Floats, Sample, SamplingParams, TokenIds
from atropos_exp.weights.transport import Transport


@dataclass(frozen=True, eq=False)
class Servers:
    """An `Engine` of one or more servers that share one transport: a bucket is written once and read by all of them.

        engine = Servers([client], transport)
        with engine.updating(version=7) as receiver:
            receiver.receive([("lm_head.weight", tensor), ...])  # until all tensors have been sent

    An update is accepted when every server has accepted it, and their digests must agree. Prompts are split into
    contiguous blocks, and each row keeps the seed that it would have had with one server. Errors are those of
    `EngineClient`.
    """

    replicas: Sequence[EngineClient]  # the client of each server
    transport: Transport

    @property
    def dtype(self) -> str:
        return self.replicas[0].dtype

    @property
    def endpoint(self) -> Endpoint:
        """Of the first server; `replicas` have one each."""
        return self.replicas[0].endpoint

    @property
    def transfers_on_device(self) -> bool:
        return self.transport.on_device

    def generate(self, prompts: Sequence[TokenIds], params: SamplingParams, *, num_samples: int) -> list[list[Sample]]:
        count = len(self.replicas)
        bounds = [len(prompts) * number // count for number in range(count + 1)]
        blocks = [
            (client, start, end)
            for client, (start, end) in zip(self.replicas, pairwise(bounds), strict=True)
            if end > start
        ]
        if not blocks:
            return []

        def work(block: tuple[EngineClient, int, int]) -> list[list[Sample]]:
            client, start, end = block
            return client.generate(prompts[start:end], params, num_samples=num_samples, first_prompt=start)

        return [group for part in together(blocks, work) for group in part]

    def score(self, sequences: Sequence[TokenIds], *, temperature: float) -> list[Floats]:
        """By the first server: all serve the same weights, which every weight sync proves."""
        return self.replicas[0].score(sequences, temperature=temperature)

    def digests(self) -> dict[str, str]:
        """Of the first server, as `score`."""
        return self.replicas[0].digests()

    def version(self) -> int:
        versions = together(self.replicas, lambda client: client.version())
        if len(set(versions)) > 1:
            raise EngineError(f"the engine's servers serve different versions: {versions}")
        return versions[0]

    def libraries(self) -> dict[str, str]:
        """Of the first server's environment: all are started alike."""
        return dict(self.replicas[0].info()["versions"])

    def check(self) -> None:
        together(self.replicas, lambda client: client.check())

    def sleep(self) -> tuple[int, int]:
        """As `Engine.sleep`. Servers on the same GPU each measure all of it: the most before, the least after."""
        found = together(self.replicas, lambda client: client.sleep())
        return max(before for before, _ in found), min(after for _, after in found)

    def updating(self, version: int) -> AbstractContextManager[WeightReceiver]:
        return update(self.replicas, self.transport, version)

    def restart(self) -> None:
        """Restart the servers that are lost. The others wait for the update that makes all of them equal again."""
        lost = [client for client in self.replicas if client.is_lost or client.process.child.poll() is not None]
        together(lost or self.replicas, lambda client: client.restart())

    def stop(self) -> None:
        """Stop one server after the other: each closes the transport that they share."""
        with ExitStack() as stack:
            for client in self.replicas:
                stack.callback(client.stop)
