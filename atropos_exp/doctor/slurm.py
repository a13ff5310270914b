"""What Slurm's limits allow, compared with what `cluster=slurm` asks for."""

import re
import shutil
import subprocess
from typing import Any

from atropos_exp.assembly.check import Checked
from atropos_exp.doctor.line import Line, fail, ok, warn

_ASK_SECONDS = 10.0


def check_slurm(checked: Checked) -> list[Line]:
    """Compare the job with the limits of its partition; nothing for a cluster that is not Slurm's."""
    cluster = checked.parts.cluster
    if not hasattr(cluster, "partition"):
        return []
    missing = [name for name in ("sbatch", "srun", "scontrol") if shutil.which(name) is None]
    if missing:
        return [
            fail("slurm", f"no {', '.join(missing)} on this machine", "type the command on a login node of the cluster")
        ]
    told = _ask("show", "partition", "-o")
    if told is None:
        return [fail("slurm", "Slurm's controller does not answer scontrol", "ask who runs the cluster; see `sinfo`")]
    partitions = {entry["PartitionName"]: entry for line in told.splitlines() if (entry := _fields(line))}
    chosen = _chosen(cluster.partition, partitions)
    if chosen is None:
        wanted = cluster.partition or "the default (there is none)"
        return [fail("slurm", f"there is no partition {wanted}", f"cluster.partition={' | '.join(partitions)}")]
    return _limits(cluster, chosen) or [ok("slurm", _allowed(chosen))]


def _limits(cluster: Any, partition: dict[str, str]) -> list[Line]:
    name, lines = partition["PartitionName"], []
    if partition.get("State") != "UP":
        lines.append(fail("slurm", f"partition {name} is {partition.get('State')}", "choose another partition"))
    limit, wanted = minutes(partition.get("MaxTime", "UNLIMITED")), getattr(cluster, "time_minutes", None)
    if limit is not None and wanted is not None and wanted > limit:
        lines.append(
            fail("slurm", f"{wanted} minutes are more than {name} allows", f"cluster.time_minutes={limit} or less")
        )
    for key, text in (("MaxNodes", "allows a job"), ("TotalNodes", "has")):
        bound = partition.get(key, "UNLIMITED")
        if bound.isdigit() and getattr(cluster, "nodes", 1) > int(bound):
            lines.append(
                fail("slurm", f"{cluster.nodes} nodes are more than {name} {text}", f"cluster.nodes={bound} or fewer")
            )
    account = getattr(cluster, "account", None)
    allowed = partition.get("AllowAccounts", "ALL")
    if account and allowed != "ALL" and account not in allowed.split(","):
        lines.append(fail("slurm", f"{name} is not open to account {account}", f"cluster.account={allowed}"))
    gpus, most = getattr(cluster, "gpus_per_node", 0), _most_gpus(name)
    if gpus and most is not None and gpus > most:
        lines.append(
            fail("slurm", f"no node of {name} has {gpus} GPUs, the most is {most}", f"cluster.gpus_per_node={most}")
        )
    if wanted is not None and getattr(cluster, "signal_seconds", 0) >= 60 * wanted:
        lines.append(
            warn("slurm", "the signal to save would come at once", "a lower cluster.signal_seconds, or more time")
        )
    return lines


def minutes(text: str) -> int | None:
    """Parse Slurm's D-HH:MM:SS into minutes; None for no limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, mins, _ = (int(word or 0) for word in match.groups())
    return (days * 24 + hours) * 60 + mins


def _chosen(name: str | None, partitions: dict[str, dict[str, str]]) -> dict[str, str] | None:
    if name is not None:
        return partitions.get(name)
    return next((entry for entry in partitions.values() if entry.get("Default") == "YES"), None)


def _most_gpus(partition: str) -> int | None:
    told = _run(["sinfo", "-h", "-p", partition, "-o", "%G"])
    found = [int(number) for number in re.findall(r"gpu(?::[A-Za-z][^:,()]*)?:(\d+)", told or "")]
    return max(found) if found else None


def _allowed(partition: dict[str, str]) -> str:
    name, nodes, time = (partition.get(key) for key in ("PartitionName", "TotalNodes", "MaxTime"))
    return f"partition {name}: {nodes} nodes, at most {time}"


def _fields(line: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def _ask(*words: str) -> str | None:
    return _run(["scontrol", *words])


def _run(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 and done.stdout.strip() else None
