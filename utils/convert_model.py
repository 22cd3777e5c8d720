"""Convert a Hugging Face text model (hub name or directory) to an MLX one that mlx-lm and the trainer read.

What is added to `mlx_lm.convert`: settings that transformers 5 nests are flattened so that they are not lost,
a setting that the MLX model would ignore or a weight it would leave random is an error with its name, LoRA
and DoRA adapters are fused in, and the output directory is complete or absent.
"""

import argparse
import collections
import contextlib
import difflib
import functools
import inspect
import io
import json
import math
import os
import re
import shlex
import shutil
import sys
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from mlx_grpo.backends import use_fast_backend  # noqa: E402

if __name__ == "__main__":
    use_fast_backend()  # ahead of MLX: the first BLAS that is loaded is the one that it uses

from inference import Parser  # noqa: E402
import mlx.core as mx  # noqa: E402
from mlx_grpo.loading import flatten_rope_parameters, is_quantized  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402
from mlx_grpo.run.directory import complete_or_absent  # noqa: E402
from mlx_grpo.tokenizer_pickle import read_tokenizer_pickle  # noqa: E402

EXAMPLES = """examples:
  uv run python utils/convert_model.py --hf-path Qwen/Qwen2.5-0.5B-Instruct --quantize --output-dir qwen-4bit
  uv run python utils/convert_model.py --hf-path qwen-4bit --adapter-path run/final -d --output-dir tuned"""
KNOWN_TO_WORK = (
    "llama, qwen2, qwen3, mistral, phi, phi3, gemma3, smollm3, gpt2 (for example Qwen/Qwen2.5-0.5B-Instruct)"
)
# The fixed (bits, group size) of each number format.
MODES = {
    "affine": (None, None),
    "mxfp4": (4, 32),
    "nvfp4": (4, 16),
    "mxfp8": (8, 32),
}
DTYPES = ("float16", "bfloat16", "float32")
RECIPES = ["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"]
# What mlx-lm's code of a model raises where it does not fit a config.json or the weights.
LOAD_ERRORS = (ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError, RuntimeError)
ROPE_SETTINGS = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq")
# Settings that change no logit at inference, or that strict loading verifies because they decide which
# weights exist and their shapes.
HARMLESS = re.compile(
    r"_|architectures$|auto_map$|model_type$|(torch_)?dtype$|transformers_version$|tie_word_embeddings$"
    r"|pretraining_tp$|use_cache$"
    r"|max_position_embeddings$|original_max_position_embeddings$|vocab_size|(qk_)?head_dim$"
    r"|num_key_value_heads$|n_inner$"
    r"|(intermediate|ffn_hidden)_size|reorder_and_upcast_attn$|is_decoder$|id2label$|label2id$"
    r"|task_specific|problem_type$|summary_"
    r"|output_(attentions|hidden_states|router_logits)$|return_dict|chunk_size_feed_forward$"
    r"|name_or_path$|.*initializer"
    r"|.*(_token_ids?|_token_index|dropout|pdrop|_drop|_bias|_config|_coef|_loss|_noise|_tokens_per_image)$"
    # Looked at on their own:
    r"|(hidden_act|hidden_activation|activation_function|rope_parameters|layer_types"
    r"|\w*sliding_window\w*|max_window_layers)$"
)

# How mlx-lm writes each activation; a model file holds one of them, whatever the config says.
TANH_GELU = r"gelu_approx|GELU\(approx|geglu"
ACTIVATIONS = {
    "silu": r"silu|swiglu|SiLU",
    "gelu": r"nn\.gelu\b|nn\.GELU\(\)",
    "gelu_new": TANH_GELU,
    "gelu_pytorch_tanh": TANH_GELU,
}


class ConversionError(Exception):
    """One line for stderr; `code` is 2 for what the user wrote and 1 for what failed."""

    def __init__(self, message, code=1):
        super().__init__(" ".join(str(message).split()))
        self.code = code


# --- Reading the source -------------------------------------------------------------------------------------


def find_source(hf_path, revision=None):
    """A local directory as it is, or the local snapshot of a hub model."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    path = Path(hf_path).expanduser()
    if path.exists():
        if not path.is_dir():
            raise ConversionError(
                f"Not a model directory: {hf_path} is a file; give the directory that holds it", 2
            )
        if revision:
            raise ConversionError(
                f"--revision is for hub models, and {hf_path} is a local directory; leave it out", 2
            )
        return path
    try:
        wanted = [*DEFAULT_ALLOW_PATTERNS, "tokenizer.pkl"]
        return Path(huggingface_hub.snapshot_download(hf_path, revision=revision, allow_patterns=wanted))
    except HFValidationError:
        raise ConversionError(
            f"Model not found: {hf_path} is neither a local directory nor a hub name of the form owner/name",
            2,
        ) from None
    except HfHubHTTPError.__bases__ as error:
        # OSError and the HTTP client's own, whose module changes with the version.
        where = f"{hf_path} at revision {revision}" if revision else hf_path
        offline = " (HF_HUB_OFFLINE is set)" if huggingface_hub.constants.HF_HUB_OFFLINE else ""
        cause = str(error).strip().splitlines()[0]
        raise ConversionError(
            f"Model not found: {where} is no local directory and could not be read from the hub{offline}: "
            f"{cause.rstrip('.')}. Check the name and the network, or give a local directory"
        ) from error


def read_safetensors_header(path):
    """{tensor name: (shape, bytes)}. Raises where the file is shorter or longer than its header says.

    MLX maps the file without looking.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if 8 + length <= size else {}
        except (UnicodeDecodeError, json.JSONDecodeError):
            header = {}
    header.pop("__metadata__", None)
    end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=math.inf)
    if end != size:
        raise ConversionError(
            f"Damaged weights: {path} holds {size} bytes, not what its header says; download or save it again"
        )
    return {
        name: (tensor["shape"], tensor["data_offsets"][1] - tensor["data_offsets"][0])
        for name, tensor in header.items()
    }


def read_checkpoint(source):
    """{tensor name: (shape, bytes)} over the model's safetensors files, complete as the index lists them."""
    if not (source / "config.json").is_file():
        raise ConversionError(
            f"Not a model directory: {source} has no config.json; give a Hugging Face model directory", 2
        )
    files = sorted(source.glob("model*.safetensors"))
    if not files:
        found = ", ".join(sorted(file.name for file in source.iterdir() if file.is_file())[:8])
        raise ConversionError(
            f"No weights: {source} has no model*.safetensors (found {found}); save the model as safetensors "
            "first",
            2,
        )
    index = source / "model.safetensors.index.json"
    wanted = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else set()
    if missing := sorted(wanted - {file.name for file in files}):
        raise ConversionError(
            f"Incomplete weights: {source} lacks {', '.join(missing)}; download the model again"
        )
    return {name: entry for file in files for name, entry in read_safetensors_header(file).items()}


def adapt_config(config, checkpoint, longrope=None):
    """`config` with the other spellings that mlx-lm's classes need (in place).

    `longrope` picks one of phi3's two lists of rope factors.
    """
    text = config.get("text_config") or config
    if "lm_head.weight" in checkpoint:
        # mlx-lm's llama ties the head where the setting is absent, and would drop the head without a word.
        text.setdefault("tie_word_embeddings", False)
    if text.get("model_type") == "gpt2":
        text.setdefault("n_ctx", text.get("n_positions", 1024))
    if text.get("model_type") == "gpt_bigcode":
        text["n_inner"] = text.get("n_inner") or 4 * text["n_embd"]  # null is transformers' way to say so
    types = text.get("layer_types") or []
    if "full_attention" in types and alternating(types, period := types.index("full_attention") + 1):
        # transformers 5 writes one type per layer; gemma3 and cohere2 in mlx-lm read the distance between
        # full-attention layers.
        text["sliding_window_pattern"] = text.get("sliding_window_pattern") or period
    if text is not config and "vocab_size" in text:
        # mlx-lm's gemma3 puts its own default over the text model's.
        config.setdefault("vocab_size", text["vocab_size"])
    scaling = text.get("rope_scaling") or {}
    if scaling.get("short_factor") != scaling.get("long_factor"):
        limit = scaling.get("original_max_position_embeddings")
        if longrope is None:
            raise ConversionError(
                "A setting would be ignored: rope_scaling.short_factor. mlx-lm uses one list of factors at "
                f"every length: add --longrope short (exact for texts up to {limit} tokens) or "
                "--longrope long (exact for longer ones)"
            )
        if longrope == "short":
            scaling["long_factor"] = scaling["short_factor"]
    return config


# --- What mlx-lm's class would ignore -----------------------------------------------------------------------


@functools.cache
def source_of(module):
    """The text of an mlx-lm model file and of those it builds on (smollm3 reads its settings in llama.py)."""
    names = {
        getattr(value, "__name__" if inspect.ismodule(value) else "__module__", "")
        for value in vars(module).values()
    }
    parents = {name for name in names if str(name).startswith("mlx_lm.models.")} - {
        module.__name__,
        "mlx_lm.models.rope_utils",
    }
    return inspect.getsource(module) + "".join(source_of(sys.modules[name]) for name in sorted(parents))


def alternating(types, period):
    """Whether every `period`-th layer, and no other, has full attention."""
    return types == ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(len(types))]


def ignored_settings(model, config):
    """{name: value} of the settings that transformers obeys and the MLX model does not.

    mlx-lm's classes drop unknown settings without a word. What their source neither reads as `args.name` nor
    names in quotes is ignored; that matters where the value differs from transformers' default for the model
    type, which is what the MLX code is written for.
    """
    import transformers

    source = source_of(sys.modules[type(model).__module__])

    def reads(name):
        return re.search(rf"[.\"']{re.escape(name)}\b", source) is not None

    if "text_config" in config and reads("text_config"):
        return ignored_settings(getattr(model, "language_model", model), config["text_config"])
    kind = config.get("model_type")
    default = transformers.CONFIG_MAPPING[kind]().to_dict() if kind in transformers.CONFIG_MAPPING else {}
    ignored = {
        name for name, value in config.items()
        if name in default and not HARMLESS.match(name) and not reads(name)
        and value not in (None, default[name])
    }  # fmt: skip
    for name in ("hidden_act", "hidden_activation", "activation_function"):
        activation = config.get(name)
        other = (
            not re.search(ACTIVATIONS[activation], source)
            if activation in ACTIVATIONS
            else activation != default.get(name)
        )
        if name in config and name in default and activation and other and not reads(name):
            ignored.add(name)
    ignored |= ignored_rope(config, reads, getattr(model, "args", None)) | ignored_window(
        config, reads, getattr(model, "args", None)
    )
    return {name: config[name] for name in sorted(ignored)}


def ignored_rope(config, reads, args):
    """Which rope settings of the flattened config the MLX model drops; `args` is what it took over."""
    neutral = {
        "rope_theta": 10000,
        "partial_rotary_factor": 1,
        "rope_scaling": None,
        "rope_local_base_freq": config.get("rope_theta"),
    }
    aliases = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    scaling = config.get("rope_scaling") or {}
    ignored = set()
    if not reads("rope_parameters"):
        ignored = {
            name for name, value in neutral.items()
            if config.get(name, value) not in (value, None)
            and not reads(name) and not reads(aliases.get(name, name))
        }  # fmt: skip
        # Two bases are all that these classes know of a rope per layer type.
        per_type = {
            name: rope
            for name, rope in (config.get("rope_parameters") or {}).items()
            if isinstance(rope, dict)
        }
        local = per_type.pop("sliding_attention", {})
        if set(per_type) - {"full_attention"} or local.get("rope_type", "default") != "default":
            ignored.add("rope_parameters")
    # rope_utils.initialize_rope does not read these two.
    unread = scaling.get("attention_factor") is not None or scaling.get("truncate") is False
    dropped = scaling.get("type", "default") != "default" and getattr(args, "rope_scaling", scaling) is None
    return ignored | ({"rope_scaling"} if unread or dropped else set())


def ignored_window(config, reads, args):
    """sliding_window or layer_types, where layers miss a window that is shorter than the context."""
    types = config.get("layer_types")
    window = config.get("sliding_window")
    if (
        not window
        or config.get("use_sliding_window") is False
        or window >= config.get("max_position_embeddings", math.inf)
    ):
        return set()
    if types is not None and "sliding_attention" not in types:
        return set()
    applied = getattr(args, "layer_types", None)
    if not reads("sliding_window") or (applied and "sliding_attention" not in applied):
        return {"sliding_window"}
    period = config.get("sliding_window_pattern", 0)
    known = (
        not types
        or reads("layer_types")
        or isinstance(period, str)
        or (period and alternating(types, period))
    )
    return set() if known else {"layer_types"}


# --- Loading ------------------------------------------------------------------------------------------------


def model_classes(config):
    """mlx-lm's (Model, ModelArgs). Its gpt2 expects names without transformers' prefix `transformer.`"""
    from mlx_lm.models.base import BaseModelArgs
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(config)
    needed = [
        name for name, parameter in inspect.signature(args_class).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        and name not in config
    ]  # fmt: skip
    if needed and args_class.from_dict.__func__ is BaseModelArgs.from_dict.__func__:
        raise ValueError(
            f"config.json lacks {', '.join(needed)}, which mlx-lm's {config['model_type']} needs"
        )
    if config["model_type"] != "gpt2":
        return model_class, args_class

    def sanitize(self, weights):
        weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
        buffers = re.compile(
            r"h\.\d+\.attn\.(masked_)?bias$" + ("|lm_head" if config.get("tie_word_embeddings", True) else "")
        )
        return model_class.sanitize(
            self, {name: weight for name, weight in weights.items() if not buffers.match(name)}
        )

    # The name and module stay: `reads` finds the source through them.
    return type(
        "Model", (model_class,), {"sanitize": sanitize, "__module__": model_class.__module__}
    ), args_class


def load_model(source, checkpoint, args):
    """(model, config), weights lazy. Raises ConversionError naming what is missing, left over or ignored."""
    from mlx_lm import utils as mlx_lm_utils

    try:
        config = mlx_lm_utils.load_config(source)
    except json.JSONDecodeError as error:
        raise ConversionError(
            f"Not a model directory: {source}/config.json is not JSON ({error})", 2
        ) from error
    if "model_type" not in config:
        raise ConversionError(f"Not a model directory: {source}/config.json names no model_type", 2)
    if (code := config.get("model_file")) and not args.trust_remote_code:
        raise ConversionError(
            f"The model is Python code of its own ({source}/{code}): read it, then add --trust-remote-code", 2
        )
    config = adapt_config(flatten_rope_parameters(config), checkpoint, args.longrope)
    try:
        model, config = mlx_lm_utils.load_model(
            source,
            lazy=True,
            strict=True,
            model_config=config,
            get_model_classes=model_classes,
            trust_remote_code=args.trust_remote_code,
        )
    # SystemExit: mlx-lm's olmo leaves the process where its own dependency is absent.
    except (*LOAD_ERRORS, SystemExit) as error:
        reason = f"{type(error).__name__}: {shorten(str(error), args.verbose)}"
        if isinstance(error, SystemExit):
            reason = f"its {config['model_type']} needs a Python package that is not installed"
        raise ConversionError(
            f"Cannot load {args.hf_path} ({config['model_type']}) with mlx-lm: {reason}. Models known to "
            f"work: {KNOWN_TO_WORK}"
        ) from error
    ignored = {} if config.get("model_file") else ignored_settings(model, config)
    window = ignored.get("sliding_window")
    if window and (
        config["model_type"] == "mistral" and window == 4096 or "sliding_window" in args.ignore_setting
    ):
        # 4096 is transformers' default for mistral, and only ever limited the length of exact texts.
        print(f"  exact for texts up to {window} tokens: mlx-lm does not apply this model's sliding_window")
        ignored.pop("sliding_window")
    if refused := {name: value for name, value in ignored.items() if name not in args.ignore_setting}:
        raise ConversionError(
            f"Settings would be ignored by mlx-lm's {config['model_type']}: "
            f"{', '.join(f'{name}={json.dumps(value)}' for name, value in refused.items())}. The converted "
            "model would differ from the "
            + (f"original beyond {window} tokens" if list(refused) == ["sliding_window"] else "original")
            + f"; to convert all the same add {' '.join(f'--ignore-setting {name}' for name in refused)}"
        )
    return model, config


def load_tokenizer(source, config, trust_remote_code):
    """mlx-lm's tokenizer wrapper, or None where the source has no Hugging Face tokenizer.

    nanochat has tokenizer.pkl instead.
    """
    from mlx_lm import utils as mlx_lm_utils

    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
    if not any((source / name).exists() for name in names) and not any(source.glob("*.tiktoken")):
        return None
    try:
        return mlx_lm_utils.load_tokenizer(
            source, {"trust_remote_code": trust_remote_code}, eos_token_ids=config.get("eos_token_id")
        )
    except (ValueError, OSError, KeyError, ImportError) as error:
        hint = (
            "; it runs code of its own: read it, then add --trust-remote-code"
            if "trust_remote_code" in str(error)
            else ""
        )
        raise ConversionError(
            f"Cannot load the tokenizer of {source}: {shorten(str(error))}{hint}"
        ) from error


def set_eos_token(token, tokenizer, source, config):
    """Make `token` the one that ends a text, in the tokenizer and in config: loading a model reads both."""
    if tokenizer is not None:
        vocabulary = tokenizer.get_vocab()
    elif (source / "tokenizer.pkl").exists():
        try:
            vocabulary = read_tokenizer_pickle(source / "tokenizer.pkl")["special_tokens"]
        except ValueError as error:
            raise ConversionError(f"Failed to load tiktoken tokenizer: {error}") from error
    else:
        raise ConversionError(f"--eos-token: {source} has no tokenizer to look {token!r} up in", 2)
    if token not in vocabulary:
        near = ", ".join(repr(name) for name in difflib.get_close_matches(token, vocabulary, n=3, cutoff=0.5))
        raise ConversionError(
            f"--eos-token: {token!r} is not in the vocabulary" + (f"; did you mean {near}?" if near else ""),
            2,
        )
    config["eos_token_id"] = vocabulary[token]
    if tokenizer is not None:
        tokenizer.eos_token = token


# --- Changing the weights -----------------------------------------------------------------------------------


def cast(model, dtype):
    """Floating-point parameters to `dtype`, except those that the model keeps as they are (a router's).

    Returns the names of the types that were cast.
    """
    wanted = getattr(model, "cast_predicate", None)
    dtype = getattr(mx, dtype)
    others = [
        (name, w) for name, w in tree_flatten(model.parameters())
        if mx.issubdtype(w.dtype, mx.floating) and w.dtype != dtype and (wanted is None or wanted(name))
    ]  # fmt: skip
    model.update(tree_unflatten([(name, w.astype(dtype)) for name, w in others]))
    return {str(w.dtype).removeprefix("mlx.core.") for _, w in others}


def plain_weight(layer):
    if not hasattr(layer, "bits"):
        return layer.weight
    return mx.dequantize(
        layer.weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, layer.mode
    )


def fuse_adapters(model, adapter_path):
    """Fuse an mlx-lm adapter directory into `model` and say what that changed.

    Adapters of type "full" replace weights.
    """
    from mlx_lm.tuner.utils import load_adapters

    path = Path(adapter_path).expanduser()
    if missing := [
        name for name in ("adapter_config.json", "adapters.safetensors") if not (path / name).is_file()
    ]:
        raise ConversionError(f"Not an mlx-lm adapter directory: {path} has no {' and no '.join(missing)}", 2)
    saved = set(read_safetensors_header(path / "adapters.safetensors"))
    try:
        load_adapters(model, str(path))
    except (ValueError, KeyError, AttributeError, RuntimeError) as error:
        hint = "; try --dequantize" if is_quantized(model) else ""  # mlx-lm puts no DoRA on 3, 5 and 6 bits
        raise ConversionError(
            f"The adapter {path} does not fit the model: {shorten(str(error))}{hint}"
        ) from error
    layers = [(name, layer) for name, layer in model.named_modules() if hasattr(layer, "fuse")]
    if absent := sorted(
        {f"{name}.{leaf}" for name, layer in layers for leaf in ("lora_a", "lora_b", "m") if leaf in layer}
        - saved
    ):
        raise ConversionError(
            f"The adapter {path} lacks weights that its adapter_config.json promises: "
            f"{shorten(', '.join(absent))}"
        )
    change = error = 0.0
    fused = []
    for name, layer in layers:
        base = layer.linear if "linear" in layer else layer.embedding
        exact = layer.fuse(dequantize=True)
        result = layer.fuse() if hasattr(base, "bits") else exact
        change = max(change, mx.abs(exact.weight - plain_weight(base)).max().item())
        error = max(error, mx.abs(exact.weight - plain_weight(result)).max().item())
        if not hasattr(result, "bits"):
            # DoRA's float32 magnitude would widen the layer.
            result.weight = result.weight.astype(plain_weight(base).dtype)
        fused.append((name, result))
    model.update_modules(tree_unflatten(fused))
    done = (
        f"fused into {len(fused)} layers, largest change of a weight {change:.3g}"
        if fused
        else f"replaced {len(saved)} weights"
    )
    print(f"Adapter {adapter_path} {done}")
    if error:
        print(f"  re-quantised: a fused weight is off by up to {error:.3g}; --dequantize fuses exactly")


def quantize(model, config, args):
    """(model, config) quantised as the flags say."""
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import quantize_model

    bits, group_size = MODES[args.q_mode or "affine"]
    bits = args.bits or bits or 4
    group_size = args.group_size or group_size or 64
    try:
        predicate = args.quant_predicate and mixed_quant_predicate_builder(
            args.quant_predicate, model, group_size
        )
    except ValueError:
        raise ConversionError(
            f"--quant-predicate {args.quant_predicate}: the recipes need layers named down_proj; use --bits",
            2,
        ) from None
    # quantize_model prints the bits per weight; the summary does so with the rest.
    with contextlib.redirect_stdout(io.StringIO()):
        model, config = quantize_model(
            model, config, group_size, bits, mode=args.q_mode or "affine", quant_predicate=predicate or None
        )
    if not is_quantized(model):
        widths = sorted({width for _, width in unquantized_layers(model)})
        raise ConversionError(
            f"--group-size {group_size} divides the width of no layer (widths {widths}): choose a smaller "
            "one",
            2,
        )
    return model, config


def check_quantization(args, quantized):
    """Refuse to quantise what is quantised, and to dequantise what is not."""
    if args.quantize and quantized:
        raise ConversionError(
            f"--quantize: {args.hf_path} is already quantised; --dequantize it into a directory of its own "
            "first",
            2,
        )
    if args.dequantize and not quantized:
        raise ConversionError(f"--dequantize: {args.hf_path} is not quantised; leave the flag out", 2)


def unquantized_layers(model):
    """[(path, input width)] of the layers that could be quantised and are not."""
    return [
        (name, layer.weight.shape[-1])
        for name, layer in model.named_modules()
        if hasattr(layer, "to_quantized") and "weight" in layer
    ]


def bits_per_weight(model):
    """Bits stored for each weight, scales and biases of the quantised layers included."""
    from mlx_lm.utils import get_total_parameters

    return 8 * sum(w.nbytes for _, w in tree_flatten(model.parameters())) / get_total_parameters(model)


# --- Saving -------------------------------------------------------------------------------------------------


def check_output(args):
    """The output directory, refused where writing it would lose something the user did not name."""
    output = Path(args.output_dir).expanduser().resolve()
    for name, path in (("--hf-path", args.hf_path), ("--adapter-path", args.adapter_path)):
        if path and Path(path).expanduser().exists():
            given = Path(path).expanduser().resolve()
            if given == output or output in given.parents:
                raise ConversionError(
                    f"--output-dir {args.output_dir} is or holds {name}, which it would replace; choose "
                    "another",
                    2,
                )
    if output.exists() and not args.overwrite:
        raise ConversionError(
            f"Output directory exists: {args.output_dir}; choose another --output-dir or add --overwrite", 2
        )
    if output.exists() and (
        not output.is_dir() or (any(output.iterdir()) and not (output / "config.json").exists())
    ):
        raise ConversionError(
            f"--overwrite replaces model directories only, and {args.output_dir} is none; choose another", 2
        )
    return output


@contextlib.contextmanager
def replacing(output):
    """A directory that becomes `output` when it is complete; what fails is a ConversionError."""
    try:
        with complete_or_absent(output) as aside:
            yield aside
    except (OSError, RuntimeError, ValueError) as error:
        raise ConversionError(
            f"Cannot write {output}: {shorten(str(error))}; nothing was left behind"
        ) from error


def write_directory(directory, source, model, config, tokenizer, args):
    """Write weights, config, tokenizer, generation settings, the model's own code and a card.

    Then load the result once, lazily.
    """
    from mlx_lm import utils as mlx_lm_utils

    mlx_lm_utils.save_model(directory, model, donate_model=True)
    has_vision = "vision_tower" in getattr(model, "model", {})
    mlx_lm_utils.save_config(dict(config), directory / "config.json", keep_vision_config=has_vision)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    for file in [*source.glob("*.py"), *source.glob("tokenizer.pkl"), *source.glob("generation_config.json")]:
        shutil.copy(file, directory)
    generation = directory / "generation_config.json"
    if args.eos_token and generation.exists():
        generation.write_text(
            json.dumps(
                {**json.loads(generation.read_text()), "eos_token_id": config["eos_token_id"]}, indent=2
            )
        )
    base = "" if Path(args.hf_path).expanduser().exists() else f"base_model: {args.hf_path}\n"
    (directory / "README.md").write_text(
        f"---\nlibrary_name: mlx\npipeline_tag: text-generation\ntags: [mlx]\n{base}---\n"
    )
    mlx_lm_utils.load_model(directory, lazy=True, strict=True, trust_remote_code=args.trust_remote_code)


def upload(directory, repo):
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo_id=repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(directory))
    except (*HfHubHTTPError.__bases__, ValueError) as error:
        raise ConversionError(
            f"Upload to {repo} failed: {shorten(str(error))}; the converted model is complete in {directory}"
        ) from error
    print(f"Uploaded to {repo}")


# --- Command line -------------------------------------------------------------------------------------------


def shorten(text, everything=False):
    text = " ".join(text.split()).rstrip(".")
    return text if everything or len(text) <= 600 else text[:600] + " ... (--verbose shows all)"


def change_weights(model, config, args):
    """(model, config) dequantised, fused, cast and quantised as the flags say, in this order."""
    from mlx_lm.utils import dequantize_model

    if args.dtype == "float32":
        cast(model, args.dtype)  # before the other steps too, so that they are done in float32
    if args.dequantize:
        print("Dequantising")
        model = dequantize_model(model)
        for key in ("quantization", "quantization_config"):
            config.pop(key, None)
    if args.adapter_path:
        fuse_adapters(model, args.adapter_path)
    dtype = (
        args.dtype
        or config.get("dtype")
        or config.get("torch_dtype")
        or (config.get("text_config") or {}).get("dtype")
    )
    if dtype in DTYPES:
        if others := cast(model, dtype):
            print(
                f"Cast {', '.join(sorted(others))} to {dtype}"
                + ("" if args.dtype else ", as config.json says (--dtype overrides it)")
            )
        config["dtype"] = config["torch_dtype"] = dtype
    if args.quantize:
        print("Quantising")
        model, config = quantize(model, config, args)
    return model, config


def convert(args):
    """One conversion, from the flags to the summary."""
    from mlx_lm.utils import get_total_parameters

    output = check_output(args)
    print(f"Loading {args.hf_path}")
    source = find_source(args.hf_path, args.revision)
    checkpoint = read_checkpoint(source)
    model, config = load_model(source, checkpoint, args)
    tokenizer = load_tokenizer(source, config, args.trust_remote_code)
    if args.eos_token:
        set_eos_token(args.eos_token, tokenizer, source, config)
    check_quantization(args, is_quantized(model))

    parameters = get_total_parameters(model)
    bits_before = bits_per_weight(model)
    # mlx-lm's own count leaves out what belongs to no layer.
    there = sum(math.prod(shape) for shape, _ in checkpoint.values())
    used = sum(w.size for _, w in tree_flatten(model.parameters()))
    left_out = 0 if is_quantized(model) else there - used
    model, config = change_weights(model, config, args)
    lines = quality_lines(model, bits_before, args)
    if left_out > 0:
        lines.append(
            f"  left out         {left_out / 1e6:.1f} M numbers that mlx-lm's text model does not use"
        )
    if tokenizer is None and not (source / "tokenizer.pkl").exists():
        lines.append(
            f"  no tokenizer     {args.hf_path} has none: copy its tokenizer.json into {args.output_dir} "
            "before generating"
        )
    lines += verbose_lines(model, config) if args.verbose else []
    trained_through = " --set fine_tune_type=lora" if is_quantized(model) else ""

    print(f"Saving to {args.output_dir}")
    with replacing(output) as directory:
        write_directory(directory, source, model, config, tokenizer, args)
    print(
        f"Converted {config['model_type']}, {parameters / 1e6:.1f} M parameters",
        size_line(checkpoint, output),
        *lines,
        sep="\n",
    )
    if args.upload_repo:
        upload(output, args.upload_repo)
    name = shlex.quote(args.output_dir)
    print(f"Next:\n  uv run python utils/inference.py --model {name} --chat")
    print(f"  uv run mlx-grpo.py --set model_name={name}{trained_through}")


def size_line(checkpoint, output):
    before = sum(size for _, size in checkpoint.values())
    after = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    return f"  size             {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB"


def quality_lines(model, bits_before, args, unquantized=unquantized_layers):
    """What the summary says of the weights: their bits, and the layers that could not be quantised."""
    lines = [f"  bits per weight  {bits_before:.3f} -> {bits_per_weight(model):.3f}"]
    if is_quantized(model) and (left := unquantized(model)):
        lines.append(f"  not quantised    {listed(left, args.verbose)}")
    return lines


def listed(layers, everything):
    """[(path, width)] as text; more than 40 are counted by kind of layer unless `everything` is wanted."""
    if everything or len(layers) <= 40:
        return ", ".join(f"{name} (width {width})" for name, width in layers)
    kinds = collections.Counter((re.sub(r"\.\d+\.", ".*.", name), width) for name, width in layers)
    return (
        ", ".join(f"{name} (width {width}, {count} layers)" for (name, width), count in kinds.items())
        + " (--verbose lists all)"
    )


def verbose_lines(model, config):
    """One line a layer with weights, and the settings in force."""
    for name, layer in model.named_modules():
        if "weight" in layer:
            packed = (
                f"{layer.bits} bits, group {layer.group_size}, {layer.mode}"
                if hasattr(layer, "bits")
                else str(layer.weight.dtype)
            )
            yield f"  {name}: {packed}"
    for name in ("eos_token_id", *ROPE_SETTINGS):
        if name in config:
            yield f"  {name} = {json.dumps(config[name])}"


def parse_args(argv=None):
    parser = Parser(
        description=__doc__.split("\n\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--hf-path", "--model", required=True, help="hub name (owner/name) or local directory")
    add("--output-dir", "--mlx-path", default="mlx_model", help="directory to write (default: mlx_model)")
    add("--overwrite", action="store_true", help="replace an existing model directory")
    add("-q", "--quantize", action="store_true", help="quantise (default: 4 bits, group size 64)")
    add("--bits", "--q-bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="bits per weight")
    add(
        "--group-size",
        "--q-group-size",
        type=int,
        choices=(16, 32, 64, 128),
        help="weights that share a scale (16: nvfp4 only)",
    )
    add("--q-mode", choices=MODES, help="number format (default: affine)")
    add(
        "--quant-predicate",
        "--recipe",
        choices=RECIPES,
        help="mixed bits: the second number for the layers that matter most",
    )
    add("-d", "--dequantize", action="store_true", help="turn a quantised model into a plain one")
    add(
        "--adapter-path",
        help="mlx-lm adapter directory (LoRA, DoRA) to fuse into the model; exact with --dequantize",
    )
    add("--dtype", choices=DTYPES, help="type of the weights that are not quantised (default: the model's)")
    add("--eos-token", help="token that ends a text, in place of the model's; it must be in the vocabulary")
    add(
        "--longrope",
        choices=("short", "long"),
        help="which rope factors to keep, for models that have both (phi3)",
    )
    add(
        "--ignore-setting",
        action="append",
        default=[],
        metavar="NAME",
        help="convert although mlx-lm ignores this setting",
    )
    add("--revision", help="branch, tag or commit of a hub model")
    add(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model or its tokenizer",
    )
    add("--upload-repo", metavar="OWNER/NAME", help="hub repository to create and upload to")
    add(
        "--verbose",
        action="store_true",
        help="also list every layer and rope setting, all names in errors, and the traceback",
    )
    args = parser.parse_args(argv)
    bits, group_size = MODES[args.q_mode or "affine"]
    for name in ("bits", "group_size", "q_mode", "quant_predicate"):
        if getattr(args, name) and not args.quantize:
            parser.error(f"--{name.replace('_', '-')} has no effect without --quantize: add -q")
    if args.quantize and args.dequantize:
        parser.error("--quantize and --dequantize exclude each other: run twice, dequantising first")
    if bits and (args.bits or bits, args.group_size or group_size) != (bits, group_size):
        parser.error(
            f"--q-mode {args.q_mode} is always {bits} bits with group size {group_size}: leave --bits and "
            "--group-size out"
        )
    if not bits and args.group_size == 16:
        parser.error("--group-size 16 is for --q-mode nvfp4: choose 32, 64 or 128")
    if args.quant_predicate and (args.bits or bits):
        parser.error("--quant-predicate sets the bits itself and is affine: leave --bits and --q-mode out")
    if args.upload_repo and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.upload_repo):
        parser.error(f"--upload-repo {args.upload_repo} is not of the form owner/name")
    return args


def exit_status(run, args):
    """Run run(args); an error is one line on stderr, after its traceback under --verbose, and a status."""
    try:
        run(args)
    except ConversionError as error:
        if args.verbose:
            traceback.print_exc()
        print(error, file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has left
        # Otherwise Python's last flush would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def main(argv=None):
    args = parse_args(argv)
    if not args.verbose:
        # Its advice on settings would come before our one line.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return exit_status(convert, args)


if __name__ == "__main__":
    sys.exit(main())
