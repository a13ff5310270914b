"""Engines on other GPUs than the trainer's: weights over NCCL, and two replicas that share the prompts.

    python benchmarks/engine_two_gpus.py                                    on a machine with two GPUs, 2 to 3 minutes
    python benchmarks/engine_two_gpus.py --kill                             and a server killed in the middle, 1 more
    python benchmarks/engine_two_gpus.py --device cpu --size tiny --python .venv-vllm/bin/python       to try it, Gloo

The trainer (a plain transformers model behind the real weight publisher, see engine_gpu.py) is on GPU 0. One vLLM
server on GPU 1 gets its weights over NCCL, 20 times, each sync proven. Two more, on GPU 0 and 1, load meanwhile and get
theirs through device memory and over NCCL; then one of them answers all prompts, and both together. Each part reports
its own failure and the others go on; what is known is printed when the time limit strikes. The table comes last.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import engine_gpu  # beside this file; puts the package on the path
import numpy as np
import torch
import yaml

from atropos_exp.assembly.resync import Resync
from atropos_exp.parts.engine.vllm.settings import VLLMEngine
from atropos_exp.processes.ranks import Ranks
from atropos_exp.weights.group import BACKENDS, nccl_version
from atropos_exp.weights.publisher import WeightPublisher

ROOT = Path(__file__).resolve().parents[1]
BUCKET_MB = 64


class Results:
    """Lines of the table, printed once."""

    def __init__(self, heading: str) -> None:
        self._heading = heading
        self._lines: list[tuple[str, str]] = []
        self._began = time.perf_counter()

    def add(self, name: str, value: float | str) -> None:
        shown = value if isinstance(value, str) else f"{value:,.4g}"
        self._lines.append((name, shown))
        print(f"[{time.perf_counter() - self._began:6.1f} s] {name}: {shown}", flush=True)

    def part(self, name: str, work: Callable[[], Any], logs: Path) -> Any:
        """What `work` returns, or None: then its failure is in the table, and the ends of the servers' logs above."""
        print(f"[{time.perf_counter() - self._began:6.1f} s] == {name}", flush=True)
        try:
            return work()
        except Exception as error:  # the other parts go on
            traceback.print_exc()
            for note in getattr(error, "__notes__", ()):
                print(note)
            for log in sorted(logs.glob("*/*.log")):
                end = log.read_text(errors="replace")[-1500:]
                print(f"-- the end of {log.parent.name}/{log.name}\n{end}", flush=True)
            self.add(f"{name}: FAILED", f"{type(error).__name__}: {str(error).splitlines()[0][:300]}")
            return None

    def print(self) -> None:
        print(f"\n| {self._heading} | |\n| --- | --- |")
        for name, shown in self._lines:
            print(f"| {name} | {shown} |")
        print(f"| whole benchmark, s | {time.perf_counter() - self._began:.0f} |", flush=True)


def start(options: argparse.Namespace, folder: Path, name: str, **changes: Any) -> Any:
    values = yaml.safe_load((ROOT / "conf/engine/vllm.yaml").read_text())
    del values["_target_"]
    chosen = {**values, "python": options.python, "seeded": False, "gpu_memory_utilization": 0.3, "max_restarts": 1}
    # Fixed, so that servers which load beside each other do not mistake each other's memory for their own.
    chosen["kv_cache_gb"] = 8.0 if options.on_gpu else 0.25
    return VLLMEngine(**{**chosen, **changes}).start(
        model_folder=folder / "model", device=options.device, log_folder=folder / name, max_sequence_length=1024
    )


def measure_syncs(trainer: Any, engine: Any, results: Results, name: str, num: int) -> None:
    found = engine_gpu.measure_syncs(trainer, engine, num, BUCKET_MB)
    results.add(f"{name}: proven", f"{found['syncs_proven']} of {num}")
    results.add(f"{name}: GB", found["bytes"] / 1e9)
    results.add(f"{name}: transfer, median s", found["transfer_s"])
    results.add(f"{name}: transfer, largest s", found["transfer_s_max"])
    results.add(f"{name}: proof, median s", found["proof_s"])
    results.add(f"{name}: GB/s", found["gb_per_s"])
    digests = f"{found['digests_compared']}, {found['digests_resident']}"
    results.add(f"{name}: digests compared, of tensors that the model uses", digests)
    results.add(f"{name}: largest canary gap, nats", found["canary_gap_max"])
    results.add(f"{name}: growth of GPU 0's memory, MiB", found["memory_growth_mb"])


def measure_line(engine: Any, options: argparse.Namespace, results: Results) -> None:
    """The group alone: a bucket of bytes that name no tensor, so the server receives and loads nothing."""
    transport = engine._transport
    size = BUCKET_MB << 20
    buffer = torch.zeros(size, dtype=torch.uint8, device=options.device)
    place = {
        "name": transport._group.name,
        "size": transport._size,
        "nccl": nccl_version() if options.on_gpu else None,
        "torch": str(torch.__version__),
    }
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        transfer = transport._group.start(buffer)
        engine.replicas[0].exchange(
            "/weights/bucket", {"pieces": [], "num_bytes": size, "group": place}, what="a bucket"
        )
        transfer.wait(60)
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds)
    results.add(f"{BUCKET_MB} MiB to the server and its answer, median ms", median * 1e3)
    results.add("the same, GB/s", size / median / 1e9)


def kill_in_the_middle(trainer: Any, engine: Any, results: Results) -> None:
    """The server is killed while a bucket is on its way: noticed, started anew, synced whole."""
    generator = np.random.default_rng(0)
    canary = [generator.integers(0, trainer.model.config.vocab_size, size=64).astype(np.int32) for _ in range(4)]

    num_tensors = len(list(trainer.model.parameters()))

    class Kills:
        killed: float | None = None
        logprobs = trainer.logprobs

        def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
            for index, pair in enumerate(trainer.parameters()):
                if index == num_tensors // 3 and self.killed is None:
                    self.killed = time.perf_counter()
                    threading.Timer(0.01, os.kill, (engine.replicas[0].process.pid, signal.SIGKILL)).start()
                yield pair

    kills = Kills()
    publisher = WeightPublisher(
        kills,  # type: ignore[arg-type]
        engine, is_rank_zero=True, bucket_bytes=8 << 20, canary=canary, temperature=0.8, tolerance=None,
    )  # fmt: skip
    resync = Resync(publisher, engine, Ranks(rank=0, world_size=1), max_restarts=1)
    noticed: list[float] = []
    restart = engine.restart

    def timed() -> None:
        noticed.append(time.perf_counter())
        restart()

    engine.restart = timed
    stats = resync.publish(engine.version() + 1)
    if resync.num_restarts == 0:  # it was quicker than its death
        engine.replicas[0].process.child.wait(5.0)
        stats = resync.through(lambda: resync.publish(stats.policy_version + 1))
    assert kills.killed is not None
    results.add("killed in the middle: noticed after s", noticed[0] - kills.killed)
    results.add("killed in the middle: serves proven weights again after s", time.perf_counter() - kills.killed)
    counts = f"{resync.num_restarts}, {resync.num_syncs}, {resync.num_verified}"
    results.add("killed in the middle: restarts, syncs, proven", counts)


def main() -> None:
    options = _options()
    heading = f"{engine_gpu._machine(options)}, {torch.cuda.device_count() if options.on_gpu else 0} GPUs"
    results = Results(heading)
    faulthandler.enable()

    def out_of_time() -> None:
        faulthandler.dump_traceback(all_threads=True)
        results.add("out of time", f"after {options.limit:g} s")
        results.print()
        os._exit(1)

    timer = threading.Timer(options.limit, out_of_time)
    timer.daemon = True
    timer.start()
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(1) as background:
        folder = Path(temporary)
        dtype = torch.bfloat16 if options.on_gpu else torch.float32
        trainer = engine_gpu.PlainTrainer(options.size, options.device, dtype)
        trainer.save(folder / "model")
        pair_starting: Future[Any] = background.submit(
            start,
            options,
            folder,
            "pair",
            transport=options.pair_transport,
            data_parallel_size=2,
            gpus=[0, 1] if options.on_gpu else None,
        )
        engines: list[Any] = []
        try:
            run_parts(options, results, folder, trainer, pair_starting, engines)
        finally:
            pair_starting.cancel()
            if pair_starting.done() and not pair_starting.cancelled() and pair_starting.exception() is None:
                engines.append(pair_starting.result())
            for engine in engines:
                engine.stop()
            results.print()


def run_parts(
    options: argparse.Namespace,
    results: Results,
    folder: Path,
    trainer: Any,
    pair_starting: Future[Any],
    engines: list[Any],
) -> None:
    own = {"gpus": [1], "transport": options.transport} if options.on_gpu else {"transport": "gloo"}

    def start_one() -> Any:
        began = time.perf_counter()
        engine = start(options, folder, "one", enforce_eager=True, **own)
        results.add(f"one server, weights over {own['transport']}: start s", time.perf_counter() - began)
        results.add("versions of the engine", str(engine.replicas[0].info()["versions"]))
        return engine

    one = results.part("a server on GPU 1", start_one, folder)
    if one is not None:
        engines.append(one)
        name = f"sync over {own['transport']}"
        results.part(name, lambda: measure_syncs(trainer, one, results, name, options.syncs), folder)
    began = time.perf_counter()
    pair = results.part("two replicas", lambda: pair_starting.result(timeout=options.limit), folder)
    if one is not None:
        name = f"sync over {own['transport']}, nothing beside it"
        results.part(name, lambda: measure_syncs(trainer, one, results, name, options.syncs // 2), folder)
        if options.transport in BACKENDS:
            results.part("the line alone", lambda: measure_line(one, options, results), folder)
    if pair is not None:
        results.add("two replicas: start, after the syncs, s", time.perf_counter() - began)
        results.part("two replicas", lambda: measure_pair(trainer, pair, options, results), folder)
    if options.kill and one is not None:
        results.part("killed in the middle", lambda: kill_in_the_middle(trainer, one, results), folder)


def measure_pair(trainer: Any, pair: Any, options: argparse.Namespace, results: Results) -> None:
    measure_syncs(trainer, pair, results, f"sync of two replicas ({options.pair_transport})", options.syncs)
    for name, engine in (("one of two replicas", pair.replicas[1]), ("two replicas", pair)):
        found = engine_gpu.measure_sampling(trainer, engine, options.rounds)
        results.add(f"{name}: {found['tokens']} tokens, best s", found["best_s"])
        results.add(f"{name}: tokens/s", found["tokens_per_s"])
        gaps = f"{found['logprob_gap_mean']:.4f} ({found['logprob_gap_max']:.4f})"
        results.add(f"{name}: logprob gap, mean (largest) nats", gaps)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="interpreter of an environment with vLLM")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=tuple(engine_gpu.SIZES), default="half")
    parser.add_argument("--transport", default="nccl", help="to the server on GPU 1; with --device cpu it is gloo")
    parser.add_argument("--pair-transport", help="to two servers, one beside the trainer (default: cuda_ipc+nccl)")
    parser.add_argument("--syncs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3, help="of sampling; the first is slower")
    parser.add_argument("--kill", action="store_true", help="kill a server in the middle of a sync, too")
    parser.add_argument("--limit", type=float, default=280.0, help="seconds after which it ends with what it has")
    options = parser.parse_args()
    options.on_gpu = options.device.startswith("cuda")
    options.pair_transport = options.pair_transport or ("cuda_ipc+nccl" if options.on_gpu else "shm+gloo")
    return options


if __name__ == "__main__":
    main()
