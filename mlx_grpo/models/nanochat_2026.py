"""The nanochat model of 2026 for mlx-lm.

convert_nanochat.py puts this file beside the weights, as config.json's model_file.

    mlx_lm.load(directory, trust_remote_code=True)

What nanochat added, since March 2026, to the architecture of mlx_lm.models.nanochat (October 2025):
- smear: each embedding takes on some of the embedding before it, through a gate on its first 24 channels;
- before layer i, x becomes resid_lambdas[i] * x + x0_lambdas[i] * x0, where x0 is the smeared embedding;
- every second layer, counted from the last, adds a value embedding of the token to its values, through a
  gate for each KV head on the first 12 channels of the layer's input;
- queries and keys are scaled by 1.2 after their norm, and the rope base is 100000;
- layers marked S in window_pattern see a quarter of the context, rounded up to 128 positions;
- backout: the output of the middle layer, times backout_lambda, is taken off the last one's.
"""

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache

SMEAR_CHANNELS, GATE_CHANNELS, SOFTCAP, QK_SCALE = 24, 12, 15.0, 1.2


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int  # nanochat's sequence_len; the windows are fractions of it
    window_pattern: str  # "SSSL": tiled over the layers; the last layer is always long
    rope_theta: float = 100000.0

    def window(self, layer: int) -> int:
        """How many positions before its own a position of this layer sees."""
        long = self.max_position_embeddings
        short = math.ceil(long / 512) * 128
        last = layer == self.num_hidden_layers - 1
        return long if last or self.window_pattern[layer % len(self.window_pattern)].upper() == "L" else short

    def has_value_embedding(self, layer: int) -> bool:
        return (self.num_hidden_layers - 1 - layer) % 2 == 0


def norm(x):
    """RMS norm without weights; eps is float32's, as torch's rms_norm takes it."""
    return mx.fast.rms_norm(x, None, 1.1920929e-07)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        dims = args.hidden_size
        self.heads = args.num_attention_heads
        self.kv_heads = args.num_key_value_heads
        self.head_dim = dims // self.heads
        self.scale = QK_SCALE**2 / math.sqrt(self.head_dim)
        self.c_q = nn.Linear(dims, self.heads * self.head_dim, bias=False)
        self.c_k = nn.Linear(dims, self.kv_heads * self.head_dim, bias=False)
        self.c_v = nn.Linear(dims, self.kv_heads * self.head_dim, bias=False)
        self.c_proj = nn.Linear(dims, dims, bias=False)
        if args.has_value_embedding(layer):
            self.value_embed = nn.Embedding(args.vocab_size, self.kv_heads * self.head_dim)
            self.ve_gate = nn.Linear(GATE_CHANNELS, self.kv_heads, bias=False)
        # nanochat rotates the other way round than mx.fast.rope: negative frequencies.
        self._freqs = -(args.rope_theta ** (mx.arange(0, self.head_dim, 2, dtype=mx.float32) / self.head_dim))

    def __call__(self, x, ids, mask, cache):
        B, T, D = x.shape
        q = self.c_q(x).reshape(B, T, self.heads, self.head_dim).transpose(0, 2, 1, 3)  # (B, H, T, D/H)
        k = self.c_k(x).reshape(B, T, self.kv_heads, self.head_dim).transpose(0, 2, 1, 3)
        v = self.c_v(x).reshape(B, T, self.kv_heads, self.head_dim)
        if "value_embed" in self:
            gate = 3 * mx.sigmoid(self.ve_gate(x[..., :GATE_CHANNELS]))  # (B, T, KV heads)
            v = v + gate[..., None] * self.value_embed(ids).reshape(v.shape).astype(v.dtype)
        v = v.transpose(0, 2, 1, 3)
        offset = 0 if cache is None else cache.offset
        rotation = {"traditional": False, "base": None, "scale": 1.0, "offset": offset, "freqs": self._freqs}
        q, k = (norm(mx.fast.rope(a, self.head_dim, **rotation)) for a in (q, k))
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        out = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.scale, mask=mask)
        return self.c_proj(out.transpose(0, 2, 1, 3).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.c_fc = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.c_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)

    def __call__(self, x):
        return self.c_proj(nn.relu2(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.attn = Attention(args, layer)
        self.mlp = MLP(args)

    def __call__(self, x, ids, mask, cache):
        x = x + self.attn(norm(x), ids, mask, cache)
        return x + self.mlp(norm(x))


class Backbone(nn.Module):
    """ids (B, T) -> hidden states (B, T, D), ready for lm_head."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.wte = nn.Embedding(args.vocab_size, args.hidden_size)
        self.h = [Block(args, layer) for layer in range(args.num_hidden_layers)]
        self.smear_gate = nn.Linear(SMEAR_CHANNELS, 1, bias=False)
        self.smear_lambda = mx.zeros((1,))
        self.backout_lambda = mx.full((1,), 0.2)
        self.resid_lambdas = mx.ones((args.num_hidden_layers,))
        self.x0_lambdas = mx.zeros((args.num_hidden_layers,))

    def smear(self, x, cache):
        """Add to each position what its gate lets through of the position before it.

        The cache keeps the embeddings, one half as keys and one as values: a plain KVCache, so that whatever
        mlx-lm does to caches (batching, padding, trimming) is right for it too.
        """
        B, T, D = x.shape
        offset = 0 if cache is None else cache.offset
        if cache is None:
            history = x
        else:
            halves = cache.update_and_fetch(x[:, None, :, : D // 2], x[:, None, :, D // 2 :])
            if hasattr(cache, "bits"):
                halves = [
                    mx.dequantize(*half, group_size=cache.group_size, bits=cache.bits) for half in halves
                ]
            history = mx.concatenate([half[:, 0] for half in halves], axis=-1)  # (B, past + T, D)
            history = history.astype(x.dtype)
        before = mx.pad(history, ((0, 0), (1, 0), (0, 0)))[:, -T - 1 : -1]
        # A row's first position has none before it; in a padded batch rows begin at different positions.
        first = mx.reshape(mx.array(offset), (-1, 1, 1)) + mx.arange(T)[None, :, None] <= 0
        gate = mx.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))  # (B, T, 1)
        gate = self.smear_lambda.astype(x.dtype) * gate
        return x + mx.where(first, 0, gate * before).astype(x.dtype)

    def __call__(self, ids, cache=None):
        x = norm(self.wte(ids))
        cache = cache or [None] * (len(self.h) + 1)
        x = x0 = self.smear(x, cache[-1])
        masks = {}
        for window in {self.args.window(layer) for layer in range(len(self.h))}:
            past = 0
            if cache[0] is not None:
                past = cache[0].offset if isinstance(cache[0].offset, int) else cache[0].size()
            # mlx-lm's window counts the position itself.
            limit = window + 1 if past + x.shape[1] > window + 1 else None
            masks[window] = create_attention_mask(x, cache[0], window_size=limit)
        for i, layer in enumerate(self.h):
            # The lambdas are float32 whatever the weights are; the sum is rounded once.
            x = (self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0).astype(x.dtype)
            x = layer(x, ids, masks[self.args.window(i)], cache[i])
            if i == len(self.h) // 2:
                middle = x
        return norm((x - self.backout_lambda * middle).astype(x.dtype))


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.transformer = Backbone(args)
        self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs, cache=None):
        logits = self.lm_head(self.transformer(inputs, cache=cache))
        return SOFTCAP * mx.tanh(logits / SOFTCAP)

    def make_cache(self):
        """One KV cache a layer, and one for the smear at the end."""
        return [KVCache() for _ in range(len(self.layers) + 1)]

    @property
    def cast_predicate(self):
        """mlx_lm.convert --dtype leaves the lambdas in float32, as nanochat does."""
        return lambda name: "lambda" not in name

    @property
    def layers(self):
        return self.transformer.h
