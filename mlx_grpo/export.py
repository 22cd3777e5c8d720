"""What a run writes of its model: a directory that mlx_lm.load opens, or adapters for its base."""

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_grpo.backends.precision import narrow, narrowed
from mlx_grpo.update.adapters import adapter_layers, fused, shared_copy

SHARD_BYTES = 5 * 2**30  # of one file, as mlx-lm cuts them
MERGED_SHARD_BYTES = 2**29  # of a file whose layers are merged for it, and in memory together


@dataclass
class ModelWriter:
    """Writes `model` as it is then, with its tokenizer; source: the directory it was loaded from."""

    model: object
    tokenizer: object
    model_config: dict
    source: Path
    config: object  # MLXGRPOConfig

    def write_checkpoint(self, folder: Path) -> None:
        """The whole model, or its adapters alone: mlx_lm.load(BASE, adapter_path=FOLDER) opens these."""
        if adapter_layers(self.model):
            write_adapters(folder, self.model, self.config)
        else:
            self.write_model(folder)

    def write_model(self, folder: Path) -> None:
        save_model(folder, self.model, self.tokenizer, self.model_config, self.source, self.config)


def write_adapters(folder: Path, model, config) -> None:
    """The adapters in mlx-lm's own format, in the model's own precision."""
    weights = narrowed(model, dict(tree_flatten(model.trainable_parameters())))
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    is_dora = any("m" in layer for _, layer in adapter_layers(model))
    settings = {
        "model": config.model_name,
        "fine_tune_type": "dora" if is_dora else "lora",
        "num_layers": len(model.layers) if config.num_layers < 0 else config.num_layers,
        "lora_parameters": {"dropout": 0.0, **config.lora_parameters},
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))


def save_model(folder: Path, model, tokenizer, model_config: dict, source: Path, config) -> None:
    """Write a model directory that mlx_lm.load opens, in the model's own precision.

    Adapters are merged, a shard at a time, and kept beside in mlx-lm's own format.
    """
    from mlx_lm.utils import save_config

    model_config = copy.deepcopy(model_config)
    adapters = adapter_layers(model)
    if adapters:
        write_adapters(folder, model, config)
        for name, _ in adapters:  # merged layers are in full precision, also where their base was quantised
            for key in ("quantization", "quantization_config"):
                model_config.get(key, {}).pop(name, None)
    weights = dict(tree_flatten(narrow(fused(model) if adapters else shared_copy(model)).parameters()))
    write_shards(folder, weights, MERGED_SHARD_BYTES if adapters else SHARD_BYTES)
    save_config(model_config, folder / "config.json")
    tokenizer.save_pretrained(folder)
    for name in ("generation_config.json", "tokenizer.pkl", model_config.get("model_file") or ""):
        if name and (source / name).is_file():
            shutil.copy(source / name, folder)


def merged_bytes(model) -> int:
    """Bytes that merging the adapters takes at most: a shard's layers, and the one that is being merged."""
    layers = [layer for _, layer in adapter_layers(model)]
    sizes = [layer["lora_a"].shape[0] * layer["lora_b"].shape[1] for layer in layers]
    if not sizes:
        return 0
    written = narrowed(model, {"lora_a": layers[0]["lora_a"]})["lora_a"].itemsize
    one = 3 * 4 * max(sizes)  # its base, what is added, and their sum
    return min(MERGED_SHARD_BYTES, written * sum(sizes)) + one


def write_shards(folder: Path, weights: dict[str, mx.array], limit: int) -> None:
    """Write model*.safetensors with their index as mlx-lm does, each file evaluated alone.

    `weights` is emptied. Arrays that are still to be computed, such as merged layers, are in memory one shard
    at a time.
    """
    shards, sizes = [[]], [0]
    for name, array in weights.items():
        if shards[-1] and sizes[-1] + array.nbytes > limit:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += array.nbytes
    files = {}
    for number, names in enumerate(shards, 1):
        file = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        files |= dict.fromkeys(names, file)
        for name in names:  # layer by layer: what a merge is computed from is freed before the next
            mx.eval(weights[name])
        mx.save_safetensors(
            str(folder / file), {name: weights.pop(name) for name in names}, {"format": "mlx"}
        )
        mx.clear_cache()
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(files.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4))
