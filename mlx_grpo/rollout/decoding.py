"""Decoding: the completions of a batch of prompts, position by position; rows leave as they finish.

prompts (P, L), left-padded --prefill once, cache repeated--> N = P*G rows
each position:  last ids (N, 1) --model, cache--> logits (N, V) --draw--> ids (N,), log-probs (N,)
each block of 8 positions:  the ids go to the host, which looks for ends; rows that have ended leave
"""

import mlx.core as mx

from mlx_grpo.backends.device import on_cpu
from mlx_grpo.answers import THINK, THINK_END
from mlx_grpo.rollout.kv_cache import map_rows, prefill

DECODE_BLOCK = 8  # positions decoded between two looks at the ids from the host
LEAVING = 8  # rows leave together, when one in so many has ended: each time the cache is copied


class Row:
    """One completion while it is being decoded."""

    def __init__(self, tokenizer, stop_strings, max_tokens, primed=""):
        """primed: text that ends the prompt and counts as the completion's beginning when it is scored."""
        self.tokenizer = tokenizer
        self.stop_strings = stop_strings
        self.max_tokens = max_tokens
        self.primed = primed
        # How many ids the thinking takes: stop strings count after them. None while that is not known.
        self.awake = None
        self.ids, self.logps = [], []
        self.finish_reason = ""

    def take(self, ids: tuple[int, ...], logps: tuple[float, ...]) -> None:
        """Append a block of ids, up to and including the one that ends the row."""
        before = len(self.ids)
        room = self.max_tokens - before
        ends = [i for i, token in enumerate(ids[:room]) if token in self.tokenizer.eos_token_ids]
        taken = ends[0] + 1 if ends else min(len(ids), room)
        self.finish_reason = "eos" if ends else "length" if taken == room else ""
        self.ids += ids[:taken]
        self.logps += logps[:taken]
        if end := self.stop(before):
            self.finish_reason = "stop"
            del self.ids[end:], self.logps[end:]

    def stop(self, before: int) -> int | None:
        """How many ids the row keeps when a stop string ends it; None where none does.

        Only a stop string that the first `before` ids do not hold counts. While the model thinks, from a
        <think> at the beginning to </think>, stop strings are ignored.
        """
        if self.awake is None:
            begun = (self.primed + self.tokenizer.decode(self.ids[:16])).lstrip()
            if begun.startswith(THINK) and THINK_END not in self.primed:
                self.awake = self.first([THINK_END], 0, before)
                if self.awake is None:
                    return None
                before = self.awake
            elif len(begun) >= len(THINK):
                self.awake = 0
        return self.first(self.stop_strings, self.awake or 0, before)

    def first(self, strings: list[str], start: int, before: int) -> int | None:
        """The least n > before where ids[start:n] hold one of the strings, and ids[start:before] none."""
        # An id is a byte at the least, so that a string that began before it lies within this many ids.
        tail = max([start, before - max((len(s.encode()) for s in strings), default=0)])

        def holds(n: int) -> bool:
            return any(s in self.tokenizer.decode(self.ids[tail:n]) for s in strings)

        found = strings and holds(len(self.ids))
        return next(n for n in range(before + 1, len(self.ids) + 1) if holds(n)) if found else None


class Decoder:
    """The logits of every row's next id, from a cache that holds the ids before."""

    def __init__(self, model):
        self.model = model

    def start(self, tokens: mx.array, pads: mx.array | None, repeats: int, room: int):
        """The prompts' cache but for their last ids (P, L), `repeats` rows each, with `room` for more."""
        return prefill(self.model, tokens, pads, repeats)

    def __call__(self, cache, last: mx.array) -> mx.array:
        """The logits (N, V) after `last` (N, 1), which the cache holds from then on."""
        return self.model(last, cache=cache)[:, -1]

    def rows_to_keep(self, going: int, rows: int) -> int:
        """How many of the batch's rows stay when `going` of them have not ended."""
        return rows if (rows - going) * LEAVING < rows else going

    def keep(self, cache, rows: mx.array) -> None:
        """Leave these rows in the cache, and no others."""
        map_rows(cache, lambda x: x[rows])


def ids_seen(tokens: mx.array, pads: mx.array | None, repeats: int, vocabulary: int) -> mx.array:
    """Which ids each row of the prompts holds, (P*repeats, V)."""
    if pads is not None:  # the last id stands in for the padding: it is seen anyway
        tokens = mx.where(mx.arange(tokens.shape[1]) < pads[:, None], tokens[:, -1:], tokens)
    seen = mx.zeros((len(tokens) * repeats, vocabulary), mx.bool_)
    return mx.put_along_axis(seen, mx.repeat(tokens, repeats, axis=0), mx.array(True), axis=-1)


def decode(
    decoder: Decoder,
    tokens: mx.array,
    pads: mx.array | None,
    rows: list[Row],
    uniforms: mx.array,
    draw,
    penalised: bool,
):
    """Decode the completions of P prompts as one batch into `rows` (P*G), leaving out rows as they finish.

    tokens: (P, L), pads: (P,) or None, uniforms: (P*G, T) in [0, 1), one a position. draw: logits (N, V),
    uniforms (N,), seen=ids (N, V) or None -> ids (N,), log-probs (N,). penalised: whether the ids of each row
    are kept in mind. Yields each position's arrays, whose evaluation the caller starts: the device runs ahead
    while the next graph is built.
    """
    from mlx_lm.models.cache import make_prompt_cache

    repeats = len(rows) // tokens.shape[0]
    # Where a cache's state cannot be set, prompts are computed once a row, and finished rows stay to the end.
    settable = all(type(layer).state.fset for layer in make_prompt_cache(decoder.model))
    if not settable:
        tokens = mx.repeat(tokens, repeats, axis=0)
        repeats = 1
    cache = decoder.start(tokens, pads, repeats, uniforms.shape[1])
    last = mx.repeat(tokens[:, -1:], repeats, axis=0)  # (N, 1)
    seen = ids_seen(tokens, pads, repeats, decoder.model(last).shape[-1]) if penalised else None
    position = 0
    unread = []  # blocks of ids that the host has not looked at
    ahead = int(not on_cpu())  # blocks a GPU decodes while the host reads the one before
    while not all(row.finish_reason for row in rows):
        ids, logps = [], []
        for _ in range(min(DECODE_BLOCK, uniforms.shape[1] - position)):
            logits = decoder(cache, last)
            if seen is not None:
                seen = mx.put_along_axis(seen, last, mx.array(True), axis=-1)
            token, logp = draw(logits, uniforms[:, position], seen=seen)
            last = token[:, None]
            yield token, logp
            ids.append(token)
            logps.append(logp)
            position += 1
        if ids:
            unread.append((rows, mx.stack(ids), mx.stack(logps)))  # (T, N): without strides to copy by
            mx.async_eval(unread[-1][1:])
        if len(unread) <= ahead and position < uniforms.shape[1]:
            continue
        read_block(*unread.pop(0))
        size = decoder.rows_to_keep(sum(not row.finish_reason for row in rows), len(rows))
        if settable and 0 < size < len(rows):
            order = sorted(range(len(rows)), key=lambda i: bool(rows[i].finish_reason))[:size]
            rows = [rows[i] for i in order]
            keep = mx.array(order, dtype=mx.int32)
            decoder.keep(cache, keep)
            last = last[keep]
            uniforms = uniforms[keep]
            seen = None if seen is None else seen[keep]


def read_block(rows: list[Row], ids: mx.array, logps: mx.array) -> None:
    """Give each row that goes on its ids and log-probs of a block, (T, N) each."""
    of_ids = zip(*ids.tolist())  # by row; the one host sync of the block
    of_logps = zip(*logps.tolist())
    for row, row_ids, row_logps in zip(rows, of_ids, of_logps):
        if not row.finish_reason:
            row.take(row_ids, row_logps)
