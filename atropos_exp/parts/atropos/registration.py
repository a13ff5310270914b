"""Registering a run with an Atropos API, and making sure that the API serves it."""

import logging

from atropos_exp.errors import UserError
from atropos_exp.parts.atropos.client import ApiDown, AtroposClient, Registered, Registration

log = logging.getLogger(__name__)


class ForeignRun(UserError):
    """The API serves another run."""


def register(client: AtroposClient, registration: Registration, *, take_over: bool) -> str:
    """Make the API serve `registration`, verify that it does, and return how: "new", "adopted" or "reset".

    "adopted": it served this run already (a resumed one), with environments and queue. "reset": it was made to forget
    everything first, for instance because a group had arrived before any trainer, after which the API answers every
    registration with 200 and ignores it. Raises ForeignRun if it serves another run and `take_over` is false.
    """
    found = client.registered()
    if found.matches(registration):
        return "adopted"
    if found.nobody:
        client.register(registration)
        if client.registered().matches(registration):
            return "new"
        log.warning("the Atropos API at %s ignored the registration (it held data of nobody): it is reset", client.url)
    elif take_over:
        log.warning("%s; atropos.take_over=true, so it is reset", _in_use(client, found))
    else:
        raise ForeignRun(
            f"{_in_use(client, found)}\n"
            "Wait for that run, use another API (atropos.api_url), or, if nobody needs it any more, take it over with "
            "atropos.take_over=true, which resets it and ends its environments"
        )
    client.reset()
    client.register(registration)
    found = client.registered()
    if not found.matches(registration):
        raise ApiDown(
            f"{client.url} took the registration (batch_size {registration.batch_size}, max_token_len "
            f"{registration.max_token_len}) but says that it serves batch_size {found.batch_size}, max_token_len "
            f"{found.max_token_len}: another trainer registers at the same time"
        )
    return "reset"


def _in_use(client: AtroposClient, found: Registered) -> str:
    return (
        f"the Atropos API at {client.url} serves another run: project {found.project!r}, group {found.group!r}, "
        f"batch_size {found.batch_size}, max_token_len {found.max_token_len}"
    )
