"""Caches of keys, values and states: prompts computed once for their groups, and gradients through them."""

import copy

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

PREFILL_CHUNK = 2048  # prompt positions in one forward
# Of the logits' spread, in float32: rounding is a hundredth of it at the most, an error many times it.
TRIAL_GAP = 0.01
TRIED = {}  # what try_padding said, by model class and kinds of cache


def cache_layers(cache: list) -> list:
    """The caches of a model one by one, also those that a layer keeps in a CacheList."""
    return [part for layer in cache for part in getattr(layer, "caches", [layer])]


def reason_not_to_pad(model) -> str:
    """Why prompts of different length cannot share a batch, as one sentence; empty where they can.

    Decided by the kinds of the model's caches, which need a batched form, by whether its code asks each kind
    for a mask, and by one small trial a class in float32: padding changes some models' positions or states.
    """
    from mlx_lm.models.cache import make_prompt_cache

    from mlx_grpo.rollout.padded_caches import has_padded_form

    layers = cache_layers(make_prompt_cache(model))
    unknown = {type(layer).__name__ for layer in layers if not has_padded_form(layer)}
    if unknown:
        return f"mlx-lm has no batched form of this model's {', '.join(sorted(unknown))}"
    key = (type(model), *(type(layer) for layer in layers))
    if key not in TRIED:
        TRIED[key] = try_padding(model)
    return TRIED[key]


def can_pad(model) -> bool:
    """Whether rows of different length may share a batch in a rollout."""
    return not reason_not_to_pad(model)


def has_plain_caches(model) -> bool:
    """Whether every layer keeps the keys and values of all positions: no window, no state."""
    from mlx_lm.models.cache import KVCache, make_prompt_cache

    return all(type(layer) is KVCache for layer in make_prompt_cache(model))


def in_float32(model, run):
    """What `run()` computes with the model, in float32. Weights are cast when used, and freed again."""
    own = model.parameters()
    half = (mx.bfloat16, mx.float16)
    model.update(tree_map(lambda x: x.astype(mx.float32) if x.dtype in half else x, own))
    try:
        result = run()
    finally:
        model.update(own)
    mx.eval([layer.state for layer in cache_layers(result)] if isinstance(result, list) else result)
    return result


def try_padding(model) -> str:
    """Why a padded row does not get the logits that it has alone, in float32; empty where it does."""
    tokens = mx.array([[0, 0, 0, 0, 0, 1, 2, 3, 4], [9, 8, 7, 6, 5, 4, 3, 2, 1]])  # (2, 9)
    pads = mx.array([5, 0])
    cache = new_cache(model, pads)
    unmasked = {type(layer): type(layer).__name__ for layer in cache_layers(cache)}
    for layer in cache_layers(cache):
        layer.make_mask = recording(layer.make_mask, lambda kind=type(layer): unmasked.pop(kind, None))
    try:
        in_float32(model, lambda: fill(model, cache, tokens, pads))
        if unmasked:
            return f"this model's code asks for no mask of its {', '.join(sorted(unmasked.values()))}"
        steps = [
            in_float32(model, lambda: model(last, cache=cache))
            for last in (tokens[:, -1:], mx.array([[5], [6]]))
        ]
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:100]
        return f"this model's code takes no mask or position of each row: {reason}"
    padded = mx.concatenate([logits[0] for logits in steps])  # (2, V): after the prompt, and one id later
    alone = in_float32(model, lambda: model(mx.array([[1, 2, 3, 4, 5]])))[0, -2:]
    equal = mx.abs(padded - alone).max() <= TRIAL_GAP * (alone.max() - alone.min())
    return "" if equal.item() else "padding changes what this model computes for a row"


def recording(function, note):
    """`function`, but each call is noted first."""

    def call(*args, **kwargs):
        note()
        return function(*args, **kwargs)

    return call


def mapped_rows(state, change):
    """A cache's state with `change` applied to every array but scalars; their first axis is the rows."""
    return tree_map(lambda x: change(x) if isinstance(x, mx.array) and x.ndim else x, state)


def map_rows(cache: list, change) -> None:
    for layer in cache_layers(cache):
        layer.state = mapped_rows(layer.state, change)


def new_cache(model, pads: mx.array | None) -> list:
    """An empty cache for rows padded on the left by pads (P,), or by nothing."""
    from mlx_lm.models.cache import make_prompt_cache

    from mlx_grpo.rollout.padded_caches import batched

    return [batched(layer, pads) for layer in make_prompt_cache(model)]


def fill(model, cache: list, tokens: mx.array, pads: mx.array | None) -> list:
    """The cache with all of `tokens` (P, L) but the last ids run through the model, without its head."""
    states = [layer for layer in cache_layers(cache) if hasattr(layer, "advance")]  # mlx-lm's ArraysCache
    length = tokens.shape[1] - 1
    for start in range(0, length, PREFILL_CHUNK):
        for layer in states if pads is not None else ():
            layer.left_padding = pads - start
        model(tokens[:, start : min(start + PREFILL_CHUNK, length)], cache=cache)
    for layer in states:
        layer.left_padding = None  # what follows is no padding
    return cache


def prefill(model, tokens: mx.array, pads: mx.array | None, repeats: int) -> list:
    """Run P prompts once and return a cache of P*repeats rows that holds all but their last ids.

    tokens: (P, L) left-padded by pads: (P,), or None where no row is padded.
    """
    cache = fill(model, new_cache(model, pads), tokens, pads)
    if repeats > 1:
        map_rows(cache, lambda x: mx.repeat(x, repeats, axis=0))
    return cache


@mx.custom_function
def enter(parameters, x):
    """A layer's parameters and its input, unchanged.

    In the backward pass the layer before waits for the gradients of both. Else MLX may leave the parameters'
    gradients for the end, and keep what they are computed from.
    """
    return parameters, x


@enter.vjp
def enter_vjp(primals, cotangents, outputs):
    parameters, x = cotangents
    return parameters, mx.depends([x], [gradient for _, gradient in tree_flatten(parameters)])[0]


def own_copy(x):
    """A copy of a cache's attribute: mlx-lm changes lists of states, and arrays of paddings, in place."""
    return x + 0 if isinstance(x, mx.array) else list(x) if isinstance(x, list) else x


def checkpointed(call):
    """A layer's `call` with gradient checkpointing: its backward pass computes the layer again.

    In training only the layer's input is kept. What the call leaves in the cache, keys and values or states,
    is an output with a gradient too. mlx-lm's grad_checkpoint gives it none, and a group's prompt could not
    be computed once.
    """

    def call_checkpointed(layer, x, *args, **kwargs):
        if not layer.training:
            return call(layer, x, *args, **kwargs)
        cache = next(
            (a for a in (*args, *kwargs.values()) if hasattr(a, "update_and_fetch") or hasattr(a, "advance")),
            None,
        )
        # Trace with a shallow copy: a cache that its own graph refers to is never freed.
        traced = copy.copy(cache)
        args = [traced if a is cache else a for a in args]
        kwargs = {name: traced if a is cache else a for name, a in kwargs.items()}
        state = {} if cache is None else vars(traced)
        before = dict(state)

        def run(parameters, x, stored, args, kwargs):
            layer.update(parameters)
            # The cache as it was before the layer: the backward pass runs this again.
            state.update({name: own_copy(x) for name, x in (before | stored).items()})
            out = call(layer, x, *args, **kwargs)
            return out, {name: state.pop(name) for name in stored}

        # An ArraysCache has its states in `cache`.
        stored = {name: before[name] for name in ("keys", "values", "cache") if name in before}
        out, stored = mx.checkpoint(run)(*enter(layer.trainable_parameters(), x), stored, args, kwargs)
        if cache is not None:
            vars(cache).update(state | stored)
        return out

    # A class is changed for good, and for every model of the process: once is enough.
    return call if call.__name__ == "call_checkpointed" else call_checkpointed


def cache_bytes(model, length: int) -> int:
    """Bytes of one row's cache at `length` positions: windows are bounded, a state is one size."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    model(mx.zeros((1, 1), mx.int32), cache=cache)
    total = 0
    for layer in cache_layers(cache):
        arrays = [x for _, x in tree_flatten(layer.state) if isinstance(x, mx.array) and x.ndim > 1]
        if hasattr(layer, "keys"):  # (1, H, S, D) each
            positions = min(length, getattr(layer, "max_size", length))
            total += positions * sum(x.nbytes // x.shape[2] for x in arrays)
        else:
            total += sum(x.nbytes for x in arrays)
    return total


def kv_bytes_per_token(model) -> int:
    """Bytes that one position more of one row takes in the cache, over all layers."""
    return cache_bytes(model, 2) - cache_bytes(model, 1) or 1
