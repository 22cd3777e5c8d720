"""Models and datasets by name: a local path, or the hub. Every format, and every way it can be broken."""

import copy
import functools
import json
import lzma
import re
import sys
import zlib
from pathlib import Path

import mlx.nn as nn

from mlx_grpo.answers import parse_number, read_quantity
from mlx_grpo.errors import RunError, UserError

ROOT = Path(__file__).resolve().parents[1]
CHECK_HUB = "Check the name and the network, or give a local path"


def local_path(name: str) -> Path | None:
    """The file or folder `name`, in the working directory or else beside mlx-grpo.py; None if neither."""
    return next((p for p in (Path(name).expanduser(), ROOT / name) if p.exists()), None)


def resolve_model(name: str) -> Path:
    """The local directory of a model: `name` itself, or its download from the hub.

    Raises UserError or RunError.
    """
    path = local_path(name)
    if path is None and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            patterns = [
                "*.json",
                "*.safetensors",
                "*.py",
                "*.jinja",
                "*.txt",
                "*.model",
                "*.tiktoken",
                "tokenizer.pkl",
            ]
            return Path(snapshot_download(name, allow_patterns=patterns))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise RunError(
                f"Model not found: {name} is no local folder, and the hub gave: {reason}. {CHECK_HUB}"
            ) from None
    if path is None:
        raise UserError(f"Model not found: {name} is neither a folder nor a hub name")
    if not (path / "config.json").is_file():
        raise UserError(f"Not a model directory: {path} has no config.json")
    return path


def is_adapter_alone(folder: Path) -> bool:
    """Whether a directory holds an adapter and no model."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def adapter_base(folder: Path) -> str:
    """The name of the model that an adapter belongs on. Raises UserError where it does not say."""
    try:
        return str(json.loads((folder / "adapter_config.json").read_text())["model"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"Adapter without its model: {folder}/adapter_config.json names none; give the model, and this "
            "by --adapter-path"
        ) from None


def flatten_rope_parameters(config: dict) -> dict:
    """A copy of transformers 5's config.json with rope_theta, rope_scaling and partial_rotary_factor on top.

    Most of mlx-lm's classes read only those; `rope_parameters` stays for the classes that read it. With one
    dict per layer type (gemma3) the top gets full_attention's values and rope_local_base_freq is
    sliding_attention's theta. `text_config` likewise.
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
        # mlx-lm reads `type` first and phi3 reads nothing else; transformers' default context is the model's
        # own, mlx-lm's is fixed.
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


def is_quantized(model) -> bool:
    """Whether any layer's weights are quantised."""
    return any(
        isinstance(m, (nn.QuantizedLinear, nn.QuantizedEmbedding)) or hasattr(m, "scales")
        for m in model.modules()
    )


# --- Files of rows ------------------------------------------------------------------------------------------

# By ending; of a text table, its separator.
FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": ",",
    ".tsv": "\t",
    ".parquet": "parquet",
}
COMPRESSED = (".gz", ".bz2", ".xz")  # an ending that may follow
# Names of the splits, in the order they are looked for.
SPLITS = {"train": ("train", "training"), "test": ("test", "validation", "valid", "val", "dev")}


class WrittenFloat(float):
    """A number of a JSON file; as text it is what is written there, to the last digit."""

    def __new__(cls, text):
        self = super().__new__(cls, text)
        self.written = str(text)
        return self

    def __str__(self):
        return self.written


class DataRow(dict):
    """A row of a dataset.

    place: "FILE, row 3"; cut: whether the prompt was a chat whose last turn, the assistant's, was left out.
    """

    place = ""
    cut = False


def format_of(path: Path) -> str | None:
    """The format that a file's name tells, one of FORMATS' values, or None."""
    name = path.with_suffix("") if path.suffix in COMPRESSED else path
    return FORMATS.get(name.suffix.lower())


def broken_json_line(text: str, whole: bool) -> str:
    """Where JSON or JSON Lines are first broken, as ", line 3: reason"; "" where they are well-formed."""
    for before, part in [(0, text)] if whole else enumerate(text.split("\n")):
        try:
            if part.strip():
                json.loads(part)
        except json.JSONDecodeError as error:
            return f", line {before + error.lineno}: {error.msg}"
    return ""


def read_json(path: Path) -> list[dict]:
    """The rows of a JSON array or of JSON Lines, with types as written.

    A field that only some rows have is None in the others. Raises UserError with the file and the line that
    is broken.
    """
    import fsspec

    with fsspec.open(str(path), "rt", encoding="utf-8-sig", compression="infer") as file:
        text = file.read()
    whole = text.lstrip().startswith("[")
    try:
        read = functools.partial(json.loads, parse_float=WrittenFloat)
        rows = read(text) if whole else [read(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise UserError(
            f"Failed to read dataset {path}{broken_json_line(text, whole) or f': {error}'}"
        ) from None
    if strange := next((n for n, row in enumerate(rows, 1) if not isinstance(row, dict)), None):
        raise UserError(f"Failed to read dataset {path}, row {strange}: no JSON object")
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]


def read_file(path: Path, text_fields: tuple[str, ...]):
    """The rows of one file.

    text_fields: the columns that a table's reader must leave as text, such as 007 and None. Raises UserError
    with the file and what is wrong with it.
    """
    import datasets

    kind = format_of(path)
    if kind is None:
        raise UserError(
            f"Unknown dataset format: {path}; use one of {', '.join(FORMATS)} or a save_to_disk folder"
        )
    if not path.stat().st_size:
        raise UserError(f"Dataset file is empty: {path}")
    try:
        if kind == "json":
            return read_json(path)
        if kind == "parquet":
            return datasets.load_dataset("parquet", data_files=str(path), split="train")
        return read_table(path, kind, text_fields)
    except (
        OSError,
        ValueError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
        datasets.exceptions.DatasetsError,
    ) as error:
        with open(path, "rb") as file:
            pointer = file.read(24) == b"version https://git-lfs."
        reason = (
            "it is a Git LFS pointer; run git lfs pull"
            if pointer
            else (str(error).strip().splitlines() or [type(error).__name__])[0]
        )
        raise UserError(f"Failed to read dataset {path}: {reason}") from None


# What means "no value" in a table, but not in a text field.
ABSENT = ["", "NA", "N/A", "NaN", "nan", "null", "None"]


def read_table(path: Path, separator: str, text_fields: tuple[str, ...]):
    """The rows of a CSV or TSV file.

    Types are inferred, but those of text_fields, which hold what is written.
    """
    import datasets
    import pandas

    others = [
        column
        for column in pandas.read_csv(path, sep=separator, nrows=0).columns
        if column not in text_fields
    ]
    return datasets.load_dataset(
        "csv", data_files=str(path), split="train", sep=separator, converters=dict.fromkeys(text_fields, str),
        keep_default_na=False, na_values=dict.fromkeys(others, ABSENT),
    )  # fmt: skip


def files_of(folder: Path, name: str) -> list[Path]:
    """The files of the split `name` in a folder.

    NAME.jsonl and its like, shards such as NAME-00000-of-00002.parquet, or NAME/*.
    """
    files = sorted(path for path in folder.glob("*") if path.is_file() and format_of(path))
    whole = [path for path in files if path.name.split(".")[0] == name]
    shards = [path for path in files if re.match(rf"{name}[-_]\d", path.name)]
    inside = sorted(path for path in (folder / name).glob("*") if path.is_file() and format_of(path))
    found = whole[:1] or shards or inside
    return [path for path in found if format_of(path) == format_of(found[0])]


def split_files(folder: Path, config_name: str, split: str) -> list[Path]:
    """The files of a split of a folder, which may be a clone of a hub dataset.

    They lie in the folder, in CONFIG/ or data/, or in its only subfolder. Raises UserError where several
    subfolders hold splits and none is chosen.
    """

    def holds_splits(place: Path) -> bool:
        return any(files_of(place, name) for names in SPLITS.values() for name in names)

    usual = [folder, *([folder / config_name] if config_name else []), folder / "data"]
    folders = [place for place in usual if holds_splits(place)][:1]
    folders = folders or [place for place in sorted(folder.glob("[!.]*/")) if holds_splits(place)]
    if len(folders) > 1:
        raise UserError(
            f"{folder} holds several datasets: set dataset_config to one of "
            f"{', '.join(p.name for p in folders)}"
        )
    return next(
        (files for place in folders for name in SPLITS[split] if (files := files_of(place, name))), []
    )


def open_dataset(
    name: str, config_name: str, split: str, text_fields: tuple[str, ...] = ()
) -> list[tuple] | None:
    """One split of a dataset as a list of (rows, where they come from), or None where it has no such split.

    `name` is a hub name, a folder with train.* and test.* files, a clone of a hub dataset or one written by
    save_to_disk, or one file, which is a training split. text_fields: columns that are read as text, whatever
    it looks like.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would say is in the one line below
    path = local_path(name)
    if path is None and format_of(Path(name)) or not name:
        raise UserError(
            f"Dataset not found: {name} is no file; check the path, which starts here or beside mlx-grpo.py"
        )
    if path is None:
        return open_hub_dataset(name, config_name, split)
    if path.is_dir() and any((path / mark).is_file() for mark in ("dataset_dict.json", "dataset_info.json")):
        try:
            saved = datasets.load_from_disk(str(path))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"Failed to read dataset {path}: {str(error).strip().splitlines()[0]}") from None
        saved = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        return next(([(saved[n], str(path))] for n in SPLITS[split] if n in saved), None)
    files = split_files(path, config_name, split) if path.is_dir() else [path] if split == "train" else []
    return [(read_file(file, text_fields), str(file)) for file in files] or None


def open_hub_dataset(name: str, config_name: str, split: str) -> list[tuple] | None:
    """The same of a dataset on the hub, or in its cache. Raises RunError where it cannot be had."""
    import datasets

    for split_name in SPLITS[split]:
        try:
            return [
                (datasets.load_dataset(name, config_name or None, split=split_name), f"{name} ({split_name})")
            ]
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).strip().splitlines()[0]
            if not reason.startswith(f'Unknown split "{split_name}"'):
                raise RunError(
                    f"Dataset not found: {name} is no local file or folder, and the hub gave: {reason}. "
                    f"{CHECK_HUB}"
                ) from None
    return None


# --- Rows ---------------------------------------------------------------------------------------------------


def field_of(row: dict, name: str):
    """A row's field by name, or by a path into its objects such as reward_model.ground_truth.

    KeyError where there is none.
    """
    if name in row:
        return row[name]
    for part in name.split("."):
        if not isinstance(row, dict):
            raise KeyError(name)
        row = row[part]
    return row


def text_of(content) -> str:
    """The text of a chat message: its content, whose text parts are joined where it is a list.

    Raises ValueError.
    """
    if isinstance(content, list) and content:
        texts = [
            part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
            for part in content
        ]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else content
    if content is None or content == [] or isinstance(content, str) and not content.strip():
        raise ValueError("is empty")
    if not isinstance(content, str):
        raise ValueError("is neither text nor a list of text parts")
    return content


def read_chat(messages: list[dict]) -> list[dict]:
    """Chat messages with text for content, without the assistant's turns at the end. Raises ValueError."""
    chat = []
    for number, message in enumerate(messages, 1):
        try:
            chat.append({**message, "role": text_of(message["role"]), "content": text_of(message["content"])})
        except ValueError as error:
            raise ValueError(f"message {number} {error}") from None
    while chat and chat[-1]["role"] == "assistant":
        chat.pop()
    if not any(message["role"] == "user" for message in chat):
        raise ValueError("the chat has no message from the user to answer")
    return chat


def prompt_key(prompt: str | list[dict]) -> str:
    """What two prompts have in common when they ask the same."""
    text = (
        prompt
        if isinstance(prompt, str)
        else "\n".join(f"{message['role']} {message['content']}" for message in prompt)
    )
    return " ".join(text.split())


# Rewards that want a number whatever the gold answer is.
NUMERIC_REWARDS = ("int_reward_func", "last_number_reward_func")


def chat_text(prompt: str | list[dict]) -> str:
    """All texts of a prompt, joined."""
    return prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)


def has_own_system(prompt: str | list[dict]) -> bool:
    """Whether a prompt is a chat that brings its own system message."""
    return not isinstance(prompt, str) and prompt[0]["role"] == "system"


def is_number(answer: str) -> bool:
    return parse_number(answer) is not None or read_quantity(answer) is not None


def warn_of_rows(config, special_tokens: re.Pattern | None = None, **splits: list[DataRow]) -> None:
    """Warn once a split of rows that the user may not expect.

    special_tokens: a pattern that finds the model's special tokens in a text.
    """
    for split, rows in splits.items():
        split = split.replace("_", "-")

        def warn(kind: str, found: list[DataRow], says: str) -> None:
            if found:
                print(
                    f"Warning: {len(found)} of {len(rows)} {split} {kind}, the first in {found[0].place}, "
                    f"{says}",
                    file=sys.stderr,
                )

        warn(
            "prompts",
            [row for row in rows if row.cut],
            "end with the assistant's turn, which is left out: it would give the answer away",
        )
        if config.system_prompt:
            warn(
                "prompts",
                [row for row in rows if has_own_system(row["prompt"])],
                "have a system message of their own, which replaces system_prompt",
            )
        spelt = [row for row in rows if special_tokens and special_tokens.search(chat_text(row["prompt"]))]
        warn("prompts", spelt, "spell special tokens of the model, which are read as ordinary text")
        other = [row for row in rows if not is_number(row["answer"])]
        wanting = [name for name in config.reward_funcs if name in NUMERIC_REWARDS]
        wanting += ["correctness_reward_func"] * (
            "correctness_reward_func" in config.reward_funcs and 2 * len(other) < len(rows)
        )
        if wanting and other:
            warn(
                "gold answers",
                other,
                f"are no numbers ({other[0]['answer'][:60]!r}), which {', '.join(wanting)} would need",
            )
    trained = {prompt_key(row["prompt"]) for row in splits.get("training", ())}
    held_out = splits.get("held_out", [])
    both = [row for row in held_out if prompt_key(row["prompt"]) in trained]
    if both:
        print(
            f"Warning: {len(both)} of {len(held_out)} held-out prompts, the first in {both[0].place}, are "
            "trained on too: held-out accuracy will also measure memory",
            file=sys.stderr,
        )
