"""Models and datasets by name: a local path, or the hub. Every format, and every way it can be broken."""

import copy
import json
import re
import sys
from pathlib import Path

import mlx.nn as nn

from mlx_grpo.answers import extract_hash_answer
from mlx_grpo.errors import RunError, UserError
from mlx_grpo.update.swiglu import use_swiglu
from mlx_grpo.tiktoken_wrapper import TiktokenTokenizerWrapper

ROOT = Path(__file__).resolve().parents[1]
CHECK_HUB = "Check the name and the network, or give a local path"


def local_path(name: str) -> Path | None:
    """The file or folder `name` means: from the working directory, else from beside this script; None if neither."""
    return next((p for p in (Path(name).expanduser(), ROOT / name) if p.exists()), None)


def resolve_model(name: str) -> Path:
    """The local directory of a model: `name` itself, or its download from the hub. Raises UserError or RunError."""
    path = local_path(name)
    if path is None and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            patterns = ["*.json", "*.safetensors", "*.py", "*.jinja", "*.txt", "*.model", "*.tiktoken", "tokenizer.pkl"]
            return Path(snapshot_download(name, allow_patterns=patterns))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise RunError(f"Model not found: {name} is no local folder, and the hub gave: {reason}. {CHECK_HUB}") from None
    if path is None:
        raise UserError(f"Model not found: {name} is neither a folder nor a hub name")
    if not (path / "config.json").is_file():
        raise UserError(f"Not a model directory: {path} has no config.json")
    return path


def flatten_rope_parameters(config: dict) -> dict:
    """config.json as transformers 5 writes it -> a copy that also has rope_theta, rope_scaling and partial_rotary_factor on top.

    Most of mlx-lm's classes read only those; `rope_parameters` stays for the classes that read it. With one dict per layer type
    (gemma3) the top gets full_attention's values and rope_local_base_freq is sliding_attention's theta. `text_config` likewise.
    """
    flat = copy.deepcopy(config)
    if isinstance(flat.get("text_config"), dict):
        flat["text_config"] = flatten_rope_parameters(flat["text_config"])
    nested = flat.get("rope_parameters") or {}
    per_type = {name: rope for name, rope in nested.items() if isinstance(rope, dict)}
    rope = per_type.get("full_attention", {}) if per_type else nested
    if "rope_theta" in rope:
        flat["rope_theta"] = rope["rope_theta"]
    if "rope_theta" in per_type.get("sliding_attention", {}):
        flat["rope_local_base_freq"] = per_type["sliding_attention"]["rope_theta"]
    factors = {each.get("partial_rotary_factor") for each in per_type.values() or [rope]} - {None}
    # Where layer types differ, one number on top would be wrong for some of them.
    if len(factors) == 1 and all("partial_rotary_factor" in each for each in per_type.values()):
        flat["partial_rotary_factor"] = factors.pop()
    if rope.get("rope_type", rope.get("type", "default")) != "default" and not flat.get("rope_scaling"):
        flat["rope_scaling"] = dict(rope)
    if scaling := flat.get("rope_scaling"):
        # mlx-lm reads `type` first and phi3 reads nothing else; transformers' default context is the model's own, mlx-lm's is fixed.
        scaling.setdefault("type", scaling.get("rope_type", "default"))
        if scaling["type"] in ("llama3", "yarn", "longrope") and "max_position_embeddings" in flat:
            original = flat.get("original_max_position_embeddings", flat["max_position_embeddings"])
            scaling.setdefault("original_max_position_embeddings", original)
    if flat.get("model_type") == "gpt_neox":
        flat.setdefault("rotary_emb_base", flat.get("rope_theta", 10000))
        flat.setdefault("rotary_pct", flat.get("partial_rotary_factor", 0.25))
    return flat


def read_model_config(path: Path) -> dict:
    """A model directory's config.json, with generation_config.json's end ids, as mlx-lm's classes need it."""
    from mlx_lm.utils import load_config as read

    return flatten_rope_parameters(read(path))


def open_model(name: str, adapter_path: str | None = None, trust_remote_code: bool = False):
    """Open a model with its tokenizer, as every script of this project does: (model, tokenizer, its config.json).

    Raises UserError where the directory holds no model that fits its tokenizer.
    """
    from mlx_lm.utils import load_adapters, load_model as mlx_load_model, load_tokenizer

    path = resolve_model(name)
    if trust_remote_code:
        print(f"trust_remote_code: Python files that come with {name} run on this machine with all your rights", file=sys.stderr)
    try:
        model_config = read_model_config(path)
        own_code = path / model_config["model_file"] if "model_file" in model_config else None
        # The one model file that needs no trust is the one this project ships, byte for byte.
        known = own_code is not None and own_code.is_file() and own_code.read_bytes() == (ROOT / "mlx_grpo" / "models" / "nanochat_2026.py").read_bytes()
        model, model_config = mlx_load_model(path, model_config=model_config, trust_remote_code=trust_remote_code or known)
        if adapter_path:
            load_adapters(model, adapter_path)
            model.eval()
        if (path / "tokenizer.pkl").is_file() and not (path / "tokenizer.json").is_file():
            tokenizer = TiktokenTokenizerWrapper(path)
            ends = model_config.get("eos_token_id")
            tokenizer.eos_token_ids |= {ends} if isinstance(ends, int) else set(ends or ())
        else:
            tokenizer = load_tokenizer(path, {"trust_remote_code": trust_remote_code}, eos_token_ids=model_config.get("eos_token_id"))
    except (ValueError, OSError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        prefix = "" if reason.startswith("Failed to load tiktoken tokenizer") else f"Failed to load model {path}: "
        raise UserError(prefix + reason) from error
    rows = model_config.get("vocab_size") or model_config.get("text_config", {}).get("vocab_size")
    largest = max(tokenizer.get_vocab().values())
    if rows and largest >= rows:
        raise UserError(f"The tokenizer does not fit the model in {path}: token id {largest}, vocabulary of {rows}")
    use_swiglu(model)
    return model, tokenizer, model_config


def is_quantized(model) -> bool:
    """Whether any layer's weights are quantised."""
    return any(isinstance(m, (nn.QuantizedLinear, nn.QuantizedEmbedding)) or hasattr(m, "scales") for m in model.modules())


def broken_json_line(path: Path) -> str:
    """Where a JSON or JSON Lines file is first broken, as ", line 3: reason"; "" where it is well-formed."""
    text = path.read_text(encoding="utf-8", errors="replace")
    parts = [(0, text)] if path.suffix == ".json" and text.lstrip().startswith("[") else enumerate(text.splitlines())
    for before, part in parts:
        try:
            if part.strip():
                json.loads(part)
        except json.JSONDecodeError as error:
            return f", line {before + error.lineno}: {error.msg}"
    return ""


def open_dataset(name: str, config_name: str, split: str):
    """One split of a dataset as (rows, where they came from), or None where a local dataset has no such split.

    `name` is a hub name, a folder with train.* and test.* files or written by save_to_disk, or one JSONL, JSON, CSV
    or parquet file, which is a training split.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would say is in the one line below
    formats = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    path = file = local_path(name)
    try:
        if path is None and Path(name).suffix in formats or not name:
            raise UserError(f"Dataset not found: {name} is no file; check the path, which starts here or beside mlx-grpo.py")
        if path is None:
            return datasets.load_dataset(name, config_name or None, split=split), f"{name} ({split})"
        if path.is_dir() and any((path / mark).is_file() for mark in ("dataset_dict.json", "dataset_info.json")):
            saved = datasets.load_from_disk(str(path))
            saved = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
            return (saved[split], str(path)) if split in saved else None
        if path.is_dir():
            file = next((f for f in sorted(path.glob(f"{split}.*")) if f.suffix in formats), None)
        elif split != "train":
            file = None
        if file is None:
            return None
        if file.suffix not in formats:
            raise UserError(f"Unknown dataset format: {file}; use one of {', '.join(formats)} or a save_to_disk folder")
        if not file.stat().st_size:
            raise UserError(f"Dataset file is empty: {file}")
        return datasets.load_dataset(formats[file.suffix], data_files=str(file), split="train"), str(file)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if path is None:
            reason = str(error).strip().splitlines()[0]
            if reason.startswith(f'Unknown split "{split}"'):
                return None
            raise RunError(f"Dataset not found: {name} is no local file or folder, and the hub gave: {reason}. {CHECK_HUB}") from None
        where = broken_json_line(file) if file.suffix in (".jsonl", ".json") and file.is_file() else ""
        raise UserError(f"Failed to read dataset {file}{where or ': ' + str(error).strip().splitlines()[0]}") from None


def check_rows(config, rows, source: str) -> list[dict]:
    """Rows with all their columns, and "prompt" and "answer", the gold one, which is read after ####.

    Raises UserError with file and row (counted from 1) where a field is missing, empty or of the wrong type.
    """
    checked = []
    for number, row in enumerate(rows, 1):
        for name in (config.prompt_field, config.answer_field):
            if name not in row:
                raise UserError(f"{source}, row {number}: no field {name!r}; it has {', '.join(row)}. Set prompt_field and answer_field")
            if row[name] is None or row[name] == [] or row[name] != row[name] or not str(row[name]).strip():
                raise UserError(f"{source}, row {number}: field {name!r} is empty")
        question, answer = row[config.prompt_field], row[config.answer_field]
        chat = isinstance(question, list) and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in question)
        if not isinstance(question, str) and not chat:
            raise UserError(f"{source}, row {number}: field {config.prompt_field!r} is neither text nor chat messages")
        if not isinstance(answer, (str, int, float)):
            raise UserError(f"{source}, row {number}: field {config.answer_field!r} is neither text nor a number")
        gold = extract_hash_answer(str(answer))
        if gold == "":
            raise UserError(f"{source}, row {number}: field {config.answer_field!r} is empty")
        checked.append({**row, "prompt": question, "answer": str(answer).strip() if gold is None else gold})
    if not checked:
        raise UserError(f"No rows in {source}")
    return checked
