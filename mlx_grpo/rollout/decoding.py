"""Decoding: the completions of a batch of prompts, position by position; rows leave as they finish."""

import mlx.core as mx
from mlx.utils import tree_map

from mlx_grpo.answers import THINK, THINK_END
from mlx_grpo.backends import cuda_kernels
from mlx_grpo.update.micro_batches import bucket
from mlx_grpo.update.fused_head import on_cuda
from mlx_grpo.rollout.kv_cache import has_plain_caches, map_rows, mapped_rows, prefill

DECODE_BLOCK = 8  # positions decoded between two looks at the ids from the host
STEP_OF_ROWS = 0.75  # rows leave in steps to this share of them: few batch sizes are met
STEP_OF_POSITIONS = 64  # by which buffers of fixed length grow, at the least


class Row:
    """One completion while it is being decoded."""

    def __init__(self, tokenizer, stop_strings, max_tokens, primed=""):
        """primed: the text that the prompt ends with and the completion begins with, as far as it is scored."""
        self.tokenizer, self.stop_strings, self.max_tokens, self.primed = tokenizer, stop_strings, max_tokens, primed
        self.awake = None  # the ids after which stop strings count; None until it is known whether, or how long, the model thinks
        self.ids, self.logps, self.finish_reason = [], [], ""

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
        """How many ids there are where a stop string is complete that was not among the first `before`; None without one.

        Stop strings sleep while the model thinks: from a <think> at the beginning to </think>.
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
        """The least n > before such that ids[start:n] hold one of the strings, which ids[start:before] do not."""
        # An id is a byte at the least, so that a string that began before it lies within this many ids.
        tail = max([start, before - max((len(s.encode()) for s in strings), default=0)])
        holds = lambda n: any(s in self.tokenizer.decode(self.ids[tail:n]) for s in strings)  # noqa: E731
        found = strings and holds(len(self.ids))
        return next(n for n in range(before + 1, len(self.ids) + 1) if holds(n)) if found else None


class Decoder:
    """Draws the next id of every row of a batch.

    draw: logits (N, V), uniforms (N,) and which ids each row has `seen`, (N, V) or None -> ids (N,), log-probs (N,).
    """

    def __init__(self, model, draw):
        self.model, self.draw, self.launches = model, draw, cuda_kernels.launches(model)
        self.attention = cuda_kernels.attention if has_plain_caches(model) else mx.fast.scaled_dot_product_attention

    def start(self, tokens, pads, repeats):
        """The KV cache of all ids but the last of the prompts (P, L), `repeats` rows each."""
        return prefill(self.model, tokens, pads, repeats)

    def __call__(self, cache, last, uniforms, seen):
        """The ids (N,) that follow `last` (N, 1), their log-probs (N,), and what is seen then."""
        with cuda_kernels.in_place(self.launches, self.attention):
            logits = self.model(last, cache=cache)[:, -1]
        if seen is not None:
            seen = mx.put_along_axis(seen, last, mx.array(True), axis=-1)
        return (*self.draw(logits, uniforms, seen), seen)

    def keep(self, cache, rows) -> None:
        map_rows(cache, lambda x: x[rows])


class CompiledDecoder(Decoder):
    """The same, compiled once for each number of rows and length of buffers. To be kept: it knows what it has compiled."""

    def __init__(self, model, draw):
        super().__init__(model, draw)

        def position(filled, pads, layers, *rest):
            cache = [FixedKVCache(*layer, filled, pads) for layer in layers]
            drawn = super(CompiledDecoder, self).__call__(cache, *rest)
            return drawn, [(layer.keys, layer.values) for layer in cache]

        self.position = mx.compile(position, inputs=[model.state])

    def start(self, tokens, pads, repeats):
        length = tokens.shape[1] - 1
        # One-id prompts leave nothing in a cache; the shapes are those of another id.
        cache = super().start(tokens if length else mx.repeat(tokens, 2, axis=1), pads, repeats)
        layers = [tuple(x[:, :, :length] for x in layer.keys_and_values()) for layer in cache]
        pads = None if pads is None else mx.repeat(pads, repeats)
        return {"filled": length, "pads": pads, "layers": layers}

    def __call__(self, cache, *rest):
        room = bucket(cache["filled"] + 1, STEP_OF_POSITIONS) - cache["layers"][0][0].shape[2]
        if room > 0:
            cache["layers"] = tree_map(lambda x: mx.pad(x, ((0, 0), (0, 0), (0, room), (0, 0))), cache["layers"])
        drawn, cache["layers"] = self.position(mx.array(cache["filled"]), cache["pads"], cache["layers"], *rest)
        cache["filled"] += 1
        return drawn

    def keep(self, cache, rows) -> None:
        cache.update(mapped_rows(cache, lambda x: x[rows]))


class FixedKVCache:
    """A layer's KV in buffers (N, H, S, D) of which `filled` positions are: a position is the same computation as the next.

    filled: (), pads: the padding before each row, (N,), or None.
    """

    def __init__(self, keys, values, filled, pads):
        self.keys, self.values, self.filled, self.pads = keys, values, filled, pads
        self.offset = filled if pads is None else filled - pads

    def update_and_fetch(self, keys, values):
        self.keys, self.values = self.filled_by(self.keys, keys), self.filled_by(self.values, values)
        return self.keys, self.values

    def filled_by(self, buffer, x):
        if on_cuda():  # finding where a slice starts costs a GPU more than the slice
            return mx.put_along_axis(buffer, mx.broadcast_to(self.filled, x.shape), x, axis=2)
        return mx.slice_update(buffer, x, self.filled.reshape(1), axes=(2,))

    def make_mask(self, N, **kwargs):
        places = mx.arange(self.keys.shape[2])
        seen = places <= self.filled
        if self.pads is not None:
            seen = seen & (places >= self.pads[:, None])
        return seen.reshape(-1, 1, 1, places.size)


def decode(decoder: Decoder, tokens: mx.array, pads: mx.array | None, rows: list[Row], uniforms: mx.array, penalised: bool):
    """Decode the completions of P prompts as one batch into `rows` (P*G), leaving out rows as they finish.

    tokens: (P, L), pads: (P,) or None, uniforms: (P*G, T) in [0, 1), one a position; penalised: whether the ids of each
    row are kept in mind. Yields each position's arrays, of which the caller starts the evaluation: the device runs ahead
    while the next position's graph is built.
    """
    from mlx_lm.models.cache import make_prompt_cache

    repeats = len(rows) // tokens.shape[0]
    # A cache whose state cannot be set has its prompts computed once a row, and keeps finished rows to the end.
    settable = all(type(layer).state.fset for layer in make_prompt_cache(decoder.model))
    if not settable:
        tokens, repeats = mx.repeat(tokens, repeats, axis=0), 1
    cache = decoder.start(tokens, pads, repeats)
    last = mx.repeat(tokens[:, -1:], repeats, axis=0)  # (N, 1)
    seen = None
    if penalised:  # the last id stands in for the padding: it is seen anyway
        real = mx.where(mx.arange(tokens.shape[1]) < (0 if pads is None else pads[:, None]), tokens[:, -1:], tokens)
        vocabulary = decoder.model(last).shape[-1]
        seen = mx.put_along_axis(mx.zeros((len(rows), vocabulary), mx.bool_), mx.repeat(real, repeats, axis=0), mx.array(True), axis=-1)
    position, unread = 0, []
    ahead = int(mx.default_device() == mx.gpu)  # blocks a GPU decodes while the host reads the one before
    while not all(row.finish_reason for row in rows):
        ids, logps = [], []
        for _ in range(min(DECODE_BLOCK, uniforms.shape[1] - position)):
            token, logp, seen = decoder(cache, last, uniforms[:, position], seen)
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
        block_rows, block_ids, block_logps = unread.pop(0)
        of_ids, of_logps = zip(*block_ids.tolist()), zip(*block_logps.tolist())  # by row; the one host sync of the block
        for row, row_ids, row_logps in zip(block_rows, of_ids, of_logps):
            if not row.finish_reason:
                row.take(row_ids, row_logps)
        going = sum(not row.finish_reason for row in rows)
        size = len(rows)
        while 0 < going <= int(STEP_OF_ROWS * size):
            size = int(STEP_OF_ROWS * size)
        if settable and size < len(rows):
            order = sorted(range(len(rows)), key=lambda i: bool(rows[i].finish_reason))[:size]
            rows, keep = [rows[i] for i in order], mx.array(order, dtype=mx.int32)
            decoder.keep(cache, keep)
            last, uniforms, seen = last[keep], uniforms[keep], None if seen is None else seen[keep]
