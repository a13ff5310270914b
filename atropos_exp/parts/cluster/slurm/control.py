"""What is asked of Slurm's commands; inside a job: the address of a node, the job's state, to be queued again."""

import fcntl
import re
import socket
import struct
import subprocess
from collections.abc import Mapping

from atropos_exp.errors import UserError

COMMAND_SECONDS = 60.0  # for one call; a busy controller answers late
_SIOCGIFADDR = 0x8915


def ask_slurm(*command: str) -> str | None:
    """Return the output of one of Slurm's commands; None if it is not installed (as in a container), refuses, or does
    not answer in time.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    except (FileNotFoundError, PermissionError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def own_job(environ: Mapping[str, str]) -> str:
    """Return the id of this process's job for scontrol.

    The plain id of one element of an array is that of the whole array, which would be queued again as a whole.
    """
    array = environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environ['SLURM_ARRAY_TASK_ID']}" if array else environ["SLURM_JOB_ID"]


def job_state(job: str, *, restarts: int) -> str | None:
    """Return the state, such as RUNNING, of a job that has been restarted `restarts` times; None if unknown."""
    text = ask_slurm("scontrol", "show", "job", "-o", job) or ""
    state, started = re.search(r"JobState=(\w+)", text), re.search(r"Restarts=(\d+)", text)
    if state is not None and started is not None and state[1] == "COMPLETING":
        return "REQUEUED" if int(started[1]) > restarts else "CANCELLED"
    return state[1] if state else None


def requeue(job: str) -> bool:
    """Queue the job again; True if Slurm has accepted, which ends its processes soon after."""
    return ask_slurm("scontrol", "requeue", job) is not None


def address_of(node: str) -> str:
    """Return the address at which the other nodes of a job reach `node`: as Slurm itself does, else by its name."""
    found = re.search(r"NodeAddr=(\S+)", ask_slurm("scontrol", "show", "node", "-o", node) or "")
    for name in ([found[1]] if found else []) + [node]:
        try:
            socket.getaddrinfo(name, None)
        except OSError:
            continue
        return name
    raise UserError(f"the first node of the job, {node}, has no address here; make its name resolve on all nodes")


def interface_towards(address: str) -> str | None:
    """Return the network interface through which this machine reaches `address`; None if unknown."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            own = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                try:
                    answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                except OSError:  # an interface without an IPv4 address
                    continue
                if socket.inet_ntoa(answer[20:24]) == own:
                    return name
    except OSError:
        return None
    return None
