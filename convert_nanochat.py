"""Convert a nanochat PyTorch checkpoint into a directory that mlx-lm and MLX-GRPO open.

    uv run --extra torch convert_nanochat.py --cache-dir ~/nanochat --output-dir nanochat-mlx
    uv run --extra torch convert_nanochat.py --cache-dir karpathy/nanochat-d32 --output-dir d32 -q

--cache-dir is a folder, or a hub repository's id, with model_NNNNNN.pt, meta_NNNNNN.json and tokenizer.pkl.

Two architectures convert: October 2025's (mlx-lm's own `nanochat`) and that since March 2026, whose MLX model
(nanochat_2026.py) is put beside the weights and needs trust_remote_code=True when loaded. Every key of the
checkpoint is used or the conversion is refused: a model with a part left out runs, and gives wrong answers.
Nothing in the checkpoint is executed: tokenizer.pkl is read as data, and .pt files with torch's weights_only.
"""

import argparse
import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

from mlx_grpo.backends import use_fast_backend

if __name__ == "__main__":
    use_fast_backend()  # ahead of MLX: the first BLAS that is loaded is the one that it uses

from mlx_grpo.run.directory import complete_or_absent
from mlx_grpo import TiktokenTokenizerWrapper
from mlx_grpo.tokenizer_pickle import read_tokenizer_pickle

ROOT = Path(__file__).resolve().parent

MODEL_FILE = "nanochat_2026.py"
CHAT_TOKENS = ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>")
META_KEYS = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
KEYS_2026 = ("resid_lambdas", "x0_lambdas", "smear_gate.weight", "smear_lambda", "backout_lambda")
# A code point that Unicode reserves for use inside programs. The chat template puts it inside content that
# merely spells a special token. Where a text has it already, it is dropped.
MARK = "\ufdd0"


class Refused(Exception):
    """The conversion cannot be done: one line, first what is wrong and then what to do. Exit status 1."""

    status = 1


class BadArgument(Refused):
    """What the user wrote is wrong. Exit status 2."""

    status = 2


# ---- finding and reading the checkpoint --------------------------------------------------------------------


def checkpoint_folder(name: str) -> Path:
    """--cache-dir -> a local folder; what is no folder but looks like a hub id is downloaded."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise BadArgument(
            f"Checkpoint not found: {name} is neither a folder nor a hub id such as karpathy/nanochat-d32"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["model_*.pt", "meta_*.json", "tokenizer.pkl"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Refused(
            f"Download failed: {name} ({reason}); check the id and the network, or give a folder"
        ) from None


def find_files(folder: Path, step: int | None) -> tuple[Path, Path, Path]:
    """A checkpoint folder -> its model, meta and tokenizer files, of the given step or the last one."""
    models = {
        int(m[1]): f for f in sorted(folder.iterdir()) if (m := re.fullmatch(r"model_(\d+)\.pt", f.name))
    }
    if not models:
        raise BadArgument(
            f"Checkpoint not found: {folder} has no model_NNNNNN.pt; give the folder that holds it"
        )
    step = max(models) if step is None else step
    if step not in models:
        raise BadArgument(
            f"Checkpoint not found: step {step} is not in {folder}; it has "
            f"{', '.join(map(str, sorted(models)))}"
        )
    meta = models[step].with_name(models[step].name.replace("model_", "meta_")).with_suffix(".json")
    if not meta.is_file():
        raise Refused(f"Metadata not found: {meta} belongs beside {models[step].name}; copy it there")
    # nanochat's own cache keeps the tokenizer in BASE/tokenizer and models in BASE/chatsft_checkpoints/d20.
    places = [
        folder,
        folder / "tokenizer",
        *(parent / "tokenizer" for parent in folder.resolve().parents[:2]),
    ]
    for place in places:
        if (place / "tokenizer.pkl").is_file():
            return models[step], meta, place / "tokenizer.pkl"
    raise Refused(f"Tokenizer not found: {folder / 'tokenizer.pkl'}; copy nanochat's tokenizer.pkl there")


def read_meta(path: Path) -> dict:
    """meta_NNNNNN.json -> its model_config, with every field known and sound."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["model_config"]
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"Metadata not readable: {path} has no model_config ({error})") from None
    if not isinstance(found, dict):
        raise Refused(f"Metadata not readable: model_config in {path} is no table")
    if missing := [key for key in META_KEYS if key not in found]:
        raise Refused(f"Metadata incomplete: model_config in {path} lacks {', '.join(missing)}")
    if unknown := sorted(set(found) - {*META_KEYS, "window_pattern"}):
        raise Refused(
            f"Unsupported architecture: model_config in {path} has {', '.join(unknown)}, which nanochat did "
            "not have "
            "in October 2025 or since March 2026; convert a checkpoint of nanochat itself"
        )
    for key in META_KEYS:
        if type(found[key]) is not int or not 1 <= found[key] <= (1024 if key == "n_layer" else 2**24):
            raise Refused(f"Metadata wrong: {key} = {found[key]!r} in {path} is no sensible positive integer")
    if found["n_embd"] % (2 * found["n_head"]) or found["n_head"] % found["n_kv_head"]:
        raise Refused(
            f"Metadata wrong: {found['n_embd']} channels do not divide into {found['n_head']} heads of even "
            "width in "
            f"{found['n_kv_head']} groups ({path})"
        )
    pattern = found.get("window_pattern", "L")
    if type(pattern) is not str or not re.fullmatch(r"[SsLl]{1,256}", pattern):
        raise Refused(
            f"Unsupported architecture: window_pattern {pattern!r} in {path} is not made of S and L"
        )
    return found


def read_weights(path: Path) -> dict:
    """model_NNNNNN.pt -> {key: torch tensor}, keys without the _orig_mod. that torch.compile leaves."""
    try:
        import torch
    except ImportError:
        raise Refused(
            "PyTorch is missing: reading .pt files needs it; run `uv run --extra torch convert_nanochat.py "
            "...`"
        ) from None
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, LookupError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Refused(
            f"Checkpoint not readable: {path} is not a plain file of tensors ({reason}); download it again"
        ) from None
    if not isinstance(weights, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in weights.items()
    ):
        raise Refused(f"Checkpoint not readable: {path} is not a table of named tensors")
    renamed = {key.removeprefix("_orig_mod."): value for key, value in weights.items()}
    if len(renamed) != len(weights):
        raise Refused(f"Checkpoint not readable: {path} has the same key with and without _orig_mod.")
    return renamed


# ---- weights -----------------------------------------------------------------------------------------------


def expected_shapes(meta: dict, is_2026: bool) -> dict[str, tuple]:
    """The name and shape of every tensor in a checkpoint of this architecture."""
    layers = meta["n_layer"]
    width = meta["n_embd"]
    kv = width // meta["n_head"] * meta["n_kv_head"]
    # Since 2026 the vocabulary is padded to a multiple of 64. nanochat cuts the logits; we cut the rows.
    rows = -(-meta["vocab_size"] // 64) * 64 if is_2026 else meta["vocab_size"]
    shapes = {"transformer.wte.weight": (rows, width), "lm_head.weight": (rows, width)}
    for i in range(layers):
        block = f"transformer.h.{i}"
        shapes |= {f"{block}.attn.c_q.weight": (width, width), f"{block}.attn.c_proj.weight": (width, width)}
        shapes |= {f"{block}.attn.c_k.weight": (kv, width), f"{block}.attn.c_v.weight": (kv, width)}
        shapes |= {
            f"{block}.mlp.c_fc.weight": (4 * width, width),
            f"{block}.mlp.c_proj.weight": (width, 4 * width),
        }
        if is_2026 and (layers - 1 - i) % 2 == 0:
            shapes |= {
                f"value_embeds.{i}.weight": (rows, kv),
                f"{block}.attn.ve_gate.weight": (meta["n_kv_head"], 12),
            }
    if is_2026:
        shapes |= dict(zip(KEYS_2026, ((layers,), (layers,), (1, 24), (1,), (1,))))
    return shapes


def mlx_name(key: str) -> str:
    """A checkpoint's key -> the parameter's name in MLX: the same, but 2026's extras join the backbone."""
    if match := re.fullmatch(r"value_embeds\.(\d+)\.weight", key):
        return f"transformer.h.{match[1]}.attn.value_embed.weight"
    return f"transformer.{key}" if key in KEYS_2026 else key


def convert_weights(weights: dict, meta: dict, is_2026: bool, dtype: str) -> dict:
    """Torch tensors -> MLX arrays of one dtype (lambdas stay float32).

    Raises Refused where a key is missing or unknown, a shape differs or a value is not finite.
    """
    import mlx.core as mx
    import torch

    shapes = expected_shapes(meta, is_2026)
    layout = "2026" if is_2026 else "October 2025"
    for kind, keys in (("has", weights.keys() - shapes.keys()), ("lacks", shapes.keys() - weights.keys())):
        if keys:
            raise Refused(
                f"Unsupported architecture: the checkpoint {kind} {sorted(keys)[0]} ({len(keys)} such "
                "keys), unlike "
                f"nanochat's layout of {layout}; convert a checkpoint of nanochat of October 2025, or since "
                "March 2026"
            )
    arrays = {}
    for key, shape in shapes.items():
        tensor = weights[key]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise Refused(
                f"Checkpoint wrong: {key} is {tensor.dtype} {tuple(tensor.shape)}; meta's model_config asks "
                f"for {shape}"
            )
        if (
            shape[0] > meta["vocab_size"]
            and key.endswith(("wte.weight", "lm_head.weight"))
            or key.startswith("value_embeds")
        ):
            tensor = tensor[: meta["vocab_size"]]
        # float32 holds bfloat16 and float16 exactly, so mixed checkpoints lose nothing on the way.
        array = mx.array(tensor.to(torch.float32).numpy())
        array = array if "lambda" in key else array.astype(getattr(mx, dtype))
        if not mx.isfinite(array).all().item():
            raise Refused(
                f"Checkpoint wrong: {key} has values that are not finite in {dtype}; use --dtype float32 or "
                "bfloat16"
            )
        arrays[mlx_name(key)] = array
    return arrays


def model_config(meta: dict, special: dict, is_2026: bool, dtype: str) -> dict:
    """config.json."""
    config = {
        "model_type": "nanochat",
        "architectures": ["NanoChatForCausalLM"],
        "hidden_size": meta["n_embd"],
        "num_hidden_layers": meta["n_layer"],
        "num_attention_heads": meta["n_head"],
        "num_key_value_heads": meta["n_kv_head"],
        "intermediate_size": 4 * meta["n_embd"],
        "vocab_size": meta["vocab_size"],
        "max_position_embeddings": meta["sequence_len"],
        "rope_theta": 100000.0 if is_2026 else 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": special["<|bos|>"],
        "eos_token_id": stop_ids(special),
        "torch_dtype": dtype,
    }
    return config | ({"window_pattern": meta["window_pattern"], "model_file": MODEL_FILE} if is_2026 else {})


def stop_ids(special: dict) -> list[int]:
    """nanochat stops at the end of its turn, and where a new document would begin."""
    return [special["<|assistant_end|>"], special["<|bos|>"]]


# ---- tokenizer ---------------------------------------------------------------------------------------------


def byte_names() -> list[str]:
    """The character for each byte in tokenizer.json (GPT-2's table): printable Latin-1 stands for itself."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def merges_into(token: bytes, ranks: dict) -> list[tuple[bytes, bytes]]:
    """The pairs of tokens that merge into `token`.

    For every token of a trained tokenizer that is exactly one: what is left of its bytes when all merges of
    lower rank are done, in tiktoken's order (lowest rank first, then leftmost).
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, ranks[token]), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank >= ranks[token]:
            # No training made this token; later merges may bring any two halves together.
            return [
                (token[:i], token[i:])
                for i in range(1, len(token))
                if token[:i] in ranks and token[i:] in ranks
            ]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [tuple(parts)]


def build_tokenizer(state: dict) -> tuple[dict, dict]:
    """tokenizer.pkl's data -> (tokenizer.json, tokenizer_config.json), which encode as tiktoken does.

    nanochat encodes text as ordinary text always, and puts special tokens between texts. A Hugging Face
    tokenizer turns one rendered text into ids. So here special tokens count only in a text that begins as a
    conversation does, with <|bos|><|user_start|>, and not where the chat template has put MARK inside,
    because content spells one. For this the special tokens are entries of the vocabulary that the splitting
    below leaves whole (ignore_merges); they are added tokens only so that decoding can skip them
    (split_special_tokens).
    """
    from tokenizers import Regex, pre_tokenizers

    ranks = state["mergeable_ranks"]
    special = state["special_tokens"]
    if missing := [token for token in CHAT_TOKENS if token not in special]:
        raise Refused(
            f"Tokenizer wrong: it lacks {', '.join(missing)}; convert a nanochat chat model's own "
            "tokenizer.pkl"
        )
    name = byte_names()
    names = {token: "".join(name[byte] for byte in token) for token in ranks}
    vocab = {names[token]: i for token, i in ranks.items()} | special
    if sorted(vocab.values()) != list(range(len(ranks) + len(special))):
        raise Refused(
            "Tokenizer wrong: its ids are not 0, 1, 2, ... without gaps; convert nanochat's own tokenizer.pkl"
        )
    longer = sorted((token for token in ranks if len(token) > 1), key=ranks.get)
    merges = [[names[a], names[b]] for token in longer for a, b in merges_into(token, ranks)]

    pattern = state["pat_str"]
    heads = {}  # where text that spells a special token can be cut without changing how the pattern cuts it
    for token in special:
        pieces = pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(token)
        if len(pieces) < 2:
            raise Refused(
                f"Tokenizer unsupported: its pattern keeps {token} in one piece, so text and special token "
                "would look alike; "
                "use TiktokenTokenizerWrapper with tokenizer.pkl"
            )
        heads[token] = pieces[0][0]
    quoted = {token: re.escape(token) for token in special}
    any_special = "|".join(quoted.values())
    begins = rf"\A{quoted['<|bos|>']}{quoted['<|user_start|>']}"
    # A text, or a stretch between two marks, that is nothing but a special token's spelling.
    whole = "|".join(
        rf"{re.escape(head)}(?={re.escape(token[len(head) :])}(?:\z|{MARK}))" for token, head in heads.items()
    )
    first = rf"\A{quoted['<|bos|>']}(?={quoted['<|user_start|>']})"
    later = rf"(?:{any_special})(?<={begins}[\s\S]*)"
    split = [
        rf"{first}|{later}|(?:\A|(?<={MARK}))(?:{whole})",
        MARK,
        rf"\A(?:{any_special})\z|{pattern}",
    ]
    pretokenizers = [
        {
            "type": "Split",
            "pattern": {"Regex": regex},
            "behavior": "Removed" if regex == MARK else "Isolated",
            "invert": False,
        }
        for regex in split
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*pretokenizers, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        "pad_token": "<|assistant_end|>",
        "additional_special_tokens": [
            token for token in special if token not in ("<|bos|>", "<|assistant_end|>")
        ],
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        "chat_template": chat_template(heads),
    }
    return tokenizer, config


def chat_template(heads: dict[str, str]) -> str:
    """nanochat's chat format in Jinja; `heads` says where MARK cuts a special token's spelling in content."""
    marked = " | ".join(
        [
            "text",
            *(
                f"replace({json.dumps(token)}, {json.dumps(head)} ~ mark ~ {json.dumps(token[len(head) :])})"
                for token, head in heads.items()
            ),
        ]
    )
    return (
        f"""\
{{%- set mark = "{MARK}" -%}}
{{%- macro plain(text) -%}}{{{{ {marked} }}}}{{%- endmacro -%}}"""
        + """\
{%- set system = "" -%}
{%- if messages and messages[0]["role"] == "system" -%}
  {%- if messages | length < 2 or messages[1]["role"] != "user" -%}
    {{- raise_exception("A system message must be followed by a user message") -}}
  {%- endif -%}
  {%- set system = messages[0]["content"] ~ "\\n\\n" -%}
  {%- set messages = messages[1:] -%}
{%- endif -%}
{{- "<|bos|>" -}}
{%- for message in messages -%}
  {%- set role = "user" if loop.index0 % 2 == 0 else "assistant" -%}
  {%- if message["role"] != role -%}
    {{- raise_exception("Message " ~ loop.index0 ~ " is from " ~ message["role"] \
~ " but should be from " ~ role) -}}
  {%- endif -%}
  {{- "<|user_start|>" if role == "user" else "<|assistant_start|>" -}}
  {%- if message["content"] is string -%}
    {{- plain((system if loop.first else "") ~ message["content"]) -}}
  {%- else -%}
    {{- plain(system if loop.first else "") -}}
    {%- for part in message["content"] -%}
      {%- if part["type"] == "python" -%}
        {{- "<|python_start|>" ~ plain(part["text"]) ~ "<|python_end|>" -}}
      {%- elif part["type"] == "python_output" -%}
        {{- "<|output_start|>" ~ plain(part["text"]) ~ "<|output_end|>" -}}
      {%- elif part["type"] == "text" -%}
        {{- plain(part["text"]) -}}
      {%- else -%}
        {{- raise_exception("Unknown part type: " ~ part["type"]) -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- "<|user_end|>" if role == "user" else "<|assistant_end|>" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {%- if not messages or messages[-1]["role"] != "user" -%}
    {{- raise_exception("A prompt for the assistant must end with a message from user") -}}
  {%- endif -%}
  {{- "<|assistant_start|>" -}}
{%- endif -%}
"""
    )


def check_tokenizer(folder: Path, reference: TiktokenTokenizerWrapper) -> None:
    """Compare the tokenizer just written with tiktoken, on texts that have gone wrong in conversions.

    A pattern may mean something else to another regular expression engine. Raises Refused where they differ.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = reference.all_special_tokens
    texts = [
        "",
        " ",
        "\n",
        "  two  spaces  ",
        "a\r\n\tb\n\n\n c",
        "I'll, you'RE, it's ſ 'S",
        "12345 1,080.50 ½ ²³ ١٢٣ Ⅷ",
        "snake_case(x)[0] != {}",
        "Café naïve — “quotes”",
        "日本語 한국어 العربية ไทย",
        "👩‍👩‍👧 🇨🇭 \u200b\u2028\ufeff\x00\x7f\xa0",
        "<|no_special|> < |bos| >",
    ]
    texts += [
        before + token + after
        for token in special
        for before in ("", "a", "!", " ", "\n", "<")
        for after in ("", "b", " ", "|>", token)
    ]
    chats = [
        [{"role": "user", "content": a}, {"role": "assistant", "content": b}]
        for a, b in zip(texts, reversed(texts))
    ]
    wrong = [
        text for text in texts if tokenizer.encode(text, add_special_tokens=False) != reference.encode(text)
    ]
    wrong += [
        chat
        for chat in chats
        if tokenizer.apply_chat_template(chat, return_dict=False) != reference.apply_chat_template(chat)
    ]
    ids = list(range(len(reference)))
    if wrong or tokenizer.decode(ids) != reference.decode(ids):
        raise Refused(
            "Tokenizer unsupported: tokenizer.json would differ from tiktoken, for example on "
            f"{str((wrong or ['decoding'])[0])[:80]!r}; use TiktokenTokenizerWrapper with tokenizer.pkl"
        )


# ---- the directory -----------------------------------------------------------------------------------------


def quantize(folder: Path) -> None:
    """Replace the weights in `folder` by 4-bit ones, in groups of 64, or 32 where the width asks for it."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model, quantize_model, save_config

    model, config = load_model(folder, trust_remote_code=True)
    width = config["hidden_size"]
    group = next((size for size in (64, 32) if width % size == 0), None)
    if group is None:  # mlx-lm would leave such layers as they are without a word
        raise Refused(f"Quantization impossible: width {width} is no multiple of 32; convert without -q")
    model, config = quantize_model(model, config, group, 4)
    mx.save_safetensors(
        str(folder / "quantized.safetensors"),
        dict(tree_flatten(model.parameters())),
        metadata={"format": "mlx"},
    )
    os.replace(folder / "quantized.safetensors", folder / "model.safetensors")
    save_config(config, folder / "config.json")


def write_directory(
    folder: Path, model: Path, meta: dict, tokenizer: Path, dtype: str, quantized: bool
) -> str:
    """Write the MLX directory into the empty `folder`; returns which architecture it is."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    try:
        reference = TiktokenTokenizerWrapper(tokenizer)
    except ValueError as error:
        raise Refused(str(error)) from None
    state = read_tokenizer_pickle(tokenizer)
    spare = meta["vocab_size"] - len(reference)
    if not 0 <= spare < 64:  # some runs pad the vocabulary to a round number
        raise Refused(
            f"Tokenizer wrong: {tokenizer} has {len(reference)} tokens and the model {meta['vocab_size']}; "
            "use the tokenizer.pkl that the model was trained with"
        )
    tokenizer_json, tokenizer_config = build_tokenizer(state)
    weights = read_weights(model)
    is_2026 = "window_pattern" in meta or any(key in weights for key in KEYS_2026)
    if is_2026 and "window_pattern" not in meta:
        raise Refused(
            "Metadata incomplete: the weights are of nanochat's 2026 architecture, but meta has no "
            "window_pattern"
        )
    arrays = convert_weights(weights, meta, is_2026, dtype)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
    special = state["special_tokens"]
    generation = {
        "bos_token_id": special["<|bos|>"],
        "eos_token_id": stop_ids(special),
        "pad_token_id": special["<|assistant_end|>"],
    }
    for name, content in (
        ("config.json", model_config(meta, special, is_2026, dtype)),
        ("generation_config.json", generation),
        ("tokenizer.json", tokenizer_json),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(tokenizer, folder / "tokenizer.pkl")
    if is_2026:
        shutil.copyfile(ROOT / "mlx_grpo" / "models" / MODEL_FILE, folder / MODEL_FILE)
    check_tokenizer(folder, reference)
    if quantized:
        quantize(folder)
    # Raises unless every name and shape fits mlx-lm's model.
    load_model(folder, lazy=True, strict=True, trust_remote_code=True)
    if spare:
        print(f"The model has {spare} more ids than {tokenizer} has tokens: they stand for no text")
    return "2026" if is_2026 else "October 2025"


def convert(
    cache_dir: str,
    output_dir: str,
    step: int | None = None,
    dtype: str = "float32",
    quantized: bool = False,
    overwrite: bool = False,
) -> Path:
    """Convert a checkpoint; the output directory is complete or absent. Raises Refused or BadArgument."""
    output = Path(output_dir).expanduser().absolute()
    taken = output.exists() and (not output.is_dir() or any(output.iterdir()))
    if taken and not overwrite:
        raise BadArgument(
            f"Output exists: {output} is not an empty directory; give another --output-dir, or --overwrite"
        )
    source = checkpoint_folder(cache_dir)
    model, meta_file, tokenizer = find_files(source, step)
    if output.resolve() in (source.resolve(), *source.resolve().parents):
        raise BadArgument(f"Output wrong: {output} holds the checkpoint itself; give another --output-dir")
    if taken and not (output / "config.json").is_file():
        raise BadArgument(
            f"Output wrong: --overwrite replaces model directories only, and {output} is none; give another "
            "--output-dir"
        )
    meta = read_meta(meta_file)
    with complete_or_absent(output) as aside:
        layout = write_directory(aside, model, meta, tokenizer, dtype, quantized)
    print(f"{model.name} (nanochat of {layout}) -> {output}")
    if layout == "2026":
        print("Loading it runs the nanochat_2026.py in it: mlx_lm.load(..., trust_remote_code=True)")
    return output


EXAMPLES = """\
examples:
  uv run --extra torch convert_nanochat.py --cache-dir nanochat-d20 --output-dir nanochat-mlx
  uv run --extra torch convert_nanochat.py --cache-dir karpathy/nanochat-d32 --output-dir nanochat-d32 -q
"""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{message[:1].upper() + message[1:]}; see --help\n")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        description="Convert a nanochat PyTorch checkpoint into a directory that mlx-lm and MLX-GRPO open.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--cache-dir",
        required=True,
        help="folder or hub id with model_NNNNNN.pt, meta_NNNNNN.json, tokenizer.pkl",
    )
    parser.add_argument("--output-dir", required=True, help="directory to write; must be new or empty")
    parser.add_argument("--step", type=int, help="which model_NNNNNN.pt (default: the last)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="type of the weights; float32 keeps mixed checkpoints exact (default)",
    )
    parser.add_argument(
        "-q",
        "--quantize",
        action="store_true",
        help="quantise to 4 bits (for other widths: mlx_lm.convert -q)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output directory")
    options = parser.parse_args(arguments)
    try:
        convert(
            options.cache_dir,
            options.output_dir,
            options.step,
            options.dtype,
            options.quantize,
            options.overwrite,
        )
    except Refused as refusal:
        print(refusal, file=sys.stderr)
        return refusal.status
    except OSError as error:
        print(f"Failed to write or read: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
