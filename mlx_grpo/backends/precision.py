"""Half-precision models on CPUs: computed in float32, saved in the precision that is their own.

MLX multiplies bfloat16 and float16 matrices on CPUs without a BLAS, many times slower than float32 ones. So a
model is widened when it is opened there, and narrowed when it is written: no file shows on which device it
was trained.
"""

from dataclasses import dataclass, replace

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_grpo.backends.device import on_cpu

HALVES = ("bfloat16", "float16")


@dataclass(frozen=True)
class OwnPrecision:
    """How a widened model is saved. Dtypes by name: mx.Dtype objects cannot be copied with a model."""

    half: str  # one of HALVES: what its parameters were
    exact: frozenset[str]  # those of them that were float32 even so

    def dtype_of(self, name: str) -> mx.Dtype:
        """The dtype that parameter `name` is saved in."""
        return mx.float32 if name in self.exact else getattr(mx, self.half)


def half_is_slow() -> bool:
    """Whether this device computes float32 many times faster than half precision."""
    return on_cpu()


def widen(model) -> str:
    """Turn a half-precision model into float32 where that is faster.

    Returns the name of its own precision, or "" where nothing changes.
    Quantised layers keep their integers; their scales and biases, and so all activations, become float32.
    """
    arrays = dict(tree_flatten(model.parameters()))
    sizes = {half: sum(a.size for a in arrays.values() if a.dtype == getattr(mx, half)) for half in HALVES}
    if not half_is_slow() or not any(sizes.values()):
        return ""
    half = max(sizes, key=sizes.get)
    model.own_precision = OwnPrecision(
        half, frozenset(name for name, a in arrays.items() if a.dtype == mx.float32)
    )
    model.set_dtype(mx.float32)
    del arrays
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)  # one by one: two copies of the whole model are never in memory
    return half


def keep_exact(model, names) -> None:
    """Save these parameters in float32 whatever the model's own precision is."""
    if own := getattr(model, "own_precision", None):
        model.own_precision = replace(own, exact=own.exact | set(names))


def saved_dtype(model, name: str, array: mx.array) -> mx.Dtype:
    """The dtype that `array`, parameter `name` of the model, has in files."""
    own = getattr(model, "own_precision", None)
    return own.dtype_of(name) if own and array.dtype == mx.float32 else array.dtype


def narrowed(model, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """Parameters of a model as they are saved."""
    return {name: a.astype(saved_dtype(model, name, a)) for name, a in arrays.items()}


def narrow(model):
    """The model itself with its parameters as they are saved: give it a copy."""
    model.update(tree_unflatten(list(narrowed(model, dict(tree_flatten(model.parameters()))).items())))
    return model


def masters(model) -> dict[str, mx.array]:
    """The trained weights that are float32 here and half precision in the model's files, by name."""
    trained = tree_flatten(model.trainable_parameters())
    return {name: weight for name, weight in trained if saved_dtype(model, name, weight) != weight.dtype}


def with_masters(model, optimizer: dict) -> dict:
    """An optimizer's state as a checkpoint keeps it: with the model's float32 weights.

    They are named as MasterAdamW names its own.
    """
    kept = {f"{name}.master": weight for name, weight in masters(model).items()}
    return tree_unflatten(list((dict(tree_flatten(optimizer)) | kept).items()))


def without_masters(model, weights: dict[str, mx.array], optimizer: dict) -> tuple[dict[str, mx.array], dict]:
    """A checkpoint's weights and optimizer's state, in the precision that is computed in here.

    Raises KeyError where a float32 weight is missing.
    """
    flat = dict(tree_flatten(optimizer))
    exact = {name: flat.pop(f"{name}.master") for name in masters(model) if weights[name].dtype != mx.float32}
    now = {name: a.dtype for name, a in tree_flatten(model.parameters())}
    held = {name: a.astype(now[name]) for name, a in (weights | exact).items() if name in now}
    return held, tree_unflatten(list(flat.items()))
