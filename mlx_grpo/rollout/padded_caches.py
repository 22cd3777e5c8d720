"""mlx-lm's batched caches, which know each row's padding. Import this where it is used: mlx-lm takes seconds.

Prompts of different length share a batch by padding on the left:

    tokens       pads   KVCache                         RotatingKVCache         ArraysCache
    . . 5 6 7    2      keys of all positions; a mask   the same, of the last   one state a row, which
    1 2 3 4 5    0      (N, 1, L, S) hides padding      max_size positions      padding leaves as it is
"""

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache, BatchKVCache, BatchRotatingKVCache, CacheList, KVCache, RotatingKVCache,
)  # fmt: skip


class Joining:
    """A block is concatenated, which is cheap for a gradient. Single positions fill a buffer that grows."""

    def update_and_fetch(self, keys, values):
        if keys.shape[2] == 1:
            return super().update_and_fetch(keys, values)
        before = None if self.keys is None else self.keys_and_values()  # as many positions as offset says
        self.offset = self.offset + keys.shape[2]
        if before:
            keys, values = (mx.concatenate(pair, axis=2) for pair in zip(before, (keys, values)))
        self.keys, self.values, self._idx = keys, values, keys.shape[2]
        return keys, values


class PlainKVCache(Joining, KVCache):
    pass


class PaddedKVCache(Joining, BatchKVCache):
    """Keys and values of rows padded on the left by pads (N,)."""

    def __init__(self, pads: mx.array):
        super().__init__([0])
        self.left_padding = pads
        self.offset = -pads

    def make_mask(self, N, return_array=False, **kwargs):
        return with_itself(super().make_mask(N, return_array, **kwargs))


class PaddedRotatingKVCache(BatchRotatingKVCache):
    """The same of the last max_size positions."""

    def __init__(self, max_size: int, pads: mx.array):
        super().__init__(max_size, [0])
        self.left_padding = pads + 0  # a copy: mlx-lm subtracts in place
        self.offset = -pads

    def make_mask(self, N, window_size=None, return_array=False):
        return with_itself(super().make_mask(N, window_size, return_array))


def with_itself(mask: mx.array) -> mx.array:
    """A block's mask (N, 1, L, S) where padding sees itself: else its gradient is NaN on CUDA."""
    length, size = mask.shape[-2:]
    if length == 1:
        return mask
    return mask | (mx.arange(size - length, size)[:, None] == mx.arange(size))


def has_padded_form(layer) -> bool:
    return type(layer) in (KVCache, ArraysCache) or type(layer) is RotatingKVCache and layer.keep == 0


def batched(layer, pads: mx.array | None):
    """The batched form of an empty mlx-lm cache. pads: (P,), each row's padding on the left, or None."""
    if isinstance(layer, CacheList):
        return CacheList(*(batched(part, pads) for part in layer.caches))
    if type(layer) is KVCache:
        return PlainKVCache() if pads is None else PaddedKVCache(pads)
    if type(layer) is RotatingKVCache and pads is not None:
        return PaddedRotatingKVCache(layer.max_size, pads)
    return layer  # an ArraysCache is told its padding block by block
