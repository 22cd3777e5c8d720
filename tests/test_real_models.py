"""Real pretrained models: what tiny random ones cannot show. Few rows and short limits, for two CPU cores."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from real_models import real_model

import mlx_grpo
from mlx_grpo import CompletionLogProbs, MLXGRPOTrainer, Sampling, build_prompt, generate, left_pad

pytestmark = [pytest.mark.real, pytest.mark.slow]

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "configs" / "arithmetic.toml"
QUESTIONS = ["What is 41 + 19?", "Hi!", "Name three colours of the rainbow."]  # prompts of different length
TEXTS = ["The capital of France is", "One, two, three,", "Once upon a time there was a small"]
G = 2
UPDATES, SAVED = 4, 2


# --- The sampler and the training forward -------------------------------------------------------------------


def opened(name: str, dtype: mx.Dtype):
    model, tokenizer, _ = mlx_grpo.open_model(str(real_model(name)))
    model.set_dtype(dtype)
    model.eval()
    return model, tokenizer


def forward_logps(model, prompt: list[int], completion: list[int]) -> np.ndarray:
    """Log-probs (T,) of a completion from one forward of the whole sequence alone: no cache, no padding."""
    logits = model(mx.array([prompt + completion]))[0, len(prompt) - 1 : -1].astype(mx.float32)
    logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return np.array(mx.take_along_axis(logps, mx.array(completion)[:, None], axis=-1)[:, 0])


def rollout_gaps(model, tokenizer, prompts: list[list[int]], tokens: int = 6) -> np.ndarray:
    """The rollout's log-prob less one forward's, of each id sampled for these prompts in one batch."""
    rows = generate(
        model, tokenizer, prompts, max_new_tokens=tokens, num_generations=G,
        keys=[mlx_grpo.random_key(0, tuple(prompt)) for prompt in prompts],
    )  # fmt: skip
    assert len(rows) == G * len(prompts)
    gaps = []
    for number, row in enumerate(rows):
        gaps.append(np.array(row.sampler_logps) - forward_logps(model, prompts[number // G], row.ids))
    return np.concatenate(gaps)


# bfloat16 keeps 8 bits: two orders of the same sums differ by hundredths of a nat in a token's log-prob.
BOUNDS = {"float32": (2e-3, 1e-6), "bfloat16": (0.5, 0.02)}


@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_rollouts_log_probs_are_one_forwards_padded_and_alone(dtype):
    largest, kl = BOUNDS[dtype]
    model, tokenizer = opened("smollm2", getattr(mx, dtype))
    prompts = [build_prompt(tokenizer, question) for question in QUESTIONS[:2]]
    assert len(prompts[0]) != len(prompts[1])
    for batch in (prompts, prompts[1:]):
        gap = rollout_gaps(model, tokenizer, batch)
        assert np.abs(gap).max() < largest
        assert np.mean(np.exp(-gap) + gap - 1) < kl


def test_the_training_forwards_log_probs_are_one_forwards():
    model, tokenizer = opened("smollm2", mx.float32)
    prompts = [build_prompt(tokenizer, question) for question in QUESTIONS[:2]]
    answers = ("41 + 19 = 60.", "It is 60.", "Hello! How can I help you?", "Hi.")
    check_training_forward(model, prompts, [tokenizer.encode(text) for text in answers])


def test_a_sliding_window_models_log_probs_are_one_forwards():
    model, tokenizer = opened("gemma3", mx.float32)
    prompts = [tokenizer.encode(text) for text in TEXTS]
    assert len({len(prompt) for prompt in prompts}) > 1
    assert np.abs(rollout_gaps(model, tokenizer, prompts)).max() < 2e-3
    endings = (" Paris.", " the city of light", " four", " five, six and seven")
    completions = [tokenizer.encode(text, add_special_tokens=False) for text in endings]
    check_training_forward(model, prompts[:2], completions)


def check_training_forward(model, prompts: list[list[int]], completions: list[list[int]]) -> None:
    """Two completions a prompt, padded into one batch, against each alone."""
    tokens, pads = left_pad(prompts, max(map(len, prompts)) + 2)
    ids = np.zeros((len(completions), max(map(len, completions)) + 1), np.int32)
    for row, completion in zip(ids, completions):
        row[: len(completion)] = completion
    logps, _ = CompletionLogProbs(model, 1.0)({"prompts": tokens, "pads": pads, "ids": mx.array(ids)})
    for n, completion in enumerate(completions):
        expected = forward_logps(model, prompts[n // 2], completion)
        np.testing.assert_allclose(np.array(logps[n, : len(completion)]), expected, atol=2e-3)


# --- One short run and what it leaves -----------------------------------------------------------------------


REWARD = '''
def digits(completions, **columns):
    """The share of a text's characters that are digits."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in texts]
'''


def script(*words) -> str:
    """Run a script of the repository; what it printed."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def convert(*flags) -> None:
    script("utils/convert_model.py", *flags)


def train(folder: Path, **changes) -> None:
    """A run of the trainer's command line."""
    line = ["--config", str(RECIPE)]
    for setting in overrides(folder, **changes):
        line += ["--set", setting]
    assert mlx_grpo.main(line) == 0


def overrides(folder: Path, **changes) -> list[str]:
    """The settings of the run as key=value: the arithmetic recipe, with a reward that a few updates raise."""
    settings = {
        "model_name": folder / "float32", "output_dir": folder, "dataset": folder / "data",
        "reward_funcs": json.dumps([f"{folder / 'reward.py'}:digits"]),
        "batch_size": 4, "num_generations": 4, "max_completion_length": 12, "num_epochs": 1,
        "learning_rate": 5e-5, "lr_scheduler_type": "constant", "warmup_ratio": 0,
        "eval_steps": 0, "save_steps": SAVED, "use_compile": "false", "seed": 0,
    }  # fmt: skip
    return [f"{name}={value}" for name, value in {**settings, **changes}.items()]


def records(run: Path, event: str | None = None) -> list[dict]:
    lines = (run / "training_log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record.get("event") == event]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with float32/ (the model), data/, reward.py and run/, a short run of the recipe with them."""
    folder = tmp_path_factory.mktemp("real")
    convert("--hf-path", real_model("smollm2"), "--dtype", "float32", "--output-dir", folder / "float32")
    (folder / "reward.py").write_text(REWARD)
    (folder / "data").mkdir()
    for split, rows in (("train", 4 * UPDATES), ("test", 4)):
        lines = (ROOT / "starter" / "arithmetic" / f"{split}.jsonl").read_text().splitlines()
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(lines[:rows]) + "\n")
    train(folder, run_name="run")
    yield folder
    shutil.rmtree(folder)  # gigabytes, of which pytest would keep three sessions


@pytest.fixture(scope="module")
def four_bits(folder):
    convert("--hf-path", folder / "run" / "final", "--quantize", "--output-dir", folder / "four-bits")
    return folder / "four-bits"


def test_a_few_updates_raise_the_reward(folder):
    found = records(folder / "run")
    assert len(found) == UPDATES and all(record["grad_norm"] > 0 for record in found)
    assert all(record["mismatch/max"] < 2e-3 for record in found)
    rewards = [record["reward_mean"] for record in found]
    assert rewards[-1] > 1.5 * rewards[0]


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(folder):
    config = mlx_grpo.load_config(RECIPE, overrides(folder, run_name="resumed"))
    resumed = MLXGRPOTrainer(config, folder / "resumed")
    resumed.run_dir.mkdir()
    resumed.resume(folder / "run" / f"checkpoint-{SAVED}")
    assert resumed.state.update == SAVED
    resumed.train()
    whole = mx.load(str(folder / "run" / "final" / "model.safetensors"))
    weights = dict(tree_flatten(resumed.model.parameters()))
    assert whole.keys() == weights.keys()
    assert all(mx.array_equal(whole[name], weights[name]) for name in whole)


def test_evaluate_says_what_the_runs_last_evaluation_said(folder):
    config = folder / "run" / "config.resolved.toml"
    shown = script("utils/evaluate.py", "--model", folder / "run" / "final", "--config", config, "--json")
    scores = json.loads(shown.splitlines()[-1])["models"][0]
    last = records(folder / "run", "eval")[-1]
    assert scores["n"] == last["n"] == 4
    assert scores["em_lenient"][0] == last["em_lenient"]
    assert scores["tokens_per_answer"] == pytest.approx(last["completion_length"])


def next_ids(path: Path, prompts: list[str]) -> list[mx.array]:
    """Log-probs (V,) of the id that follows each question."""
    model, tokenizer, _ = mlx_grpo.open_model(str(path))
    found = []
    for prompt in prompts:
        logits = model(mx.array([build_prompt(tokenizer, prompt)]))[0, -1].astype(mx.float32)
        found.append(logits - mx.logsumexp(logits))
    return found


def test_a_model_quantised_and_loaded_back_predicts_nearly_what_it_did(folder, four_bits):
    size = (folder / "run" / "final" / "model.safetensors").stat().st_size
    assert (four_bits / "model.safetensors").stat().st_size < size / 6
    for before, after in zip(next_ids(folder / "run" / "final", QUESTIONS), next_ids(four_bits, QUESTIONS)):
        divergence = (mx.exp(before) * (before - after)).sum().item()
        assert 0 < divergence < 1.0, divergence


def test_a_four_bit_copy_trains_through_adapters(folder, four_bits):
    # 4-bit layers are slow on CPUs: one update of two prompts.
    train(
        folder, run_name="lora", model_name=four_bits, fine_tune_type="auto", learning_rate=1e-3,
        batch_size=2, max_train_samples=2, max_completion_length=8, eval_samples=1, save_steps=0,
    )  # fmt: skip
    assert all(record["grad_norm"] > 0 for record in records(folder / "lora"))
    adapters = mx.load(str(folder / "lora" / "final" / "adapters.safetensors"))
    assert all(re.search(r"lora_[ab]$", name) for name in adapters)
    assert all(mx.abs(array).max().item() > 0 for name, array in adapters.items() if name.endswith("lora_b"))
