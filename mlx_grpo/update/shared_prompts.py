"""A group's prompt computed once in training, with gradients through what is kept of it.

    prompts (P, L) --one forward--> keys, values, states (P) --repeated--> (P*G)
    completions (P*G, T) --forward after those--> hidden states (P*G, T, D)

The rollout's caches are made for that, but for sliding windows: they overwrite their oldest positions one by
one, which has no cheap gradient. Here a window keeps all positions, and a mask hides those that have left it.
"""

import mlx.core as mx

from mlx_grpo.rollout.kv_cache import TRIAL_GAP, cache_layers, in_float32, map_rows, reason_not_to_pad

TRIED = {}  # what try_sharing said, by model class and kinds of cache


def reason_not_to_share(model) -> str:
    """Why training computes a group's prompt once a row, as one sentence; empty where it computes it once.

    Decided by the kinds of the model's caches and one small trial a class in float32.
    """
    from mlx_lm.models.cache import CacheList, KVCache, make_prompt_cache

    cache = make_prompt_cache(model)
    if any(isinstance(layer, CacheList) for layer in cache):
        return "a layer of this model keeps several caches"
    reason = reason_not_to_pad(model)
    kinds = tuple(type(layer) for layer in cache)
    if reason or set(kinds) == {KVCache}:  # which is what the trial of padding has tried
        return reason
    if (type(model), kinds) not in TRIED:
        TRIED[type(model), kinds] = try_sharing(model)
    return TRIED[type(model), kinds]


def try_sharing(model) -> str:
    """Why completions after a shared, padded prompt do not get the logits of whole sequences.

    Tried in float32; empty where they do.
    """
    prompts = mx.array([[0, 0, 0, 0, 0, 1, 2, 3, 4], [9, 8, 7, 6, 5, 4, 3, 2, 1]])  # (2, 9)
    # (4, 4): each prompt's last id and three more
    answers = mx.array([[4, 5, 6, 7], [4, 7, 8, 9], [1, 2, 3, 4], [1, 5, 6, 7]])
    try:
        cache = in_float32(model, lambda: prefill(model, prompts, mx.array([5, 0]), 2))
        shared = in_float32(model, lambda: model(answers, cache=cache))[0]
    except (TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:100]
        return f"this model's code does not take a prompt's caches for several rows: {reason}"
    alone = in_float32(model, lambda: model(mx.array([[1, 2, 3, 4, 5, 6, 7]])))[0, -4:]
    equal = mx.abs(shared - alone).max() <= TRIAL_GAP * (alone.max() - alone.min())
    return "" if equal.item() else "sharing a prompt changes what this model computes"


def prefill(model, prompts: mx.array, pads: mx.array | None, repeats: int) -> list:
    """The caches of all ids but the last of prompts (P, L), `repeats` rows each, from one forward.

    pads: (P,), the padding on the left of each prompt, or None.
    """
    from mlx_lm.models.cache import make_prompt_cache

    from mlx_grpo.update.window_caches import training_cache

    cache = [training_cache(layer, pads) for layer in make_prompt_cache(model)]
    states = [layer for layer in cache_layers(cache) if hasattr(layer, "advance")]  # mlx-lm's ArraysCache
    for layer in states:
        layer.left_padding = None if pads is None else pads + 0  # a copy: mlx-lm subtracts in place
    if prompts.shape[1] > 1:
        model(prompts[:, :-1], cache=cache)
    for layer in states:
        layer.left_padding = None  # what follows is no padding
    if repeats > 1:
        map_rows(cache, lambda x: mx.repeat(x, repeats, axis=0))
    return cache
