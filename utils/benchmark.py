#!/usr/bin/env python3
"""Measure the trainer: what each objective learns, how fast a step is, what it holds in memory, and peers on the same work.

objectives trains the starter once a variant and seed and prints held-out accuracy. learn trains it beside TRL and prints the
rewards and the seconds of both. rollout, train, step and memory run a GRPO step or a part of it on a model of random weights.
Nothing there ends a completion early, so that every run and every peer does the same work.
"""

import argparse
import gc
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import distributions, version
from pathlib import Path
from statistics import fmean, median

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
from mlx_grpo.backends.blas import blas_name  # noqa: E402
from mlx_grpo.run.memory_plan import plan, work_of  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_grpo.run.directory import complete_or_absent  # noqa: E402

EXAMPLES = """examples:
  uv run python utils/benchmark.py objectives --updates 32 --seeds 0,1,2 --parallel 2
  uv run python utils/benchmark.py step --preset tiny --peer trl"""

# --- Objectives -------------------------------------------------------------------------------------------------

# With one update a rollout the ratio is 1, and grpo, sapo and GSPO are one gradient, as are bnpo, dapo, cispo and vespo:
# the loss types are told apart where a rollout is used several times.
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


def objective_command(variant: str, seed: int, updates: int, output: Path, extra: list[str]) -> tuple[Path, list[str]]:
    """The run directory of one run and the command that fills it."""
    name = f"{variant}-seed{seed}"
    settings = ["eval_samples=0", "log_completions_steps=0", "logging_steps=10", f"seed={seed}", *VARIANTS[variant], *extra]
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
            [sys.executable, *command], cwd=ROOT, env={**os.environ, **limits}, stdout=output, stderr=output, check=False
        ).returncode
        output.seek(0)
        lines = output.read().split("\n")
    return next((line for line in reversed(lines) if line.strip()), f"status {status}") if status else ""


def read_run(folder: Path) -> dict:
    """What the table says of one run: exact match before, half-way and after (%), the last rewards, seconds an update."""
    records = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    scores = [100 * r["em_strict"] for r in records if r.get("event") == "eval" and r["split"] == "test"]
    updates = [r for r in records if "event" not in r]
    phases = {tuple(r[f"seconds/{phase}"] for phase in ("rollout", "reward", "train")) for r in updates}  # once a rollout
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
        [name, *(spread([r[key] for r in runs], digits) for key, digits in columns), f"{fmean(r['seconds'] for r in runs):.2f}"]
        for name, runs in results.items()
    ]


def objectives(args: argparse.Namespace) -> None:
    output = Path(args.output).resolve()
    runs = {(v, s): objective_command(v, s, args.updates, output, args.set) for s in args.seeds for v in args.variants}
    done = sum(is_complete(*run) for run in runs.values())
    threads = max(1, (os.cpu_count() or 1) // args.parallel)
    print(f"{len(runs)} runs, {done} done already, {args.parallel} at a time; each in {output}/VARIANT-seedN", flush=True)
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
    results = {v: [read_run(runs[v, s][0]) for s in args.seeds if is_complete(*runs[v, s])] for v in args.variants}
    print(f"\nHeld-out exact match of the starter, {args.updates} updates, mean of seeds {args.seeds} (range)\n{machine()}\n")
    print_table(objectives_table({name: found for name, found in results.items() if found}))
    if failures:
        raise mlx_grpo.RunError(f"{len(failures)} of {len(runs)} runs failed; their output.txt says why, the same command tries again")


# --- The work ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A Qwen2 model's dimensions; heads are 64 wide but for 1.5b's 128, the embedding is the head."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    wide: int
    vocabulary: int

    @property
    def kv_width(self) -> int:
        """Numbers that one position of one row keeps in the KV cache, over all layers."""
        return 2 * self.layers * self.kv_heads * self.hidden // self.heads


PRESETS = {
    "tiny": Shape(256, 4, 4, 2, 704, 4096),
    "small": Shape(512, 8, 8, 2, 1408, 8192),
    "0.5b": Shape(896, 24, 14, 2, 4864, 151936),
    "1.5b": Shape(1536, 28, 12, 2, 8960, 151936),
}


def on_gpu() -> bool:
    return mx.default_device() == mx.gpu


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-grpo-benchmark"


def model_folder(preset: str) -> Path:
    """A model directory of this shape with random weights and the starter's tokenizer, made once and kept in the cache."""
    from mlx_lm.models import qwen2

    shape, dtype = PRESETS[preset], "bfloat16" if on_gpu() else "float32"
    folder = cache_folder() / f"{preset}-{dtype}"
    if folder.is_dir():
        return folder
    config = {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": shape.hidden, "intermediate_size": shape.wide,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": True, "torch_dtype": dtype, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    mx.random.seed(0)
    model = qwen2.Model(qwen2.ModelArgs.from_dict(config))
    model.set_dtype(getattr(mx, dtype))

    with complete_or_absent(folder) as aside:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / "starter" / "model" / file, aside)
        (aside / "config.json").write_text(json.dumps(config))
        mx.save_safetensors(str(aside / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "pt"})
    return folder


def questions(tokenizer, count: int, length: int, ragged: bool) -> list[str]:
    """Word problems run together and cut so that each prompt has `length` tokens; ragged: from two thirds of it on."""
    words = " ".join(starter_problems()).split()
    tokens = lambda text: len(mlx_grpo.build_prompt(tokenizer, text))  # noqa: E731
    found, start = [], 0
    while len(found) < count:
        wanted = length - (7 * len(found)) % (length // 3) if ragged else length
        n = wanted  # no word is less than a token
        while n > 1 and tokens(" ".join(words[start : start + n])) > wanted:
            n -= 1
        text = " ".join(words[start : start + n])
        start += 1
        if start + wanted > len(words):
            raise mlx_grpo.UserError(f"No {count} prompts of {length} tokens could be made; change --prompt-tokens")
        if tokens(text) == wanted:
            found.append(text)
            start += n
    return found


REWARDS = "def alternate(completions, **kwargs):\n    return [float(i % 2) for i in range(len(completions))]\n"


def write_work(folder: Path, texts: list[str]) -> None:
    """A dataset of these questions and a reward function, into `folder`."""
    rows = [json.dumps({"question": text, "answer": "#### 1"}) for text in texts]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "rewards.py").write_text(REWARDS)


def prepare(args: argparse.Namespace, folder: Path, settings: list[str]):
    """A trainer of the project's own for the work in `args`, and the prompts' texts; `folder` takes its files."""
    from mlx_lm.utils import load_tokenizer

    model = model_folder(args.preset)
    texts = questions(load_tokenizer(model), args.prompts, args.prompt_tokens, args.ragged)
    write_work(folder, texts)
    config = mlx_grpo.load_config(None, [
        f"model_name={model}", f"dataset={folder}", f"reward_funcs=['{folder}/rewards.py:alternate']", "system_prompt=",
        f"batch_size={args.prompts}", f"num_generations={args.completions}", f"max_completion_length={args.tokens}",
        f"max_prompt_length={args.prompt_tokens}", "stop_strings=[]", "num_epochs=1000", "lr_scheduler_type=constant",
        "log_completions_steps=0", "log_jsonl=false", *settings,
    ])  # fmt: skip
    trainer = mlx_grpo.MLXGRPOTrainer(config, folder)
    trainer.tokenizer.eos_token_ids = set()
    trainer.build_step()
    return trainer, texts


def own_runner(args: argparse.Namespace, trainer):
    """A function that does the work once and returns the seconds of its phases."""
    groups = trainer.sample_groups(args.prompts, {"rollout": 0.0, "reward": 0.0}) if args.command != "step" else None

    def once() -> dict:
        start, seconds = time.perf_counter(), {"rollout": 0.0, "reward": 0.0}
        if args.command == "rollout":
            trainer.sample_groups(args.prompts, seconds)
            return {"rollout": seconds["rollout"]}
        if args.command == "step":
            record = trainer.one_rollout()[-1]
            parts = {phase: record[f"seconds/{phase}"] for phase in ("rollout", "train")}
            whole = time.perf_counter() - start
            return {**parts, "other": whole - sum(parts.values()), "step": whole}
        trainer.train_on(groups)
        return {"train": time.perf_counter() - start}

    return once


# --- The machine ------------------------------------------------------------------------------------------------


def machine() -> str:
    """Versions and hardware, in one line."""
    name = mx.device_info().get("device_name") if on_gpu() else platform.processor()
    if not on_gpu() and Path("/proc/cpuinfo").is_file():
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else platform.machine()
    blas = f", {Path(blas_name()).name}" if blas_name() and not on_gpu() else ""
    return f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}, Python {platform.python_version()}; {name}, {os.cpu_count()} CPU cores{blas}"


def warn_if_busy() -> None:
    if os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1):
        print(f"load average {os.getloadavg()[0]:.1f}: other programs are running, and every figure below may be off", file=sys.stderr)


def best_seconds(function, repeats: int = 5) -> float:
    """The fastest of several runs, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        mx.eval(function())
        times.append(time.perf_counter() - start)
    return min(times[1:])


def ceilings(side: int = 0, megabytes: int = 0) -> tuple[float, float]:
    """What the device reaches: FLOP/s of a square matrix product, and bytes/s of reading and writing a large array."""
    side, megabytes = side or (8192 if on_gpu() else 1536), megabytes or (2048 if on_gpu() else 256)
    a = mx.random.normal((side, side)).astype(mx.bfloat16 if on_gpu() else mx.float32)
    large = mx.zeros(megabytes * 2**18)
    mx.eval(a, large)
    return 2 * side**3 / best_seconds(lambda: a @ a), 2 * large.nbytes / best_seconds(lambda: large + 1)


def costs(args: argparse.Namespace, model) -> dict[str, tuple[float, float]]:
    """By phase, the FLOPs and the bytes that the work takes at the least: a group's prompt once, attention not counted.

    The rollout reads every weight and its rows' KV once a position. Training is three times a forward; its bytes are few.
    """
    parameters = [p for _, p in tree_flatten(model.parameters())]
    count, weights = sum(p.size for p in parameters), sum(p.nbytes for p in parameters)
    rows = args.prompts * args.completions
    positions = rows * args.tokens + args.prompts * args.prompt_tokens
    kv = PRESETS[args.preset].kv_width * parameters[0].itemsize * rows * (args.prompt_tokens + args.tokens / 2)
    return {"rollout": (2 * count * positions, args.tokens * (weights + kv)), "train": (6 * count * positions, math.nan)}


def print_table(rows: list[list[str]]) -> None:
    """A Markdown table; the first row is its header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for first, *others in (rows[0], rule, *rows[1:]):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]
        print(f"| {' | '.join(cells)} |", flush=True)


# --- Peers ------------------------------------------------------------------------------------------------------

# A driver reads the work as one line of JSON, then does it once a line and answers with its seconds.
DRIVER = """
import ctypes, json, os, sys, threading, time
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print goes to the log
work = json.loads(sys.stdin.readline())
rows, seconds, parent = work["prompts"] * work["completions"], {}, os.getppid()
def watch():  # ends with the benchmark, however that ends
    while os.getppid() == parent: time.sleep(1)
    os._exit(1)
threading.Thread(target=watch, daemon=True).start()
def wait():
    if not sys.stdin.readline(): os._exit(0)
    return time.perf_counter()
def say(answer):
    answers.write(json.dumps(answer) + "\\n"); answers.flush()
def report(start, peak):
    step = time.perf_counter() - start
    say({"rollout": seconds["rollout"], "train": step - seconds["rollout"], "step": step, "peak": peak})
def timed(function):
    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        sync()
        seconds["rollout"] = time.perf_counter() - start
        return result
    return wrapper
"""
MLX_DRIVER = """
if work["blas"]: ctypes.CDLL(work["blas"], mode=ctypes.RTLD_GLOBAL)
import mlx.core as mx
from mlx_lm import load
sync = lambda: None
model, tokenizer = load(work["model"])
prompts = [list(p) for p in work["ids"]]
tokenizer.eos_token_ids = set()
"""
MLX_LM_DRIVER = """
from mlx_lm import batch_generate
from mlx_lm.sample_utils import make_sampler
once = timed(lambda: batch_generate(
    model, tokenizer, [p for p in prompts for _ in range(work["completions"])], max_tokens=work["tokens"],
    sampler=make_sampler(1.0), completion_batch_size=rows, prefill_batch_size=rows))
while True:
    start = wait()
    once()
    report(start, mx.get_peak_memory())
"""
MLX_LM_LORA_DRIVER = """
import tempfile
import mlx.optimizers as optim
from mlx_lm_lora.trainer import grpo_trainer
grpo_trainer.generate_grpo = timed(grpo_trainer.generate_grpo)
answers_text = ["1"] * len(prompts)
def batches(**kwargs):
    while True:
        start = wait()
        yield prompts, [[1]] * len(prompts), work["texts"], answers_text, [None] * len(prompts)
        report(start, mx.get_peak_memory())
args = grpo_trainer.GRPOTrainingArgs(
    batch_size=len(prompts), iters=10**9, group_size=work["completions"], max_completion_length=work["tokens"], beta=0.0,
    epsilon=0.2, temperature=1.0, top_p=1.0, top_k=0, max_seq_length=32768, steps_per_report=10**9, steps_per_save=10**9,
    adapter_file=os.path.join(tempfile.mkdtemp(), "a.safetensors"))
grpo_trainer.train_grpo(
    model, None, tokenizer, optim.Adam(1e-6), [], None, [alternate], args, iterate_batches=batches, end_answer_token="")
"""
TRL_DRIVER = """
import functools, resource, tempfile, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
cuda = torch.cuda.is_available() and work["gpu"]
sync = torch.cuda.synchronize if cuda else lambda: None
class Timed(GRPOTrainer):
    _generate_and_score_completions = timed(GRPOTrainer._generate_and_score_completions)
class Pace(TrainerCallback):
    def on_step_begin(self, *args, **kwargs): self.start = wait()
    def on_step_end(self, *args, **kwargs):
        sync()
        report(self.start, torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
def train(trainer, reward, prompts, **settings):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(work["model"], dtype="auto"), AutoTokenizer.from_pretrained(work["model"])
    # TRL does not hand generate the tokenizer, without which it takes no stop strings.
    model.generate = functools.partial(model.generate, tokenizer=tokenizer)
    config = GRPOConfig(
        tempfile.mkdtemp(), per_device_train_batch_size=rows, bf16=False, gradient_checkpointing=False, use_cpu=not cuda,
        report_to="none", logging_steps=10**6, save_strategy="no", disable_tqdm=True, shuffle_dataset=False, **settings)
    trainer(model, reward, config, Dataset.from_list(prompts), processing_class=tokenizer, callbacks=[Pace()]).train()
"""
TRL_SPEED_DRIVER = """
prompts = [{"prompt": [{"role": "user", "content": text}]} for text in work["texts"]]
train(Timed, alternate, prompts, num_generations=work["completions"], max_completion_length=work["tokens"], max_steps=10**6,
      temperature=1.0, learning_rate=1e-6, loss_type="grpo", beta=0.0, generation_kwargs={"min_new_tokens": work["tokens"]})
"""
# Its reward function asks the benchmark: a line of JSON with the texts of an update, answered by a line with their rewards.
TRL_LEARN_DRIVER = """
class Learner(Timed):
    def _generate_single_turn(self, *args):
        # generate pads what a stop string has ended. TRL, which looks for the end token alone, would train on the padding.
        completions, logps = super()._generate_single_turn(*args)
        for ids in completions:
            while ids[-1] == self._tokenizer.pad_token_id: ids.pop()
        return completions, logps
def asked(completions, **columns):
    say([chat[0]["content"] for chat in completions])
    return json.loads(sys.stdin.readline())
train(Learner, asked, work["chats"], **work["settings"])
"""
SPEEDS = ("rollout", "train", "step")
PEERS = {  # packages, and the driver of each command it can run
    "trl": (("trl==1.16.0", "torch"), {**dict.fromkeys(SPEEDS, TRL_DRIVER + TRL_SPEED_DRIVER), "learn": TRL_DRIVER + TRL_LEARN_DRIVER}),
    "mlx-lm": (("mlx-lm==0.32.2", "rich"), {"rollout": MLX_DRIVER + MLX_LM_DRIVER}),
    "mlx-lm-lora": (("mlx-lm-lora==5.10.2", "rich"), dict.fromkeys(SPEEDS, MLX_DRIVER + MLX_LM_LORA_DRIVER)),
}


def peer_python(peer: str) -> str:
    """The Python of the peer's own environment, made at its first use in the cache folder. Raises RunError."""
    packages = list(PEERS[peer][0])
    # MLX's compute library is a package of its own: the peer gets the one that this environment has.
    here = {d.name for d in distributions()} & {"mlx-cpu", "mlx-cuda-12", "mlx-cuda-13"}
    if peer != "trl":
        extra = "".join(f"[{name.removeprefix('mlx-').replace('-', '')}]" for name in here)
        packages.append(f"mlx{extra}=={version('mlx')}")
    folder = cache_folder() / "peers" / peer
    python, mark = folder / "bin" / "python", folder / "packages.json"
    if mark.is_file() and json.loads(mark.read_text()) == packages:
        return str(python)
    uv = shutil.which("uv")
    if uv:
        steps = [uv, "venv", "--clear", str(folder), "--python", sys.executable], [uv, "pip", "install", "--python", str(python), *packages]
    else:
        steps = [sys.executable, "-m", "venv", "--clear", str(folder)], [str(python), "-m", "pip", "install", *packages]
    print(f"Installing {', '.join(packages)} into {folder}", flush=True)
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = " ".join(done.stderr.split())[-300:]
            raise mlx_grpo.RunError(f"Cannot install {peer}: {reason}")
    mark.write_text(json.dumps(packages))
    return str(python)


class Peer:
    """A running driver with the `work` that it does once a line."""

    def __init__(self, args: argparse.Namespace, config, folder: Path, **work):
        python = args.peer_python or peer_python(args.peer)
        self.name, self.log = args.peer, folder / "peer.log"
        work |= {"prompts": config.batch_size, "completions": config.num_generations, "tokens": config.max_completion_length}
        work |= {"model": str(mlx_grpo.resolve_model(config.model_name)), "gpu": on_gpu(), "blas": blas_name()}
        try:
            self.process = subprocess.Popen(
                [python, "-c", DRIVER + REWARDS + PEERS[args.peer][1][args.command]], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=open(self.log, "w"), text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            )  # fmt: skip
        except OSError as error:
            raise mlx_grpo.UserError(f"Cannot run {python}: {error.strerror}; --peer-python takes an interpreter") from None
        self.send(json.dumps(work))

    def send(self, line: str) -> None:
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.fail()

    def fail(self) -> None:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        raise mlx_grpo.RunError(f"{self.name} failed: {lines[-1] if lines else 'no message'}")

    def ask(self, line: str = "go"):
        """Send a line and return the answer to it."""
        self.send(line)
        answer = self.process.stdout.readline()
        return json.loads(answer) if answer else self.fail()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


# --- Learning beside a peer -------------------------------------------------------------------------------------

SAME = "temperature max_completion_length num_generations loss_type scale_rewards learning_rate adam_beta1 adam_beta2 weight_decay max_grad_norm"
BOTH_HAVE = {**{name: name for name in SAME.split()}, "clip_eps": "epsilon", "kl_coeff": "beta"}  # the trainer's name: TRL's
LEARN_SETTINGS = (*BOTH_HAVE, "batch_size", "system_prompt", "stop_strings", "reward_weights", "use_compile", "micro_batch_tokens")
SHARE = 0.9  # of the highest reward that both come to: what the time to reach it is taken of


def learner(args: argparse.Namespace, seed: int, folder: Path):
    """A trainer of the starter, ready to begin, and the problems it will draw, in order."""
    settings = ["learning_rate=1e-4", "warmup_ratio=0", "log_completions_steps=0", "log_jsonl=false", f"seed={seed}", *args.set]
    settings += length_settings(mlx_grpo.load_config(QUICKSTART, settings), args.updates)
    trainer = mlx_grpo.MLXGRPOTrainer(mlx_grpo.load_config(QUICKSTART, settings), folder)
    trainer.build_step()
    rows = [row for _, row in trainer.next_rows(args.updates * trainer.prompts_per_update)]
    trainer.cursor = 0
    return trainer, rows


def learn_here(trainer) -> list[tuple[float, float]]:
    """Reward and seconds of each update by this trainer; its loop, less evaluations and saves."""
    course = []
    for _ in range(trainer.updates):
        start = time.perf_counter()
        record = trainer.one_rollout()[-1]
        course.append((record["reward_mean"], time.perf_counter() - start))
    return course


def learn_there(args: argparse.Namespace, trainer, rows: list[dict], folder: Path) -> list[tuple[float, float]]:
    """The same by the peer, on the same `rows` in the same order, with the trainer's settings and reward functions."""
    config, course = trainer.config, []
    system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
    chats = [{"prompt": [*system, {"role": "user", "content": row["prompt"]}]} for row in rows]
    settings = {theirs: getattr(config, ours) for ours, theirs in BOTH_HAVE.items()}
    settings |= {"lr_scheduler_type": "constant", "seed": config.seed, "max_steps": trainer.updates}
    settings["generation_kwargs"] = {"stop_strings": config.stop_strings} if config.stop_strings else {}
    peer = Peer(args, config, folder, chats=chats, settings=settings)
    try:
        for first in range(0, len(rows), config.batch_size):
            answers = [row["answer"] for row in rows[first : first + config.batch_size] for _ in range(config.num_generations)]
            scores = mlx_grpo.score(trainer.reward_functions, config.reward_timeout, peer.ask(), {"answer": answers})  # (F, N)
            rewards = (scores.T @ trainer.reward_weights).tolist()
            course.append((fmean(rewards), peer.ask(json.dumps(rewards))["step"]))
    finally:
        peer.close()
    return course


def learn_table(courses: list[tuple], peer: str) -> list[list[str]]:
    """Rows of the table from the two courses, this trainer's and the peer's, of each seed: rewards by tenths, then seconds."""
    width = max(1, len(courses[0][0]) // 10)
    rolling = lambda course: [fmean(r for r, _ in course[i : i + width]) for i in range(len(course) - width + 1)]  # noqa: E731
    levels = [SHARE * min(max(rolling(course)) for course in pair) for pair in courses]  # each seed's own
    table = [["", "this trainer", peer, "ratio"]]
    for i in range(0, len(courses[0][0]) - width + 1, width):
        rewards = [spread([rolling(course)[i] for course in program], 2) for program in zip(*courses)]
        table.append([f"reward, updates {i + 1}-{i + width}", *rewards, "-"])
    whole = lambda course, level: len(course)  # noqa: E731
    reach = lambda course, level: next(n for n, mean in enumerate(rolling(course), width) if mean >= level)  # noqa: E731
    for name, updates in (("seconds, all updates", whole), (f"seconds until the reward is {spread(levels, 2)}", reach)):
        pairs = [[sum(s for _, s in course[: updates(course, level)]) for course in pair] for pair, level in zip(courses, levels)]
        table.append([name, *(spread(list(program), 1) for program in zip(*pairs)), spread([theirs / own for own, theirs in pairs], 2)])
    return table


def learn(args: argparse.Namespace) -> None:
    """The starter trained by this trainer and then by the peer, once a seed."""
    warn_if_busy()
    courses = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as name:
            trainer, rows = learner(args, seed, Path(name))
            courses.append((learn_here(trainer), learn_there(args, trainer, rows, Path(name))))
        own, theirs = (sum(seconds for _, seconds in course) for course in courses[-1])
        print(f"seed {seed}: this trainer {own:.1f} s, {args.peer} {theirs:.1f} s", flush=True)
    config = trainer.config
    print(
        f"\nThe starter, {args.updates} updates of {config.batch_size} prompts x {config.num_generations} completions; mean of seeds "
        f"{args.seeds} (range). The reward to reach is {SHARE:.0%} of the highest mean of a tenth of the run that both come to\n{machine()}\n"
    )
    print_table(learn_table(courses, args.peer))


# --- The commands -----------------------------------------------------------------------------------------------


def describe_work(args: argparse.Namespace, trainer) -> str:
    count = sum(p.size for _, p in tree_flatten(trainer.model.parameters()))
    precision = "bfloat16" if on_gpu() else "float32"
    ragged = "from two thirds of " if args.ragged else ""
    return (
        f"{args.preset}: {count / 1e6:.1f}M parameters, {precision}; {args.prompts} prompts of {ragged}{args.prompt_tokens} tokens x "
        f"{args.completions} completions of {args.tokens}; median of {args.repeats}\n{machine()}"
    )


def speed_table(args: argparse.Namespace, own: list[dict], peer: list[dict], work: dict, limits: tuple[float, float]) -> list[list[str]]:
    """Rows of the table, one a phase: the medians, their share of the ceilings, and the peer's seconds as a ratio."""
    percent = lambda x: "-" if math.isnan(x) else f"{100 * x:.1f}%"  # noqa: E731
    header = ["phase", "seconds", "tokens/s", "of matmul", "of bandwidth"] + ([args.peer, "ratio"] if peer else [])
    table = [header]
    for phase in own[0]:
        seconds = median(r[phase] for r in own)
        flops, moved = work.get(phase, (math.nan, math.nan))
        rate = "-" if phase == "other" else f"{args.prompts * args.completions * args.tokens / seconds:,.0f}"
        row = [phase, f"{seconds:.3f}", rate, percent(flops / seconds / limits[0]), percent(moved / seconds / limits[1])]
        if peer:
            theirs = median(r[phase] for r in peer) if phase in peer[0] else math.nan
            row += ["-", "-"] if math.isnan(theirs) else [f"{theirs:.3f}", f"{theirs / seconds:.2f}"]
        table.append(row)
    return table


def speed(args: argparse.Namespace) -> None:
    """rollout, train and step: own runs and the peer's in turn, after one of each to warm up."""
    with tempfile.TemporaryDirectory() as name:
        trainer, texts = prepare(args, Path(name), args.set)
        print(describe_work(args, trainer), flush=True)
        warn_if_busy()
        limits = ceilings()
        print(f"ceilings: {limits[0] / 1e12:.2f} TFLOP/s in a matrix product, {limits[1] / 1e9:.0f} GB/s read and written\n", flush=True)
        once, ids = own_runner(args, trainer), [mlx_grpo.build_prompt(trainer.tokenizer, text) for text in texts]
        peer = Peer(args, trainer.config, Path(name), texts=texts, ids=ids) if args.peer else None
        own, theirs = [], []
        try:
            for turn in range(args.repeats + 1):
                if turn == 1:
                    mx.clear_cache()
                    mx.reset_peak_memory()
                own.append(once())
                if peer:
                    theirs.append(peer.ask())
                whole = list(own[-1])[-1]  # the table comes at the end: whoever stops earlier has seen what there was
                seconds = ", ".join(f"{name} {runs[-1][whole]:.3f} s" for name, runs in (("this trainer", own), (args.peer, theirs)) if runs)
                print(f"{f'turn {turn} of {args.repeats}' if turn else 'to warm up'}: {seconds}", file=sys.stderr, flush=True)
        finally:
            if peer:
                peer.close()
        print_table(speed_table(args, own[1:], theirs[1:], costs(args, trainer.model), limits))
        print(f"\npeak memory {mx.get_peak_memory() / 2**30:.2f} GB" + (f", {args.peer} {theirs[-1]['peak'] / 2**30:.2f} GB" if peer else ""))


def full_logits_step(trainer, groups):
    """A training step as it is commonly written: the whole sequences of all rows, all their logits at once."""
    rows = mx.array([g.prompt + ids for g in groups for ids in g.completions])
    advantages = mx.array([float(i % 2) - 0.5 for i in range(rows.shape[0])])[:, None]
    first = len(groups[0].prompt) - 1

    def loss(rows):
        logits = trainer.model(rows[:, :-1]).astype(mx.float32)
        logps = mx.take_along_axis(logits, rows[:, 1:, None], axis=-1)[..., 0] - mx.logsumexp(logits, axis=-1)
        return -(mx.exp(logps - mx.stop_gradient(logps)) * advantages)[:, first:].mean()

    def once():
        trainer.optimizer.update(trainer.model, nn.value_and_grad(trainer.model, loss)(rows)[1])
        mx.eval(trainer.model.state, trainer.optimizer.state)

    return once


def memory(args: argparse.Namespace) -> None:
    """The peak of a training step, measured and planned: as configured, with all logits, and with what saves memory."""
    cases = {  # gradient checkpointing patches a model's class for good, so it comes last
        "as configured": [],
        "all logits at once": [],
        "grad_checkpoint": ["grad_checkpoint=true"],
        "lora, grad_checkpoint": ["grad_checkpoint=true", "fine_tune_type=lora"],
    }
    table = [["training step", "peak, GB", "plan, GB", "seconds", "positions/s"]]
    for case, settings in cases.items():
        with tempfile.TemporaryDirectory() as name:
            trainer, _ = prepare(args, Path(name), args.set + settings)
            if len(table) == 1:
                print(describe_work(args, trainer) + "\n", flush=True)
            # What is in the completions does not matter here, so they are not sampled.
            groups = trainer.sample_groups(args.prompts, {"rollout": 0.0, "reward": 0.0})
            once = full_logits_step(trainer, groups) if case.startswith("all") else lambda: trainer.train_on(groups)  # noqa: B023
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
                planned = "-" if case.startswith("all") else f"{plan(work_of(trainer))['peak'] / 2**30:.2f}"
                table.append([case, f"{mx.get_peak_memory() / 2**30:.2f}", planned, f"{best:.3f}", f"{positions / best:,.0f}"])
                print(", ".join(map(": ".join, zip(table[0], table[-1]))), file=sys.stderr, flush=True)
            except RuntimeError as error:  # out of memory, as each backend words it
                table.append([case, "does not fit", "-", "-", "-"])
                print(f"{case}: {str(error).splitlines()[0]}", file=sys.stderr)
            del trainer, groups, once
            gc.collect()  # a trainer and its compiled step refer to each other
            mx.clear_cache()
    print_table(table)


# --- Command line -----------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


positive.__name__ = "positive integer"  # argparse names the type in its message


def seed_list(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


seed_list.__name__ = "comma-separated integers"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n\n")[0], epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser("objectives", help="train the starter with each variant of the objective")
    names = f"of {', '.join(VARIANTS)} (default: all)"
    one.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME", help=names)
    keeps = "holds a directory a run; finished ones are kept (default: outputs/objectives)"
    one.add_argument("--output", default="outputs/objectives", metavar="DIR", help=keeps)
    one.add_argument("--parallel", type=positive, default=1, metavar="N", help="runs at a time, each with its share of the cores (default: 1)")
    one = commands.add_parser("learn", help="train the starter, then with TRL from the same start, with the same settings")
    for name, updates in (("objectives", 32), ("learn", 50)):
        one = commands.choices[name]
        one.add_argument("--updates", type=positive, default=updates, metavar="N", help=f"updates of each run (default: {updates})")
        one.add_argument("--seeds", type=seed_list, default=[0, 1, 2], metavar="N,..", help="each run is made once a seed (default: 0,1,2)")
    helps = {"rollout": "sampling", "train": "an update", "step": "both, as the trainer does them", "memory": "the peak of an update"}
    gpu = on_gpu()
    for name, text in helps.items():
        one = commands.add_parser(name, help=f"{text}, on random weights")
        one.add_argument("--preset", choices=PRESETS, default="0.5b" if gpu else "tiny", help="the model's shape (default: 0.5b on a GPU, else tiny)")
        for flag, default, what in (("--prompts", 8 if gpu else 1, "prompts a step"), ("--completions", 8, "completions a prompt"),
                                    ("--prompt-tokens", 125, "tokens a prompt"), ("--tokens", 256 if gpu else 128, "tokens a completion"),
                                    ("--repeats", 5, "measurements; the median counts")):  # fmt: skip
            one.add_argument(flag, type=positive, default=default, metavar="N", help=f"{what} (default: {default})")
        one.add_argument("--ragged", action="store_true", help="prompts of different length, which need padding and a mask")
    for name in ("learn", *SPEEDS):
        peers, one = [peer for peer, (_, drivers) in PEERS.items() if name in drivers], commands.choices[name]
        helps = "run this program on the same work, in an environment of its own" + (" (default: trl)" if name == "learn" else "")
        one.add_argument("--peer", choices=peers, default="trl" if name == "learn" else None, help=helps)
        one.add_argument("--peer-python", metavar="PATH", help="an interpreter that has the peer (default: one is made)")
    for one in commands.choices.values():
        one.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="a setting of mlx-grpo.py; repeatable")
    args = parser.parse_args(argv)
    if args.command == "learn" and (ours := {s.partition("=")[0] for s in args.set} - set(LEARN_SETTINGS)):
        parser.error(f"--set: {', '.join(sorted(ours))}: learn takes what leaves both the same work: {', '.join(LEARN_SETTINGS)}")
    if args.command in (*SPEEDS, "memory") and (args.completions < 2 or args.prompt_tokens < 20):
        parser.error("--completions must be at least 2 and --prompt-tokens at least 20")
    if args.command == "memory" and args.ragged:
        parser.error("--ragged is for rollout, train and step")
    return args


def run(args: argparse.Namespace) -> None:
    {"objectives": objectives, "learn": learn, "memory": memory}.get(args.command, speed)(args)


def main(argv: list[str] | None = None) -> int:
    return exit_status(lambda: run(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
