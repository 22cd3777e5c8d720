"""An update's completions as padded arrays, in parts that fit the budget of positions.

A micro-batch is a list of (group, row slice): the rows that go through the model together.
"""

import math

import mlx.core as mx
import numpy as np

from mlx_grpo.backends.device import on_cpu
from mlx_grpo.backends.streams import stream_count

STREAM_POSITIONS = 256  # positions that are worth a stream of their own


def bucket(n: int, least: int = 8, parts: int = 4) -> int:
    """What a rollout's length n is padded to: steps of a quarter of its power of two, or of 1/parts.

    So few shapes are ever compiled.
    """
    step = max(least, 2 ** max(0, (n - 1).bit_length() - 1) // parts)
    return -(-n // step) * step


def grid(n: int, least: int = 8) -> int:
    """What a length, or a number of groups, of an update is padded to: 8, 16, 24, 32, 48, 64, 96 and so on.

    On GPUs a new shape costs time, and a shape that comes again is compiled: 90 updates with sampled lengths,
    8 x 8 up to 256 tokens, meet 23 shapes in place of 36 in steps of quarters, for 3% more positions. CPUs
    take every length as it is.
    """
    return n if on_cpu() else bucket(n, least, parts=2)


def left_pad(prompts: list[list[int]], length: int) -> tuple[mx.array, mx.array]:
    """Ragged prompts as ids (P, length) and the padding before each (P,)."""
    pads = [length - len(p) for p in prompts]
    return mx.array([[0] * pad + p for pad, p in zip(pads, prompts)]), mx.array(pads)


def micro_batches(groups: list, advantages: np.ndarray, config, ranks, shares_padded: bool) -> list[dict]:
    """This rank's share of an update's arrays, in batches of at most micro_batch_tokens positions.

    advantages: (B, G). shares_padded: whether a padded prompt is computed once for its rows.
    Each has prompts (P, L), pads (P,), ids and mask (P*K, T), sampler_logps (P*K, T), advantages (P*K,),
    `rows`, how many of the P*K are no padding, and what makes the parts add up to the whole: `totals`, the
    step's sizes as grpo_loss takes them.
    """
    g = config.num_generations
    tokens = mx.array(float(sum(sum(trained(c, config)) for group in groups for c in group.completions)))

    def cost(count: int, prompt: int, longest: int, rows: int) -> int:
        """Padded positions of `count` groups of `rows` rows, by their longest prompt and completion."""
        return grid(count, 1) * ((1 if shares_padded else rows) * grid(prompt) + rows * grid(longest))

    def whole(b: int) -> int:
        return cost(1, len(groups[b].prompt), longest_completion(groups[b]), g)

    # Where the rewards alone drive the loss, groups without signal have no gradient: only totals count them.
    used = [b for b in range(len(groups)) if not config.rewards_drive_alone or np.any(advantages[b])]
    used.sort(key=lambda b: longest_completion(groups[b]))
    used = ranks.balanced(used, whole)
    if not used:
        return []
    parts = split_micro_batches(groups, used, cost, sum(map(whole, used)), config)
    batches = [collate(groups, advantages, part, config, shares_padded) for part in parts]
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


def split_micro_batches(
    groups: list, used: list[int], cost, total: int, config
) -> list[list[tuple[int, slice]]]:
    """The micro-batches of an update, each a list of (group, row slice); all slices are equally long.

    used: the numbers of the groups in it, by length; total: the sum of their costs, in positions. On a CPU
    the streams work side by side: together they keep within the budget, and each has an equal share of it.
    """
    g = config.num_generations
    streams = stream_count()
    budget = config.micro_batch_tokens // streams
    is_large = total >= streams * STREAM_POSITIONS
    parts = streams * math.ceil(total / config.micro_batch_tokens) if is_large else 1
    longest_prompt = max(len(groups[b].prompt) for b in used)
    longest = max(longest_completion(groups[b]) for b in used)

    def fits(rows: int) -> bool:
        return cost(1, longest_prompt, longest, rows) <= budget and len(used) * g // rows >= parts

    # A group's rows go together, unless one group alone is over the budget, or there would be too few parts.
    rows = next(rows for rows in range(g, 0, -1) if g % rows == 0 and (rows == 1 or fits(rows)))

    def positions(part: list) -> int:
        completion = max(len(c.ids) for b, chosen in part for c in groups[b].completions[chosen])
        return cost(len(part), max(len(groups[b].prompt) for b, _ in part), completion, rows)

    first, *rest = [(b, slice(start, start + rows)) for b in used for start in range(0, g, rows)]
    found = [[first]]
    for piece in rest:
        now, larger = positions(found[-1]), positions([*found[-1], piece])
        # Without the piece, the last micro-batch is nearer to an equal share of the positions.
        is_nearer = len(found) < parts and now + larger > 2 * total / parts
        if is_nearer or larger > budget:
            found.append([])
        found[-1].append(piece)
    return found


def collate(groups: list, advantages: np.ndarray, part: list, config, shares_padded: bool) -> dict:
    """The arrays of a micro-batch, a list of (group, row slice), padded to shapes of the grid."""
    rows = [(b, i) for b, chosen in part for i in range(chosen.start, chosen.stop)]
    k = len(rows) // len(part)  # rows of each slice
    count = grid(len(part), 1)
    width = grid(max(len(groups[b].completions[i].ids) for b, i in rows))
    prompts = [groups[b].prompt for b, _ in part]
    prompts += prompts[:1] * (count - len(part))
    # Where a padded prompt cannot be shared, one of exact length can; elsewhere few shapes are worth more.
    equal = len(set(map(len, prompts))) == 1 and not shares_padded
    tokens, pads = left_pad(prompts, len(prompts[0]) if equal else grid(max(map(len, prompts))))
    kinds = {"ids": np.int32, "mask": np.float32, "sampler_logps": np.float32}
    arrays = {name: np.zeros((count * k, width), kind) for name, kind in kinds.items()}
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
