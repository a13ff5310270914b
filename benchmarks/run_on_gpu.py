"""Tests and benchmarks of the trainer on the GPUs of this machine, in one command; the short tables come last.

    python benchmarks/run_on_gpu.py FOLDER                         all visible GPUs are looked for: one, or two and more
    python benchmarks/run_on_gpu.py FOLDER --smoke --device cpu    the same parts on the CPU, tiny

Every part is a process with a time limit of its own, so that one that fails or hangs costs no other; FOLDER takes one
log of each. The exit code is 1 if any part failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHOWN = 2200  # characters of each part's output


@dataclass(kw_only=True)
class Part:
    """A command, in one process per rank."""

    name: str
    command: list[str]
    limit_s: float
    num_ranks: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    started: float = 0.0
    seconds: float = 0.0

    def start(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.started = time.monotonic()
        for rank in range(self.num_ranks):
            environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": python_path} | self.environment
            if self.num_ranks > 1:
                environment |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(self.num_ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            with self.log(folder, rank).open("wb") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *self.command],
                        cwd=ROOT,
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def finish(self, deadline: float) -> str:
        """Wait, and end what is left, children included. Returns `ok`, `exit code N` or `stopped after N s`."""
        until = min(self.started + self.limit_s, deadline)
        late = False
        for process in self.processes:
            try:
                process.wait(timeout=max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                late = True
        self.seconds = time.monotonic() - self.started
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if late:
            return f"stopped after {self.seconds:.0f} s"
        codes = [process.returncode for process in self.processes if process.returncode]
        return f"exit code {codes[0]}" if codes else "ok"

    def log(self, folder: Path, rank: int = 0) -> Path:
        return folder / f"{self.name}{f'_rank{rank}' if rank else ''}.log"


def tests(*paths: str) -> list[str]:
    # Warnings are no errors here: another machine's versions of libraries have deprecations of their own.
    return [
        "-m",
        "pytest",
        "-n",
        "0",
        "-q",
        "-W",
        "default",
        "--durations-min=5",
        "--maxfail=12",
        "--tb=short",
        *paths,
    ]


def rounds(device: str, num_gpus: int, folder: Path, scratch: Path, smoke: list[str], scale: float) -> list[list[Part]]:
    """Parts of one round run side by side: tests do not mind, benchmarks run alone."""
    where = {"GPU_TESTS_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    benchmark = ["benchmarks/trainer_gpu.py", str(folder), "--device", device, *smoke]
    if num_gpus > 1:
        return [
            [Part(name="tests_trainer", command=tests("tests/gpu/test_trainer.py"), limit_s=240, environment=where)],
            [
                Part(
                    name="benchmark_2",
                    command=[*benchmark, "--seconds", str(110 * scale)],
                    limit_s=150,
                    num_ranks=2,
                    environment=where,
                )
            ],
            [Part(name="benchmark_1", command=[*benchmark, "--only", "shipped"], limit_s=60, environment=where)],
        ]
    demo = [
        "-m", "atropos_exp.run", "experiment=demo", f"device={device}", "trainer.max_steps=4", "rollout=local",
        "batch_size=8", "logger=none", "eval.num_prompts=32", "eval.samples_per_prompt=0",
        f"output_dir={scratch / 'runs'}",
    ]  # fmt: skip
    return [
        [
            Part(name="tests_attention", command=tests("tests/gpu/test_attention.py"), limit_s=100, environment=where),
            Part(name="tests_trainer", command=tests("tests/gpu/test_trainer.py"), limit_s=150, environment=where),
            *([Part(name="tests_sync", command=tests("tests/weights/test_gpu.py"), limit_s=120)] if not smoke else []),
            Part(name="demo", command=demo, limit_s=150, environment=where),
        ],
        [Part(name="benchmark_1", command=[*benchmark, "--seconds", str(150 * scale)], limit_s=210, environment=where)],
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--gpus", type=int, help="default: all that are visible; on the CPU, ranks")
    parser.add_argument("--total-seconds", type=float, default=350.0, help="for everything")
    parser.add_argument("--limit-scale", type=float, default=1.0, help="the limit of each part times this")
    parser.add_argument("--only", nargs="+", default=[], help="parts whose name begins with one of these")
    options = parser.parse_args()
    deadline = time.monotonic() + options.total_seconds
    folder: Path = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    num_gpus = options.gpus or 1
    if options.device == "cuda" and not options.gpus:
        import torch

        num_gpus = torch.cuda.device_count()
    scratch = Path(tempfile.mkdtemp())
    shown, failed = [], False
    smoke = ["--smoke"] if options.smoke else []
    for every in rounds(options.device, num_gpus, folder, scratch, smoke, options.limit_scale):
        parts = [part for part in every if not options.only or part.name.startswith(tuple(options.only))]
        for part in parts:
            part.limit_s *= options.limit_scale
            part.start(folder)
        for part in parts:
            result = part.finish(deadline)
            failed = failed or result != "ok"
            print(f"{part.name}: {result}, {part.seconds:.0f} s", flush=True)
            size = SHOWN if result == "ok" else 2 * SHOWN
            text = part.log(folder).read_text(errors="replace")
            shown.append(f"==== {part.name}: {result}, {part.seconds:.0f} s\n{text[-size:].strip()}")
    shutil.rmtree(scratch)
    print("\n".join(shown), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
