"""What the logs say of a run: of each update, of its completions, of the machine."""

import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np


def completion_records(update: int, groups: list, names: list[str]) -> list[dict]:
    """The lines of completions.jsonl for an update's groups. names: of the reward functions, in the order of their rewards."""
    return [
        {
            "update": update, "prompt": group.row["prompt"], "answer": group.row["answer"], "completion": text,
            "rewards": {n: None if np.isnan(r) else float(r) for n, r in zip(names, rewards)},
            "finish_reason": reason, "length": len(ids),
        }
        for group in groups
        for text, reason, rewards, ids in zip(group.texts, group.finish_reasons, group.rewards.T, group.completions)
    ]  # fmt: skip


def nan_mean(values: np.ndarray) -> float | None:
    """Mean of what is not NaN; None where all is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def update_facts(trainer, groups: list, names: list[str], prompts_drawn: int, sampled: int, seconds: dict) -> dict:
    """What the log says of an update's completions and of its time.

    names: of the reward functions; prompts_drawn, sampled: prompts and completion tokens, those of replaced groups included; seconds: by phase.
    """
    lengths = np.array([len(c) for group in groups for c in group.completions])
    per_function = np.stack([group.rewards for group in groups], axis=1)  # (F, B, G)
    scored = trainer.totals[~np.isnan(trainer.totals)]
    record = {
        "epoch": round(trainer.cursor / len(trainer.rows), 4),
        "reward_mean": float(scored.mean()) if scored.size else None,
        "reward_std": float(scored.std()) if scored.size else None,
        **{f"rewards/{name}": nan_mean(r) for name, r in zip(names, per_function)},
        "completion_length_mean": float(lengths.mean()),
        "completion_length_max": int(lengths.max()),
        "truncated_fraction": float(np.mean([r == "length" for group in groups for r in group.finish_reasons])),
        "zero_signal_fraction": float(np.mean(~trainer.advantages.any(axis=1))),
        "prompts_drawn": prompts_drawn,
        "rollout_tokens_per_s": sampled / seconds["rollout"],
        "train_tokens_per_s": int(lengths.sum()) * trainer.config.num_iterations / seconds["train"],
        **{f"seconds/{phase}": value for phase, value in seconds.items()},
        "peak_memory_gb": mx.get_peak_memory() / 2**30,
        "total_tokens": trainer.tokens,
    }
    return record if trainer.reference else {"kl": 0.0, **record}


def machine_facts(memory: int) -> dict:
    """What the report says of the machine, the versions and the command. memory: the machine's, in bytes."""
    versions = {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm", "transformers")}
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), "chip": mx.device_info().get("device_name", "unknown"),
        "device": mx.default_device().type.name, "cores": os.cpu_count(), "memory_gb": round(memory / 2**30, 1),
        "platform": f"{platform.system()} {platform.machine()}", "python": platform.python_version(), **versions,
    }  # fmt: skip
