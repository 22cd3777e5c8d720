"""What the logs say of a run: of each update, of its completions, of the machine."""

import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_grpo.answers import cut_while_thinking, is_thinking


def end_of(completion) -> str:
    """How a completion ended, for a reader."""
    cut_thinking = completion.finish_reason == "length" and is_thinking(completion.text)
    return completion.finish_reason + ", while thinking" * cut_thinking


def thinking_facts(texts: list[str]) -> dict:
    """The share of completions that were cut while thinking, where the model thinks at all."""
    cut = cut_while_thinking(texts)
    return {} if cut is None else {"cut_thinking_fraction": cut}


def completion_records(update: int, groups: list, names: list[str]) -> list[dict]:
    """The lines of completions.jsonl for an update's groups.

    names: of the reward functions, in the order of the completions' rewards.
    """
    return [
        {
            "update": update,
            "prompt": group.row["prompt"],
            "answer": group.row["answer"],
            "completion": completion.text,
            "rewards": {name: None if np.isnan(r) else r for name, r in zip(names, completion.rewards)},
            "finish_reason": end_of(completion),
            "length": len(completion.ids),
        }
        for group in groups
        for completion in group.completions
    ]


def nan_mean(values: np.ndarray) -> float | None:
    """Mean of what is not NaN; None where all is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def update_facts(groups: list, rewards: np.ndarray, advantages: np.ndarray, names: list[str]) -> dict:
    """What the log says of an update's completions.

    rewards, advantages: (B, G); names: of the reward functions.
    """
    completions = [completion for group in groups for completion in group.completions]
    lengths = np.array([len(completion.ids) for completion in completions])
    per_function = np.array([completion.rewards for completion in completions]).T  # (F, N)
    return {
        "reward_mean": nan_mean(rewards),
        "reward_std": float(np.nanstd(rewards)) if not np.isnan(rewards).all() else None,
        **{f"rewards/{name}": nan_mean(values) for name, values in zip(names, per_function)},
        "completion_length_mean": float(lengths.mean()),
        "completion_length_max": int(lengths.max()),
        "truncated_fraction": float(
            np.mean([completion.finish_reason == "length" for completion in completions])
        ),
        **thinking_facts([completion.text for completion in completions]),
        "zero_signal_fraction": float(np.mean(~advantages.any(axis=1))),
    }


def time_facts(groups: list, seconds: dict, prompts_drawn: int, metrics: list[dict]) -> dict:
    """What the log says of a batch's time and memory.

    prompts_drawn: those of replaced groups included; metrics: of each update on the batch, of which some may
    be skipped.
    """
    updates = sum("skipped" not in one for one in metrics)
    tokens = sum(len(completion.ids) for group in groups for completion in group.completions)
    sampled = int(tokens * prompts_drawn / len(groups))  # replaced groups cost the same each
    return {
        "sampled": sampled,
        "prompts_drawn": prompts_drawn,
        "rollout_tokens_per_s": sampled / seconds["rollout"],
        "train_tokens_per_s": tokens * updates / seconds["train"] if updates else None,
        **{f"seconds/{phase}": value for phase, value in seconds.items()},
        "peak_memory_gb": mx.get_peak_memory() / 2**30,
    }


def machine_facts(memory: int) -> dict:
    """What the report says of the machine, the versions and the command. memory: the machine's, in bytes."""
    versions = {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm", "transformers")}
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "chip": mx.device_info().get("device_name", "unknown"),
        "device": mx.default_device().type.name,
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 2**30, 1),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions,
    }
