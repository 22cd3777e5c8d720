"""LoRA and DoRA layers: found, left out, merged; copies of a model that share its memory."""

import copy

import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten


def adapter_layers(model) -> list[tuple[str, nn.Module]]:
    """The (name, module) of each LoRA or DoRA layer."""
    return [(name, m) for name, m in model.named_modules() if "lora_a" in m]


def shared_copy(model):
    """A second module tree over the same arrays, which takes no memory.

    It keeps the present weights when the original is updated.
    """
    return copy.deepcopy(model, {id(a): a for _, a in tree_flatten(model.parameters())})


def without_adapters(model):
    """The model beneath its LoRA or DoRA layers, sharing their base weights."""
    base = shared_copy(model)
    names = [(name, m.linear if "linear" in m else m.embedding) for name, m in adapter_layers(base)]
    base.update_modules(tree_unflatten(names))
    return base


def reference_copy(model):
    """The policy as it is now, for the KL: under adapters the same weights without them, for no memory."""
    return without_adapters(model) if adapter_layers(model) else shared_copy(model)


def fused(model):
    """The model with its adapters merged into full-precision weights, sharing every other array."""
    merged = shared_copy(model)
    merged.update_modules(
        tree_unflatten([(name, m.fuse(dequantize=True)) for name, m in adapter_layers(merged)])
    )
    return merged
