"""Real pretrained models, at lengths as they end: what tiny random ones cannot show. Float32 on two CPU cores; few rows, short limits."""

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
from mlx_grpo import CompletionLogProbs, MLXGRPOTrainer, Sampling, build_prompt, generate, left_pad, load_config, random_key

pytestmark = [pytest.mark.real, pytest.mark.slow]

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = ["What is 41 + 19?", "Hi!", "Name three colours of the rainbow."]  # prompts of different length
TEXTS = ["The capital of France is", "One, two, three,", "Once upon a time there was a small"]  # for a model without chat template
G = 2
UPDATES, SAVED = 4, 2


# --- The sampler and the training forward -----------------------------------------------------------------------


def opened(name: str, dtype: mx.Dtype):
    model, tokenizer, _ = mlx_grpo.open_model(str(real_model(name)))
    model.set_dtype(dtype)
    model.eval()
    return model, tokenizer


def rollout_of(model, tokenizer, prompts: list[list[int]], tokens: int):
    keys = [random_key(0, tuple(prompt)) for prompt in prompts]
    decoder = mlx_grpo.make_decoder(model, Sampling(), use_compile=False)
    return generate(model, tokenizer, prompts, max_new_tokens=tokens, num_generations=G, keys=keys, decoder=decoder)


def forward_logps(model, prompt: list[int], completion: list[int]) -> np.ndarray:
    """Log-probs (T,) of a completion from one forward of the whole sequence alone, without cache and padding."""
    logits = model(mx.array([prompt + completion]))[0, len(prompt) - 1 : -1].astype(mx.float32)
    logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return np.array(mx.take_along_axis(logps, mx.array(completion)[:, None], axis=-1)[:, 0])


def gaps(model, rollout) -> np.ndarray:
    """The rollout's log-prob less the forward's, of each id that was sampled."""
    found = [
        np.array(logps) - forward_logps(model, rollout.prompts[n // G], ids)
        for n, (ids, logps) in enumerate(zip(rollout.completions, rollout.sampler_logps))
    ]
    return np.concatenate(found)


# bfloat16 keeps 8 bits of a number: what two orders of the same sums differ by is a few hundredths of a nat in a token's log-prob.
@pytest.mark.parametrize("dtype, largest, kl", [(mx.float32, 2e-3, 1e-6), (mx.bfloat16, 0.5, 0.02)], ids=["float32", "bfloat16"])
def test_the_rollouts_log_probs_are_one_forwards_padded_and_alone(dtype, largest, kl):
    model, tokenizer = opened("smollm2", dtype)
    prompts = [build_prompt(tokenizer, question) for question in QUESTIONS]
    assert len({len(prompt) for prompt in prompts}) == len(prompts)
    padded = rollout_of(model, tokenizer, prompts, 6)
    alone = [rollout_of(model, tokenizer, [prompt], 6) for prompt in prompts[:2]]
    for rollout in (padded, *alone):
        gap = gaps(model, rollout)
        assert np.abs(gap).max() < largest
        assert np.mean(np.exp(-gap) + gap - 1) < kl


def test_the_training_forwards_log_probs_are_one_forwards():
    model, tokenizer = opened("smollm2", mx.float32)
    prompts = [build_prompt(tokenizer, question) for question in QUESTIONS[:2]]
    completions = [tokenizer.encode(text) for text in ("41 + 19 = 60.", "It is 60.", "Hello! How can I help you?", "Hi.")]
    check_training_forward(model, prompts, completions)


def test_a_sliding_window_models_log_probs_are_one_forwards():
    model, tokenizer = opened("gemma3", mx.float32)
    prompts = [tokenizer.encode(text) for text in TEXTS]
    assert len({len(prompt) for prompt in prompts}) > 1
    assert np.abs(gaps(model, rollout_of(model, tokenizer, prompts, 6))).max() < 2e-3
    completions = [tokenizer.encode(text, add_special_tokens=False) for text in (" Paris.", " the city of light", " four", " five, six and seven")]
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


# --- One short run and what it leaves ---------------------------------------------------------------------------


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


def overrides(folder: Path, **changes) -> list[str]:
    """The settings of the run as key=value: the arithmetic recipe, with a reward that a few updates raise."""
    settings = {
        "model_name": folder / "float32", "output_dir": folder, "dataset": folder / "data", "reward_funcs": [f"{folder / 'reward.py'}:digits"],
        "batch_size": 4, "num_generations": 4, "max_completion_length": 12, "num_epochs": 1, "learning_rate": 5e-5,
        "lr_scheduler_type": "constant", "warmup_ratio": 0, "eval_steps": 0, "save_steps": SAVED, "use_compile": "false", "seed": 0,
    }  # fmt: skip
    return [f"{name}={json.dumps(value) if isinstance(value, list) else value}" for name, value in {**settings, **changes}.items()]


def records(run: Path, event: str | None = None) -> list[dict]:
    lines = (run / "training_log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record.get("event") == event]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with float32/ (the model), data/, reward.py and run/, a short run of the arithmetic recipe with them."""
    folder = tmp_path_factory.mktemp("real")
    script("utils/convert_model.py", "--hf-path", real_model("smollm2"), "--dtype", "float32", "--output-dir", folder / "float32")
    (folder / "reward.py").write_text(REWARD)
    (folder / "data").mkdir()
    for split, rows in (("train", 4 * UPDATES), ("test", 4)):
        lines = (ROOT / "starter" / "arithmetic" / f"{split}.jsonl").read_text().splitlines()
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(lines[:rows]) + "\n")
    line = ["--config", str(ROOT / "configs" / "arithmetic.toml")]
    for setting in overrides(folder, run_name="run"):
        line += ["--set", setting]
    assert mlx_grpo.main(line) == 0
    yield folder
    shutil.rmtree(folder)  # gigabytes, of which pytest would keep three sessions


@pytest.fixture(scope="module")
def four_bits(folder):
    script("utils/convert_model.py", "--hf-path", folder / "run" / "final", "--quantize", "--output-dir", folder / "four-bits")
    return folder / "four-bits"


def test_a_few_updates_raise_the_reward(folder):
    found = records(folder / "run")
    assert len(found) == UPDATES and all(record["grad_norm"] > 0 for record in found)
    assert all(record["mismatch/max"] < 2e-3 for record in found)
    rewards = [record["reward_mean"] for record in found]
    assert rewards[-1] > 1.5 * rewards[0]


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(folder):
    config = load_config(ROOT / "configs" / "arithmetic.toml", overrides(folder, run_name="resumed"))
    resumed = MLXGRPOTrainer(config, folder / "resumed")
    resumed.run_dir.mkdir()
    resumed.resume(folder / "run" / f"checkpoint-{SAVED}")
    assert resumed.update == SAVED
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
    logits = [model(mx.array([build_prompt(tokenizer, prompt)]))[0, -1].astype(mx.float32) for prompt in prompts]
    return [x - mx.logsumexp(x) for x in logits]


def test_a_model_quantised_and_loaded_back_predicts_nearly_what_it_did(folder, four_bits):
    size = (folder / "run" / "final" / "model.safetensors").stat().st_size
    assert (four_bits / "model.safetensors").stat().st_size < size / 6
    for before, after in zip(next_ids(folder / "run" / "final", QUESTIONS), next_ids(four_bits, QUESTIONS)):
        divergence = (mx.exp(before) * (before - after)).sum().item()
        assert 0 < divergence < 1.0, divergence


def test_a_four_bit_copy_trains_through_adapters(folder, four_bits):
    line = ["--config", str(ROOT / "configs" / "arithmetic.toml")]
    changes = dict(run_name="lora", model_name=four_bits, fine_tune_type="auto", learning_rate=1e-3, max_train_samples=4, save_steps=0)
    for setting in overrides(folder, **changes):
        line += ["--set", setting]
    assert mlx_grpo.main(line) == 0
    assert all(record["grad_norm"] > 0 for record in records(folder / "lora"))
    adapters = mx.load(str(folder / "lora" / "final" / "adapters.safetensors"))
    assert all(re.search(r"lora_[ab]$", name) for name in adapters)
    assert all(mx.abs(array).max().item() > 0 for name, array in adapters.items() if name.endswith("lora_b"))
