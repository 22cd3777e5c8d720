#!/usr/bin/env python3
"""Measure the trainer: what each objective learns, a step's speed and memory, and peers on the same work.

objectives trains the starter once a variant and seed and prints held-out accuracy. learn trains any
configuration beside TRL and prints what both reach on held-out prompts, and when. rollout, train and step run
a GRPO step or a part of it: new prompts each turn, and completions that end at lengths drawn as models end
them, the same for every peer. memory measures an update's peak.
"""

import argparse
import contextlib
import functools
import gc
import json
import math
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import NormalDist, fmean, median

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.toml"
sys.path[:0] = [str(ROOT), str(ROOT / "utils")]
from mlx_grpo.backends import use_fast_backend  # noqa: E402

if __name__ == "__main__":
    use_fast_backend()  # ahead of MLX: the first BLAS that is loaded is the one that it uses

from inference import Parser, exit_status  # noqa: E402
import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx_grpo  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_grpo.backends.blas import blas_name  # noqa: E402
from mlx_grpo.rollout.kv_cache import kv_bytes_per_token  # noqa: E402
from mlx_grpo.run.directory import complete_or_absent  # noqa: E402
from mlx_grpo.run.memory_plan import plan  # noqa: E402
from peers import PEERS, SPEEDS, Peer, PeerCrashed, cache_folder  # noqa: E402
from peers.learning import Course, learn_once  # noqa: E402

EXAMPLES = """examples:
  uv run python utils/benchmark.py objectives --updates 32 --seeds 0,1,2 --parallel 2
  uv run python utils/benchmark.py step --preset tiny --peer trl
  uv run python utils/benchmark.py learn --config configs/quickstart.toml --seeds 0,1,2"""

# --- Objectives ---------------------------------------------------------------------------------------------

# With one update a rollout the ratio is 1, and grpo, sapo and GSPO are one gradient, as are bnpo, dapo, cispo
# and vespo: the loss types are told apart where a rollout is used several times.
REUSE = ("num_iterations=4",)
VARIANTS = {  # name: settings over configs/quickstart.toml
    "grpo": REUSE,
    "bnpo": (*REUSE, "loss_type=bnpo"),
    "dr_grpo": (*REUSE, "loss_type=dr_grpo", "scale_rewards=none"),
    "dapo": (*REUSE, "loss_type=dapo", "clip_eps_high=0.28"),
    "cispo": (*REUSE, "loss_type=cispo", "clip_eps_high=5"),
    "sapo": (*REUSE, "loss_type=sapo"),
    "luspo": (*REUSE, "loss_type=luspo", "importance_sampling_level=sequence"),
    "vespo": (*REUSE, "loss_type=vespo"),
    "gmpo": (*REUSE, "loss_type=gmpo", "clip_eps=0.4"),
    "gspo": (*REUSE, "importance_sampling_level=sequence"),
    "on-policy": (),
    "rloo": ("advantage_estimator=rloo",),
    "reinforce++": ("advantage_estimator=reinforce_plus_plus_baseline",),
    "maxrl": ("advantage_estimator=maxrl",),
    "2-grpo": ("num_generations=2", "batch_size=32"),
    "iterations-2": ("num_iterations=2",),
    "sync-every-4": ("sync_every=4",),
    "4-bit-rollouts": ("quantize_for_rollouts=true", "group_size=32"),
    "dynamic-sampling": ("dynamic_sampling_max_batches=3",),
    "lora": ("fine_tune_type=lora", "learning_rate=1e-3"),  # adapters want a larger rate
}


def starter_problems() -> list[str]:
    with open(ROOT / "starter" / "data" / "train.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["question"] for line in file]


def length_settings(config, rollouts: int) -> list[str]:
    """Settings over `config` that make a run on the starter's problems so many rollouts long."""
    prompts = rollouts * config.batch_size * config.gradient_accumulation_steps
    rows = min(prompts, len(starter_problems()))
    # The half keeps a quotient that rounding made too small from costing a rollout.
    return [f"max_train_samples={rows}", f"num_epochs={(prompts + 0.5) / rows}"]


def objective_command(
    variant: str, seed: int, updates: int, output: Path, extra: list[str]
) -> tuple[Path, list[str]]:
    """The run directory of one run and the command that fills it."""
    name = f"{variant}-seed{seed}"
    settings = [
        "eval_samples=0",
        "log_completions_steps=0",
        "logging_steps=10",
        f"seed={seed}",
        *VARIANTS[variant],
        *extra,
    ]
    config = mlx_grpo.load_config(QUICKSTART, settings)
    rollouts = math.ceil(updates / config.num_iterations)
    settings += [f"output_dir={output}", f"run_name={name}", *length_settings(config, rollouts)]
    settings += [f"eval_steps={max(1, rollouts * config.num_iterations // 2)}"]
    command = ["mlx-grpo.py", "--config", "configs/quickstart.toml"]
    return output / name, command + [part for setting in settings for part in ("--set", setting)]


def is_complete(folder: Path, command: list[str]) -> bool:
    """Whether `folder` holds the finished run of just this command."""
    record = folder / "command.json"
    return (folder / "final").is_dir() and record.is_file() and json.loads(record.read_text()) == command


def train_variant(folder: Path, command: list[str], threads: int) -> str:
    """Run one training unless it is done already; the last line it printed where it failed, else ""."""
    if is_complete(folder, command):
        return ""
    if folder.exists():
        if not (folder / "command.json").is_file():
            return f"{folder} is not a benchmark's; choose another --output"
        shutil.rmtree(folder)  # cut short, or made with other settings
    folder.mkdir(parents=True)
    (folder / "command.json").write_text(json.dumps(command))
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    with open(folder / "output.txt", "w+", encoding="utf-8") as output:
        status = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **limits},
            stdout=output,
            stderr=output,
            check=False,
        ).returncode
        output.seek(0)
        lines = output.read().split("\n")
    return next((line for line in reversed(lines) if line.strip()), f"status {status}") if status else ""


def read_run(folder: Path) -> dict:
    """One run's figures: exact match before, half-way and after (%), the last rewards, seconds an update."""
    records = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    scores = [100 * r["em_strict"] for r in records if r.get("event") == "eval" and r["split"] == "test"]
    updates = [r for r in records if "event" not in r]
    phases = {
        tuple(r[f"seconds/{phase}"] for phase in ("rollout", "reward", "train")) for r in updates
    }  # once a rollout
    return {
        "before": scores[0],
        "half": scores[1] if len(scores) > 2 else math.nan,
        "after": scores[-1],
        "reward": fmean(r["reward_mean"] for r in updates[-5:]),
        "seconds": median(map(sum, phases)) * len(phases) / len(updates),  # the median leaves compilation out
    }


def spread(values: list[float], digits: int) -> str:
    """The mean of the seeds with their range: [1, 2, 6] -> "3 (1-6)"; "-" where one has no value."""
    if any(map(math.isnan, values)):
        return "-"
    mean, low, high = (f"{x:.{digits}f}" for x in (fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low}-{high})"


def objectives_table(results: dict[str, list[dict]]) -> list[list[str]]:
    """Rows of the table, one a variant, from its runs."""
    header = ["variant", "before, %", "half-way, %", "after, %", "reward, last 5", "s/update"]
    columns = (("before", 1), ("half", 1), ("after", 1), ("reward", 2))
    return [header] + [
        [
            name,
            *(spread([r[key] for r in runs], digits) for key, digits in columns),
            f"{fmean(r['seconds'] for r in runs):.2f}",
        ]
        for name, runs in results.items()
    ]


def objectives(args: argparse.Namespace) -> None:
    output = Path(args.output).resolve()
    runs = {
        (v, s): objective_command(v, s, args.updates, output, args.set)
        for s in args.seeds
        for v in args.variants
    }
    done = sum(is_complete(*run) for run in runs.values())
    threads = max(1, (os.cpu_count() or 1) // args.parallel)
    print(
        f"{len(runs)} runs, {done} done already, {args.parallel} at a time; each in {output}/VARIANT-seedN",
        flush=True,
    )
    failures = []
    with ThreadPoolExecutor(args.parallel) as pool:
        try:
            pending = {pool.submit(train_variant, *run, threads): key for key, run in runs.items()}
            for future, (variant, seed) in pending.items():
                if problem := future.result():
                    failures.append(f"{variant}, seed {seed}: {problem}")
                    print(f"failed: {failures[-1]}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    results = {
        v: [read_run(runs[v, s][0]) for s in args.seeds if is_complete(*runs[v, s])] for v in args.variants
    }
    print(
        f"\nHeld-out exact match of the starter, {args.updates} updates, mean of seeds {args.seeds} (range)\n"
        f"{machine()}\n"
    )
    print_table(objectives_table({name: found for name, found in results.items() if found}))
    if failures:
        raise mlx_grpo.RunError(
            f"{len(failures)} of {len(runs)} runs failed; their output.txt says why, "
            "the same command tries again"
        )


# --- The work -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A Qwen2 model's dimensions; heads are 64 wide but for 1.5b's 128, the embedding is the head."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    wide: int
    vocabulary: int


PRESETS = {
    "tiny": Shape(256, 4, 4, 2, 704, 4096),
    "small": Shape(512, 8, 8, 2, 1408, 8192),
    "0.5b": Shape(896, 24, 14, 2, 4864, 151936),
    "1.5b": Shape(1536, 28, 12, 2, 8960, 151936),
}


def on_gpu() -> bool:
    return mx.default_device() == mx.gpu


def model_folder(preset: str) -> Path:
    """A cached model directory of this shape: random weights and the starter's tokenizer."""
    from mlx_lm.models import qwen2

    shape = PRESETS[preset]
    dtype = "bfloat16" if on_gpu() else "float32"
    folder = cache_folder() / f"{preset}-{dtype}"
    if folder.is_dir():
        return folder
    config = {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": shape.hidden, "intermediate_size": shape.wide, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": True, "torch_dtype": dtype, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    mx.random.seed(0)
    model = qwen2.Model(qwen2.ModelArgs.from_dict(config))
    model.set_dtype(getattr(mx, dtype))

    with complete_or_absent(folder) as aside:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / "starter" / "model" / file, aside)
        (aside / "config.json").write_text(json.dumps(config))
        mx.save_safetensors(
            str(aside / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "pt"}
        )
    return folder


def prompt_lengths(args: argparse.Namespace, count: int) -> list[int]:
    """Tokens of each prompt: two thirds of --prompt-tokens to all of it, or just that with fixed lengths."""
    if args.lengths == "fixed":
        return [args.prompt_tokens] * count
    draws = random.Random(f"{args.seed}/prompts")
    return [draws.randint(2 * args.prompt_tokens // 3, args.prompt_tokens) for _ in range(count)]


def completion_sigma(args: argparse.Namespace) -> float:
    """Of the log-normal distribution with --median that exceeds --tokens with the probability --cut."""
    return math.log(args.tokens / args.median) / NormalDist().inv_cdf(1 - args.cut)


def completion_lengths(args: argparse.Namespace, turn: int) -> list[int]:
    """Tokens of each completion of a turn, rows of a prompt together: log-normal, and cut at --tokens.

    A row's length depends on --seed, the turn, its prompt and its place in the group alone: every program
    does the same work.
    """
    if args.lengths == "fixed":
        return [args.tokens] * (args.prompts * args.completions)
    lengths = []
    for prompt in range(args.prompts):
        draws = random.Random(f"{args.seed}/{turn}/{prompt}")
        drawn = [
            draws.lognormvariate(math.log(args.median), completion_sigma(args))
            for _ in range(args.completions)
        ]
        lengths += [min(args.tokens, math.ceil(length)) for length in drawn]
    return lengths


def questions(tokenizer, lengths: list[int]) -> list[str]:
    """Word problems joined and cut so that prompts have just these lengths, in tokens. Raises UserError."""
    words = " ".join(starter_problems()).split()
    template = len(mlx_grpo.build_prompt(tokenizer, ""))
    found = []
    start = 0
    while len(found) < len(lengths):
        wanted = lengths[len(found)]
        if template >= wanted or start + wanted > len(words):
            raise mlx_grpo.UserError(
                f"No {len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens could be made; "
                f"change --prompt-tokens (the chat template alone takes {template})"
            )

        def tokens(n: int) -> int:  # called in this round only, so `start` is this round's
            return len(mlx_grpo.build_prompt(tokenizer, " ".join(words[start : start + n])))  # noqa: B023

        n = bisect_right(range(1, wanted + 1), wanted, key=tokens)  # no word is less than a token
        if n and tokens(n) == wanted:
            found.append(" ".join(words[start : start + n]))
            start += n
        else:
            start += 1
    return found


REWARDS = (
    "def alternate(completions, **kwargs):\n    return [float(i % 2) for i in range(len(completions))]\n"
)


def write_work(folder: Path, texts: list[str]) -> None:
    """A dataset of these questions and a reward function, into `folder`."""
    rows = [json.dumps({"question": text, "answer": "#### 1"}) for text in texts]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "rewards.py").write_text(REWARDS)


def prepare(args: argparse.Namespace, folder: Path, settings: list[str], turns: int):
    """Our trainer for the work in `args`, with prompts for so many turns; `folder` gets its files."""
    from mlx_lm.utils import load_tokenizer

    model = args.model or model_folder(args.preset)
    tokenizer = load_tokenizer(mlx_grpo.resolve_model(str(model)))
    write_work(folder, questions(tokenizer, prompt_lengths(args, turns * args.prompts)))
    config = mlx_grpo.load_config(None, [
        f"model_name={model}", f"dataset={folder}", f"reward_funcs=['{folder}/rewards.py:alternate']",
        "system_prompt=", f"batch_size={args.prompts}", f"num_generations={args.completions}",
        f"max_completion_length={args.tokens}", f"max_prompt_length={args.prompt_tokens}",
        "stop_strings=[]", "num_epochs=1000", "lr_scheduler_type=constant",
        "log_completions_steps=0", "log_jsonl=false", *settings,
    ])  # fmt: skip
    trainer = mlx_grpo.MLXGRPOTrainer(config, folder)
    trainer.tokenizer.eos_token_ids = set()  # a row ends where it is to end, whatever the model draws
    return trainer


@contextlib.contextmanager
def rows_ending_at(lengths: list[int]):
    """Within it the rows that `generate` decodes end at these lengths, in order, as if by the model."""
    script = mlx_grpo.script
    due = iter(lengths)
    rows = []
    plain = script.Row

    class Ending(plain):
        def __init__(self, tokenizer, stop_strings, max_tokens, primed=""):
            super().__init__(tokenizer, stop_strings, next(due), primed)
            self.limit = max_tokens
            rows.append(self)

        def take(self, ids, logps):
            super().take(ids, logps)
            if self.finish_reason == "length" and len(self.ids) < self.limit:
                self.finish_reason = "eos"

    script.Row = Ending
    try:
        yield
    finally:
        script.Row = plain
    check_tokens("this trainer", sum(len(row.ids) for row in rows), lengths)


def check_tokens(program: str, tokens: int, lengths: list[int]) -> None:
    """Raises RunError where a program has not done the work it was given."""
    if tokens != sum(lengths):
        raise mlx_grpo.RunError(
            f"{program} sampled {tokens} tokens where {sum(lengths)} were asked for; "
            "its figures would mean nothing"
        )


def own_turn(args: argparse.Namespace, trainer, lengths: list[int]) -> dict:
    """Do one turn's work; the seconds of its phases."""
    watch = mlx_grpo.Stopwatch()
    with rows_ending_at(lengths):
        start = time.perf_counter()
        if args.command == "step":
            record = trainer.train_step()[-1]
            whole = time.perf_counter() - start
            parts = {phase: record[f"seconds/{phase}"] for phase in ("rollout", "train")}
            return {**parts, "other": whole - sum(parts.values()), "step": whole}
        groups = trainer.rollout(args.prompts, watch)
    if args.command == "rollout":
        return {"rollout": watch.seconds["rollout"]}
    _, advantages = trainer.advantages(groups)
    start = time.perf_counter()
    trainer.train_on(groups, advantages)
    return {"train": time.perf_counter() - start}


# --- The machine --------------------------------------------------------------------------------------------


def machine() -> str:
    """Versions and hardware, in one line."""
    name = mx.device_info().get("device_name") if on_gpu() else platform.processor()
    if not on_gpu() and Path("/proc/cpuinfo").is_file():
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else platform.machine()
    blas = f", {Path(blas_name()).name}" if blas_name() and not on_gpu() else ""
    return (
        f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}, Python {platform.python_version()}; "
        f"{name}, {os.cpu_count()} CPU cores{blas}"
    )


def warn_if_busy() -> None:
    if os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1):
        print(
            f"load average {os.getloadavg()[0]:.1f}: other programs are running, "
            "and every figure below may be off",
            file=sys.stderr,
        )


def best_seconds(function, repeats: int = 5) -> float:
    """The fastest of several runs, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        mx.eval(function())
        times.append(time.perf_counter() - start)
    return min(times[1:])


def ceilings(side: int = 0, megabytes: int = 0) -> tuple[float, float]:
    """What the device reaches: FLOP/s of a square matrix product, bytes/s of reading and writing an array."""
    side = side or (8192 if on_gpu() else 1536)
    megabytes = megabytes or (2048 if on_gpu() else 256)
    a = mx.random.normal((side, side)).astype(mx.bfloat16 if on_gpu() else mx.float32)
    large = mx.zeros(megabytes * 2**18)
    mx.eval(a, large)
    return 2 * side**3 / best_seconds(lambda: a @ a), 2 * large.nbytes / best_seconds(lambda: large + 1)


def costs(model, turns: list[tuple[list[int], list[int]]]) -> dict[str, tuple[float, float]]:
    """By phase, the least FLOPs and bytes of these turns: a group's prompt once, attention not counted.

    turns: the prompts' lengths and the completions'. The rollout reads every weight once a position, as long
    as a row is left, and each row's KV once a position of its own. Training is three times a forward; its
    bytes are few.
    """
    parameters = [p for _, p in tree_flatten(model.parameters())]
    count, weights = sum(p.size for p in parameters), sum(p.nbytes for p in parameters)
    positions = steps = read = 0
    for prompts, lengths in turns:
        group = len(lengths) // len(prompts)
        positions += sum(prompts) + sum(lengths)
        steps += max(lengths)
        read += sum(n * (prompts[i // group] + n / 2) for i, n in enumerate(lengths))  # positions of KV
    moved = steps * weights + read * kv_bytes_per_token(model)
    return {"rollout": (2 * count * positions, moved), "train": (6 * count * positions, math.nan)}


def print_table(rows: list[list[str]]) -> None:
    """A Markdown table; the first row is its header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for first, *others in (rows[0], rule, *rows[1:]):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]
        print(f"| {' | '.join(cells)} |", flush=True)


# --- Learning beside a peer ---------------------------------------------------------------------------------


def over_seeds(values: list[float | str], digits: int) -> str:
    """Mean and range over the seeds, and how many have none: [1.0, "crashed"] -> "1.0, 1 of 2 crashed"."""
    numbers = [value for value in values if not isinstance(value, str)]
    said = [spread(numbers, digits)] if numbers else []
    for word, count in Counter(value for value in values if isinstance(value, str)).items():
        said.append(word if count == len(values) else f"{count} of {len(values)} {word}")
    return ", ".join(said)


def level_to_reach(courses: tuple[Course, ...], target: float | None) -> float:
    """The held-out reward to reach: `target`, else the highest that all uncrashed courses reach."""
    return target if target is not None else min(course.best() for course in courses if not course.crashed)


def seconds_an_update(course: Course, updates: int) -> float | str:
    """The median, without the first turn; `updates` a turn."""
    return "crashed" if course.crashed else median(course.seconds[1:] or course.seconds) / updates


def learn_table(
    courses: list[tuple[Course, Course]], peer: str, updates: int, target: float | None
) -> list[list[str]]:
    """Rows of the table from each seed's courses, this trainer's and the peer's. updates: on each rollout."""
    levels = [level_to_reach(pair, target) for pair in courses]
    last = [[course.scores[max(course.scores)] for course in pair] for pair in courses]
    rows = {
        "held-out reward before": ([[course.scores[0] for course in pair] for pair in courses], 3),
        "held-out reward after": (
            [["crashed" if c.crashed else x for c, x in zip(*both)] for both in zip(courses, last)],
            3,
        ),
        f"seconds to {spread(levels, 3)}": (
            [[c.seconds_to(level) for c in pair] for pair, level in zip(courses, levels)],
            1,
        ),
        "seconds of all updates": (
            [["crashed" if c.crashed else sum(c.seconds) for c in pair] for pair in courses],
            1,
        ),
        "seconds an update, median": ([[seconds_an_update(c, updates) for c in pair] for pair in courses], 3),
        "seconds of the first update": (
            [[c.seconds[0] if c.seconds else "crashed" for c in pair] for pair in courses],
            1,
        ),
    }
    table = [["", "this trainer", peer, "ratio"]]
    for name, (pairs, digits) in rows.items():
        ratios = [
            theirs / own
            for own, theirs in pairs
            if not isinstance(own, str) and not isinstance(theirs, str) and own
        ]
        ratio = spread(ratios, 2) if ratios and name.startswith("seconds") else "-"
        table.append([name, *(over_seeds(list(program), digits) for program in zip(*pairs)), ratio])
    return table


def curve_table(courses: list[tuple[Course, Course]], peer: str, updates: int) -> list[list[str]]:
    """Both programs' held-out reward by update, and the seconds until then. updates: on each rollout."""
    table = [["updates", "this trainer, s", "held-out", f"{peer}, s", "held-out"]]
    for turns in sorted(courses[0][0].scores):
        cells = []
        for program in zip(*courses):
            there = [turns in course.scores for course in program]
            seconds = [sum(c.seconds[:turns]) if has else "crashed" for c, has in zip(program, there)]
            scores = [c.scores[turns] if has else "crashed" for c, has in zip(program, there)]
            cells += [over_seeds(seconds, 1), over_seeds(scores, 3)]
        table.append([str(turns * updates), *cells])
    return table


def learn(args: argparse.Namespace) -> None:
    """The configuration trained by this trainer and then by the peer, once a seed."""
    warn_if_busy()
    courses = []
    config = mlx_grpo.load_config(args.config, args.set)
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as name:
            courses.append(learn_once(args, seed, Path(name)))
        own, theirs = (f"{sum(c.seconds):.1f} s, held-out {c.scores[max(c.scores)]:.3f}" for c in courses[-1])
        print(
            f"seed {seed}: this trainer {own}; {args.peer} {'crashed' if courses[-1][1].crashed else theirs}",
            flush=True,
        )
    turns = len(courses[0][0].seconds)
    target = "the highest that both come to" if args.target is None else args.target
    print(
        f"\n{Path(args.config).name}, {config.model_name}: {turns * config.num_iterations} updates of "
        f"{config.batch_size} prompts x {config.num_generations} completions; "
        f"mean of seeds {args.seeds} (range). Held-out: mean reward of greedy answers, by one "
        f"evaluator, not in the seconds. The reward to reach is {target}\n{machine()}\n"
    )
    print_table(learn_table(courses, args.peer, config.num_iterations, args.target))
    print()
    print_table(curve_table(courses, args.peer, config.num_iterations))
    if crashed := sum(theirs.crashed for _, theirs in courses):
        raise mlx_grpo.RunError(
            f"{args.peer} crashed in {crashed} of {len(courses)} runs; the last lines of its log are above"
        )


# --- The commands -------------------------------------------------------------------------------------------


def describe_work(args: argparse.Namespace, trainer, lengths: list[list[int]]) -> str:
    """What is measured and where; lengths: of the completions of each turn."""
    parameters = [p for _, p in tree_flatten(trainer.model.parameters())]
    dtype = str(parameters[0].dtype).rpartition(".")[2]
    size = f"{sum(p.size for p in parameters) / 1e6:.1f}M parameters, {dtype}"
    prompts, completions = f"{args.prompt_tokens} tokens", f"{args.tokens} tokens"
    if args.lengths == "natural":
        prompts = f"{2 * args.prompt_tokens // 3} to {prompts}, new ones each turn,"
        completions = (
            f"at most {completions} (log-normal, median {args.median}, sigma {completion_sigma(args):.2f}, "
            f"{args.cut:.0%} cut at the limit, seed {args.seed}; mean {fmean(sum(lengths, [])):.1f})"
        )
    return (
        f"{args.model or args.preset}: {size}; {args.prompts} prompts of {prompts} x "
        f"{args.completions} completions of {completions}; the first turn and {args.repeats} more\n"
        f"{machine()}"
    )


def speed_table(
    args: argparse.Namespace, own: list[dict], peer: list[dict] | None, tokens: int, work: dict, limits: tuple
) -> list[list[str]]:
    """Rows of the table, one a phase: the first turn, which compiles, and the others' median, mean, speed and
    share of the ceilings.

    own, peer: each turn's seconds; peer None where it crashed. tokens, work: of all turns but the first. The
    ratio is of the means.
    """

    def percent(x: float) -> str:
        return "-" if math.isnan(x) else f"{100 * x:.1f}%"

    def seconds(turns: list[dict], phase: str) -> list[str]:
        later = [turn[phase] for turn in turns[1:]]
        return [f"{x:.3f}" for x in (turns[0][phase], median(later), fmean(later))]

    table = [["phase", "first, s", "median, s", "mean, s", "tokens/s", "of matmul", "of bandwidth"]]
    table[0] += [f"{args.peer}: first, s", "median, s", "mean, s", "ratio"] if args.peer else []
    for phase in own[0]:
        total = sum(turn[phase] for turn in own[1:])
        flops, moved = work.get(phase, (math.nan, math.nan))
        rate = "-" if phase == "other" else f"{tokens / total:,.{0 if tokens > 10 * total else 2}f}"
        row = [
            phase,
            *seconds(own, phase),
            rate,
            percent(flops / total / limits[0]),
            percent(moved / total / limits[1]),
        ]
        if args.peer and peer is None:
            row += ["crashed", "-", "-", "-"]
        elif args.peer and phase not in peer[0]:
            row += ["-"] * 4
        elif args.peer:
            row += [*seconds(peer, phase), f"{sum(turn[phase] for turn in peer[1:]) / total:.2f}"]
        table.append(row)
    return table


PEER_SETTINGS = {
    "temperature": 1.0,
    "learning_rate": 1e-6,
    "loss_type": "grpo",
    "beta": 0.0,
}  # TRL's, for the work of rollout, train and step


def speed(args: argparse.Namespace) -> None:
    """rollout, train and step: own turns and the peer's by turns; the first of each is its first use."""
    turns = args.repeats + 1
    lengths = [completion_lengths(args, turn) for turn in range(turns)]
    with tempfile.TemporaryDirectory() as name:
        trainer = prepare(args, Path(name), args.set, turns)
        rows = [
            row for _, row in mlx_grpo.draw_rows(trainer.rows, trainer.config.seed, 0, turns * args.prompts)
        ]
        print(describe_work(args, trainer, lengths), flush=True)
        warn_if_busy()
        limits = ceilings()
        print(
            f"ceilings: {limits[0] / 1e12:.2f} TFLOP/s in a matrix product, "
            f"{limits[1] / 1e9:.0f} GB/s read and written\n",
            flush=True,
        )
        ids = [row["prompt_ids"] for row in rows]
        work = {"ids": ids, "texts": [row["prompt"] for row in rows], "lengths": sum(lengths, [])}
        settings = {**PEER_SETTINGS, "max_steps": turns}
        peer = Peer(args, trainer.config, Path(name), settings=settings, **work) if args.peer else None
        own, theirs = take_turns(args, trainer, peer, lengths)
    prompts = [list(map(len, ids[turn * args.prompts : (turn + 1) * args.prompts])) for turn in range(turns)]
    later = costs(trainer.model, list(zip(prompts, lengths))[1:])
    print_table(speed_table(args, own, theirs, sum(map(sum, lengths[1:])), later, limits))
    peak = f", {args.peer} {theirs[-1]['peak'] / 2**30:.2f} GB" if theirs else ""
    print(f"\npeak memory after the first turn {mx.get_peak_memory() / 2**30:.2f} GB{peak}")
    if args.peer and theirs is None:
        raise mlx_grpo.RunError(f"{args.peer} crashed; the last lines of its log are above")


def take_turns(
    args: argparse.Namespace, trainer, peer: Peer | None, lengths: list[list[int]]
) -> tuple[list[dict], list[dict] | None]:
    """Each turn's seconds of this trainer and of the peer, which are None where it crashed."""
    own, theirs = [], []
    try:
        for turn, of_turn in enumerate(lengths):
            if turn == 1:
                mx.clear_cache()
                mx.reset_peak_memory()
            own.append(own_turn(args, trainer, of_turn))
            if peer and theirs is not None:
                try:
                    theirs.append(peer.ask())
                    check_tokens(args.peer, theirs[-1]["tokens"], of_turn)
                except PeerCrashed as crash:
                    crash.show()
                    theirs = None
            whole = list(own[-1])[
                -1
            ]  # the table comes at the end: whoever stops earlier has seen what there was
            seconds = [
                f"{name} {runs[-1][whole]:.3f} s"
                for name, runs in (("this trainer", own), (args.peer, theirs))
                if runs
            ]
            label = f"turn {turn} of {args.repeats}" if turn else "first turn"
            print(f"{label}: {', '.join(seconds)}", file=sys.stderr, flush=True)
    finally:
        if peer:
            peer.close()
    return own, theirs


def full_logits_step(trainer, groups):
    """A training step as commonly written: the whole sequences of all rows, all their logits at once."""
    rows = mx.array([g.prompt + c.ids for g in groups for c in g.completions])
    advantages = mx.array([float(i % 2) - 0.5 for i in range(rows.shape[0])])[:, None]
    first = len(groups[0].prompt) - 1
    optimizer = trainer.learner.optimizer

    def loss(rows):
        logits = trainer.model(rows[:, :-1]).astype(mx.float32)
        logps = mx.take_along_axis(logits, rows[:, 1:, None], axis=-1)[..., 0] - mx.logsumexp(logits, axis=-1)
        return -(mx.exp(logps - mx.stop_gradient(logps)) * advantages)[:, first:].mean()

    def once():
        optimizer.update(trainer.model, nn.value_and_grad(trainer.model, loss)(rows)[1])
        mx.eval(trainer.model.state, optimizer.state)

    return once


def memory(args: argparse.Namespace) -> None:
    """A training step's peak, measured and planned: as configured, with all logits, with less memory."""
    cases = {  # gradient checkpointing patches a model's class for good, so it comes last
        "as configured": [],
        "all logits at once": [],
        "grad_checkpoint": ["grad_checkpoint=true"],
        "lora, grad_checkpoint": ["grad_checkpoint=true", "fine_tune_type=lora"],
    }
    table = [["training step", "peak, GB", "plan, GB", "seconds", "positions/s"]]
    for case, settings in cases.items():
        with tempfile.TemporaryDirectory() as name:
            trainer = prepare(args, Path(name), args.set + settings, turns=1)
            if len(table) == 1:
                print(describe_work(args, trainer, []) + "\n", flush=True)
            groups = trainer.rollout(args.prompts, mlx_grpo.Stopwatch())
            usual = functools.partial(trainer.train_on, groups, trainer.advantages(groups)[1])
            once = full_logits_step(trainer, groups) if case.startswith("all") else usual
            mx.clear_cache()
            mx.reset_peak_memory()
            seconds = []
            try:
                for _ in range(args.repeats + 1):
                    start = time.perf_counter()
                    once()
                    seconds.append(time.perf_counter() - start)
                positions = args.prompts * args.completions * (args.prompt_tokens + args.tokens)
                best = median(seconds[1:])
                planned = "-" if case.startswith("all") else f"{plan(trainer.work)['peak'] / 2**30:.2f}"
                table.append(
                    [
                        case,
                        f"{mx.get_peak_memory() / 2**30:.2f}",
                        planned,
                        f"{best:.3f}",
                        f"{positions / best:,.0f}",
                    ]
                )
                print(", ".join(map(": ".join, zip(table[0], table[-1]))), file=sys.stderr, flush=True)
            except RuntimeError as error:  # out of memory, as each backend words it
                table.append([case, "does not fit", "-", "-", "-"])
                print(f"{case}: {str(error).splitlines()[0]}", file=sys.stderr)
            del trainer, groups, once, usual
            gc.collect()  # a trainer and its compiled step refer to each other
            mx.clear_cache()
    print_table(table)


# --- Command line -------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


positive.__name__ = "positive integer"  # argparse names the type in its message


def seed_list(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


seed_list.__name__ = "comma-separated integers"


def add_sizes(parser: argparse.ArgumentParser, *sizes: tuple[str, int, str]) -> None:
    """Flags that take a positive integer: each a flag, its default and what it is."""
    for flag, default, what in sizes:
        parser.add_argument(
            flag, type=positive, default=default, metavar="N", help=f"{what} (default: {default})"
        )


def add_work(one: argparse.ArgumentParser, gpu: bool) -> None:
    """The flags that say what model and what work is measured."""
    model = one.add_mutually_exclusive_group()
    preset = "a shape with random weights (default: 0.5b on a GPU, else tiny)"
    model.add_argument("--preset", choices=PRESETS, help=preset)
    model.add_argument(
        "--model", metavar="DIR", help="a real model instead: a directory, or a hub name that is in the cache"
    )
    add_sizes(
        one,
        ("--prompts", 8 if gpu else 1, "prompts a step"),
        ("--completions", 8, "completions a prompt"),
        ("--prompt-tokens", 125, "the longest prompt"),
        ("--tokens", 256 if gpu else 128, "the longest completion"),
        ("--repeats", 5, "turns after the first"),
    )
    one.add_argument("--seed", type=int, default=0, metavar="N", help="of the drawn lengths (default: 0)")


def add_lengths(one: argparse.ArgumentParser) -> None:
    """The flags that say when completions end."""
    natural = (
        "natural (default): completions end at lengths drawn from a log-normal distribution with --median, "
        "of which the share --cut is beyond --tokens and cut there; prompts have two thirds of "
        "--prompt-tokens or more, uniformly. fixed: all are longest"
    )
    one.add_argument("--lengths", choices=("natural", "fixed"), default="natural", help=natural)
    one.add_argument(
        "--median",
        type=positive,
        metavar="N",
        help="median of the distribution, in tokens (default: a third of --tokens)",
    )
    one.add_argument(
        "--cut", type=float, default=0.05, metavar="SHARE", help="share of it beyond --tokens (default: 0.05)"
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        description=__doc__.split("\n\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser("objectives", help="train the starter with each variant of the objective")
    names = f"of {', '.join(VARIANTS)} (default: all)"
    one.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME", help=names
    )
    keeps = "holds a directory a run; finished ones are kept (default: outputs/objectives)"
    one.add_argument("--output", default="outputs/objectives", metavar="DIR", help=keeps)
    one.add_argument(
        "--parallel",
        type=positive,
        default=1,
        metavar="N",
        help="runs at a time, each with its share of the cores (default: 1)",
    )
    one.add_argument(
        "--updates", type=positive, default=32, metavar="N", help="updates of each run (default: 32)"
    )
    one = commands.add_parser(
        "learn", help="train a configuration, then with TRL from the same start, with the same settings"
    )
    one.add_argument(
        "--config",
        metavar="FILE",
        default=str(QUICKSTART),
        help="the trainer's TOML file (default: the quickstart's)",
    )
    one.add_argument(
        "--updates", type=positive, metavar="N", help="updates of each run (default: as configured)"
    )
    one.add_argument(
        "--target",
        type=float,
        metavar="X",
        help="held-out reward to take the time to (default: the highest that both come to)",
    )
    for name in ("objectives", "learn"):
        helps = "each run is made once a seed (default: 0,1,2)"
        commands.choices[name].add_argument(
            "--seeds", type=seed_list, default=[0, 1, 2], metavar="N,..", help=helps
        )
    helps = {
        "rollout": "sampling",
        "train": "an update",
        "step": "both, as the trainer does them",
        "memory": "the peak of an update",
    }
    for name, text in helps.items():
        one = commands.add_parser(name, help=f"{text}, on random weights or a real model")
        add_work(one, on_gpu())
        if name in SPEEDS:
            add_lengths(one)
        else:
            one.set_defaults(lengths="fixed")
    for name in ("learn", *SPEEDS):
        peers = [peer for peer, (_, can) in PEERS.items() if name in can]
        one = commands.choices[name]
        helps = "run this program on the same work, in an environment of its own" + (
            " (default: trl)" if name == "learn" else ""
        )
        one.add_argument("--peer", choices=peers, default="trl" if name == "learn" else None, help=helps)
        one.add_argument(
            "--peer-python", metavar="PATH", help="an interpreter that has the peer (default: one is made)"
        )
    for one in commands.choices.values():
        one.add_argument(
            "--set",
            metavar="KEY=VALUE",
            action="append",
            default=[],
            help="a setting of mlx-grpo.py; repeatable",
        )
    args = parser.parse_args(argv)
    if args.command in (*SPEEDS, "memory"):
        args.preset = args.preset or ("0.5b" if on_gpu() else "tiny")
        if args.completions < 2 or args.prompt_tokens < 20:
            parser.error("--completions must be at least 2 and --prompt-tokens at least 20")
    if args.command in SPEEDS:
        args.median = args.median or max(1, args.tokens // 3)
        if args.lengths == "natural" and not (args.median < args.tokens and 0 < args.cut < 0.5):
            parser.error("--median must be below --tokens, and --cut between 0 and 0.5")
    return args


def run(args: argparse.Namespace) -> None:
    {"objectives": objectives, "learn": learn, "memory": memory}.get(args.command, speed)(args)


def main(argv: list[str] | None = None) -> int:
    return exit_status(lambda: run(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
