"""The batch script of a job, made by submitit from the settings."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atropos_exp.parts.cluster.slurm.settings import SlurmSettings
from atropos_exp.processes.child import IMPORT_ROOT

# After the ranks. A job that they could not queue again from inside a container is queued again here, and so is one
# whose ranks srun could not even start, as on a node that has just died: then there is no folder of this attempt.
# A cancelled job is left alone.
TEARDOWN = """\
code=$?
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # its plain id may stand for a whole array
job=${job:-$SLURM_JOB_ID}
again() {
  scontrol show job -o "$job" | grep -q JobState=RUNNING && scontrol requeue "$job" && exit 0
}
begun=
for folder in {folders}; do
  marker="$folder/slurm/requeue_$SLURM_JOB_ID"
  if [ -e "$marker" ]; then rm -f "$marker"; again; fi
  if [ -e "$folder/slurm/attempt_$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" ]; then begun=yes; fi
done
if [ "$code" != 0 ] && [ -z "$begun" ]; then
  echo "the ranks could not be started" >> {count}
  if [ "$(wc -l < {count})" -lt {limit} ]; then again; fi
fi
exit "$code"
"""


def parameters(settings: SlurmSettings, *, name: str, folder: Path, run_folders: Sequence[Path]) -> dict[str, Any]:
    """Return the settings under submitit's names."""
    layout = settings.layout
    extra: dict[str, Any] = {"requeue" if settings.requeue else "no-requeue": True}
    for option in settings.sbatch:
        key, separator, value = option.removeprefix("--").partition("=")
        extra[key] = value if separator else True
    found: dict[str, Any] = {
        "job_name": name,
        "time": settings.time_minutes,
        "nodes": settings.nodes,
        "ntasks_per_node": layout.ranks_per_node,
        "cpus_per_task": settings.cpus_per_task,
        "signal_delay_s": settings.signal_seconds,
        "stderr_to_stdout": True,
        "array_parallelism": settings.array_parallelism,
        "wckey": None,
        "additional_parameters": extra,
        "srun_args": srun_arguments(settings),
        "setup": setup(settings),
        "teardown": teardown(settings, folder=folder, run_folders=run_folders),
    }
    if settings.gpus_per_node:
        found["gpus_per_node"] = settings.gpus_per_node
    if settings.mem_gb is not None:
        found["mem"] = f"{round(settings.mem_gb * 1024)}M"
    return found | settings.model_dump(include={"partition", "account", "qos", "constraint"}, exclude_none=True)


def srun_arguments(settings: SlurmSettings) -> list[str]:
    """Return the arguments of srun."""
    found = [
        f"--cpus-per-task={settings.cpus_per_task}",  # srun takes it from sbatch in some versions only
        "--kill-on-bad-exit=0",  # the launchers see to the ends of each other, and note why
    ]
    if settings.container_image:
        found.append(f"--container-image={settings.container_image}")
        if settings.container_mounts:
            found.append(f"--container-mounts={','.join(settings.container_mounts)}")
    return [*found, *settings.srun]


def setup(settings: SlurmSettings) -> list[str]:
    """Return the commands before srun. A checkout becomes importable from anywhere."""
    lines = []
    if IMPORT_ROOT.name not in ("site-packages", "dist-packages"):
        lines.append(f'export PYTHONPATH={shlex.quote(str(IMPORT_ROOT))}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    return [*lines, *settings.setup]


def teardown(settings: SlurmSettings, *, folder: Path, run_folders: Sequence[Path]) -> list[str]:
    """Return the commands after srun; the script exits with srun's code."""
    words = {
        "{folders}": " ".join(shlex.quote(str(path)) for path in run_folders),
        "{count}": shlex.quote(f"{folder}/not_started_") + '"$SLURM_JOB_ID"',
        "{limit}": str(settings.max_failures if settings.requeue else 1),
    }
    text = TEARDOWN
    for word, value in words.items():
        text = text.replace(word, value)
    return text.splitlines()


def python_of(settings: SlurmSettings) -> str:
    """Return how the nodes start Python: one word or several, in the shell's syntax."""
    return settings.python or shlex.quote(sys.executable)


def script_text(settings: SlurmSettings, *, name: str, folder: Path, run_folders: Sequence[Path]) -> str:
    """Return the text that `sbatch` is given.

    `folder`: of submitit's own files. Several run folders make an array.
    """
    from submitit.slurm import slurm

    command = f"{python_of(settings)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    options = parameters(settings, name=name, folder=folder, run_folders=run_folders)
    if len(run_folders) > 1:
        options["map_count"] = len(run_folders)
    text: str = slurm._make_sbatch_string(command=command, folder=folder, **options)
    return text
