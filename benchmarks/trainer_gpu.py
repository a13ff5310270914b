"""One update of the trainer on GPUs: seconds, tokens per second, MFU and memory of each way to run it.

    python benchmarks/trainer_gpu.py FOLDER                                    one GPU
    torchrun --nproc-per-node 2 benchmarks/trainer_gpu.py FOLDER               two
    python benchmarks/trainer_gpu.py FOLDER --smoke --device cpu               tiny, to try the script itself

A random model of the shape of Qwen2.5-0.5B trains on 32 prompts x 16 samples x (128 + 256) tokens with the shipped
loss and optimizer. FOLDER takes `trainer_N.json` (every number; N = ranks) and a profile of one update.
The last line of output is the end of the table. MFU counts what an update must compute (`parts/trainer/flops.py`); the
column after it is the usual estimate of 6 x parameters x tokens.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from trainer_variants import FULL, ONE_GPU, SEVERAL_GPUS, SMOKE, Size, Variant  # beside this file

from atropos_exp.config.origin import CONF_DIR
from atropos_exp.parts.loss.ppo_clip import PPOClip
from atropos_exp.parts.trainer import logprob_head
from atropos_exp.parts.trainer.distributed import broadcast_text
from atropos_exp.parts.trainer.flops import peak_flops
from atropos_exp.parts.trainer.fsdp2 import VerlFSDP2
from atropos_exp.types import TrainBatch

WARM_UPS, REPEATS = 1, 2


def write_model(folder: Path, size: Size, device: str) -> Path:
    from transformers import AutoModelForCausalLM, Qwen2Config

    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        config = Qwen2Config(**size.model, tie_word_embeddings=True)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        partial = folder.with_name(f"{folder.name}.partial")
        model.save_pretrained(partial)
        partial.rename(folder)
    return folder


def make_batch(size: Size, seed: int) -> TrainBatch:
    generator = torch.Generator().manual_seed(seed)
    length, number = size.prompt + size.response, size.num_sequences
    total = length * number
    trained_S = (torch.arange(length) >= size.prompt).repeat(number)
    no_N = torch.zeros(number, dtype=torch.bool)
    logprobs_S = torch.randn(total, generator=generator) * 0.1 - torch.log(torch.tensor(size.model["vocab_size"]))
    return TrainBatch(
        token_ids_S=torch.randint(0, size.model["vocab_size"], (total,), generator=generator),
        lengths_N=torch.full((number,), length),
        trained_S=trained_S,
        advantages_S=torch.randn(number, generator=generator).repeat_interleave(length) * trained_S,
        behaviour_logprobs_S=logprobs_S * trained_S,
        has_behaviour_N=~no_N,
        fresh_N=~no_N,
        reference_logprobs_S=torch.zeros(total),
        has_reference_N=no_N,
        supervised_N=no_N,
        temperature_N=torch.ones(number),
        num_trained_tokens=int(trained_S.sum()),
    )


def settings(path: str, **changes: Any) -> dict[str, Any]:
    values = yaml.safe_load((CONF_DIR / path).read_text())
    del values["_target_"]
    return {**values, **changes}


def measure(variant: Variant, size: Size, model_folder: Path, folder: Path, device: str) -> dict[str, Any]:
    """Seconds and memory of `variant`; the trainer is gone afterwards."""
    logprob_head.MAX_CHUNK_LOGITS = variant.chunk
    started = time.perf_counter()
    trainer = VerlFSDP2(**settings("trainer/fsdp2.yaml", learning_rate=1e-6, timeout_s=180.0) | variant.trainer).start(
        model_folder=model_folder,
        model=variant.model,
        loss=PPOClip(**settings("loss/ppo_clip.yaml")),
        seed=0,
        device=device,
        dump_folder=folder / "dumps",
    )
    synchronize(device)
    start_s = time.perf_counter() - started
    idle = memory(device)["now"]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for repeat in range(WARM_UPS + REPEATS):
        batch = make_batch(size, repeat)
        synchronize(device)
        started = time.perf_counter()
        stats = trainer.update(batch)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    if variant.name == "shipped settings":
        profile(trainer, size, folder, device)
    started = time.perf_counter()
    num_elements = sum(tensor.numel() for _, tensor in trainer.parameters())  # float32; rank 0 is given them
    synchronize(device)
    export_s = time.perf_counter() - started
    assert not stats.skipped
    update_s, tokens = statistics.median(seconds[WARM_UPS:]), stats.num_tokens
    peak = peak_flops(torch.device(device)) * dist.get_world_size()
    return {
        "start_s": start_s,
        "seconds": seconds,
        "update_s": update_s,
        "tokens_per_s": tokens / update_s,
        "mfu": stats.peak_seconds / update_s,
        "mfu_6nd": 6.0 * num_elements * tokens / (update_s * peak),
        "peak_gb": memory(device)["peak"] / 1e9,
        "idle_gb": idle / 1e9,
        "micro_batches": stats.num_micro_batches,
        "export_s": export_s,
        "export_gb": 4 * num_elements / 1e9,
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "logprob_gap_mean": stats.logprob_gap_mean,
    }


def profile(trainer: Any, size: Size, folder: Path, device: str) -> None:
    """Where an eighth of the batch spends its time, to `profile_<device>.txt`."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    small = Size(model=size.model, num_sequences=size.num_sequences // 8, prompt=size.prompt, response=size.response)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    trainer.update(make_batch(small, 7))
    with record(activities=activities, acc_events=True) as recorded:
        trainer.update(make_batch(small, 8))
    order = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    table = recorded.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=70)
    (folder / f"profile_{device}.txt").write_text(table)


def memory(device: str) -> dict[str, int]:
    if device == "cpu":
        return {"now": 0, "peak": 0}
    return {"now": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated()}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def clean(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def table(results: dict[str, dict[str, Any]], heading: str) -> str:
    lines = [
        heading,
        f"{'':26}  s/update   tok/s   MFU  6ND-MFU  peak GB  idle GB  passes  export s",
    ]
    for name, result in results.items():
        if "error" in result:
            lines.append(f"{name:26}  {result['error'][:100]}")
            continue
        lines.append(
            f"{name:26}  {result['update_s']:8.3f} {result['tokens_per_s']:7.0f} {result['mfu']:5.3f} "
            f"{result['mfu_6nd']:8.3f} {result['peak_gb']:8.1f} {result['idle_gb']:8.2f} "
            f"{result['micro_batches']:7d} {result['export_s']:9.3f}"
        )
    return "\n".join(lines)


def goes_on(deadline: float) -> bool:
    """Rank 0 decides for all whether there is time for another variant."""
    mine = "on" if time.monotonic() < deadline else "stop"
    if not dist.is_initialized():
        return mine == "on"
    return broadcast_text(mine if dist.get_rank() == 0 else None) == "on"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the results")
    parser.add_argument("--only", default="", help="variants whose name begins with this")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--seconds", type=float, default=200.0, help="start no further variant after this long")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    size: Size = SMOKE if options.smoke else FULL
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    model_folder = Path(tempfile.gettempdir()) / f"trainer_gpu_{'tiny' if options.smoke else '0_5b'}_{os.getuid()}"
    if rank == 0:
        write_model(model_folder, size, options.device)
    while not (model_folder / "config.json").is_file():
        assert time.monotonic() < deadline, f"rank 0 has not written {model_folder}"
        time.sleep(0.2)

    device_name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    heading = (
        f"{num_ranks} x {device_name}, torch {torch.__version__}, {size.num_sequences} sequences of "
        f"{size.prompt} + {size.response} tokens, bfloat16; median of {REPEATS} updates"
    )
    results: dict[str, dict[str, Any]] = {}
    for variant in ONE_GPU if num_ranks == 1 else SEVERAL_GPUS:
        if not variant.name.startswith(options.only):
            continue
        if not goes_on(deadline):
            results[variant.name] = {"error": f"not run: --seconds {options.seconds:g} were over"}
            continue
        try:
            results[variant.name] = measure(variant, size, model_folder, folder, options.device)
        except (RuntimeError, torch.OutOfMemoryError) as error:  # the table says so, and the others are still run
            traceback.print_exc()
            results[variant.name] = {"error": f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"}
        clean(options.device)
        if rank == 0:
            print(variant.name, json.dumps(results[variant.name]), flush=True)
            (folder / f"trainer_{num_ranks}.json").write_text(
                json.dumps({"heading": heading, "results": results}, indent=1) + "\n"
            )
    if rank == 0:
        print(table(results, heading), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
