"""Keys and values of a batch in flight: allocated once for prompt and completion, written in place, rows removable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def make_cache(num_rows: int, num_positions: int) -> Any:
    """A transformers Cache of `num_rows` sequences of at most `num_positions` tokens.

    DynamicCache copies all of it at every token; StaticCache attends to its unused tail. This does neither:
    `update` writes one column and returns a view of the used part.
    """
    import torch
    from transformers.cache_utils import Cache, CacheLayerMixin

    class SlabLayer(CacheLayerMixin):  # type: ignore[misc]
        """One layer: keys and values [rows, heads, positions, head size], of which `length` positions are used."""

        is_sliding = False

        def __init__(self) -> None:
            super().__init__()
            self.length = 0

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            rows, heads, _, size = key_states.shape
            self.keys = key_states.new_empty(num_rows, heads, num_positions, size)
            self.values = value_states.new_empty(num_rows, heads, num_positions, value_states.shape[-1])
            self.is_initialized = True
            assert rows == num_rows

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            end = self.length + key_states.shape[2]
            self.keys[:, :, self.length : end] = key_states
            self.values[:, :, self.length : end] = value_states
            self.length = end
            return self.keys[:, :, :end], self.values[:, :, :end]

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.length + query_length, 0

        def get_seq_length(self) -> int:
            return self.length

        def get_max_cache_shape(self) -> int:
            return num_positions

        def take(self, row_N: Tensor, positions: int) -> None:
            """Keep (or repeat) these rows, in this order, with room for `positions`."""
            for name in ("keys", "values"):
                old = getattr(self, name)
                new = old.new_empty(len(row_N), old.shape[1], positions, old.shape[3])
                new[:, :, : self.length] = old[:, :, : self.length].index_select(0, row_N)
                setattr(self, name, new)

    class Slab(Cache):  # type: ignore[misc]
        """Layers appear as the model first writes to them."""

        def take(self, row_N: Tensor, positions: int) -> None:
            for layer in self.layers:
                layer.take(row_N, positions)

        def append_rows(self, others: Sequence[Slab]) -> None:
            """Add the rows of caches of the same used length."""
            if others:
                for layers in zip(self.layers, *(other.layers for other in others), strict=True):
                    layers[0].keys = torch.cat([layer.keys for layer in layers])
                    layers[0].values = torch.cat([layer.values for layer in layers])

    return Slab(layer_class_to_replicate=SlabLayer)
