"""`benchmark.py learn`: this trainer and a peer from one start, on the same prompts, by the same rewards."""

import argparse
import dataclasses
import gc
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx_grpo
import numpy as np
from mlx.utils import tree_flatten

from peers import Peer, PeerCrashed

SAME = """
temperature top_p top_k repetition_penalty max_completion_length num_generations num_iterations
gradient_accumulation_steps loss_type importance_sampling_level scale_rewards multi_objective_aggregation
mask_truncated_completions delta use_bias_correction_kl top_entropy_quantile entropy_coef
use_adaptive_entropy entropy_target entropy_coef_delta entropy_coef_min entropy_coef_max vespo_k_pos
vespo_lambda_pos vespo_k_neg vespo_lambda_neg off_policy_mask_threshold sapo_temperature_pos
sapo_temperature_neg learning_rate lr_scheduler_type adam_beta1 adam_beta2 weight_decay max_grad_norm
"""
BOTH_HAVE = {
    **{name: name for name in SAME.split()},
    "clip_eps": "epsilon",
    "clip_eps_high": "epsilon_high",
    "kl_coeff": "beta",
}
# Settings that reach the peer another way, or that do not change what is learnt.
HANDLED = """
model_name trust_remote_code fine_tune_type dataset dataset_config eval_dataset eval_fraction prompt_field
answer_field max_train_samples max_prompt_length system_prompt completion_prefix reward_funcs reward_weights
reward_timeout batch_size min_p stop_strings memory_limit_gb kv_budget_gb warmup_ratio num_epochs
micro_batch_tokens grad_checkpoint max_nan_updates use_compile eval_steps eval_samples eval_every_updates
eval_subset_size eval_max_new_tokens output_dir run_name logging_steps log_jsonl log_completions_steps
report_to save_steps save_total_limit seed distributed_timeout check_weights_steps
""".split()


@dataclass
class Course:
    """One program's training from one seed. A turn is a rollout with the updates on it."""

    seconds: list[float] = field(default_factory=list)  # of each turn
    files: dict[int, Path] = field(default_factory=dict)  # turns done -> the weights then
    scores: dict[int, float] = field(default_factory=dict)  # turns done -> held-out reward
    crashed: bool = False

    def best(self) -> float:
        return max(self.scores.values())

    def seconds_to(self, level: float) -> float | str:
        """Training seconds before the first evaluation of at least `level`, or why there are none."""
        for turns, score in sorted(self.scores.items()):
            if score >= level:
                return sum(self.seconds[:turns])
        return "crashed" if self.crashed else "not reached"


class HeldOut:
    """Scores weights on the held-out rows: the mean reward of greedy answers, by the run's own functions."""

    def __init__(self, trainer):
        self.config = trainer.config
        self.tokenizer = trainer.tokenizer
        self.functions = trainer.reward_functions
        self.weights = trainer.reward_weights
        self.rows = trainer.eval_rows["test"]

    def rewards(self, rows: list[dict], ids: list[list[int]]) -> np.ndarray:
        """Rewards (F, N) of N completions of these rows' prompts, NaN where a function abstained."""
        completions = []
        for row, one in zip(rows, ids):
            primed = mlx_grpo.primed_text(self.tokenizer, row["prompt_ids"], self.config.completion_prefix)
            text = primed + mlx_grpo.completion_text(self.tokenizer, one)
            completions.append(mlx_grpo.Completion(one, [], [1] * len(one), "", text))
        return self.scored(rows, completions, self.config.max_completion_length)

    def scored(self, rows: list[dict], completions: list, limit: int) -> np.ndarray:
        """Rewards (F, N) of N completions of these rows' prompts, of at most `limit` ids."""
        groups = [mlx_grpo.Group(row, row["prompt_ids"], [one]) for row, one in zip(rows, completions)]
        mlx_grpo.score_groups(groups, self.functions, self.config.reward_timeout, limit)
        return np.array([one.rewards for one in completions]).T

    def open(self) -> None:
        """The model as both programs start from it."""
        self.model = mlx_grpo.open_model(
            self.config.model_name, trust_remote_code=self.config.trust_remote_code
        )[0]
        self.model.eval()

    def load(self, file: Path, is_peers: bool) -> None:
        """Take over saved weights, rounded to the precision of the model's own."""
        weights = mx.load(str(file))
        if is_peers and hasattr(self.model, "sanitize"):  # transformers' names to mlx-lm's
            weights = self.model.sanitize(weights)
        now = dict(tree_flatten(self.model.parameters()))
        self.model.load_weights([(name, value.astype(now[name].dtype)) for name, value in weights.items()])

    def score(self) -> float:
        config = self.config
        limit = config.eval_max_new_tokens or config.max_completion_length
        completions = mlx_grpo.generate(
            self.model, self.tokenizer, [row["prompt_ids"] for row in self.rows],
            sampling=mlx_grpo.Sampling(temperature=0.0),
            max_new_tokens=limit,
            stop_strings=config.stops,
            prefix=config.completion_prefix,
            kv_budget=int(config.kv_budget_gb * 2**30),
            most_rows=max(mlx_grpo.EVALUATION_ROWS, config.batch_size * config.num_generations),
        )  # fmt: skip
        rewards = self.scored(self.rows, completions, limit)
        return float(np.nansum(rewards * np.array(self.weights)[:, None]) / len(self.rows))

    def evaluate(self, own: Course, theirs: Course) -> None:
        """Fill in the scores of both, after the training: it costs neither of them a second."""
        self.open()
        before = self.score()
        for course in (own, theirs):
            course.scores[0] = before
            for turns, file in course.files.items():
                self.load(file, course is theirs)
                course.scores[turns] = self.score()
                file.unlink()


def learner(args: argparse.Namespace, seed: int, folder: Path):
    """A trainer of the configuration, ready to begin, and the rows it will draw, in order."""
    settings = ["log_completions_steps=0", "log_jsonl=false", *args.set, f"seed={seed}"]
    config = mlx_grpo.load_config(args.config, settings)
    if config.fine_tune_type not in ("auto", "full"):
        raise mlx_grpo.UserError(
            f"learn trains every weight, in the peer too; set fine_tune_type to full instead of "
            f"{config.fine_tune_type}"
        )
    if args.updates and args.updates % config.num_iterations:
        raise mlx_grpo.UserError(f"--updates must be a multiple of num_iterations ({config.num_iterations})")
    trainer = mlx_grpo.MLXGRPOTrainer(config, folder)
    trainer.updates = args.updates or trainer.updates
    count = trainer.updates // config.num_iterations * config.prompts_per_update
    return trainer, [row for _, row in mlx_grpo.draw_rows(trainer.rows, config.seed, 0, count)]


def evaluation_turns(config, turns: int) -> list[int]:
    """The turns after which the weights are kept: every eval_steps updates, and the last."""
    every = math.ceil(config.eval_steps / config.num_iterations) or turns
    return sorted({*range(every, turns, every), turns})


def show_progress(program: str, turn: int, turns: int, seconds: list[float]) -> None:
    print(
        f"{program}: rollout {turn} of {turns} and its updates done, {sum(seconds):.1f} s",
        file=sys.stderr,
        flush=True,
    )


def learn_here(trainer, folder: Path) -> Course:
    """This trainer's course; its loop, less evaluations and saves."""
    course = Course()
    turns = trainer.updates // trainer.config.num_iterations
    keep = evaluation_turns(trainer.config, turns)
    for turn in range(1, turns + 1):
        start = time.perf_counter()
        trainer.train_step()
        course.seconds.append(time.perf_counter() - start)
        if turn in keep:
            course.files[turn] = folder / f"own-{turn}.safetensors"
            mx.save_safetensors(str(course.files[turn]), dict(tree_flatten(trainer.model.parameters())))
            show_progress("this trainer", turn, turns, course.seconds)
    return course


def peer_settings(config, updates: int) -> dict:
    """The configuration in TRL's words."""
    settings = {theirs: getattr(config, ours) for ours, theirs in BOTH_HAVE.items()}
    settings |= {"min_p": config.min_p or None, "seed": config.seed, "max_steps": updates}
    settings["warmup_steps"] = math.ceil(config.warmup_ratio * updates)
    settings["per_device_train_batch_size"] = config.batch_size * config.num_generations
    settings["generation_kwargs"] = {"stop_strings": config.stops} if config.stops else {}
    return settings


def not_in_peer(config) -> list[str]:
    """The settings in force that the peer has no counterpart of."""
    fields = dataclasses.fields(config)
    defaults = {
        f.name: f.default_factory() if f.default is dataclasses.MISSING else f.default for f in fields
    }
    return [
        name
        for name, value in defaults.items()
        if getattr(config, name) != value and name not in BOTH_HAVE and name not in HANDLED
    ]


def answer(peer: Peer, held_out: HeldOut, rows: list[dict], message: dict) -> dict:
    """The peer's next message that does not ask for rewards."""
    while "ids" in message:
        rewards = held_out.rewards([rows[i] for i in message["rows"]], message["ids"])
        message = peer.ask(rewards.tolist())
    return message


def learn_there(
    args: argparse.Namespace, held_out: HeldOut, rows: list[dict], updates: int, folder: Path
) -> Course:
    """The peer's course, on the same `rows` in the same order, with the trainer's settings and rewards."""
    config = held_out.config
    course = Course()
    mu = config.num_iterations
    keep = evaluation_turns(config, updates // mu)
    work = {
        "ids": [row["prompt_ids"] for row in rows],
        "rewards": len(held_out.functions),
        "save_at": [mu * turn for turn in keep],
    }
    settings = peer_settings(config, updates) | {"reward_weights": held_out.weights}
    peer = Peer(args, config, folder, settings=settings, **work)
    try:
        for turn in range(1, updates // mu + 1):
            course.seconds.append(sum(answer(peer, held_out, rows, peer.ask())["step"] for _ in range(mu)))
            if turn in keep:
                course.files[turn] = Path(peer.read()["saved"])
                show_progress(args.peer, turn, updates // mu, course.seconds)
    except PeerCrashed as crash:
        crash.show()
        course.crashed = True
    finally:
        peer.close()
    return course


def learn_once(args: argparse.Namespace, seed: int, folder: Path) -> tuple[Course, Course]:
    """Both courses of one seed, with their scores."""
    trainer, rows = learner(args, seed, folder)
    updates = trainer.updates
    held_out = HeldOut(trainer)
    if missing := not_in_peer(trainer.config):
        print(
            f"{args.peer} has no counterpart of {', '.join(missing)}: only this trainer uses them",
            file=sys.stderr,
        )
    own = learn_here(trainer, folder)
    del trainer
    gc.collect()  # a trainer and its compiled step refer to each other
    mx.clear_cache()
    theirs = learn_there(args, held_out, rows, updates, folder)
    held_out.evaluate(own, theirs)
    return own, theirs
