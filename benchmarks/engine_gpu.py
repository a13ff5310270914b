"""An engine beside the trainer on one GPU: proven weight syncs through device memory, and sampling.

    python benchmarks/engine_gpu.py                       vLLM of this interpreter, about five minutes
    python benchmarks/engine_gpu.py --python PATH         vLLM of another one
    python benchmarks/engine_gpu.py --engine sglang --set attention_backend=triton --set sampling_backend=pytorch

The model has random weights in the shape of Qwen2.5-0.5B (0.99 GB in bfloat16) and is made here; nothing is fetched.
The trainer's side is a plain transformers model on the same GPU behind the real weight publisher, so a sync
costs what it costs in a run: cast, device buffer, load, digests of every tensor, prefix cache, canary. The table comes
last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from atropos_exp.types import Floats, SamplingParams, TokenIds  # noqa: E402
from atropos_exp.weights.publisher import WeightPublisher  # noqa: E402

NUM_PROMPTS, NUM_SAMPLES, PROMPT_TOKENS, ANSWER_TOKENS = 32, 16, 128, 256
TEMPERATURE = 0.8
SIZES = {
    "half": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 1024},
}  # fmt: skip


class PlainTrainer:
    """What the weight publisher needs of a trainer, around a transformers model."""

    def __init__(self, size: str, device: str, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM, Qwen2Config

        config = Qwen2Config(
            **SIZES[size], tie_word_embeddings=True, max_position_embeddings=32768, initializer_range=0.02,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device(device):
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
        self.device = device
        self.seed = 0

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def step(self) -> None:
        """Every weight changes a little, as by an update."""
        self.seed += 1
        torch.manual_seed(self.seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1 + 0.02 * torch.randn_like(parameter))

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.model.named_parameters()

    def logprobs(self, sequences: Sequence[TokenIds], *, temperature: float) -> list[Floats]:
        """All in one forward pass, as the real trainer packs them."""
        ids_NT = torch.tensor(np.stack(sequences).astype(np.int64), device=self.device)
        with torch.inference_mode():
            logits = self.model(input_ids=ids_NT).logits[:, :-1].float() / temperature
            scored = torch.log_softmax(logits, -1).gather(-1, ids_NT[:, 1:, None])[..., 0]
        return list(scored.cpu().numpy())


def start(options: argparse.Namespace, folder: Path, **changes: Any) -> Any:
    import importlib

    values = yaml.safe_load((ROOT / f"conf/engine/{options.engine}.yaml").read_text())
    module, name = values.pop("_target_").rsplit(".", 1)
    chosen = {**values, "python": options.python, **changes, **options.set}
    settings = getattr(importlib.import_module(module), name)(**chosen)
    return settings.start(
        model_folder=folder / "model", device=options.device, log_folder=folder, max_sequence_length=1024
    )


def device_bytes(device: str) -> int:
    """In use on the whole GPU, whichever process holds it."""
    if not device.startswith("cuda"):
        return 0
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure_syncs(
    trainer: PlainTrainer, engine: Any, num: int, bucket_mb: int, *, temperature: float = TEMPERATURE
) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    vocab = trainer.model.config.vocab_size
    canary = [generator.integers(0, vocab, size=64).astype(np.int32) for _ in range(4)]
    publisher = WeightPublisher(
        trainer,  # type: ignore[arg-type]
        engine, is_rank_zero=True, bucket_bytes=bucket_mb << 20, canary=canary, temperature=temperature, tolerance=None,
        recheck=False,
    )  # fmt: skip
    stats, engine_seconds, used = [], [], []
    for _ in range(num):
        trainer.step()
        synchronize(trainer.device)  # the update's own work is not the sync's
        stats.append(publisher.publish(engine.version() + 1))
        engine_seconds.append(engine.replicas[0].info().get("update_seconds", {}))
        used.append(device_bytes(trainer.device))
    later = stats[2:]
    second_half = max(1, num // 2)
    return {
        "syncs_proven": publisher.num_verified,
        "bytes": stats[-1].num_bytes,
        "tensors": stats[-1].num_tensors,
        "digests_compared": stats[-1].digests_compared,
        "digests_resident": sum(one.info()["num_resident_digests"] for one in engine.replicas),
        "transfer_s": statistics.median(one.seconds for one in later),
        "transfer_s_max": max(one.seconds for one in later),
        "proof_s": statistics.median(one.proof_seconds for one in later),
        "total_s": statistics.median(one.seconds + one.proof_seconds for one in later),
        **{
            f"{part}_s": statistics.median(one.seconds_by_part[part] for one in later)
            for part in later[0].seconds_by_part
        },
        **{
            f"engine {part}_s": statistics.median(one[part] for one in engine_seconds[2:])
            for part in engine_seconds[-1]
        },
        "engine loads plainly": float(engine.replicas[0].info().get("loads_plainly", False)),
        "gb_per_s": stats[-1].num_bytes / statistics.median(one.seconds for one in later) / 1e9,
        "canary_gap_max": max(one.canary_gap_max for one in stats),
        "memory_growth_mb": (used[-1] - used[1]) / 2**20,
        "memory_growth_second_half_mb": (used[-1] - used[second_half]) / 2**20,  # a leak goes on, a pool is full once
    }


def profile_syncs(trainer: PlainTrainer, engine: Any, options: argparse.Namespace) -> None:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if options.device.startswith("cuda") else [])]
    with profile(activities=activities) as profiler:
        measure_syncs(trainer, engine, 3, options.buckets[0])
    by = "self_cuda_time_total" if options.device.startswith("cuda") else "self_cpu_time_total"
    options.profile.write_text(profiler.key_averages().table(sort_by=by, row_limit=40))


def measure_sampling(
    trainer: PlainTrainer, engine: Any, rounds: int, *, temperature: float = TEMPERATURE
) -> dict[str, Any]:
    generator = np.random.default_rng(1)
    vocab = trainer.model.config.vocab_size
    prompts = [generator.integers(0, vocab, size=PROMPT_TOKENS).astype(np.int32) for _ in range(NUM_PROMPTS)]
    seconds = []
    for seed in range(rounds):
        params = SamplingParams(
            temperature=temperature, top_p=1.0, top_k=0, max_tokens=ANSWER_TOKENS, stop_token_ids=(), seed=seed
        )
        began = time.perf_counter()
        groups = engine.generate(prompts, params, num_samples=NUM_SAMPLES)
        seconds.append(time.perf_counter() - began)
    num_tokens = sum(len(sample.token_ids) for group in groups for sample in group)
    few = [(prompts[index], groups[index][0]) for index in range(8)]
    scored = trainer.logprobs([np.concatenate([p, s.token_ids]) for p, s in few], temperature=temperature)
    gaps = np.concatenate(
        [np.abs(score[PROMPT_TOKENS - 1 :] - sample.logprobs) for score, (_, sample) in zip(scored, few, strict=True)]
    )
    return {
        "first_s": seconds[0],
        "best_s": min(seconds),
        "tokens": num_tokens,
        "tokens_per_s": num_tokens / min(seconds),
        "logprob_gap_mean": float(gaps.mean()),
        "logprob_gap_max": float(gaps.max()),
    }


def main() -> None:
    options = _options()
    results: dict[str, Any] = {"machine": _machine(options), "engine": options.engine}
    dtype = torch.bfloat16 if options.device.startswith("cuda") else torch.float32
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        trainer = PlainTrainer(options.size, options.device, dtype)
        trainer.save(folder / "model")
        for seeded in (True, False) if options.both else (False,):
            began = time.perf_counter()
            engine = start(options, folder, seeded=seeded)
            try:
                name = "seeded" if seeded else "unseeded"
                results[f"{name} start_s"] = time.perf_counter() - began
                results["versions"] = engine.replicas[0].info()["versions"]
                if not seeded:
                    if options.profile is not None:
                        profile_syncs(trainer, engine, options)
                    for bucket_mb, temperature in itertools.product(options.buckets, options.temperatures):
                        results[f"sync, buckets of {bucket_mb} MiB, temperature {temperature:g}"] = measure_syncs(
                            trainer, engine, options.syncs, bucket_mb, temperature=temperature
                        )
                else:
                    measure_syncs(trainer, engine, 3, 64)
                if options.rounds:
                    results[f"sampling, {name}"] = measure_sampling(
                        trainer, engine, options.rounds, temperature=options.temperatures[0]
                    )
            except BaseException:
                print((folder / "engine.log").read_text()[-4000:], file=sys.stderr)
                raise
            finally:
                engine.stop()
            print(json.dumps(results), flush=True)  # what is known so far, should the rest not come
    if options.output is not None:
        options.output.write_text(json.dumps(results, indent=1))
    print_table(results)


def print_table(results: dict[str, Any]) -> None:
    print(f"\n| {results['machine']} | {results['engine']} {results['versions']} |\n| --- | --- |")
    for name, value in results.items():
        if isinstance(value, dict) and name != "versions":
            for key, number in value.items():
                print(f"| {name}: {key} | {number:,.4g} |")
        elif isinstance(value, float):
            print(f"| {name} | {value:.1f} |")


def _machine(options: argparse.Namespace) -> str:
    if not options.device.startswith("cuda"):
        return "CPU"
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True, text=True, check=False, timeout=60,
    ).stdout.split()[0]  # fmt: skip
    return f"{torch.cuda.get_device_name()}, driver {driver}, torch {torch.__version__}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("vllm", "sglang"), default="vllm")
    parser.add_argument("--python", default=sys.executable, help="interpreter of an environment with the engine")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=tuple(SIZES), default="half")
    parser.add_argument("--syncs", type=int, default=50)
    parser.add_argument("--buckets", type=int, nargs="+", default=[64, 1024], help="MiB")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[TEMPERATURE], help="of canary and sampling")
    parser.add_argument("--rounds", type=int, default=3, help="of sampling; the first is slower; 0: only syncs")
    parser.add_argument("--profile", type=Path, help="write what the trainer's side of two syncs does on CPU and GPU")
    parser.add_argument("--both", action="store_true", help="a server whose rows have seeds of their own, too")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of conf/engine")
    parser.add_argument("--output", type=Path, help="the results as JSON")
    options = parser.parse_args()
    options.set = {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in options.set)}
    return options


if __name__ == "__main__":
    main()
