"""Log-probs and entropies from hidden states, with their own backward pass and no (N, T, V) tensor."""

import copy
import math

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_grpo.backends.device import has_slow_exp, on_cuda

HEAD_CHUNK_LOGITS = 2**27  # alive at once in the head, forward and backward, at most: 512 MB of float32


def exp(x: mx.array) -> mx.array:
    return mx.power(math.e, x) if has_slow_exp() else mx.exp(x)


def sigmoid(x: mx.array) -> mx.array:
    return (1 / (1 + exp(-x.astype(mx.float32)))).astype(x.dtype) if has_slow_exp() else mx.sigmoid(x)


def softmax(logits: mx.array) -> mx.array:
    """Probabilities (.., V) of float32 logits."""
    if not has_slow_exp():
        return mx.softmax(logits, axis=-1)
    powers = exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


class HiddenThrough:
    """Replaces a model's backbone: it is called with hidden states, and returns them to the head."""

    def __init__(self, backbone):
        self.backbone = backbone

    def __call__(self, hidden, *args, **kwargs):
        return hidden

    def __getattr__(self, name):
        return getattr(self.backbone, name)


def split_head(model):
    """(backbone, head) with model(ids) == head(backbone(ids)), or None for a model that cannot be split so.

    The head is the model's own code after its backbone, with soft caps, scales and biases, sharing its
    weights.
    """
    owner = model.language_model if "language_model" in model and "model" in model.language_model else model
    name = next((n for n in ("model", "transformer", "backbone") if n in owner), None)
    if name is None:
        return None
    backbone, head = owner[name], copy.copy(owner)
    del head[name]
    object.__setattr__(head, name, HiddenThrough(backbone))
    ids = mx.array([[0, 1, 2]])
    try:
        whole, parts = model(ids), head(backbone(ids))
    except (TypeError, AttributeError, ValueError):  # the backbone takes, or the head needs, something else
        return None
    same = whole.shape == parts.shape and mx.allclose(whole, parts, rtol=1e-3, atol=1e-3).item()
    return (backbone, head) if same else None


def make_head_stats(head, backbone, temperature: float, chunk: int, entropy_gradient: bool):
    """f(hidden (M, D), ids (M,)) -> log-probs (M,), entropies (M,) in float32, without an (M, V) tensor.

    Forward and backward go through the head chunk by chunk, each chunk waiting for the one before, and the
    backward pass computes the logits again: memory holds one chunk's logits however many positions and ids
    there are. Where all positions are one chunk, its probabilities are kept for the backward pass instead
    (not on CUDA). The gradient is written out: of log p_id it is onehot - p, of the entropy H -p (log p + H),
    the latter only where `entropy_gradient`.
    chunk: positions in one.
    """
    # Tied models keep their head's weight in the embedding, under the backbone.
    tied = not tree_flatten(head.parameters()) or getattr(head.args, "tie_word_embeddings", False)
    holders = [head, *(m for m in backbone.children().values() if tied and hasattr(m, "as_linear"))]

    def logits_of(hidden, *weights):
        current = [holder.trainable_parameters() for holder in holders]
        names = [[n for n, _ in tree_flatten(tree)] for tree in current]
        given = iter(weights)
        for holder, holder_names in zip(holders, names):
            holder.update(tree_unflatten([(n, next(given)) for n in holder_names]))
        logits = head(hidden[None]).squeeze(0)  # (C, V); [0] would be a gather, whose gradient is a scatter
        for holder, tree in zip(holders, current):
            holder.update(tree)
        return logits

    def scaled(logits):
        return logits if temperature == 1.0 else logits.astype(mx.float32) / temperature

    def stats(logits, ids):
        """Log-probs, entropies and the softmax's log-normalisers (C,), probabilities (C, V), in float32."""
        logits = scaled(logits)
        chosen = mx.take_along_axis(logits, ids[:, None], axis=-1)[:, 0].astype(mx.float32)
        exact = logits.astype(mx.float32)
        if on_cuda():  # a kernel that reads logits in half precision and sums in float32
            normalisers = chosen + mx.fast.cross_entropy(logits, ids)
            probs = exp(exact - normalisers[:, None])
        else:  # one pass of exponentials; the largest p gives the normaliser
            probs = softmax(exact)
            normalisers = exact.max(axis=-1) - mx.log(probs.max(axis=-1))
        return chosen - normalisers, normalisers - (probs * exact).sum(axis=-1), normalisers, probs

    def losses_of(ids):
        return lambda hidden, *weights: mx.fast.cross_entropy(scaled(logits_of(hidden, *weights)), ids)

    def logit_gradient(logits, ids, probs, entropies, normalisers, logp_grad, entropy_grad):
        if probs is None:
            probs = exp(scaled(logits).astype(mx.float32) - normalisers[:, None])
        grad = (-logp_grad[:, None] * probs).at[mx.arange(ids.shape[0]), ids].add(logp_grad)
        if entropy_gradient:
            logps = mx.log(mx.maximum(probs, 1e-38))  # p log p is 0 at 0
            grad = grad - entropy_grad[:, None] * probs * (logps + entropies[:, None])
        return (grad if temperature == 1.0 else grad / temperature).astype(logits.dtype)

    def chunks(total):
        return [slice(start, min(start + chunk, total)) for start in range(0, total, chunk)]

    @mx.custom_function
    def chunked(hidden, ids, *weights):
        parts = []
        for part in chunks(ids.shape[0]):
            here = mx.depends([hidden[part]], list(parts[-1][:2]))[0] if parts else hidden[part]
            parts.append(stats(logits_of(here, *weights), ids[part]))
        *vectors, probs = zip(*parts)
        keep = len(parts) == 1 and not on_cuda()
        return *map(mx.concatenate, vectors), probs[0] if keep else mx.zeros((0,))

    @chunked.vjp
    def chunked_vjp(primals, cotangents, outputs):
        hidden, ids, *weights = primals
        _, entropies, normalisers, kept = outputs
        hidden_grads = []
        weight_grads = None
        for part in chunks(ids.shape[0]):
            here = hidden[part]
            if hidden_grads:
                here = mx.depends([here], [hidden_grads[-1], *weight_grads])[0]
            logp_grad, entropy_grad = (cotangent[part] for cotangent in cotangents[:2])
            if on_cuda() and not entropy_gradient:  # the gradient of the same kernel
                grads = mx.vjp(losses_of(ids[part]), [here, *weights], [-logp_grad])[1]
            else:
                known = ids[part], kept if kept.size else None, entropies[part], normalisers[part]
                grad = logit_gradient(logits_of(here, *weights), *known, logp_grad, entropy_grad)
                grads = mx.vjp(logits_of, [here, *weights], [grad])[1]
            hidden_grads.append(grads[0])
            exact = [g.astype(mx.float32) for g in grads[1:]]  # many chunks add up: not in half precision
            weight_grads = exact if weight_grads is None else [a + b for a, b in zip(weight_grads, exact)]
        weight_grads = [g.astype(w.dtype) for g, w in zip(weight_grads, weights)]
        return mx.concatenate(hidden_grads), mx.zeros_like(ids), *weight_grads

    def head_stats(hidden, ids):
        weights = [w for holder in holders for _, w in tree_flatten(holder.trainable_parameters())]
        return chunked(hidden, mx.stop_gradient(ids), *weights)[:2]

    return head_stats
