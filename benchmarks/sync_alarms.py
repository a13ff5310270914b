"""What the proof of a weight sync says of honest syncs, and of an engine whose weights change behind its digests.

    python -m benchmarks.sync_alarms 1000                   engine hf on a CPU, in float32 and bfloat16
    python -m benchmarks.sync_alarms 1000 --engine vllm     vLLM of .venv-vllm
    python -m benchmarks.sync_alarms 50 --engine vllm --device cuda --size half --dtypes bfloat16 --python python

Random models; updates of every size, from none to a fifth of the weights. After the honest syncs come three that are
not, each after five honest ones: q and k of a layer swapped, a layer times 1.5, an update that the engine ignores, with
digests that are right. `ended` says at which of the syncs that followed the run would have stopped. One line for each
dtype.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from atropos_exp.errors import SyncError
from tests.helpers.engines import start_engine
from tests.helpers.publishing import HeldModel, manage
from tests.helpers.random_models import random_model
from tests.helpers.sabotage import LiesAboutDigests, one_layer_larger, swap_q_and_k

PATIENCE = 20  # syncs within which a sabotage may be named


def build(size: str, device: str) -> Any:
    """`tiny`: two layers. `half`: the shape of Qwen2.5-0.5B, with weights large enough that attention matters."""
    if size == "tiny":
        return random_model(seed=1, vocab=512).to(device)
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=32768, initializer_range=0.05,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(1)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()


def honest(publisher: Any, trainer: HeldModel, version: int, num: int) -> str:
    """So many honest syncs from `version` on."""
    sizes, alarms, shares, gaps, followed = np.random.default_rng(0), [], [], [], []
    for index in range(num):
        trainer.wander(float(10 ** sizes.uniform(-4, -0.7)) if index % 7 else 0.0)
        try:
            stats = publisher.publish(version + index)
        except SyncError as error:
            alarms.append(str(error))
            continue
        shares.append(stats.canary_gap_mean / stats.canary_gap_allowed)
        gaps.append(stats.canary_gap_mean)
        if (share := publisher._expectations[0].follows) is not None:
            followed.append(share)
    moved = f"{min(followed):.2f} to {max(followed):.2f}" if followed else "never judged"
    return (
        f"{num} honest syncs, {len(alarms)} alarms {alarms[:1]}; gap {np.mean(gaps):.2g} in the mean, {max(gaps):.2g} "
        f"at most; gap / allowed {max(shares):.2f} at most; the engine's movement {moved} of the trainer's"
    )


def ended(publisher: Any, line: LiesAboutDigests, trainer: HeldModel, version: int, begin: Callable[[], None]) -> str:
    """Five honest syncs, then a sabotage: how many syncs it took until it was named, and how."""
    for index in range(5):
        trainer.wander(0.02)
        publisher.publish(version + index)
    begin()
    for index in range(PATIENCE):
        trainer.wander(0.02)
        try:
            publisher.publish(version + 5 + index)
        except SyncError as error:
            return f"named at sync {index + 1}: {str(error).split(' (')[0][:160]}"
    return f"NOT named in {PATIENCE} syncs"


def sabotage(publisher: Any, line: LiesAboutDigests, trainer: HeldModel, version: int) -> dict[str, str]:
    """What became of each of the three."""
    found = {}
    for name, (attribute, value) in {
        "q and k swapped": ("change", swap_q_and_k),
        "a layer times 1.5": ("change", one_layer_larger),
        "ignored updates": ("ignores", True),
    }.items():
        found[name] = ended(publisher, line, trainer, version, lambda a=attribute, v=value: setattr(line, a, v))
        line.change, line.ignores = None, False
        version += 5 + PATIENCE
    return found


def main() -> None:
    options = _options()
    for dtype in options.dtypes:
        trainer = HeldModel(build(options.size, options.device))
        vocab = trainer.model.config.vocab_size
        random = np.random.default_rng(5)
        canary = [random.integers(0, vocab, size=64).astype(np.int32) for _ in range(4)]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            trainer.model.save_pretrained(folder / "model")
            engine = start_engine(
                options.engine, folder, folder / "model", max_length=300, device=options.device, dtype=dtype,
                **options.set,
            )  # fmt: skip
            try:
                line = LiesAboutDigests(engine)
                publisher = manage(trainer, line, canary=canary, tolerance=None, bucket_bytes=1 << 33, temperature=1.0)
                what = f"{options.engine}, {options.size}, {dtype}"
                print(f"{what}: {honest(publisher, trainer, 1, options.syncs)}", flush=True)
                for name, result in sabotage(publisher, line, trainer, options.syncs + 1).items():
                    print(f"{what}: {name}: {result}", flush=True)
            finally:
                engine.stop()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("syncs", type=int)
    parser.add_argument("--engine", choices=("hf", "vllm", "sglang"), default="hf")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=("tiny", "half"), default="tiny")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--python", help="interpreter of an environment with the engine")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of conf/engine")
    options = parser.parse_args()
    options.set = {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in options.set)}
    if options.python is not None:
        options.set["python"] = options.python
    return options


if __name__ == "__main__":
    main()
