"""False alarms of the canary: so many honest weight syncs of a tiny random model to engine `hf`, in both dtypes.

    python -m benchmarks.honest_syncs 1000

Updates of every size, from none to a fifth of the weights; the figures are printed as a line for each dtype.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from atropos_exp.errors import SyncError
from tests.helpers.engines import start_random
from tests.helpers.publishing import HeldModel, manage
from tests.helpers.random_models import random_model, random_prompts


def main(num_syncs: int) -> None:
    for dtype in ("bfloat16", "float32"):
        torch.manual_seed(0)
        sizes = np.random.default_rng(0)
        trainer, alarms, shares, used = HeldModel(random_model(seed=1)), [], [], []
        with tempfile.TemporaryDirectory() as folder:
            engine = start_random("hf", Path(folder), trainer.model, max_length=32, dtype=dtype)
            try:
                canary = random_prompts([12, 9, 16, 11], seed=5)
                publisher = manage(trainer, engine, canary=canary, tolerance=None, bucket_bytes=1 << 30)
                for version in range(1, num_syncs + 1):
                    trainer.wander(float(10 ** sizes.uniform(-4, -0.7)) if version % 7 else 0.0)
                    try:
                        stats = publisher.publish(version)
                    except SyncError as error:
                        alarms.append(str(error))
                        continue
                    shares.append(stats.canary_gap_mean / stats.canary_gap_allowed)
                    used.append(publisher._expectations[0].follows)
            finally:
                engine.stop()
        followed = [share for share in used if share is not None]
        print(
            f"{dtype}: {num_syncs} honest syncs, {len(alarms)} alarms {alarms[:1]}; gap / allowed {max(shares):.2f} at "
            f"most, {np.mean(shares):.2f} in the mean; the engine's movement {min(followed):.2f} to "
            f"{max(followed):.2f} of the trainer's",
            flush=True,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]))
