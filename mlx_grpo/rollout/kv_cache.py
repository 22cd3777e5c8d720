"""KV caches: prompts computed once for their groups, padded rows, and gradients through both."""

import copy

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

PREFILL_CHUNK = 2048  # prompt positions in one forward
PADDING_WORKS = {}  # by model class


def can_pad(model) -> bool:
    """Whether rows of different length may share a batch: every layer keeps a plain KV cache and masks its padding.

    Sliding-window and recurrent caches may not be padded, and some models' attention takes no mask of its own for each
    row; that is found out by trying, once a class.
    """
    from mlx_lm.models.cache import KVCache, make_prompt_cache

    if any(type(c) is not KVCache for c in make_prompt_cache(model)):
        return False
    if type(model) not in PADDING_WORKS:
        tokens, pads, last = mx.array([[0, 0, 1, 2, 3], [1, 2, 3, 4, 3]]), mx.array([2, 0]), mx.array([[3], [3]])
        try:
            padded = model(last, cache=prefill(model, tokens, pads, 1))[:1]
            alone = model(last[:1], cache=prefill(model, tokens[:1, 2:], None, 1))
            gap, spread = mx.abs(padded - alone).max(), alone.max() - alone.min()
            PADDING_WORKS[type(model)] = (gap < 0.03 * spread).item()  # half precision differs by a little
        except ValueError:  # the shapes of mask and scores do not match
            PADDING_WORKS[type(model)] = False
    return PADDING_WORKS[type(model)]


def mapped_rows(state, change):
    """A cache's state with `change` applied to every array; all that are not scalars have the rows as their first axis."""
    return tree_map(lambda x: change(x) if isinstance(x, mx.array) and x.ndim else x, state)


def map_rows(cache: list, change) -> None:
    for layer in cache:
        layer.state = mapped_rows(layer.state, change)


def prefill(model, tokens: mx.array, pads: mx.array | None, repeats: int) -> list:
    """Run P prompts once and return a KV cache of P*repeats rows that holds all but their last ids.

    tokens: (P, L) left-padded by pads: (P,), or None where no row is padded. The head is never evaluated.
    """
    from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache

    class Joining:
        """A block joins what is there; only single positions fill a buffer that grows by steps, which costs a gradient dear."""

        def update_and_fetch(self, keys, values):
            if keys.shape[2] == 1:
                return super().update_and_fetch(keys, values)
            self.offset = self.offset + keys.shape[2]
            if self.keys is not None:
                keys, values = (mx.concatenate(pair, axis=2) for pair in zip(self.keys_and_values(), (keys, values)))
            self.keys, self.values, self._idx = keys, values, keys.shape[2]
            return keys, values

    class PlainKVCache(Joining, KVCache):
        pass

    class PaddedKVCache(Joining, BatchKVCache):
        """Padding sees itself: an attention row with nothing to see has a NaN gradient on CUDA."""

        def make_mask(self, N, return_array=False, **kwargs):
            mask = super().make_mask(N, return_array, **kwargs)
            itself = self._idx + mx.arange(N)[:, None] == mx.arange(self._idx + N)
            return mask | itself if N > 1 else mask

    cache = [PlainKVCache() if type(layer) is KVCache else layer for layer in make_prompt_cache(model)]
    if pads is not None:
        cache = [PaddedKVCache([0]) for _ in cache]
        for layer in cache:
            layer.left_padding, layer.offset = pads, -pads
    length = tokens.shape[1] - 1
    for start in range(0, length, PREFILL_CHUNK):
        model(tokens[:, start : min(start + PREFILL_CHUNK, length)], cache=cache)
    if length and repeats > 1:
        map_rows(cache, lambda x: mx.repeat(x, repeats, axis=0))
    elif repeats > 1 and pads is not None:  # one-id prompts: nothing is cached yet but the padding
        for layer in cache:
            layer.left_padding, layer.offset = (mx.repeat(x, repeats) for x in (layer.left_padding, layer.offset))
    return cache


@mx.custom_function
def enter(parameters, x):
    """A layer's parameters and its input as they are; in the backward pass the layer before waits for the gradients of both.

    Else MLX may leave the parameters' gradients for the end, and keep what they are computed from.
    """
    return parameters, x


@enter.vjp
def enter_vjp(primals, cotangents, outputs):
    parameters, x = cotangents
    return parameters, mx.depends([x], [gradient for _, gradient in tree_flatten(parameters)])[0]


def checkpointed(call):
    """A layer's `call`, but in training it keeps its input alone and computes the rest again in the backward pass.

    What it adds to a KV cache is an output too, with a gradient: mlx-lm's grad_checkpoint has none there, and a group's
    prompt could not be computed once.
    """

    def call_checkpointed(layer, x, *args, **kwargs):
        if not layer.training:
            return call(layer, x, *args, **kwargs)
        cache = next((a for a in (*args, *kwargs.values()) if hasattr(a, "update_and_fetch")), None)
        # The graph keeps a twin, without what the layer adds: a cache that refers to a graph that refers to it is never freed.
        twin = copy.copy(cache)
        args = [twin if a is cache else a for a in args]
        kwargs = {name: twin if a is cache else a for name, a in kwargs.items()}
        state = {} if cache is None else vars(twin)
        before = dict(state)

        def run(parameters, x, stored, args, kwargs):
            layer.update(parameters)
            state.update(before | stored)  # as it was: the backward pass comes here a second time
            out = call(layer, x, *args, **kwargs)
            return out, {name: state.pop(name) for name in stored}

        stored = {name: before[name] for name in ("keys", "values") if name in before}
        out, stored = mx.checkpoint(run)(*enter(layer.trainable_parameters(), x), stored, args, kwargs)
        if cache is not None:
            vars(cache).update(state | stored)
        return out

    # A class is changed for good, and for every model of the process: once is enough.
    return call if call.__name__ == "call_checkpointed" else call_checkpointed


def kv_bytes_per_token(model) -> int:
    """Bytes that one position of one row takes in the KV cache, over all layers."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    model(mx.zeros((1, 1), mx.int32), cache=cache)
    arrays = [x for layer in cache for _, x in tree_flatten(layer.state) if isinstance(x, mx.array) and x.ndim == 4]
    return sum(x.nbytes // x.shape[2] for x in arrays) or 1
