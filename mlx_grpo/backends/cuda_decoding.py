"""Decoding on CUDA, where the host takes longer to launch a position's kernels than the GPU to compute them.

Measured on one H200, SmolLM2-135M in bfloat16, 8 prompts x 8 completions of at most 160 tokens with natural
ends: 2,100 tokens/s by plain MLX, 3,900 with cuda_kernels.py, 7,200 with model and sampling compiled too;
9,400, 14,400 and 25,700 at 16 x 16. What is built on first use took 10 s for the kernels and 20 s for
compilation. Sampling is no longer compiled: evaluations, which draw otherwise, had shapes of their own.
"""

from collections import OrderedDict
from functools import partial

import mlx.core as mx
from mlx.utils import tree_map

from mlx_grpo.backends import cuda_kernels
from mlx_grpo.rollout.decoding import Decoder
from mlx_grpo.rollout.kv_cache import can_pad, has_plain_caches, mapped_rows
from mlx_grpo.update.micro_batches import bucket

FAST_AFTER = 1500  # positions that a run decodes by plain MLX before it builds what is faster
MOST_SHAPES = 8  # compiled at a time; each keeps host memory
LEAST_ROWS = 16  # fewer take the GPU as long as these
STEP_OF_POSITIONS = 64  # buffer lengths are multiples of this at least, so that few shapes are compiled


def fast_decoder(model) -> Decoder:
    """The decoder that is fastest once it is built: on CUDA one of these, elsewhere plain MLX's."""
    if not cuda_kernels.has_tensor_cores():
        return Decoder(model)
    if has_plain_caches(model) and can_pad(model) and cuda_kernels.attention_covers(model):
        return CompiledDecoder(model)
    return KernelDecoder(model)


class KernelDecoder(Decoder):
    """Linear layers and rotary embeddings by cuda_kernels.py, whatever the model's caches are."""

    def __init__(self, model):
        super().__init__(model)
        self.launches = cuda_kernels.launches(model)

    def __call__(self, cache, last):
        with cuda_kernels.fast_kernels(self.launches, cuda_kernels.MLX_ATTENTION):
            return super().__call__(cache, last)


class CompiledDecoder(Decoder):
    """All of cuda_kernels.py, and the model compiled once for each number of rows and length of buffers.

    A cache is {"filled": positions, "pads": (N,), "layers": [(keys, values), ..]} of buffers (N, H, S, D),
    which have room for the longest completion from the start: one position is computed as the next.

        0      pads             filled        S
        | padding | prompt, completion |  empty  |    the mask (N, 1, 1, S) shows pads to filled
    """

    def __init__(self, model):
        super().__init__(model)
        self.position = partial(compute_position, model, cuda_kernels.launches(model))
        self.compiled = OrderedDict()  # the compiled position by (N, S), the least recently used first

    def start(self, tokens, pads, repeats, room):
        length = tokens.shape[1] - 1
        # One-id prompts leave nothing in a cache; the shapes are those of another id.
        cache = super().start(tokens if length else mx.repeat(tokens, 2, axis=1), pads, repeats, room)
        empty = bucket(length + room, STEP_OF_POSITIONS) - length
        layers = [[x[:, :, :length] for x in layer.keys_and_values()] for layer in cache]
        layers = tree_map(lambda x: mx.pad(x, ((0, 0), (0, 0), (0, empty), (0, 0))), layers)
        pads = mx.zeros(tokens.shape[0], mx.int32) if pads is None else pads
        return {"filled": length, "pads": mx.repeat(pads, repeats), "layers": layers}

    def __call__(self, cache, last):
        filled = mx.array(cache["filled"])
        positions = mx.arange(cache["layers"][0][0].shape[2])  # (S,)
        mask = (positions <= filled) & (positions >= cache["pads"][:, None])  # (N, S)
        position = self.compiled_for(mask.shape)
        last = last.astype(mx.int32)  # ids as they are drawn have another type, which would be compiled again
        offsets = filled - cache["pads"]
        logits, cache["layers"] = position(last, filled, offsets, mask[:, None, None], cache["layers"])
        cache["filled"] += 1
        return logits

    def compiled_for(self, shape: tuple[int, int]):
        """The position compiled for (N, S).

        Beyond MOST_SHAPES the least recently used goes, and may return.
        """
        if shape not in self.compiled:
            self.compiled[shape] = mx.compile(partial(self.position), inputs=[self.model.state])
        self.compiled.move_to_end(shape)
        if len(self.compiled) > MOST_SHAPES:
            self.compiled.popitem(last=False)
        return self.compiled[shape]

    def rows_to_keep(self, going, rows):
        """By halves: few numbers of rows are met."""
        while going <= rows // 2 >= LEAST_ROWS:
            rows //= 2
        return rows

    def keep(self, cache, rows):
        cache.update(mapped_rows(cache, lambda x: x[rows]))


def compute_position(model, launches, last, filled, offsets, mask, layers):
    """Logits (N, V) after `last` (N, 1), and the layers' buffers with it. offsets: its positions, (N,)."""
    cache = [FixedKVCache(keys, values, filled, offsets, mask) for keys, values in layers]
    with cuda_kernels.fast_kernels(launches, cuda_kernels.attention):
        logits = model(last, cache=cache)[:, -1]
    return logits, [[layer.keys, layer.values] for layer in cache]


class FixedKVCache:
    """A layer's keys and values in buffers (N, H, S, D), which have the new position at `filled`, ()."""

    def __init__(self, keys, values, filled, offset, mask):
        self.keys, self.values = keys, values
        self.filled, self.offset, self.mask = filled, offset, mask

    def update_and_fetch(self, keys, values):
        self.keys = self.with_position(self.keys, keys)
        self.values = self.with_position(self.values, values)
        return self.keys, self.values

    def with_position(self, buffer, x):
        # Finding where a slice starts would cost a GPU more than the slice.
        return mx.put_along_axis(buffer, mx.broadcast_to(self.filled, x.shape), x, axis=2)

    def make_mask(self, N, **kwargs):
        return self.mask
