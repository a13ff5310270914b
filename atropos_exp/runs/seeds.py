"""Independent random streams from one seed."""

import hashlib


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose: `derive_seed(seed, "rollout", step)`.

    Equal arguments give the same seed on any machine; seeds for different arguments are independent.
    """
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
