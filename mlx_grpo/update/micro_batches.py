"""An update's completions as padded arrays, in parts that fit the budget of positions.

A unit is the list of (group, first row) pairs that go through the model together, `k` rows from each first
one on.
"""

import math

import mlx.core as mx
import numpy as np

from mlx_grpo.backends.device import on_cpu
from mlx_grpo.backends.streams import stream_count

STREAM_POSITIONS = 256  # for which a stream of its own is worth it


def bucket(n: int, least: int = 8) -> int:
    """The length n of a rollout is padded to: steps of a quarter of its power of two, so that few shapes are
    ever compiled.
    """
    step = max(least, 2 ** max(0, (n - 1).bit_length() - 3))
    return -(-n // step) * step


def grid(n: int, least: int = 8) -> int:
    """What a length, or a number of groups, of an update is padded to: 8, 16, 24, 32, 48, 64, 96 and so on.

    On GPUs a new shape costs time, and a shape that comes again is compiled: 90 updates with sampled lengths,
    8 x 8 up to 256 tokens, meet 23 shapes in place of 36 in steps of quarters, for 3% more positions. CPUs
    take every length as it is.
    """
    if on_cpu():
        return n
    step = max(least, 2 ** max(0, (n - 1).bit_length() - 2))
    return -(-n // step) * step


def left_pad(prompts: list[list[int]], length: int) -> tuple[mx.array, mx.array]:
    """Ragged prompts as ids (P, length) and the padding before each (P,)."""
    pads = [length - len(p) for p in prompts]
    return mx.array([[0] * pad + p for pad, p in zip(pads, prompts)]), mx.array(pads)


def micro_batches(groups: list, advantages: np.ndarray, config, ranks, shares_padded: bool) -> list[dict]:
    """This rank's share of an update's arrays, in batches of at most micro_batch_tokens positions;
    advantages: (B, G).

    Each has prompts (P, L), pads (P,), ids and mask (P*K, T), sampler_logps (P*K, T), advantages (P*K,),
    `rows`, how many of the P*K are no padding, and what makes the parts add up to the whole: `totals`, the
    step's sizes as grpo_loss takes them. shares_padded: whether a padded prompt is computed once for its
    rows.
    """
    g = config.num_generations
    tokens = mx.array(float(sum(sum(trained(c, config)) for group in groups for c in group.completions)))

    def cost(count: int, prompt: int, longest: int, rows: int) -> int:
        """Positions of `count` groups, padded: `rows` rows each, of prompts and completions up to these
        lengths.
        """
        return grid(count, 1) * ((1 if shares_padded else rows) * grid(prompt) + rows * grid(longest))

    def whole(b: int) -> int:
        return cost(1, len(groups[b].prompt), longest_completion(groups[b]), g)

    # Where the rewards alone drive the loss, groups without signal have no gradient: only totals count them.
    used = [b for b in range(len(groups)) if not config.rewards_drive_alone or np.any(advantages[b])]
    used.sort(key=lambda b: longest_completion(groups[b]))
    used = ranks.balanced(used, whole)
    if not used:
        return []
    units, k = cut(groups, used, cost, sum(map(whole, used)), config)
    batches = [collate(groups, advantages, unit, k, config, shares_padded) for unit in units]
    totals = {"rows": mx.array(float(len(groups) * g)), "tokens": tokens, "entropy_tokens": tokens}
    for batch in batches:
        batch["totals"] = totals
    return batches


def longest_completion(group) -> int:
    return max(len(completion.ids) for completion in group.completions)


def trained(completion, config) -> list[int]:
    """1 for each id of a completion that the loss is taken of, else 0."""
    if config.mask_truncated_completions and completion.finish_reason == "length":
        return [0] * len(completion.ids)
    return completion.mask


def cut(groups: list, used: list[int], cost, total: int, config) -> tuple[list[list], int]:
    """The units of an update, and k.

    used: the groups in it, by length; `total`: the sum of their costs. On a CPU streams work side by side:
    within the budget together, and each on its share.
    """
    g, side_by_side = config.num_generations, stream_count()
    budget = config.micro_batch_tokens // side_by_side
    parts = (
        side_by_side * math.ceil(total / config.micro_batch_tokens)
        if total >= side_by_side * STREAM_POSITIONS
        else 1
    )
    # Rows of a group that go together: all of them, unless one group alone is over the budget, or parts are
    # too few.
    widest = max(len(groups[b].prompt) for b in used), max(longest_completion(groups[b]) for b in used)
    fits = lambda k: cost(1, *widest, k) <= budget and len(used) * g // k >= parts  # noqa: E731
    k = next(k for k in range(g, 0, -1) if g % k == 0 and (k == 1 or fits(k)))

    def positions(unit):
        longest = max(len(c.ids) for b, first in unit for c in groups[b].completions[first : first + k])
        return cost(len(unit), max(len(groups[b].prompt) for b, _ in unit), longest, k)

    first, *rest = [(b, start) for b in used for start in range(0, g, k)]
    units = [[first]]
    for piece in rest:
        now, larger = positions(units[-1]), positions([*units[-1], piece])
        is_nearer = (
            len(units) < parts and now + larger > 2 * total / parts
        )  # to an equal share, without the piece
        if is_nearer or larger > budget:
            units.append([])
        units[-1].append(piece)
    return units, k


def collate(groups: list, advantages: np.ndarray, unit: list, k: int, config, shares_padded: bool) -> dict:
    """The arrays of a unit, padded to shapes of the grid."""
    rows = [(b, i) for b, first in unit for i in range(first, first + k)]
    count = grid(len(unit), 1)
    width = grid(max(len(groups[b].completions[i].ids) for b, i in rows))
    prompts = [groups[b].prompt for b, _ in unit]
    prompts += prompts[:1] * (count - len(unit))
    # Where a padded prompt cannot be shared, one of exact length can; elsewhere few shapes are worth more.
    equal = len(set(map(len, prompts))) == 1 and not shares_padded
    tokens, pads = left_pad(prompts, len(prompts[0]) if equal else grid(max(map(len, prompts))))
    arrays = {name: np.zeros((count * k, width), kind) for name, kind in
              (("ids", np.int32), ("mask", np.float32), ("sampler_logps", np.float32))}  # fmt: skip
    for n, (b, i) in enumerate(rows):
        completion = groups[b].completions[i]
        length = len(completion.ids)
        arrays["ids"][n, :length] = completion.ids
        arrays["mask"][n, :length] = trained(completion, config)
        arrays["sampler_logps"][n, :length] = completion.sampler_logps
    flat = np.zeros(count * k, np.float32)
    flat[: len(rows)] = [advantages[b, i] for b, i in rows]
    batch = {"prompts": tokens, "advantages": mx.array(flat), **{n: mx.array(a) for n, a in arrays.items()}}
    batch["rows"] = mx.array(len(rows))
    return batch if equal else {**batch, "pads": pads}
