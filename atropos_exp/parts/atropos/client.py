"""A client of the Atropos API. Every call has a deadline, and one that takes data from a queue is never repeated."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import httpx

from atropos_exp.parts.atropos.stream import BrokenJSON, NoGroups, groups

Group = TypeVar("Group")

GREETING = "AtroposLib API"  # the answer to GET /
CONNECT_SECONDS = 2.0
ANSWER_SECONDS = 10.0  # for every call but GET /batch


class ApiDown(RuntimeError):
    """Nothing answers, or something that is no Atropos API. The text says which."""


class ApiLost(RuntimeError):
    """The API answers but does not know this run: it was restarted or reset."""


class BatchLost(RuntimeError):
    """A batch left the API's queue and did not arrive: the API has no copy. The text says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Registration:
    """The body of POST /register; the API requires every field."""

    wandb_group: str
    wandb_project: str
    batch_size: int  # sequences, not groups
    max_token_len: int  # environments drop groups with a sequence of this length or more
    checkpoint_dir: str
    save_checkpoint_interval: int
    starting_step: int
    num_steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Registered:
    """Which run the API serves now, as far as it says."""

    batch_size: int  # -1: it serves no run
    max_token_len: int
    project: str | None
    group: str | None

    @property
    def nobody(self) -> bool:
        """Whether the API serves no run."""
        return self.batch_size == -1

    def matches(self, registration: Registration) -> bool:
        """Whether the API serves the run of `registration`."""
        return (self.batch_size, self.max_token_len, self.project, self.group) == (
            registration.batch_size,
            registration.max_token_len,
            registration.wandb_project,
            registration.wandb_group,
        )


class AtroposClient:
    """The client of one API server. `batch` must be called from one thread at a time, the rest from any.

    Every method raises ApiDown if the API does not answer as one.
    """

    def __init__(self, url: str, *, batch_seconds: float) -> None:
        """`batch_seconds`: deadline of GET /batch, which blocks the API's event loop for seconds when batches are
        large, and loses the batch if the client hangs up."""
        self.url = url.rstrip("/")
        self._batch_timeout = httpx.Timeout(batch_seconds, connect=CONNECT_SECONDS)
        self._http = httpx.Client(
            base_url=self.url,
            headers={"accept-encoding": "identity"},  # packing a large batch costs the API far longer than sending it
            timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
            # A kept connection may be closed by the API just as it is used again; was a batch taken then, or not?
            limits=httpx.Limits(max_keepalive_connections=0),
            trust_env=False,
        )

    def check(self) -> None:
        """Raise ApiDown unless an Atropos API answers."""
        greeting = self._json("GET", "/")
        if not isinstance(greeting, dict) or greeting.get("message") != GREETING:
            raise ApiDown(f"{self.url} answers, but is no Atropos API (GET / gave {str(greeting)[:80]!r})")

    def registered(self) -> Registered:
        """Which run the API serves now."""
        info, wandb = self._json("GET", "/info"), self._json("GET", "/wandb_info")
        return Registered(
            batch_size=int(info["batch_size"]),
            max_token_len=int(info["max_token_len"]),
            project=wandb["project"],
            group=wandb["group"],
        )

    def register(self, registration: Registration) -> None:
        """Register. An API in use answers 200 and ignores it, so use `registration.register`, which verifies it."""
        self._json("POST", "/register", asdict(registration))

    def reset(self) -> None:
        """Make the API forget registration, queue and environments; the environments' processes then end."""
        self._send("GET", "/reset_data")

    def status(self) -> tuple[int, int]:
        """The API's step (its starting step plus the batches formed since) and the number of queued groups."""
        status = self._json("GET", "/status")
        return int(status["current_step"]), int(status["queue_size"])

    def has_example(self) -> bool:
        """Whether any group has arrived since the API was started."""
        return bool(self._json("GET", "/latest_example").get("tokens"))

    def environment(self, env_id: int) -> Mapping[str, Any] | None:
        """What the API tells the environment with this number, even a dead one; None if there is none."""
        response = self._send("GET", "/status-env", {"env_id": env_id}, allow_error=True)
        if response.status_code != 200:
            return None
        status: Mapping[str, Any] = response.json()
        return status

    def disconnect(self, env_id: int) -> None:
        """Deregister a dead environment, which the API would otherwise count for ever."""
        assert env_id >= 0, "the API counts negative numbers from the end"
        self._json("POST", "/disconnect-env", {"env_id": env_id})

    def batch(self, read: Callable[[Any], Group] = lambda raw: raw) -> list[Group] | None:
        """What `read` makes of each group of the next batch, as the environments sent them (lists of numbers are arrays
        in them); None while there is no batch. Each is read as it arrives, so the whole is never in memory.

        Raises ApiLost if this run is not registered, BatchLost if a batch was taken and is gone, ApiDown.
        """
        try:
            with self._http.stream("GET", "/batch", timeout=self._batch_timeout) as response:
                if response.status_code != 200:
                    raise self._refused(response)
                return _read_batch(response.iter_raw(), read)
        except httpx.ReadTimeout:
            raise BatchLost(
                f"GET /batch took longer than {self._batch_timeout.read:g} s (atropos.batch_timeout): what it "
                "was sending is lost"
            ) from None
        except (httpx.ReadError, httpx.RemoteProtocolError) as error:
            raise ApiDown(f"{self.url} broke off while sending a batch ({error})") from None
        except httpx.TransportError as error:
            raise ApiDown(f"{self.url} does not answer ({error})") from None

    def _refused(self, response: httpx.Response) -> Exception:
        """Why there is no batch in it. The API itself answers 500; a proxy before it others."""
        if response.status_code == 500:
            return BatchLost(
                "GET /batch answered 500: the API cannot send what it took from its queue, as when a group holds NaN "
                "or infinity"
            )
        text = response.read()[:200].decode(errors="replace")
        return ApiDown(
            f"GET {self.url}/batch answered {response.status_code}, as a proxy does that does not reach the API: {text}"
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        response = self._send(method, path, body)
        try:
            return response.json()
        except ValueError:
            raise ApiDown(f"{self.url}{path} answers, but not with JSON: is it an Atropos API?") from None

    def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, allow_error: bool = False
    ) -> httpx.Response:
        try:
            response = self._http.request(method, path, json=body)  # a GET with a body too: the API wants it
        except httpx.TransportError as error:
            raise ApiDown(f"{self.url} does not answer ({type(error).__name__}: {error})") from None
        if response.status_code >= 400 and not allow_error:
            raise ApiDown(f"{method} {self.url}{path} answered {response.status_code}: {response.text[:200]}")
        return response


def _read_batch(pieces: Iterable[bytes], read: Callable[[Any], Group]) -> list[Group] | None:
    batch: list[Group] = []
    try:
        for group in groups(pieces):
            batch.append(read(group))
    except NoGroups as none:
        if none.answer.get("status") == "error":
            raise ApiLost(str(none.answer.get("message"))) from None
    except BrokenJSON as error:
        raise BatchLost(f"GET /batch sent no JSON ({error})") from None
    return batch or None
