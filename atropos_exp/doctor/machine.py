"""The machine: devices, memory, disk, write access."""

import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from atropos_exp.assembly.check import Checked
from atropos_exp.doctor import memory
from atropos_exp.doctor.line import Level, Line, fail, ok, warn
from atropos_exp.doctor.memory import human
from atropos_exp.parts.engine.launch import ServerSettings

_OPEN_FILES = 1024
_LOOK_SECONDS = 15.0
_CPU_SHARE, _GPU_SHARE = 0.9, 0.92  # of what is free, above which an estimate is too close


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """An NVIDIA device, as nvidia-smi reports it."""

    name: str
    total: int  # bytes
    used: int


def gpus() -> list[Gpu]:
    """Return the visible NVIDIA devices; empty if there is none or if that cannot be told."""
    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=index,name,memory.total,memory.used", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=_LOOK_SECONDS, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = []
    for line in told.splitlines():
        index, name, total, used = (word.strip() for word in line.split(","))
        if visible is None or index in visible.split(","):
            found.append(Gpu(name=name, total=int(total) * memory.MIB, used=int(used) * memory.MIB))
    return found


def is_elsewhere(checked: Checked) -> bool:
    """Whether the run trains on other machines than this one."""
    return checked.parts.cluster.queue is not None


def check_devices(checked: Checked) -> list[Line]:
    """Compare the devices that the run asks for with those of this machine."""
    if is_elsewhere(checked):
        return [ok("devices", "are those of the cluster's nodes, which cannot be looked at from here")]
    cores, found = len(os.sched_getaffinity(0)), gpus()
    ranks = checked.sizes.world_size
    if checked.device == "cpu":
        lines = [ok("devices", f"{cores} CPU cores for {ranks} trainer process{'es' if ranks > 1 else ''}")]
        if found and checked.run.device != "cpu":
            text = f"{len(found)} NVIDIA GPU present, but PyTorch is a CPU build"
            lines = [warn("devices", text, "install a CUDA build")]
        if ranks > cores:
            text = f"{ranks} trainer processes share {cores} cores"
            lines.append(warn("devices", text, f"cluster.num_processes={cores} or fewer"))
        return lines
    if len(found) < ranks:
        remedy = f"cluster.num_processes={max(1, len(found))}, or make more visible (CUDA_VISIBLE_DEVICES)"
        return [fail("devices", f"{len(found)} GPUs are visible for {ranks} trainer processes", remedy)]
    lines = [ok("devices", f"{len(found)} x {found[0].name} ({human(found[0].total)})")]
    for number, gpu in enumerate(found):
        if gpu.used > 0.1 * gpu.total:
            remedy = "nvidia-smi shows whose; wait for it, or choose another device with CUDA_VISIBLE_DEVICES"
            lines.append(warn("devices", f"GPU {number} holds {human(gpu.used)} of somebody else's", remedy))
    if ranks > 1 and (shared := shutil.disk_usage("/dev/shm").total) < memory.GIB:
        text = f"/dev/shm has {human(shared)}; NCCL wants more"
        lines.append(warn("devices", text, "in a container: --shm-size=8g (docker)"))
    return lines


def check_memory(checked: Checked, model_folder: Path) -> list[Line]:
    """Compare the estimate of what the run needs with the memory that is free."""
    shape = memory.Shape.of(model_folder)
    needs = memory.estimate(checked, shape)
    told = (
        f"trainer {human(needs.trainer_total)} a rank ({_largest(needs.trainer)}), "
        f"engine {human(needs.engine_total)} ({_largest(needs.engine)})"
    )
    if is_elsewhere(checked):
        return [ok("memory", f"{told}; whether the nodes have it cannot be seen from here")]
    return [(_host_memory if checked.device == "cpu" else _gpu_memory)(checked, needs, told)]


def _host_memory(checked: Checked, needs: memory.Estimate, told: str) -> Line:
    engine = checked.parts.engine
    servers = engine.data_parallel_size if isinstance(engine, ServerSettings) else 1
    fixed = checked.sizes.world_size * memory.TRAINER_BYTES + servers * memory.ENGINE_BYTES
    fixed += memory.WORKER_BYTES * checked.parts.reward.num_workers
    fixed += memory.ATROPOS_BYTES if checked.parts.rollout.uses_atropos else 0
    total = fixed + checked.sizes.world_size * needs.trainer_total + servers * needs.engine_total
    free = available_memory()
    text = f"{told}, programs {human(fixed)}: about {human(total)} of {human(free)} that are free"
    return _compared("memory", text, _shrink(needs), wanted=total, there=free, comfortable=_CPU_SHARE * free)


def _gpu_memory(checked: Checked, needs: memory.Estimate, told: str) -> Line:
    found = gpus()
    if not found:
        return warn("memory", f"{told}; nvidia-smi does not tell what there is", "see why nvidia-smi does not run")
    engine, there = checked.parts.engine, found[0].total
    beside, too_little = needs.engine_total, False
    if isinstance(engine, ServerSettings):
        if engine.gpus:
            beside = 0
        elif engine.gpu_memory_utilization is not None:
            beside = int(engine.gpu_memory_utilization * there)
            too_little = needs.engine["weights"] > beside
    total = needs.peak(engine=beside, takes_turns=engine.colocate)
    text = f"{told}: about {human(total)} on the fullest of {human(there)}"
    if too_little:
        return fail("memory", f"{text}; the engine's share does not hold its weights", "raise the engine's share")
    return _compared("memory", text, _shrink(needs), wanted=total, there=there, comfortable=_GPU_SHARE * there)


def _compared(topic: str, text: str, remedy: str, *, wanted: int, there: int, comfortable: float) -> Line:
    if wanted > there:
        return fail(topic, text, remedy)
    return warn(topic, text, remedy) if wanted > comfortable else ok(topic, text)


def available_memory() -> int:
    """Return the bytes that processes can still get: of the machine, or fewer where a control group limits them."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            bound, taken = Path(limit).read_text().strip(), int(Path(used).read_text())
        except (OSError, ValueError):
            continue
        if bound.isdigit():
            free = min(free, max(0, int(bound) - taken))
    return free


def _largest(parts: Mapping[str, int]) -> str:
    name, size = max(parts.items(), key=lambda item: item[1])
    return f"most of it {name}, {human(size)}"


def _shrink(needs: memory.Estimate) -> str:
    largest = max(needs.trainer, key=needs.trainer.__getitem__)
    if needs.engine.get("keys and values", 0) > needs.trainer_total:
        return "lower engine.max_batch_tokens (hf) or engine.kv_cache_gb, or max_response_length"
    if largest in ("activations", "logits"):
        return "lower trainer.max_tokens_per_micro_batch, or model.gradient_checkpointing=true"
    return "model.lora.rank=16, more trainer processes, trainer.offload_optimizer=true, or a smaller model"


def check_disk(checked: Checked, model_folder: Path | None) -> list[Line]:
    """Examine whether there is room for checkpoints and journals, and permission to write them."""
    run = checked.run
    place = _existing(Path(run.run_dir or run.output_dir).expanduser())
    try:
        with tempfile.NamedTemporaryFile(dir=place):
            pass
    except OSError as error:
        return [fail("disk", f"{place} cannot be written to ({error.strerror})", "output_dir=SOME/FOLDER of yours")]
    sizes = checked.sizes
    parameters = memory.count_parameters(model_folder) if model_folder is not None else 0
    checkpoints = (run.checkpoint.keep + 1) * 12 * parameters
    journals = checked.parts.trainer.max_steps * sizes.sequences * sizes.tokens_per_sequence * 10
    needed, free = checkpoints + journals, shutil.disk_usage(place).free
    text = (
        f"{human(free)} free in {place}; up to {human(needed)} wanted ({run.checkpoint.keep + 1} checkpoints "
        f"{human(checkpoints)}, rollouts {human(journals)})"
    )
    remedy = "output_dir=ANOTHER/DISK, checkpoint.keep=1, or make room"
    room = _compared("disk", text, remedy, wanted=needed, there=free, comfortable=free / 2)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _OPEN_FILES:
        return [room]
    few = warn("disk", f"at most {soft} files may be open", f"ulimit -n {4 * _OPEN_FILES}")
    return [few] if room.level is Level.ok else [room, few]


def _existing(path: Path) -> Path:
    """The nearest folder above that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
