"""The trainer's side of one engine server: each call is one request to its process, answered within a deadline."""

import contextlib
import logging
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from atropos_exp.errors import EngineError, EngineLost, UserError, WireError
from atropos_exp.parts.engine.process import ServerProcess
from atropos_exp.processes import stopping
from atropos_exp.processes.wire import HEARTBEAT, Message, flatten, pack, split, unpack
from atropos_exp.types import Endpoint, Finish, Floats, Sample, SamplingParams, TokenIds
from atropos_exp.weights.transport import Transport

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class EngineClient:
    """One server of an engine; `servers.Servers` makes an `Engine` of one or several.

        client.wait_until_ready()
        groups = client.generate(prompts, params, num_samples=8)  # one list of 8 samples for each prompt
        client.stop()

    It may be used from several threads; requests that wait at the same time are decoded together. Every method raises
    EngineError if the server does not do what it was asked, and EngineLost if it died or hangs.
    """

    process: ServerProcess
    transport: Transport
    kind: str  # the engine's name in conf/engine
    dtype: str  # of the served weights: float32 | bfloat16 | float16
    start_timeout_seconds: float
    request_timeout_seconds: float
    health_timeout_seconds: float
    max_restarts: int  # of a server that is killed while it starts
    is_lost: bool = field(default=False, init=False)  # a call has found the server dead or hanging

    def __post_init__(self) -> None:
        import httpx

        self._http = httpx.Client(
            base_url=self.process.address,
            headers={"authorization": f"Bearer {self.process.token}"},
            timeout=httpx.Timeout(self.health_timeout_seconds),  # for every single read: the server beats more often
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,  # a proxy has no business on loopback
        )

    @property
    def endpoint(self) -> Endpoint:
        """Where other processes of the run reach this server. All engines' servers speak one protocol, named hf."""
        return Endpoint(kind="hf", address=self.process.address, token=self.process.token)

    def wait_until_ready(self) -> None:
        """Wait until the server answers and has generated a token, at most the time that a start may take."""
        self._started(self._await_first_token)

    def _await_first_token(self) -> None:
        left = self._await_server()
        self.exchange("/health", {}, what="the first token", seconds=max(1.0, left))

    def restart(self) -> None:
        """Replace a lost server by a new one at the same address, which refuses to sample until it has had a complete
        update."""
        self.transport.reset()
        self.transport.clear()
        arguments = ("--problem", "weights incomplete: the engine was started anew and not synced yet")
        self.process.restart(*arguments)
        self._started(self._await_server, *arguments)
        self.is_lost = False

    def _started(self, wait: Callable[[], object], *arguments: str) -> None:
        """`wait`, but while the server is killed meanwhile and restarts are left it is started anew, with
        `arguments`."""
        while True:
            try:
                wait()
                return
            except EngineLost as error:
                if not self._was_killed() or self.process.num_restarts >= self.max_restarts:
                    raise
                log.warning("engine %s was killed while it started, and is started anew: %s", self.kind, error)
            self.process.restart(*arguments)
            self.is_lost = False

    def _was_killed(self) -> bool:
        """From outside, as far as one can tell: a server that crashes by itself gets another signal."""
        return self.process.child.poll() == -signal.SIGKILL

    def _await_server(self) -> float:
        """Wait until the server answers. Returns the seconds that are left of the time that a start may take. Raises
        EngineLost if it is killed meanwhile, EngineError for what would happen again, StopRequested."""
        import httpx

        seconds = self.start_timeout_seconds
        deadline = time.monotonic() + seconds
        while True:
            stopping.check()
            if self.process.child.poll() is not None:
                kind = EngineLost if self._was_killed() else EngineError
                raise kind(f"engine {self.kind} did not start: {self.process.child.state()}")
            try:
                self._http.post("/info", content=pack({"timeout_seconds": 1.0}), timeout=httpx.Timeout(1.0))
                return deadline - time.monotonic()
            except httpx.TransportError:
                if time.monotonic() > deadline:
                    reason = f"waited {seconds:g} s (engine.start_timeout_seconds) for the server to load the model"
                    raise EngineError(
                        f"engine {self.kind} did not start: {reason}; {self.process.child.state()}"
                    ) from None

    def generate(
        self, prompts: Sequence[TokenIds], params: SamplingParams, *, num_samples: int, first_prompt: int = 0
    ) -> list[list[Sample]]:
        """As `Engine.generate`. `first_prompt`: the place of the first prompt in a call that is split between servers.
        Raises UserError for a prompt that does not fit, or a token outside the vocabulary."""
        if not prompts:
            return []
        token_ids, lengths = flatten(prompts, np.int32)
        message = {
            "token_ids": token_ids,
            "lengths": lengths,
            "num_samples": num_samples,
            "temperature": float(params.temperature),
            "top_p": float(params.top_p),
            "top_k": int(params.top_k),
            "max_tokens": int(params.max_tokens),
            "stop_token_ids": [int(token) for token in params.stop_token_ids],
            "seed": int(params.seed),
            "first_prompt": first_prompt,
        }
        what = f"{num_samples} completions of {len(prompts)} prompts, up to {params.max_tokens} tokens each"
        answer = self.exchange("/generate", message, what=what)
        samples = [
            Sample(
                token_ids=tokens,
                logprobs=logprobs,
                finish=Finish.STOP if stopped else Finish.LENGTH,
                policy_version=version,
            )
            for tokens, logprobs, stopped, version in zip(
                split(answer["token_ids"], answer["lengths"]),
                split(answer["logprobs"], answer["lengths"]),
                answer["stopped"].tolist(),
                answer["versions"].tolist(),
                strict=True,
            )
        ]
        assert len(samples) == len(prompts) * num_samples
        return [samples[start : start + num_samples] for start in range(0, len(samples), num_samples)]

    def score(self, sequences: Sequence[TokenIds], *, temperature: float) -> list[Floats]:
        """As `Engine.score`: for each sequence [T] the logprobs [T - 1] of its tokens from the second on, in nats."""
        if not sequences:
            return []
        token_ids, lengths = flatten(sequences, np.int32)
        message = {"token_ids": token_ids, "lengths": lengths, "temperature": float(temperature)}
        answer = self.exchange("/score", message, what=f"the logprobs of {len(sequences)} sequences")
        return split(answer["logprobs"], answer["lengths"])

    def version(self) -> int:
        """The policy version that the server serves; 0 before the first update."""
        return int(self.info()["version"])

    def info(self) -> Message:
        """The server's state: version, problem, expected tensors, batches decoded, library versions and more."""
        return self.exchange("/info", {}, what="its version", seconds=self.health_timeout_seconds)

    def check(self) -> None:
        """Let the server generate one token, as a sign of health."""
        self.exchange("/health", {}, what="a token as a sign of health", seconds=self.health_timeout_seconds)

    def pause(self) -> None:
        """Hold new generations. Returns when the batch in flight has ended."""
        self.exchange("/pause", {}, what="the batch in flight to end")

    def resume(self) -> None:
        """Sample again after `pause`."""
        self.exchange("/resume", {}, what="sampling to resume", seconds=self.health_timeout_seconds)

    def sleep(self) -> tuple[int, int]:
        """As `Engine.sleep`: bytes in use on the device before and after."""
        self.pause()
        try:
            answer = self.exchange("/sleep", {}, what="its memory to be given back")
        except EngineError:
            with contextlib.suppress(EngineError):
                self.resume()
            raise
        return int(answer["bytes_before"]), int(answer["bytes_after"])

    def digests(self) -> dict[str, str]:
        """The digest of every tensor that an update brings, as the server holds it, by name."""
        message = {"on_device": self.transport.on_device}
        found: dict[str, str] = self.exchange("/weights/digests", message, what="the digests of its weights")["digests"]
        return found

    def stop(self) -> None:
        """Kill the server and close the transport. May be called twice."""
        self._http.close()
        self.process.stop()
        self.transport.close()

    def exchange(self, path: str, message: Message, *, what: str, seconds: float | None = None) -> Message:
        """Send one request and return its answer. `what`: what is waited for, in messages. `seconds`: until the
        deadline; None: the settings' `request_timeout_seconds`. Raises EngineError, or UserError for a wrong request.

            client.exchange("/weights/begin", {"version": 7}, what="the update to version 7 to begin")
        """
        import httpx

        seconds = self.request_timeout_seconds if seconds is None else seconds
        deadline = time.monotonic() + seconds
        waiting = f"engine {self.kind}: waited for {what}"
        content = pack({**message, "timeout_seconds": seconds})
        silence = min(seconds, self.health_timeout_seconds)
        try:
            with self._http.stream("POST", path, content=content, timeout=silence) as response:
                body = bytearray()
                for chunk in response.iter_raw():
                    body += chunk
                    if time.monotonic() > deadline + 1.0:  # the server itself gives up at the deadline
                        raise EngineError(f"{waiting} longer than {seconds:g} s; {self.process.child.state()}")
        except httpx.TimeoutException as error:
            reason = f"no sign of life for {silence:g} s (engine.health_timeout_seconds): it hangs"
            self.is_lost = True
            raise EngineLost(f"{waiting}; {reason}. {self.process.child.state()}") from error
        except httpx.TransportError as error:
            self.process.child.wait(1.0)
            self.is_lost = True
            raise EngineLost(f"{waiting}; {type(error).__name__} {error}: {self.process.child.state()}") from error
        try:
            answer = unpack(bytes(body).lstrip(HEARTBEAT))
        except WireError as error:
            got = f"status {response.status_code} and {bytes(body[:80])!r}"
            raise EngineError(f"{waiting}; got {got}: {error}") from None
        if "error" in answer:
            if answer["status"] == 400 and path in ("/generate", "/score"):
                raise UserError(f"engine {self.kind} refused a request for {what}: {answer['error']}")
            raise EngineError(f"{waiting}; it answered {answer['status']}: {answer['error']}")
        return answer
