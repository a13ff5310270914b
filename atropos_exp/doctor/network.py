"""The ports that the run will listen on, and the Atropos API that it will train from."""

import json
from pathlib import Path

from atropos_exp.assembly.check import Checked
from atropos_exp.config.freeze import config_hash
from atropos_exp.doctor.line import Line, fail, ok, split_remedy, warn
from atropos_exp.errors import UserError
from atropos_exp.parts.atropos.client import ApiDown, AtroposClient


def check_ports(checked: Checked) -> list[Line]:
    """Bind the ports that the gateway will bind, and release them."""
    gateway, extra = checked.parts.gateway, checked.parts.atropos.extra_ports
    if not checked.parts.rollout.uses_atropos:
        return [ok("ports", "none is needed: rollout=local starts no gateway")]
    try:
        gateway.listen(extra).close()
    except UserError as error:
        return [fail("ports", *split_remedy(str(error)))]
    wanted = [str(port) for port in ([gateway.port] if gateway.port else []) + list(extra)]
    return [ok("ports", f"free: {', '.join(wanted)}" if wanted else f"the gateway takes a free one of {gateway.host}")]


def check_atropos(checked: Checked) -> list[Line]:
    """Examine whom the API serves: nobody, this run, another one, or data that no trainer registered for."""
    settings = checked.parts.atropos
    if not checked.parts.rollout.uses_atropos:
        return [ok("atropos", "rollout=local does not use it")]
    if settings.api_url is None:
        return [ok("atropos", "the run starts an API and its environments")]
    client = AtroposClient(settings.api_url, batch_seconds=settings.batch_timeout)
    try:
        return [_state(checked, client)]
    except ApiDown as error:
        return [_down(checked, str(error))]
    finally:
        client.close()


def _down(checked: Checked, reason: str) -> Line:
    settings = checked.parts.atropos
    remedy = f"start it (run-api), or correct atropos.api_url={settings.api_url}"
    if settings.launch:
        return warn("atropos", f"{reason}: the run starts an API of its own instead", remedy)
    if checked.falls_back:
        return warn("atropos", f"{reason}: the run goes on with local rollouts", remedy)
    return fail(
        "atropos", f"{reason}, and the run has nothing else", f"{remedy}, or rollout=auto with env.fallback=true"
    )


def _state(checked: Checked, client: AtroposClient) -> Line:
    client.check()
    found = client.registered()
    run = checked.run
    if found.nobody:
        if client.has_example():
            return warn(
                "atropos",
                f"{client.url} serves nobody, yet groups have arrived: unless it was reset since, it is poisoned and "
                "ignores every registration",
                "nothing: the run resets it when it registers, which ends environments that wait there; or do it "
                f"yourself: curl {client.url}/reset_data",
            )
        return ok("atropos", f"{client.url} is free")
    mine = (run.batch_size * run.group_size, checked.max_sequence_length + 1)
    if found.group in _own_groups(checked) and (found.batch_size, found.max_token_len) == mine:
        return ok("atropos", f"{client.url} serves this very run, which will continue")
    text = (
        f"{client.url} serves another run: project {found.project!r}, group {found.group!r}, batch_size "
        f"{found.batch_size}, max_token_len {found.max_token_len}"
    )
    if checked.parts.atropos.take_over:
        return warn("atropos", f"{text}; atropos.take_over=true ends it", "leave take_over out if that run is wanted")
    remedy = "wait for that run, use another API (atropos.api_url), or, if nobody needs it, atropos.take_over=true"
    return fail("atropos", text, remedy)


def _own_groups(checked: Checked) -> set[str]:
    """What this configuration's unfinished runs are called there, or would be."""
    if given := checked.parts.logger.group:
        return {given}
    run, own = checked.run, config_hash(checked.config)
    base = Path(run.output_dir).expanduser() / run.name
    folders = [Path(run.run_dir).expanduser()] if run.run_dir else [path.parent for path in base.glob("*/*/run.json")]
    groups = set()
    for folder in folders:
        try:
            identity = json.loads((folder / "run.json").read_text())
        except (OSError, ValueError):
            continue
        if identity.get("config_hash") == own:
            groups.add("/".join(folder.parts[-3:]))
    return groups
