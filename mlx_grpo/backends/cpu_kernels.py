"""Attention and rotary embeddings for CPUs, where MLX composes them of many small operations and a slow exponential.

`install` puts them in the place of mx.fast's, which models call; what they do not cover goes to those. The results are
MLX's to rounding.
"""

import functools

import mlx.core as mx
import numpy as np

from mlx_grpo.update import fused_head

MLX_ATTENTION, MLX_ROPE = mx.fast.scaled_dot_product_attention, mx.fast.rope


softmax = mx.custom_function(fused_head.softmax)


@softmax.vjp
def softmax_vjp(scores, cotangent, probs):
    weighted = probs * cotangent
    return weighted - probs * weighted.sum(axis=-1, keepdims=True)


def attention(queries, keys, values, *, scale, mask=None, sinks=None, **kwargs):
    """softmax(q k^T * scale) v of queries (N, H, L, D), keys and values (N, K, S, D); the H / K heads of one key go as one product."""
    if queries.dtype != mx.float32 or sinks is not None or kwargs:
        return MLX_ATTENTION(queries, keys, values, scale=scale, mask=mask, sinks=sinks, **kwargs)
    n, h, length, _ = queries.shape
    k, size = keys.shape[1:3]
    scores = (scale * queries).reshape(n, k, h // k * length, -1) @ keys.swapaxes(-1, -2)
    scores = scores.reshape(n, h, length, size)
    if isinstance(mask, str):
        mask = mx.arange(size - length, size)[:, None] >= mx.arange(size)
    if mask is not None:
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min) if mask.dtype == mx.bool_ else scores + mask
    probs = softmax(scores).reshape(n, k, h // k * length, size)
    return (probs @ values).reshape(n, h, length, -1)


@functools.cache
def frequencies(dims: int, base: float, scale: float) -> mx.array:
    return mx.array(scale * base ** (-np.arange(0, dims, 2) / dims), dtype=mx.float32)


@functools.cache
def places(length: int) -> mx.array:
    return mx.array(np.arange(length)[:, None], dtype=mx.float32)


def rope(x, dims, *, traditional, base, scale, offset, freqs=None, **kwargs):
    """Rotary embedding of x (N, H, L, D) from position `offset` on, an int or (), or (N,). Sines are shared by all layers."""
    if traditional or freqs is not None or dims != x.shape[-1] or x.ndim != 4 or kwargs:
        return MLX_ROPE(x, dims, traditional=traditional, base=base, scale=scale, offset=offset, freqs=freqs, **kwargs)
    if isinstance(offset, mx.array):
        offset = offset.reshape(-1, 1, 1, 1)
    theta = (offset + places(x.shape[2])) * frequencies(dims, base, scale)
    cos, sin = mx.cos(theta).astype(x.dtype), mx.sin(theta).astype(x.dtype)
    first, second = mx.split(x, 2, axis=-1)
    return mx.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def install() -> None:
    """Put both in the place of MLX's own, for the whole process."""
    mx.fast.scaled_dot_product_attention = attention
    mx.fast.rope = rope
