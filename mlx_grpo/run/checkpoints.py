"""A trainer's whole state on disk: all that a run needs to go on as if there had been no stop."""

import dataclasses
import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_grpo.update.adapters import save_model
from mlx_grpo.errors import RunError, UserError
from mlx_grpo.run.directory import checkpoints, remove_directory, remove_old_checkpoints, write_directory

RESUMED_STATE = (
    "update", "cursor", "nan_updates", "entropy_coef", "last_entropy", "best", "best_update", "tokens",
    "quantize_rollouts", "before",
)  # fmt: skip
MAY_CHANGE = {  # settings that a resumed run may have otherwise: where and how often it writes
    "output_dir", "run_name", "logging_steps", "log_jsonl", "log_completions_steps", "save_steps", "save_total_limit", "eval_steps",
    "eval_every_updates", "max_nan_updates", "reward_timeout", "trust_remote_code", "report_to",
    "distributed_timeout", "check_weights_steps",
}  # fmt: skip
MAY_BE_SET = {  # and those that alter it, but only by --set: rate, lengths, and what makes it fit into memory
    "learning_rate", "num_epochs", "max_completion_length", "max_new_tokens", "micro_batch_tokens", "grad_checkpoint", "kv_budget_gb", "memory_limit_gb",
    "use_compile",
}  # fmt: skip


def write_model(trainer, folder: Path) -> None:
    """Write the policy as it is into `folder`."""
    save_model(folder, trainer.model, trainer.tokenizer, trainer.model_config, trainer.source, trainer.config)


def write_checkpoint(trainer) -> None:
    """Write checkpoint-UPDATE, with all that an exact resume needs; a failure is fatal only the third time in a row."""
    target = trainer.run_dir / f"checkpoint-{trainer.update}"
    if target.exists():  # nothing has happened since
        return

    def write(folder: Path) -> None:
        logs = trainer.logs.sync()
        write_model(trainer, folder)
        mx.save_safetensors(str(folder / "optimizer.safetensors"), dict(tree_flatten(trainer.optimizer.state)))
        if trainer.config.sync_every > 1:
            mx.save_safetensors(str(folder / "sampler.safetensors"), trainer.synced)
        state = {name: getattr(trainer, name) for name in RESUMED_STATE}
        state |= {"config": dataclasses.asdict(trainer.config), "logs": logs}
        (folder / "trainer_state.json").write_text(json.dumps(state, indent=2))

    try:
        write_directory(target, write)
    except RunError as error:
        trainer.failed_saves += 1
        if trainer.stop_signal or trainer.failed_saves >= 3:
            raise
        print(f"{error}; training goes on, the next save will try again", file=sys.stderr)
        return
    trainer.failed_saves = 0
    remove_old_checkpoints(trainer.run_dir, trainer.config.save_total_limit, trainer.best_update)


def read_checkpoint(trainer, folder: Path, asked: set[str]) -> None:
    """Take over what a checkpoint holds, and set aside what the run wrote after it.

    Raises UserError where other settings have changed, or where the checkpoint is not this model's.
    """
    try:
        state = json.loads((folder / "trainer_state.json").read_text())
        then, sizes = dict(state["config"]), {name: int(size) for name, size in state["logs"].items()}
        adapters, stale = folder / "adapters.safetensors", folder / "sampler.safetensors"
        weights = {}
        for file in [adapters] if adapters.is_file() else sorted(folder.glob("model*.safetensors")):
            weights |= mx.load(str(file))
        optimizer = tree_unflatten(list(mx.load(str(folder / "optimizer.safetensors")).items()))
        fits = all(type(state[name]) is type(getattr(trainer, name)) for name in RESUMED_STATE)
        fits = fits and all(weights[name].shape == old.shape for name, old in trainer.trainable().items())
    except (ValueError, TypeError, AttributeError, KeyError, OSError, RuntimeError):
        fits = False
    if not fits:
        raise UserError(f"Cannot resume {folder}: it is not a checkpoint of this model, or of another version of this program")
    now = dataclasses.asdict(trainer.config)
    changed = {k: [then.get(k), now[k]] for k in now if now[k] != then.get(k) and k not in MAY_CHANGE}
    if refused := [k for k in changed if k not in MAY_BE_SET or k not in asked]:
        raise UserError(f"Cannot resume {folder}: changed settings would alter the run: {', '.join(refused)}")
    trainer.model.load_weights(list(weights.items()), strict=False)
    trainer.optimizer.state = optimizer
    for name in RESUMED_STATE:
        setattr(trainer, name, state[name])
    trainer.refresh_sampler(mx.load(str(stale)) if stale.is_file() else None)
    for newer in checkpoints(trainer.run_dir):  # damaged, or of a course that this resume leaves
        if int(newer.name.rpartition("-")[2]) > trainer.update:
            remove_directory(newer.with_name(f"superseded-{newer.name}"))
            newer.rename(newer.with_name(f"superseded-{newer.name}"))
            print(f"{newer} is now superseded-{newer.name}")
    remove_old_checkpoints(trainer.run_dir, trainer.config.save_total_limit, trainer.best_update)  # a kill may have come before
    trainer.logs.cut(sizes)
    if changed:
        trainer.log("training_log", {"event": "resume", "update": trainer.update, "changed": changed})
