"""LoRA and DoRA layers: found, left out, merged; and the model directory that a run writes."""

import copy
import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_grpo.backends.precision import narrow, narrowed


def adapter_layers(model) -> list[tuple[str, nn.Module]]:
    """The (name, module) of each LoRA or DoRA layer."""
    return [(name, m) for name, m in model.named_modules() if "lora_a" in m]


def shared_copy(model):
    """A second module tree over the same arrays: it keeps today's weights while the original moves on, for no memory."""
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
    merged.update_modules(tree_unflatten([(name, m.fuse(dequantize=True)) for name, m in adapter_layers(merged)]))
    return merged


def save_model(folder: Path, model, tokenizer, model_config: dict, source: Path, config) -> None:
    """Write a model directory that mlx_lm.load opens, in the model's own precision; adapters are merged, and kept beside in
    mlx-lm's own format."""
    from mlx_lm.utils import save_config, save_model as save_weights

    model_config = copy.deepcopy(model_config)
    adapters = adapter_layers(model)
    if adapters:
        weights = narrowed(model, dict(tree_flatten(model.trainable_parameters())))
        mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
        kind = "dora" if any("m" in layer for _, layer in adapters) else "lora"
        blocks = len(model.layers) if config.num_layers < 0 else config.num_layers
        settings = {"fine_tune_type": kind, "num_layers": blocks, "lora_parameters": {"dropout": 0.0, **config.lora_parameters}}
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))
        for name, _ in adapters:  # merged layers are in full precision, also where their base was quantised
            for key in ("quantization", "quantization_config"):
                model_config.get(key, {}).pop(name, None)
    save_weights(folder, narrow(fused(model) if adapters else shared_copy(model)))
    save_config(model_config, folder / "config.json")
    tokenizer.save_pretrained(folder)
    for name in ("generation_config.json", "tokenizer.pkl", model_config.get("model_file") or ""):
        if name and (source / name).is_file():
            shutil.copy(source / name, folder)
