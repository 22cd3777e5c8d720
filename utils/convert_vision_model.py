"""Convert a Hugging Face vision-language model (hub name or directory) to an MLX one that mlx-vlm reads.

What is added to `mlx_vlm.convert`: settings that transformers 5 nests are put where mlx-vlm looks for them,
code that comes with a model runs only when allowed, and the output directory is complete or absent. The
vision tower is never quantised.
"""

import argparse
import contextlib
import io
import json
import logging
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import convert_model
from convert_model import DTYPES, MODES, ConversionError, Parser, bits_per_weight, is_quantized, shorten

EXAMPLES = """examples:
  uv run python utils/convert_vision_model.py --hf-path Qwen/Qwen2-VL-2B-Instruct -q --output-dir qwen-vl-4bit
  uv run python utils/convert_vision_model.py --hf-path ./my-smolvlm --dtype bfloat16 --output-dir smolvlm"""
KNOWN_TO_WORK = "qwen2_vl, qwen2_5_vl, qwen3_vl, smolvlm (for example Qwen/Qwen2-VL-2B-Instruct)"
LOAD_ERRORS = (*convert_model.LOAD_ERRORS, ImportError, OSError)


# --- Loading, shared with inference_vision.py ---------------------------------------------------------------


def adapt_config(config):
    """config.json as transformers writes it -> a copy with the settings where mlx-vlm looks for them."""
    config = convert_model.flatten_rope_parameters(config)
    kind = config["model_type"]
    text = config.get("text_config") or config
    vision = config.get("vision_config") or {}
    rope = text.get("rope_parameters") or {}
    if "mrope_section" in rope and not text.get("rope_scaling"):
        text["rope_scaling"] = {**rope, "type": "mrope"}
    if "tie_word_embeddings" in config:
        text.setdefault("tie_word_embeddings", config["tie_word_embeddings"])
    if kind.startswith("qwen") and vision.get("model_type") == f"{kind}_vision":
        vision["model_type"] = kind  # mlx-vlm knows the towers by the name that transformers 4 gave them
    if kind in ("qwen2_vl", "qwen2_5_vl"):
        config = {**text, **config}  # these two read the text model's settings at the top, and nowhere else
    return config


@contextlib.contextmanager
def adapted(source):
    """`source` and its config, adapted if need be.

    An adapted config stands in a temporary directory that links to the rest of `source`.
    """
    try:
        config = json.loads((source / "config.json").read_text())
        changed = adapt_config(config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(
            f"Not a model directory: {source}/config.json is no model's configuration ({error!r})", 2
        ) from error
    if changed == config:
        yield source, config
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / source.name  # transformers caches a model's code under this name
        folder.mkdir()
        for entry in source.iterdir():
            if entry.name != "config.json":
                (folder / entry.name).symlink_to(entry.resolve())
        (folder / "config.json").write_text(json.dumps(changed))
        yield folder, changed


def load_vision_model(directory, config, name, trust_remote_code=False, lazy=False):
    """mlx-vlm's model with every weight in place; `name` is what the user called it."""
    from mlx_vlm.utils import load_model

    if (code := config.get("model_file")) and not trust_remote_code:
        raise ConversionError(
            f"The model is Python code of its own ({name}/{code}): read it, then add --trust-remote-code", 2
        )
    try:
        model = load_model(directory, lazy=lazy, trust_remote_code=trust_remote_code)
    except LOAD_ERRORS as error:
        raise ConversionError(
            f"Cannot load {name} ({config['model_type']}) with mlx-vlm: {type(error).__name__}: "
            f"{shorten(str(error))}. "
            f"Models known to work: {KNOWN_TO_WORK}"
        ) from error
    # mlx-vlm drops a whole module that has no weights, and only logs it.
    if blind := [part for part, value in vars(model).items() if value is None and "vision" in part]:
        raise ConversionError(
            f"Incomplete weights: {name} has none for {', '.join(blind)}; download the model again"
        )
    if not any(re.search("vision|image|img", part) for part in [*config, *dict(model.named_modules())]):
        raise ConversionError(
            f"Not a vision model: {name} ({config['model_type']}); use utils/convert_model.py and "
            "utils/inference.py",
            2,
        )
    text = getattr(model.config, "text_config", model.config)
    wanted = (config.get("text_config") or config).get("rope_theta")
    if wanted is not None and getattr(text, "rope_theta", wanted) != wanted:
        raise ConversionError(
            f"A setting would be ignored by mlx-vlm's {config['model_type']}: rope_theta={wanted} (it would "
            "compute with "
            f"{text.rope_theta}). Models known to work: {KNOWN_TO_WORK}"
        )
    return model


def load_processor(directory, name, eos_token_ids=None, trust_remote_code=False):
    """What turns text and images into arrays, from the same directory as the model."""
    from mlx_vlm.utils import load_image_processor, load_processor
    from transformers import PreTrainedTokenizerBase

    try:
        # Said outright: left out, mlx-vlm's processors run the model's code unasked.
        processor = load_processor(
            directory, eos_token_ids=eos_token_ids, trust_remote_code=trust_remote_code
        )
        if image_processor := load_image_processor(directory, trust_remote_code=trust_remote_code):
            processor.image_processor = image_processor
    except LOAD_ERRORS as error:
        hint = (
            "; it runs code of its own: read it, then add --trust-remote-code"
            if "trust_remote_code" in str(error)
            else ""
        )
        raise ConversionError(f"Cannot load the processor of {name}: {shorten(str(error))}{hint}") from error
    if isinstance(processor, PreTrainedTokenizerBase) and image_processor is None:
        raise ConversionError(
            f"{name} has a tokenizer and no image processor (preprocessor_config.json): it cannot read images"
        )
    return processor


# --- Converting ---------------------------------------------------------------------------------------------


def quantize(model, config, args):
    """(model, config), the language model quantised as the flags say."""
    from mlx_vlm.quant_utils import quantize_model
    from mlx_vlm.utils import skip_multimodal_module

    bits, group_size = MODES[args.q_mode or "affine"]
    bits = args.bits or bits or 4
    group_size = args.group_size or group_size or 64
    wanted = getattr(model, "quant_predicate", None)

    def predicate(path, layer):
        if skip_multimodal_module(path):
            return False
        return wanted(path, layer) if wanted else True

    # It prints the bits per weight; the summary does so with the rest.
    with contextlib.redirect_stdout(io.StringIO()):
        model, config = quantize_model(model, config, group_size, bits, args.q_mode or "affine", predicate)
    if not is_quantized(model):
        widths = sorted({width for _, width in unquantized_layers(model)})
        raise ConversionError(
            f"--group-size {group_size} divides the width of no layer (widths {widths}): choose a smaller "
            "one",
            2,
        )
    return model, config


def unquantized_layers(model):
    """[(path, input width)] of the language model's layers that could be quantised and are not."""
    from mlx_vlm.utils import skip_multimodal_module

    return [
        (path, width)
        for path, width in convert_model.unquantized_layers(model)
        if not skip_multimodal_module(path)
    ]


def write_directory(directory, source, model, config, args):
    """Write weights, config and card, and copy the source's processor and tokenizer files.

    Then load the result once, lazily.
    """
    from mlx_vlm.utils import save_config, save_weights

    save_weights(directory, model, donate_weights=True)
    save_config(dict(config), directory / "config.json")
    for file in source.iterdir():
        kept = file.suffix in (".json", ".jsonl", ".jinja", ".txt", ".model", ".tiktoken", ".py")
        if kept and file.name != "config.json" and not file.name.endswith(".index.json"):
            shutil.copy(file, directory)
    base = "" if Path(args.hf_path).expanduser().exists() else f"base_model: {args.hf_path}\n"
    (directory / "README.md").write_text(
        f"---\nlibrary_name: mlx\npipeline_tag: image-text-to-text\ntags: [mlx]\n{base}---\n"
    )
    load_vision_model(directory, config, args.output_dir, args.trust_remote_code, lazy=True)
    load_processor(directory, args.hf_path, trust_remote_code=args.trust_remote_code)


def change_weights(model, config, args):
    """(model, config) as --dequantize, --dtype and --quantize ask."""
    from mlx_vlm.quant_utils import dequantize_model

    # mlx-vlm rewrites the weights of GPTQ, FP8 and their like as it reads them: their configuration no longer
    # describes them.
    foreign = "quantization" not in config and (config.get("quantization_config") or {}).get("quant_method")
    convert_model.check_quantization(args, is_quantized(model) or foreign)
    if foreign and not args.dequantize:
        raise ConversionError(f"{args.hf_path} is quantised with {foreign}; add --dequantize", 2)
    if args.dequantize:
        print("Dequantising")
        model = dequantize_model(model)
        for part in (config, config.get("text_config") or {}):
            part.pop("quantization", None)
            part.pop("quantization_config", None)
    if args.dtype:
        convert_model.cast(model, args.dtype)
        config["dtype"] = args.dtype
        for part in (part for part in config.values() if isinstance(part, dict)):
            part.update({key: args.dtype for key in ("dtype", "torch_dtype") if key in part})
    if args.quantize:
        print("Quantising")
        model, config = quantize(model, config, args)
    return model, config


def convert(args):
    """One conversion, from the flags to the summary."""
    output = convert_model.check_output(args)
    print(f"Loading {args.hf_path}")
    source = convert_model.find_source(args.hf_path, args.revision)
    checkpoint = convert_model.read_checkpoint(source)
    with adapted(source) as (directory, config):
        model = load_vision_model(directory, config, args.hf_path, args.trust_remote_code, lazy=True)
    bits_before = bits_per_weight(model)
    model, config = change_weights(model, config, args)
    lines = convert_model.quality_lines(model, bits_before, args, unquantized_layers)
    lines += convert_model.verbose_lines(model, config) if args.verbose else []
    print(f"Saving to {args.output_dir}")
    with convert_model.replacing(output) as aside:
        write_directory(aside, source, model, config, args)
    print(f"Converted {config['model_type']}", convert_model.size_line(checkpoint, output), *lines, sep="\n")
    if args.upload_repo:
        convert_model.upload(output, args.upload_repo)
    print(f"Next:\n  uv run python utils/inference_vision.py --model {shlex.quote(args.output_dir)} --chat")


# --- Command line -------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(
        description=__doc__.split("\n\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--hf-path", "--model", required=True, help="hub name (owner/name) or local directory")
    add("--output-dir", "--mlx-path", help="directory to write (default: mlx_model)")
    add("--overwrite", action="store_true", help="replace an existing model directory")
    add(
        "-q",
        "--quantize",
        action="store_true",
        help="quantise the language model (default: 4 bits, group size 64)",
    )
    add("--bits", "--q-bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="bits per weight")
    add(
        "--group-size",
        "--q-group-size",
        type=int,
        choices=(16, 32, 64, 128),
        help="weights that share a scale (16: nvfp4 only)",
    )
    add("--q-mode", choices=MODES, help="number format (default: affine)")
    add("-d", "--dequantize", action="store_true", help="turn a quantised model into a plain one")
    add("--dtype", choices=DTYPES, help="type of the weights that are not quantised (default: the model's)")
    add("--revision", help="branch, tag or commit of a hub model")
    add(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model or its processor",
    )
    add("--upload-repo", metavar="OWNER/NAME", help="hub repository to create and upload to")
    add(
        "--verbose",
        action="store_true",
        help="also list every layer, the libraries' warnings and the traceback of a failure",
    )
    parser.parse_args(argv)
    # These are some of convert_model.py's flags, which says what does not go together.
    return convert_model.parse_args(argv)


def run_script(args, run):
    """The exit status of run(args), with mlx-vlm at hand."""

    def run_with_mlx_vlm(args):
        try:
            import mlx_vlm  # noqa: F401
        except ImportError as error:
            raise ConversionError(
                f"The vision scripts need mlx-vlm ({error}): install it with uv sync --extra vision"
            ) from error
        run(args)

    if not args.verbose:
        logging.disable(logging.ERROR)  # mlx-vlm and transformers log what they raise as well
    return convert_model.exit_status(run_with_mlx_vlm, args)


def main(argv=None):
    return run_script(parse_args(argv), convert)


if __name__ == "__main__":
    sys.exit(main())
