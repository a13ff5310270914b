"""What Slurm's limits allow, compared with what `cluster=slurm` asks for."""

import re
import shutil
import subprocess

from atropos_exp.assembly.check import Checked
from atropos_exp.doctor.line import Line, fail, ok
from atropos_exp.parts.cluster.slurm.settings import SlurmSettings

_ASK_SECONDS = 10.0


def check_slurm(checked: Checked) -> list[Line]:
    """Compare the job with the limits of its partition; nothing for a cluster that is not Slurm's."""
    cluster = checked.parts.cluster
    if not isinstance(cluster, SlurmSettings):
        return []
    missing = [name for name in ("sbatch", "srun", "scontrol") if shutil.which(name) is None]
    if missing:
        text = f"no {', '.join(missing)} on this machine"
        return [fail("slurm", text, "type the command on a login node of the cluster")]
    told = _run("scontrol", "show", "partition", "-o")
    if told is None:
        return [fail("slurm", "Slurm's controller does not answer scontrol", "ask who runs the cluster; see `sinfo`")]
    entries = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in told.splitlines()]
    partitions = {entry["PartitionName"]: entry for entry in entries if entry}
    default = next((name for name, entry in partitions.items() if entry.get("Default") == "YES"), "")
    chosen = partitions.get(default if cluster.partition is None else cluster.partition)
    if chosen is None:
        wanted = cluster.partition or "the default (there is none)"
        return [fail("slurm", f"there is no partition {wanted}", f"cluster.partition={' | '.join(partitions)}")]
    name, nodes, time = (chosen.get(key) for key in ("PartitionName", "TotalNodes", "MaxTime"))
    return _limits(cluster, chosen) or [ok("slurm", f"partition {name}: {nodes} nodes, at most {time}")]


def _limits(cluster: SlurmSettings, partition: dict[str, str]) -> list[Line]:
    name, lines = partition["PartitionName"], []
    if partition.get("State") != "UP":
        lines.append(fail("slurm", f"partition {name} is {partition.get('State')}", "choose another partition"))
    limit, wanted = minutes(partition.get("MaxTime", "UNLIMITED")), cluster.time_minutes
    if limit is not None and wanted > limit:
        text = f"{wanted} minutes are more than {name} allows"
        lines.append(fail("slurm", text, f"cluster.time_minutes={limit} or less"))
    for key, verb in (("MaxNodes", "allows a job"), ("TotalNodes", "has")):
        bound = partition.get(key, "UNLIMITED")
        if bound.isdigit() and cluster.nodes > int(bound):
            text = f"{cluster.nodes} nodes are more than {name} {verb}"
            lines.append(fail("slurm", text, f"cluster.nodes={bound} or fewer"))
    account, allowed = cluster.account, partition.get("AllowAccounts", "ALL")
    if account and allowed != "ALL" and account not in allowed.split(","):
        lines.append(fail("slurm", f"{name} is not open to account {account}", f"cluster.account={allowed}"))
    gpus, most = cluster.gpus_per_node, _most_gpus(name)
    if most is not None and gpus > most:
        text = f"no node of {name} has {gpus} GPUs, the most is {most}"
        lines.append(fail("slurm", text, f"cluster.gpus_per_node={most}"))
    return lines


def minutes(text: str) -> int | None:
    """Parse Slurm's D-HH:MM:SS into minutes; None for no limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, mins, _ = (int(word or 0) for word in match.groups())
    return (days * 24 + hours) * 60 + mins


def _most_gpus(partition: str) -> int | None:
    told = _run("sinfo", "-h", "-p", partition, "-o", "%G")
    found = [int(number) for number in re.findall(r"gpu(?::[A-Za-z][^:,()]*)?:(\d+)", told or "")]
    return max(found, default=None)


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 and done.stdout.strip() else None
