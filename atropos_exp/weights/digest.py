"""Digests of tensors: they prove that the bits which arrived are the bits which were sent."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_DIGEST_CHUNK = 1 << 22  # words of 8 bytes at once: bounds the work space on the device to some 200 MiB
_DIGEST_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: SplitMix64's constants
_DIGEST_MIX = -4658895280553007687  # 0xBF58476D1CE4E5B9


def digest(tensor: Tensor) -> str:
    """A hexadecimal digest of the elements' bits in row-major order: equal digests mean equal bits.

    For a tensor on the host it is xxh3-128; for one on a device it is the two sums of `digest_lanes`, so that no weight
    leaves the device. A digest of one kind says nothing about one of the other.
    """
    return digests([tensor])[0]


def digests(tensors: Sequence[Tensor]) -> list[str]:
    """The `digest` of each tensor. They are all on the host, or all on one device."""
    import torch
    import xxhash

    if tensors and tensors[0].device.type != "cpu":
        return resolve_lanes(digest_lanes(tensors))
    flat = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
    return [xxhash.xxh3_128_hexdigest(raw.numpy().data) for raw in flat]


def digest_lanes(tensors: Sequence[Tensor]) -> Tensor:
    """Two sums over the bits of each of N tensors, int64 [N, 2], computed on their device without waiting for it;
    `resolve_lanes` makes digests of them.

    A multilinear hash modulo 2^64: every 8 bytes are multiplied by a weight of their own, which is odd, so that no
    single change cancels; the second lane does so with mixed words and other weights. It detects errors, not forgery.
    Many small tensors are digested by the same few kernels: concatenated, summed cumulatively, and separated by
    differences.
    """
    import torch

    device = tensors[0].device
    lanes = torch.zeros(len(tensors), 2, dtype=torch.int64, device=device)
    segments: list[tuple[int, int, Tensor]] = []  # owner, place in its tensor, words
    num_words = 0
    for owner, tensor in enumerate(tensors):
        start = 0
        for words in _words(tensor):
            while len(words):
                part = words[: _DIGEST_CHUNK - num_words]
                segments.append((owner, start, part))
                words, start, num_words = words[len(part) :], start + len(part), num_words + len(part)
                if num_words == _DIGEST_CHUNK:
                    _add_lanes(lanes, segments)
                    segments, num_words = [], 0
    if segments:
        _add_lanes(lanes, segments)
    return lanes


def _words(tensor: Tensor) -> list[Tensor]:
    """The bits of a tensor as int64, the last word filled up with zeros."""
    import torch

    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if raw.data_ptr() % 8:
        raw = raw.clone()
    whole = len(raw) // 8 * 8
    words = [raw[:whole].view(torch.int64)]
    if whole < len(raw):
        last = torch.zeros(8, dtype=torch.uint8, device=raw.device)
        last[: len(raw) - whole] = raw[whole:]
        words.append(last.view(torch.int64))
    return words


def _add_lanes(lanes: Tensor, segments: Sequence[tuple[int, int, Tensor]]) -> None:
    """Add the sums of at most `_DIGEST_CHUNK` words. Works in place where it can: memory traffic is all it costs."""
    import torch

    device = lanes.device
    words = torch.cat([part for _, _, part in segments]) if len(segments) > 1 else segments[0][2]
    lengths = [len(part) for _, _, part in segments]
    ends = list(itertools.accumulate(lengths))
    # Before the segment's place in `words` comes its place in its tensor, from 1 on.
    shifts = [start + 1 - (end - length) for (_, start, _), end, length in zip(segments, ends, lengths, strict=True)]
    table = torch.tensor([[owner for owner, _, _ in segments], lengths, ends, shifts])
    owner, length, end, shift = table.to(device, non_blocking=True)
    weight = torch.arange(len(words), device=device)
    weight += torch.repeat_interleave(shift, length, output_size=len(words)) if len(segments) > 1 else shift
    weight *= _DIGEST_GOLDEN
    weight ^= weight >> 30
    weight *= _DIGEST_MIX
    mixed = words >> 32
    mixed ^= words
    mixed *= (weight ^ (weight >> 27)).bitwise_or_(1)
    weight |= 1
    weight *= words
    for lane, products in enumerate((weight, mixed)):
        upto = torch.cumsum(products, dim=0)[end - 1]
        upto[1:] -= upto[:-1].clone()
        lanes[:, lane].index_add_(0, owner, upto)


def resolve_lanes(lanes: Tensor) -> list[str]:
    """The N digests of `digest_lanes`' [N, 2], with one wait for their device."""
    return ["".join(f"{lane & 0xFFFFFFFFFFFFFFFF:016x}" for lane in pair) for pair in lanes.tolist()]


class Digests:
    """Digests of tensors that arrive bucket by bucket.

        digests = Digests()
        digests.add([("lm_head.weight", tensor)])
        digests.read()  # {"lm_head.weight": "5a6f..."}

    Those of tensors on a device are waited for only in `read`.
    """

    def __init__(self) -> None:
        self._known: dict[str, str] = {}
        self._lanes: list[tuple[list[str], Tensor]] = []

    def add(self, bucket: Sequence[tuple[str, Tensor]]) -> None:
        """Digest named tensors, as they are now."""
        if any(tensor.device.type == "cpu" for _, tensor in bucket):
            self._known.update((name, digest(tensor)) for name, tensor in bucket)
        elif bucket:
            self._lanes.append(([name for name, _ in bucket], digest_lanes([tensor for _, tensor in bucket])))

    def read(self) -> dict[str, str]:
        """The digest of every tensor so far, by its name."""
        for names, lanes in self._lanes:
            self._known.update(zip(names, resolve_lanes(lanes), strict=True))
        self._lanes.clear()
        return self._known
