"""Checkpoints of a run: what an exact resume needs, on disk, and what may have changed when a run goes on."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_grpo.errors import RunError, UserError
from mlx_grpo.run.directory import checkpoints, remove_directory, remove_old_checkpoints, write_directory

MAY_CHANGE = {  # settings that a resumed run may have otherwise: where and how often it writes
    "output_dir", "run_name", "logging_steps", "log_jsonl", "log_completions_steps", "save_steps",
    "save_total_limit", "eval_steps", "eval_every_updates", "max_nan_updates", "max_flat_updates",
    "reward_timeout", "trust_remote_code", "report_to", "distributed_timeout", "check_weights_steps",
}  # fmt: skip
MAY_BE_SET = {  # and those that alter it, but only by --set: rate, lengths, and what makes it fit into memory
    "learning_rate", "num_epochs", "max_completion_length", "max_new_tokens", "micro_batch_tokens",
    "grad_checkpoint", "kv_budget_gb", "memory_limit_gb", "use_compile",
}  # fmt: skip
FAILED_SAVES = 3  # in a row that end a run


@dataclass
class Snapshot:
    """What lies in a checkpoint beside the model's own files."""

    state: dict  # the RunState
    config: dict  # settings
    logs: dict[str, int]  # bytes of each log file
    inputs: dict[str, str]  # digests of the data, the base model, the files of rewards
    weights: dict[str, mx.array]  # trainable arrays; empty when written: the model's files hold them
    optimizer: dict  # tree
    stale: dict[str, mx.array]  # what a stale sampler's copy was made of; empty where it is not


def write_snapshot(folder: Path, snapshot: Snapshot) -> None:
    mx.save_safetensors(str(folder / "optimizer.safetensors"), dict(tree_flatten(snapshot.optimizer)))
    if snapshot.stale:
        mx.save_safetensors(str(folder / "sampler.safetensors"), snapshot.stale)
    plain = {
        "config": snapshot.config,
        "logs": snapshot.logs,
        "inputs": snapshot.inputs,
        "state": snapshot.state,
    }
    (folder / "trainer_state.json").write_text(json.dumps(plain, indent=2))


def read_snapshot(folder: Path) -> Snapshot:
    """Raises UserError where it is none."""
    try:
        plain = json.loads((folder / "trainer_state.json").read_text())
        sizes = {name: int(size) for name, size in plain["logs"].items()}
        adapters, stale = folder / "adapters.safetensors", folder / "sampler.safetensors"
        weights = {}
        for file in [adapters] if adapters.is_file() else sorted(folder.glob("model*.safetensors")):
            weights |= mx.load(str(file))
        optimizer = tree_unflatten(list(mx.load(str(folder / "optimizer.safetensors")).items()))
        sampler = mx.load(str(stale)) if stale.is_file() else {}
        return Snapshot(
            dict(plain["state"]),
            dict(plain["config"]),
            sizes,
            dict(plain["inputs"]),
            weights,
            optimizer,
            sampler,
        )
    except (ValueError, TypeError, AttributeError, KeyError, OSError, RuntimeError):
        raise UserError(not_resumable(folder)) from None


def not_resumable(folder: Path) -> str:
    return (
        f"Cannot resume {folder}: it is not a checkpoint of this model, or of another version of this program"
    )


def changed_settings(then: dict, now: dict, asked: set[str], folder: Path) -> dict[str, list]:
    """[then, now] of each setting that has changed and may. Raises UserError for one that may not.

    asked: those given by --set.
    """
    changed = {
        name: [then.get(name), now[name]]
        for name in now
        if now[name] != then.get(name) and name not in MAY_CHANGE
    }
    if refused := [name for name in changed if name not in MAY_BE_SET or name not in asked]:
        raise UserError(f"Cannot resume {folder}: changed settings would alter the run: {', '.join(refused)}")
    return changed


def changed_inputs(then: dict, now: dict, accepted: bool, folder: Path) -> dict[str, list]:
    """[then, now] of the digest of each input that has changed. Raises UserError unless that is accepted."""
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if names and not accepted:
        raise UserError(
            f"Cannot resume {folder}: what the run reads has changed since: {', '.join(names)}. Put it back, "
            "or go on with it by --accept-changed-inputs"
        )
    return {name: [then.get(name), now.get(name)] for name in names}


class Checkpoints:
    """A run's checkpoint directories, each complete or absent: the newest `limit` (0: all), and the best."""

    def __init__(self, run_dir: Path, limit: int):
        self.run_dir, self.limit = run_dir, limit
        self.failures = 0  # in a row

    def write(self, update: int, best_update: int, write, may_fail: bool) -> None:
        """Make checkpoint-UPDATE by write(folder).

        Raises RunError where it fails, unless it may; the third time always.
        """
        target = self.run_dir / f"checkpoint-{update}"
        if target.exists():  # nothing has happened since
            return
        try:
            write_directory(target, write)
        except RunError as error:
            self.failures += 1
            if not may_fail or self.failures >= FAILED_SAVES:
                raise
            print(f"{error}; training goes on, the next save will try again", file=sys.stderr)
            return
        self.failures = 0
        remove_old_checkpoints(self.run_dir, self.limit, best_update)

    def set_aside_after(self, update: int, best_update: int) -> None:
        """Rename the checkpoints newer than `update`: damaged, or of a course that a resume leaves."""
        for newer in checkpoints(self.run_dir):
            if int(newer.name.rpartition("-")[2]) > update:
                aside = newer.with_name(f"superseded-{newer.name}")
                remove_directory(aside)
                newer.rename(aside)
                print(f"{newer} is now {aside.name}")
        remove_old_checkpoints(self.run_dir, self.limit, best_update)  # a kill may have come before
