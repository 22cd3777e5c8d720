"""GGUF files as Hugging Face model directories: undo what llama.cpp renames, reorders and quantises.

Weights come dequantised, so they are as exact as the file is. Sources: llama.cpp's convert_hf_to_gguf.py
(names and layouts) and the GGUF specification (ggml, docs/gguf.md).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_grpo.errors import UserError

# GGUF's names of a block's tensors -> those of transformers; an architecture adds its own.
BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class Architecture:
    """How one of llama.cpp's architectures is written in transformers."""

    model_type: str
    class_name: str
    activation: str
    block_names: dict[str, str]  # beside BLOCK_NAMES
    interleaved: bool = False  # the rows of q and k: rotary pairs stand side by side
    norm_offset: float = 0.0  # what llama.cpp has added to each norm's weight


ARCHITECTURES = {
    "llama": Architecture(
        "llama", "LlamaForCausalLM", "silu", {"ffn_norm": "post_attention_layernorm"}, interleaved=True
    ),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", "gelu_pytorch_tanh",
        {
            "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        norm_offset=1.0,
    ),
}  # fmt: skip
# The settings that model_config understands. Others are refused: they would change the model unseen.
SETTINGS = {
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window", "block_count", "context_length",
    "embedding_length", "feed_forward_length", "rope.dimension_count", "rope.freq_base", "vocab_size",
}  # fmt: skip
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # token types


def write_model_directory(path: Path, folder: Path, dtype: mx.Dtype = mx.bfloat16) -> None:
    """Write the model of a GGUF file into `folder` as config.json, model.safetensors and tokenizer files.

    Raises UserError where the file's architecture, a setting or its tokenizer is none that is known here.
    """
    reader = open_gguf(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    name = fields["general.architecture"]
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"GGUF architecture not known: {name} in {path}; known are {known}")
    own = {key.removeprefix(f"{name}."): value for key, value in fields.items() if key.startswith(f"{name}.")}
    if unknown := sorted(set(own) - SETTINGS):
        raise UserError(f"GGUF settings not known: {', '.join(unknown)} in {path}")

    weights = read_weights(reader, ARCHITECTURES[name], own)
    config = model_config(ARCHITECTURES[name], own, fields, tied="lm_head.weight" not in weights)
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("mlx.core.")
    weights = {key: mx.array(value).astype(dtype) for key, value in weights.items()}

    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    make_tokenizer(fields).save(str(folder / "tokenizer.json"))
    ends = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", ends)
    write_json(folder / "tokenizer_config.json", tokenizer_config(fields))


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def open_gguf(path: Path):
    """The gguf package's reader of a file. Raises UserError without the package, or if it is no GGUF."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError("Reading GGUF files needs the gguf package: uv sync --extra gguf") from None
    try:
        return GGUFReader(path)
    except (OSError, ValueError) as error:
        raise UserError(f"Failed to read GGUF file {path}: {error}") from None


# --- Weights ------------------------------------------------------------------------------------------------


def read_weights(reader, architecture: Architecture, own: dict) -> dict[str, np.ndarray]:
    """Every tensor in float32, by transformers' name and in its layout; own: the architecture's settings."""
    from gguf.quants import dequantize

    names = BLOCK_NAMES | architecture.block_names
    heads = {"attn_q": own["attention.head_count"], "attn_k": own["attention.head_count_kv"]}
    weights = {}
    for tensor in reader.tensors:
        block, kind, suffix = split_name(tensor.name)
        known = OUTER_NAMES if block is None else names
        if kind not in known or suffix != "weight":
            raise UserError(f"GGUF tensor not known: {tensor.name}")
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if architecture.interleaved and kind in heads:
            values = halves_apart(values, heads[kind])
        if kind.endswith("norm"):
            values = values - architecture.norm_offset
        prefix = "" if block is None else f"model.layers.{block}."
        weights[f"{prefix}{known[kind]}.weight"] = values
    return weights


def split_name(name: str) -> tuple[int | None, str, str]:
    """(block or None, kind, suffix) of a tensor's name: blk.3.attn_q.weight -> 3, attn_q, weight."""
    parts = name.split(".")
    block = int(parts[1]) if parts[0] == "blk" and len(parts) > 3 else None
    kind = ".".join(parts[:-1] if block is None else parts[2:-1])
    return block, kind, parts[-1]


def halves_apart(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows (heads * D, in) with rotary pairs (2i, 2i + 1) -> with pairs (i, i + D/2), as in transformers."""
    width = values.shape[0] // heads
    pairs = values.reshape(heads, width // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


# --- Settings -----------------------------------------------------------------------------------------------


def model_config(architecture: Architecture, own: dict, fields: dict, tied: bool) -> dict:
    """config.json as transformers has it; tied: the head is the embedding."""
    heads = own["attention.head_count"]
    head_dim = own.get("attention.key_length") or own["embedding_length"] // heads
    config = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "hidden_act": architecture.activation,
        "hidden_size": own["embedding_length"],
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": own["attention.head_count_kv"],
        "head_dim": head_dim,
        "rms_norm_eps": float(f"{own['attention.layer_norm_rms_epsilon']:.6g}"),  # stored as float32
        "rope_theta": own["rope.freq_base"],
        "max_position_embeddings": own["context_length"],
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": tied,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }
    if architecture.model_type == "gemma3_text":
        # Not in the file: every sixth layer sees everything, the others rotate by a base of their own.
        config |= {"sliding_window_pattern": 6, "rope_local_base_freq": 10000.0}
        config["sliding_window"] = own["attention.sliding_window"]
        config["hidden_activation"] = architecture.activation
        # llama.cpp knows the 27B model, whose attention is scaled otherwise, by its 62 layers.
        is_27b = own["block_count"] == 62
        config["query_pre_attn_scalar"] = own["embedding_length"] // heads if is_27b else head_dim
    return config


# --- Tokenizer ----------------------------------------------------------------------------------------------


def make_tokenizer(fields: dict):
    """The tokenizers.Tokenizer of a GGUF file: byte-level BPE ("gpt2") or SentencePiece ("llama")."""
    from tokenizers import AddedToken, processors

    tokens = fields["tokenizer.ggml.tokens"]
    types = fields["tokenizer.ggml.token_type"]
    kind = fields["tokenizer.ggml.model"]
    makers = {"gpt2": byte_level_bpe, "llama": sentencepiece_bpe}
    if kind not in makers:
        raise UserError(f"GGUF tokenizer not known: {kind}; known are {', '.join(makers)}")
    tokenizer = makers[kind](fields)
    control = [token for token, type in zip(tokens, types) if type == CONTROL]
    defined = [token for token, type in zip(tokens, types) if type == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in defined])
    if fields.get("tokenizer.ggml.add_bos_token"):
        begin = fields["tokenizer.ggml.bos_token_id"]
        bos = tokens[begin]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, begin)]
        )
    return tokenizer


def byte_level_bpe(fields: dict):
    """A byte-level BPE. Of how text is cut into words the file has but a name that llama.cpp knows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    cut = fields.get("tokenizer.ggml.pre", "default")
    single_digits = pre_tokenizers.Digits(individual_digits=True)
    words = {"smollm": [single_digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]}
    if cut not in words:
        raise UserError(f"GGUF pre-tokenizer not known: {cut}; known are {', '.join(words)}")
    vocabulary = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words[cut])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_bpe(fields: dict):
    """A SentencePiece BPE: its merges are the pairs whose join is a token, in the order of the scores."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    types = fields["tokenizer.ggml.token_type"]
    scores = fields["tokenizer.ggml.scores"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    ranked = []
    for token, kind, score in zip(tokens, types, scores):
        for cut in range(1, len(token) if kind in (NORMAL, USER_DEFINED) else 1):
            left, right = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-score, left, right))
    merges = [(tokens[left], tokens[right]) for _, left, right in sorted(ranked)]
    unknown = tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)]
    bpe = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    spaces = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def tokenizer_config(fields: dict) -> dict:
    """tokenizer_config.json: the tokens that begin, end and pad a text, and the chat template if any."""
    tokens = fields["tokenizer.ggml.tokens"]
    ids = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding")}
    begin, end, pad = (None if i is None else tokens[i] for i in ids.values())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": end,
        "pad_token": pad or end,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields[f"{fields['general.architecture']}.context_length"],
    }
    if template := fields.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config
