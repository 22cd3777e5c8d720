"""Sliding windows that keep all positions, for gradients.

To be imported where they are used: mlx-lm takes seconds.
"""

from mlx_lm.models.cache import RotatingKVCache

from mlx_grpo.rollout.padded_caches import PaddedKVCache, PlainKVCache, batched


class WindowKVCache(PlainKVCache):
    """Keys and values of all positions, of which each sees the last max_size."""

    def __init__(self, max_size: int):
        super().__init__()
        self.max_size = max_size

    def make_mask(self, N, window_size=None, **kwargs):
        size = window_size or self.max_size
        inside = self.offset + N <= size  # then attention is causal, and fused
        return super().make_mask(N, return_array=False, window_size=None if inside else size)


class PaddedWindowKVCache(PaddedKVCache):
    """The same of rows padded on the left by pads (N,)."""

    def __init__(self, max_size: int, pads):
        super().__init__(pads)
        self.max_size = max_size

    def make_mask(self, N, window_size=None, **kwargs):
        return super().make_mask(N, window_size=window_size or self.max_size)


def training_cache(layer, pads):
    """The form that an empty mlx-lm cache has in training. pads: (P,), padding on the left, or None."""
    if type(layer) is not RotatingKVCache:
        return batched(layer, pads)
    return WindowKVCache(layer.max_size) if pads is None else PaddedWindowKVCache(layer.max_size, pads)
