"""A small tokenizer as nanochat makes them, and where the shared references are."""

import os
from pathlib import Path

import tiktoken

ROOT = Path(__file__).resolve().parents[1]
REFERENCES = Path(os.environ.get("MLX_GRPO_SHARED", ROOT.parent / "shared")) / "nanochat" / "d4-2025-10"
SPECIAL = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
           "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"]  # fmt: skip
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


def make_encoding(
    merged=("th", "the", " the", "in", "ing", "aa", "aaa", "aaaa", "é", "< ", "<|", "|>", "\n\n"),
) -> tiktoken.Encoding:
    """A small tokenizer in nanochat's manner; `merged` is in the order of training."""
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {token.encode(): 256 + i for i, token in enumerate(merged)}
    special = {token: len(ranks) + i for i, token in enumerate(SPECIAL)}
    return tiktoken.Encoding("rustbpe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
