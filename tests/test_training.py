"""The training forward, the micro-batched step, the trainer's loop: exact, deterministic, and it stops where it must."""

import dataclasses
import json
import math
import textwrap
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from tiny import ARCHITECTURES, tiny_model

from mlx_grpo.update import compiled_shapes, fused_head
import mlx_grpo
from mlx_grpo.backends import precision
from mlx_grpo.export import save_model
from mlx_grpo import Completion, CompletionLogProbs, Group, MLXGRPOTrainer, left_pad, load_config, trainable_arrays

PROMPTS = [[5, 6, 7, 8, 9], [20, 21], [30, 31, 32]]
COMPLETIONS = [[1, 2, 3, 4], [5, 6], [7], [8, 9, 10, 11, 12], [13, 14, 15], [16, 17, 18, 96]]  # two a prompt


def batch_of(prompts=PROMPTS, completions=COMPLETIONS, length=8, width=8):
    tokens, pads = left_pad(prompts, length)
    ids = np.zeros((len(completions), width), np.int32)
    mask = np.zeros((len(completions), width), np.float32)
    for n, c in enumerate(completions):
        ids[n, : len(c)], mask[n, : len(c)] = c, 1
    return {"prompts": tokens, "pads": pads, "ids": mx.array(ids), "mask": mx.array(mask)}


def reference_stats(model, prompt, completion, temperature):
    logits = model(mx.array([prompt + completion]))[0, len(prompt) - 1 : -1].astype(mx.float32) / temperature
    logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    taken = mx.take_along_axis(logps, mx.array(completion)[:, None], axis=-1)[:, 0]
    return taken, -(mx.exp(logps) * logps).sum(axis=-1)


def largest_gap(a, b):
    """Largest difference of two gradients, relative to the largest entry."""
    pairs = list(zip(tree_flatten(a), tree_flatten(b)))
    assert [n for (n, _), _ in pairs] == [n for _, (n, _) in pairs]
    top = max(mx.abs(y).max().item() for _, (_, y) in pairs)
    return max(mx.abs(x - y).max().item() for (_, x), (_, y) in pairs) / top


def log_probs(model, temperature=1.0, share=True, **options):
    """The forward, or that of a model whose groups' prompts cannot be shared."""
    forward = CompletionLogProbs(model, temperature, **options)
    if not share:
        forward.share_prompts = forward.shares_padded = False
    return forward


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probs_entropies_and_gradients_equal_plain_sequences(monkeypatch, name, share, checkpoint):
    model = tiny_model(name)
    for kind in {type(layer) for layer in model.layers} if checkpoint else ():
        monkeypatch.setattr(kind, "__call__", mlx_grpo.checkpointed(kind.__call__))
    model.train()
    # Seven positions a chunk: several chunks, one ragged; else one chunk, whose probabilities are kept.
    forward, batch = log_probs(model, 0.8, share, head_chunk=97 * (7 if share else 1000)), batch_of()
    assert forward.split is not None
    weights = np.random.default_rng(0).normal(size=batch["ids"].shape)

    def through_the_trainer(model):
        logps, entropies = forward(batch)
        inside = batch["mask"] * mx.array(weights, dtype=mx.float32)
        return (logps * inside).sum() + 0.3 * (entropies * inside).sum()

    def plainly(model):
        total = 0.0
        for n, completion in enumerate(COMPLETIONS):
            logps, entropies = reference_stats(model, PROMPTS[n // 2], completion, 0.8)
            w = mx.array(weights[n, : len(completion)], dtype=mx.float32)
            total = total + (logps * w).sum() + 0.3 * (entropies * w).sum()
        return total

    value, grads = nn.value_and_grad(model, through_the_trainer)(model)
    expected, expected_grads = nn.value_and_grad(model, plainly)(model)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-3)
    assert largest_gap(grads, expected_grads) < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_the_head_by_cudas_kernel_gives_the_same(monkeypatch, temperature):
    def stats_and_gradient():
        model, batch = tiny_model("llama"), batch_of()
        forward = log_probs(model, temperature, entropy_gradient=False, head_chunk=97 * 7)
        return forward(batch), nn.value_and_grad(model, lambda m: (forward(batch)[0] * batch["mask"]).sum())(model)[1]

    written_out, expected_gradient = stats_and_gradient()
    monkeypatch.setattr(fused_head, "on_cuda", lambda: True)  # the CPU computes it by other operations
    by_kernel, gradient = stats_and_gradient()
    for a, b in zip(by_kernel, written_out):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-5)
    assert largest_gap(gradient, expected_gradient) < 1e-5


def test_prompts_of_one_length_need_no_padding():
    model, prompts = tiny_model("llama"), [[5, 6, 7, 8], [9, 10, 11, 12]]
    padded = batch_of(prompts)
    exact = {**padded, "prompts": mx.array(prompts)}
    del exact["pads"]
    mask = np.array(padded["mask"])
    for share in (True, False):
        for a, b in zip(log_probs(model)(padded), log_probs(model, share=share)(exact)):
            np.testing.assert_allclose(np.array(a) * mask, np.array(b) * mask, atol=1e-4)


def test_a_quantised_head_is_read_through_too():
    model = tiny_model("llama", hidden_size=64)
    nn.quantize(model, 32, 4)
    logps, _ = log_probs(model)(batch_of())
    for n, completion in enumerate(COMPLETIONS):
        expected, _ = reference_stats(model, PROMPTS[n // 2], completion, 1.0)
        np.testing.assert_allclose(np.array(logps[n, : len(completion)]), np.array(expected), atol=2e-3)


def test_a_model_whose_head_cannot_be_split_gives_the_same(monkeypatch):
    model = tiny_model("qwen2")
    split = log_probs(model)(batch_of())
    monkeypatch.setattr(mlx_grpo.script, "split_head", lambda model: None)
    whole = log_probs(model)(batch_of())
    mask = np.array(batch_of()["mask"])
    for a, b in zip(split, whole):
        np.testing.assert_allclose(np.array(a) * mask, np.array(b) * mask, atol=1e-4)


# The trainer on the bundled starter


def settings(tmp_path, *overrides):
    base = [
        "model_name=starter/model", "dataset=starter/data", f"output_dir={tmp_path}", "run_name=run", "max_train_samples=24",
        "batch_size=3", "num_generations=4", "max_completion_length=24", "eval_samples=4", "learning_rate=1e-3",
        "save_steps=0", "use_compile=false",
    ]  # fmt: skip
    return load_config(None, [*base, *overrides])


def trainer_of(tmp_path, *overrides):
    trainer = MLXGRPOTrainer(settings(tmp_path, *overrides), tmp_path / "run")
    trainer.run_dir.mkdir(parents=True, exist_ok=True)
    return trainer


def groups_of(trainer, b=3, ragged=True):
    """Groups with made-up completions of the starter's vocabulary, of uneven lengths."""
    rng, g = np.random.default_rng(1), trainer.config.num_generations
    groups = []
    for i in range(b):
        lengths = rng.integers(3, 20, g) if ragged else [10] * g
        ids = [rng.integers(5, 200, n).tolist() for n in lengths]
        logps = [rng.uniform(-4, -0.1, n).tolist() for n in lengths]
        reasons = ["length" if n > 16 else "eos" for n in lengths]
        rewards = rng.normal(size=(5, g)) if i != 1 else np.ones((5, g))  # the second group has no signal
        parts = zip(ids, logps, reasons, rewards.T.tolist())
        completions = [Completion(row, logp, [1] * len(row), reason, "", reward) for row, logp, reason, reward in parts]
        groups.append(Group(trainer.rows[i], trainer.rows[i]["prompt_ids"], completions))
    return groups


def train_on(trainer, groups):
    return trainer.train_on(groups, trainer.advantages(groups)[1])


def mean_kl(model, groups, reference_logps):
    """The mean of exp(d) - d - 1 over all tokens, with d the reference's log-prob less the model's."""
    gaps = np.concatenate(reference_logps) - np.concatenate(completion_logps(model, groups))
    return np.mean(np.exp(gaps) - gaps - 1)


def completion_logps(model, groups):
    """Each completion's log-probs, from a forward of its own."""
    return [np.array(reference_stats(model, group.prompt, c.ids, 1.0)[0]) for group in groups for c in group.completions]


def set_rewards(group, rewards):
    """rewards: (F, G)"""
    for completion, values in zip(group.completions, np.array(rewards).T.tolist()):
        completion.rewards = values


def whole_gradient(trainer, groups, micro_batch_tokens, stored=()):
    trainer.learner.config = dataclasses.replace(trainer.config, micro_batch_tokens=micro_batch_tokens)
    batches = trainer.learner.prepare(groups, trainer.advantages(groups)[1])
    rng_shift = 0.3
    total, grads = 0.0, None
    for batch in batches:
        if "old" in stored:
            logps = trainer.learner.log_probs(batch)[0]
            batch["old_logps"] = logps + rng_shift * mx.sin(batch["ids"].astype(mx.float32))
        loss, _, part = trainer.learner.gradient(batch)
        grads = part if grads is None else tree_map(mx.add, grads, part)
        total += loss.item()
    return len(batches), total, grads


@pytest.mark.parametrize("loss_type", mlx_grpo.LOSSES)
def test_micro_batches_add_up_to_the_whole_batchs_gradient(tmp_path, loss_type):
    trainer = trainer_of(tmp_path, f"loss_type={loss_type}", "mask_truncated_completions=true", "kl_coeff=0")
    groups = groups_of(trainer)
    one, loss, grads = whole_gradient(trainer, groups, 10**6, ["old"])
    assert one == 1
    for budget in (200, 130, 1):
        many, split_loss, split_grads = whole_gradient(trainer, groups, budget, ["old"])
        assert many > 1
        assert split_loss == pytest.approx(loss, rel=1e-4, abs=1e-6)
        assert largest_gap(split_grads, grads) < 1e-4
    assert many == 8  # two groups with signal of four rows: at the smallest budget one row a batch


def with_a_near_sampler(trainer, groups):
    """The groups as a sampler would have written them that is not far from the policy, nor the policy itself."""
    for group in groups:
        prompt = mlx_grpo.left_pad([group.prompt], len(group.prompt))
        for i, completion in enumerate(group.completions):
            batch = {"prompts": prompt[0], "pads": prompt[1], "ids": mx.array([completion.ids])}
            logps = np.array(trainer.learner.log_probs(batch)[0][0])
            completion.sampler_logps = (logps + 0.5 * np.sin(np.arange(len(logps)) + 1) + 0.3 * (-1) ** i).tolist()
    return groups


@pytest.mark.parametrize(
    "count, options",
    [
        (10, ["loss_type=vespo", "sampler_correction=token_truncate", "num_generations=2"]),  # nine have a signal: padded to the shape of 10
        (3, ["importance_sampling_level=sequence", "advantage_estimator=rloo", "kl_coeff=0.1"]),
        (3, ["loss_type=cispo", "clip_eps_high=1.1", "top_entropy_quantile=0.6", "entropy_coef=0.05"]),
    ],
)
def test_a_steps_record_does_not_depend_on_its_micro_batches(tmp_path, count, options):
    records = {}
    for budget in (10**6, 150):
        trainer = trainer_of(tmp_path, "num_iterations=2", "learning_rate=0.001", "warmup_ratio=0", f"micro_batch_tokens={budget}", *options)
        records[budget] = train_on(trainer, with_a_near_sampler(trainer, groups_of(trainer, count)))
    for one, other in zip(*records.values()):
        assert one == pytest.approx(other, rel=5e-3, abs=1e-4) and one["grad_norm"] > 1e-4


def entry_of_the_page(heading):
    """Name and value of the table's line in a section of CONTRIBUTING.md, made as it says with the function before it."""
    section = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    function, line = (textwrap.dedent(block.split("   ```")[0]) for block in section.split("```python\n")[1:])
    script = dict(vars(mlx_grpo.script))
    exec(function, script)
    [(name, entry)] = eval("{" + line + "}", script).items()
    return name, entry


@pytest.mark.parametrize("heading, table, setting", [("Adding a loss", "LOSSES", "loss_type"), ("Adding an estimator", "ESTIMATORS", "advantage_estimator")])
def test_what_is_added_as_contributing_says_trains(tmp_path, monkeypatch, heading, table, setting):
    name, entry = entry_of_the_page(heading)
    with pytest.raises(mlx_grpo.UserError, match=f"Invalid {setting}: '{name}'"):
        load_config(None, [f"{setting}={name}"])
    monkeypatch.setitem(getattr(mlx_grpo, table), name, entry)
    records = {}
    for budget in (10**6, 1):
        trainer = trainer_of(tmp_path, f"{setting}={name}", f"micro_batch_tokens={budget}", "loss_type=bnpo" if table == "ESTIMATORS" else "clip_eps=0.2")
        start = {k: np.array(v) for k, v in trainable_arrays(trainer.model).items()}
        groups = groups_of(trainer)
        records[budget] = train_on(trainer, groups)[0]
        assert any((np.array(v) != start[k]).any() for k, v in trainable_arrays(trainer.model).items())
    assert records[1] == pytest.approx(records[10**6], rel=1e-3, abs=1e-5)
    # On-policy either example is the plain policy gradient over the batch's tokens; here by hand, of its value.
    rewards = np.array([[sum(c.rewards) for c in group.completions] for group in groups])  # (B, G)
    lengths = np.array([[len(c.ids) for c in group.completions] for group in groups])
    if table == "ESTIMATORS":
        rewards[1] = 0  # no signal
        assert records[1]["loss"] == pytest.approx(-(rewards * lengths).sum() / lengths.sum(), rel=1e-4)


def test_an_estimator_may_have_a_say_for_each_token(tmp_path, monkeypatch):
    seen = []

    def by(factor):
        def tokens(advantages, old_logps, ref_logps, mask):
            seen.append((advantages.shape, old_logps.shape, ref_logps.shape, mask.shape))
            return factor * advantages[:, None] * mask

        return mlx_grpo.Estimator(mlx_grpo.leave_one_out, tokens=tokens)

    records = {}
    monkeypatch.setitem(mlx_grpo.ESTIMATORS, "same", by(1.0))
    monkeypatch.setitem(mlx_grpo.ESTIMATORS, "double", by(2.0))
    for name in ("rloo", "same", "double"):
        trainer = trainer_of(tmp_path, f"advantage_estimator={name}", "kl_coeff=1e-6", "max_grad_norm=0")
        records[name] = train_on(trainer, groups_of(trainer))[0]
    assert all(shape[0] == (shapes[1][0],) for shapes in seen for shape in [shapes]) and seen[0][1] == seen[0][2] == seen[0][3]
    assert records["same"]["grad_norm"] == pytest.approx(records["rloo"]["grad_norm"], rel=1e-4)
    assert records["double"]["grad_norm"] == pytest.approx(2 * records["rloo"]["grad_norm"], rel=1e-3)


def test_adaptive_entropy_moves_the_coefficient_and_pays_once_the_entropy_is_low(tmp_path):
    trainer = trainer_of(tmp_path, "use_adaptive_entropy=true", "entropy_coef=0.1", "entropy_target=9", "entropy_coef_delta=0.01",
                         "num_iterations=3", "use_compile=true", "learning_rate=0")  # fmt: skip
    records = train_on(trainer, groups_of(trainer))
    assert [record["entropy_coef"] for record in records] == pytest.approx([0.0, 0.11, 0.12]) and trainer.state.entropy_coef == pytest.approx(0.13)
    entropy = records[0]["entropy_trained"]
    assert trainer.state.last_entropy == pytest.approx(entropy) and 0 < entropy < 9
    for record in records[1:]:  # the weights stand still: what the loss changes by is the bonus
        assert record["loss"] - records[0]["loss"] == pytest.approx(-record["entropy_coef"] * entropy, rel=1e-4)


def dry_run(trainer, groups):
    mlx_grpo.dry_run(trainer.learner, groups, trainer.work)


def test_a_dry_run_says_what_its_gradient_was_and_does_not_pass_one_that_is_not_finite(tmp_path, capsys, monkeypatch):
    trainer = trainer_of(tmp_path)
    monkeypatch.setattr(mlx_grpo.script, "stream_count", lambda: 8)  # room for every micro-batch
    group = groups_of(trainer)[:1]
    dry_run(trainer, group)
    said = capsys.readouterr().out.rpartition("dry run ")[2]
    tokens, norm = int(said.split()[0]), float(said.split("gradient norm ")[1].split(")")[0])
    made_up = np.linspace(-1, 1, trainer.config.num_generations)
    assert tokens == sum(len(c.ids) for c in group[0].completions)
    assert norm == pytest.approx(plain_gradient_norm(trainer, group, made_up), rel=0.01)
    trainer.model.model.norm.weight = mx.full(trainer.model.model.norm.weight.shape, mx.nan)
    with pytest.raises(mlx_grpo.RunError, match="^NaN gradient encountered: in the first backward pass"):
        dry_run(trainer, group)


def plain_gradient_norm(trainer, groups, advantages):
    """Of REINFORCE's gradient, each row's mean over its tokens, by a forward for each completion."""
    rows = [(group.prompt, c.ids) for group in groups for c in group.completions]

    def loss(model):
        means = [reference_stats(model, prompt, ids, 1.0)[0].mean() for prompt, ids in rows]
        return -(mx.stack(means) * mx.array(advantages.reshape(-1), dtype=mx.float32)).mean()

    gradient = nn.value_and_grad(trainer.model, loss)(trainer.model)[1]
    return math.sqrt(sum((g * g).sum().item() for _, g in tree_flatten(gradient)))


def test_on_policy_the_ratio_is_one_and_the_gradient_is_reinforces(tmp_path):
    trainer = trainer_of(tmp_path)
    groups = trainer.rollout(3, mlx_grpo.Stopwatch())
    wanted = plain_gradient_norm(trainer, groups, trainer.advantages(groups)[1])
    record = train_on(trainer, groups)[0]
    assert record["grad_norm"] == pytest.approx(wanted, rel=1e-3) and wanted > 0
    assert record["clip_ratio/region_mean"] == 0.0
    assert record["mismatch/max"] < 1e-3  # the rollout's log-probs are the training forward's


@pytest.fixture
def compiled_at_once(monkeypatch):
    """A device on which a shape is compiled the first time that it comes."""
    monkeypatch.setattr(mlx_grpo.script, "compiling_pays", lambda: True)
    monkeypatch.setattr(compiled_shapes, "updates_to_earn_it", lambda: 1)


ON_POLICY = [("num_iterations=2",), ("num_iterations=2", "top_entropy_quantile=0.5", "use_adaptive_entropy=true"), ("top_entropy_quantile=0.5", "use_compile=true")]


@pytest.mark.parametrize("extra", ON_POLICY)
def test_a_rollouts_first_update_has_a_ratio_of_exactly_one(tmp_path, monkeypatch, compiled_at_once, extra):
    """Also where another forward's log-probs, rounded otherwise, came before it; and the updates that follow are not on policy."""
    ratios, honest = [], mlx_grpo.grpo_loss

    def seen(logps, old_logps, *args, **options):
        ratios.append(mx.exp(logps - old_logps))
        return honest(logps, old_logps, *args, **options)

    trainer = trainer_of(tmp_path, *extra)
    learner, groups = trainer.learner, groups_of(trainer)
    forward = CompletionLogProbs.__call__
    with monkeypatch.context() as before:  # a forward that comes before and is rounded otherwise
        before.setattr(CompletionLogProbs, "__call__", lambda self, batch: tuple(x + 1e-3 for x in forward(self, batch)))
        batches = learner.prepare(groups, trainer.advantages(groups)[1])
        mx.eval([batch.get("old_logps", batch["mask"]) for batch in batches])
    monkeypatch.setattr(mlx_grpo.script, "grpo_loss", seen)
    for i in range(trainer.config.num_iterations):
        del ratios[:]
        learner.step(batches, 1e-3, 0.0)
        last = np.concatenate([np.array(r).ravel() for r in ratios[1::2]])  # every second one is of the metrics, evaluated
        assert (last == 1).all() == (i == 0), i


def test_a_rollout_used_twice_has_one_forward_an_update(tmp_path, monkeypatch):
    calls, forward = [], CompletionLogProbs.__call__
    monkeypatch.setattr(CompletionLogProbs, "__call__", lambda self, batch: calls.append(1) or forward(self, batch))
    once, twice = trainer_of(tmp_path, "warmup_ratio=0"), trainer_of(tmp_path, "num_iterations=2", "warmup_ratio=0")
    first = train_on(once, groups_of(once))
    parts = len(calls)  # micro-batches
    records = train_on(twice, groups_of(twice))
    assert len(calls) == 3 * parts and records[0]["loss"] == first[0]["loss"] and records[0]["grad_norm"] == first[0]["grad_norm"]
    assert records[1]["loss"] != records[0]["loss"]


def test_compiled_and_eager_updates_agree(tmp_path, compiled_at_once):
    results = []
    for flag in ("true", "false"):
        trainer = trainer_of(tmp_path, f"use_compile={flag}", "loss_type=dapo")
        results.append((train_on(trainer, groups_of(trainer))[0], trainable_arrays(trainer.model)))
    assert results[0][0]["grad_norm"] == pytest.approx(results[1][0]["grad_norm"], rel=1e-4)
    for name, weight in results[0][1].items():
        np.testing.assert_allclose(np.array(weight), np.array(results[1][1][name]), atol=2e-4)


def test_a_batch_without_signal_changes_nothing(tmp_path):
    trainer = trainer_of(tmp_path)
    before = {k: np.array(v) for k, v in trainable_arrays(trainer.model).items()}
    groups = groups_of(trainer)
    for group in groups:
        set_rewards(group, np.full((5, 4), 0.1))
    record = train_on(trainer, groups)[0]
    assert record["skipped"] == "no signal"
    for name, weight in trainable_arrays(trainer.model).items():
        assert (np.array(weight) == before[name]).all()


def test_a_non_finite_gradient_never_reaches_the_weights(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, "max_nan_updates=2")
    before = {k: np.array(v) for k, v in trainable_arrays(trainer.model).items()}
    groups = groups_of(trainer)
    good = trainer.learner.gradient
    trainer.learner.gradient = lambda batch: (*good(batch)[:2], tree_map(lambda g: g * mx.nan, good(batch)[2]))
    assert train_on(trainer, groups)[0]["skipped"] == "non-finite gradient"
    for name, weight in trainable_arrays(trainer.model).items():
        assert (np.array(weight) == before[name]).all()
    trainer.rollout = lambda count, watch: (watch.seconds.update(rollout=1.0), groups)[1]
    trainer.learner.probe_memory = lambda *_: None
    with pytest.raises(mlx_grpo.RunError, match="^NaN gradient encountered: 2 updates in a row"):
        trainer.train()
    assert [p.name for p in trainer.run_dir.glob("checkpoint-*")] == ["checkpoint-2"]


def test_the_reference_is_the_policy_at_first_and_stays_behind(tmp_path):
    trainer = trainer_of(tmp_path, "kl_coeff=0.1")
    groups = groups_of(trainer)
    at_first = completion_logps(trainer.model, groups)
    assert train_on(trainer, groups)[0]["kl"] == pytest.approx(0, abs=1e-9)
    wanted = mean_kl(trainer.model, groups, at_first)
    assert train_on(trainer, groups)[0]["kl"] == pytest.approx(wanted, rel=1e-3) and wanted > 0


def test_the_adapters_reference_is_the_base(tmp_path):
    for kind in ("lora", "dora"):
        trainer = trainer_of(tmp_path, "kl_coeff=0.1", f"fine_tune_type={kind}")
        assert all(k.rsplit(".", 1)[-1] in ("lora_a", "lora_b", "m") for k in trainable_arrays(trainer.model))
        groups = groups_of(trainer)
        at_first = completion_logps(trainer.model, groups)  # B begins as zeros
        assert train_on(trainer, groups)[0]["kl"] == pytest.approx(0, abs=1e-6)
        wanted = mean_kl(trainer.model, groups, at_first)
        assert train_on(trainer, groups)[0]["kl"] == pytest.approx(wanted, rel=1e-3) and wanted > 0


def test_the_adapters_of_a_half_precision_model_are_as_it_is_but_for_dora(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "half_is_slow", lambda: False)  # as on a GPU
    model, tokenizer, config = mlx_grpo.open_model("starter/model")
    model.set_dtype(mx.bfloat16)
    folder = tmp_path / "half"
    folder.mkdir()
    save_model(folder, model, tokenizer, config, Path("starter/model"), load_config())
    for kind, dtype in (("lora", mx.bfloat16), ("dora", mx.float32)):
        trainer = trainer_of(tmp_path, f"model_name={folder}", f"fine_tune_type={kind}", "learning_rate=1e-4")
        adapters = trainable_arrays(trainer.model)
        assert {a.dtype for name, a in adapters.items() if "lora_" in name} == {dtype}
        assert trainer.model(mx.array([[1, 2]])).dtype == mx.bfloat16
        masters = [a for name, a in tree_flatten(trainer.learner.optimizer.state) if name.endswith("master")]
        assert len(masters) == (len(adapters) if kind == "lora" else 0) and all(a.dtype == mx.float32 for a in masters)
        train_on(trainer, groups_of(trainer))
        moved = [name for name, a in trainable_arrays(trainer.model).items() if mx.any(a != adapters[name]).item()]
        assert any("lora_b" in name for name in moved)


@pytest.mark.parametrize("overrides", [(), ("quantize_for_rollouts=true", "group_size=32"), ("sync_every=2",), ("fine_tune_type=lora", "sync_every=2")])
def test_a_sampler_keeps_its_decoder_and_gets_the_policys_weights(overrides, tmp_path):
    trainer = trainer_of(tmp_path, *overrides)
    before, frozen = trainer.old_policy.decoder, dict(tree_flatten(trainer.model_old.parameters()))
    trainer.model.update(tree_map(lambda w: w + 0.5, trainer.model.trainable_parameters()))
    trainer.old_policy.refresh()
    assert trainer.old_policy.decoder is before and trainer.old_policy.decoder.model is trainer.model_old
    expected = trainer.old_policy.copy(None) if overrides else trainer.model
    now, fresh = (dict(tree_flatten(model.parameters())) for model in (trainer.model_old, expected))
    assert now.keys() == fresh.keys() and all(mx.array_equal(now[name], fresh[name]) for name in now)
    assert any(not mx.array_equal(now[name], frozen[name]) for name in now)


def test_quantised_rollouts_are_measured_and_corrected(tmp_path):
    trainer = trainer_of(tmp_path, "quantize_for_rollouts=true", "group_size=32")
    assert mlx_grpo.is_quantized(trainer.model_old) and not mlx_grpo.is_quantized(trainer.model)
    assert trainer.config.correction == "token_truncate"
    record = train_on(trainer, trainer.rollout(3, mlx_grpo.Stopwatch()))[0]
    assert record["mismatch/max"] > 1e-3


def test_a_half_precision_policy_keeps_float32_masters():
    """Steps far below bfloat16's resolution must add up."""
    layer = nn.Linear(4, 4, bias=False)
    layer.set_dtype(mx.bfloat16)
    start = np.array(layer.weight.astype(mx.float32))
    optimizer = mlx_grpo.MasterAdamW(load_config())
    optimizer.init(layer.trainable_parameters())
    optimizer.learning_rate = 1e-5
    for _ in range(2000):
        optimizer.update(layer, {"weight": mx.ones_like(layer.weight)})
    mx.eval(layer.parameters())
    np.testing.assert_allclose(np.array(layer.weight.astype(mx.float32)), start - 0.02, atol=2e-3)


def test_adam_is_bias_corrected():
    layer = nn.Linear(1, 1, bias=False)
    start = layer.weight.item()
    optimizer = mlx_grpo.MasterAdamW(load_config())
    optimizer.learning_rate = 0.1
    optimizer.update(layer, {"weight": mx.array([[0.5]])})
    assert layer.weight.item() == pytest.approx(start - 0.1, rel=1e-4)  # the first step is the learning rate


@pytest.mark.parametrize(
    "schedule, wanted",
    [
        ("constant", [0.6, 1.2, 1.2, 1.2, 1.2, 1.2, 1.2, 1.2, 1.2, 1.2]),
        ("linear", [0.6, 1.2, 1.2, 1.05, 0.9, 0.75, 0.6, 0.45, 0.3, 0.15]),
        ("cosine", [0.6, 1.2, 1.2] + [0.6 * (1 + cosine) for cosine in (0.92388, 0.70711, 0.38268, 0, -0.38268, -0.70711, -0.92388)]),
    ],
)  # fmt: skip
def test_each_schedule_by_hand(schedule, wanted):
    config = load_config(None, ["learning_rate=1.2", "warmup_ratio=0.2", f"lr_scheduler_type={schedule}"])
    assert [mlx_grpo.learning_rate(config, update, 10) for update in range(10)] == pytest.approx(wanted, abs=1e-5)
    config = load_config(None, ["learning_rate=1.2", "warmup_ratio=0", f"lr_scheduler_type={schedule}"])
    assert mlx_grpo.learning_rate(config, 0, 8) == 1.2


def run_and_read(tmp_path, name, *overrides):
    trainer = MLXGRPOTrainer(settings(tmp_path, f"run_name={name}", *overrides), tmp_path / name)
    trainer.run_dir.mkdir()
    trainer.train()
    return trainer, records_of(tmp_path / name)


def records_of(folder):
    timed = ("seconds", "tokens_per_s", "memory")
    lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not any(t in k for t in timed)} for line in lines]


def test_two_equal_runs_are_equal_to_the_bit(tmp_path):
    (a, log_a), (b, log_b) = (run_and_read(tmp_path, name, "max_train_samples=9") for name in "ab")
    assert log_a == log_b and len([r for r in log_a if "event" not in r]) == 3
    for name, weight in trainable_arrays(a.model).items():
        assert (np.array(weight) == np.array(trainable_arrays(b.model)[name])).all()
    c, log_c = run_and_read(tmp_path, "c", "max_train_samples=9", "seed=1")
    assert log_c != log_a


@pytest.mark.parametrize("extra", [[], ["fine_tune_type=lora", "kl_coeff=0.05"], ["sync_every=2", "num_iterations=1"]])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, extra):
    options = ["max_train_samples=12", "log_completions_steps=1", *extra]
    whole, log = run_and_read(tmp_path, "whole", *options)
    stopped = MLXGRPOTrainer(settings(tmp_path, "run_name=cut", *options), tmp_path / "cut")
    stopped.run_dir.mkdir()
    train_step = stopped.train_step

    def stop_after_the_first():
        records = train_step()
        stopped.request_stop(2)
        return records

    stopped.train_step = stop_after_the_first
    assert stopped.train() == {}
    resumed = MLXGRPOTrainer(settings(tmp_path, "run_name=cut", *options), tmp_path / "cut")
    resumed.resume(mlx_grpo.find_checkpoint(tmp_path / "cut", ""))
    assert resumed.state.update == 1
    resumed.train()
    assert records_of(tmp_path / "cut") == log
    assert (tmp_path / "cut" / "completions.jsonl").read_text() == (tmp_path / "whole" / "completions.jsonl").read_text()
    for name, weight in trainable_arrays(whole.model).items():
        assert (np.array(weight) == np.array(trainable_arrays(resumed.model)[name])).all()


@pytest.mark.parametrize("extra", [[], ["fine_tune_type=lora"], ["fine_tune_type=dora"]])
def test_the_final_model_opens_in_mlx_lm_with_the_policys_logits(tmp_path, extra):
    from mlx_lm import load

    trainer, _ = run_and_read(tmp_path, "run", "max_train_samples=6", *extra)
    opened, tokenizer = load(str(tmp_path / "run" / "final"))
    ids = mx.array([trainer.rows[0]["prompt_ids"]])
    trainer.model.eval()
    np.testing.assert_allclose(np.array(opened(ids)), np.array(trainer.model(ids)), atol=1e-3)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], add_generation_prompt=True)
    if extra:
        adapted, _ = load("starter/model", adapter_path=str(tmp_path / "run" / "final"))
        np.testing.assert_allclose(np.array(adapted(ids)), np.array(trainer.model(ids)), atol=1e-4)


def test_a_quantised_model_trains_through_adapters_only(tmp_path):
    model, tokenizer, config = mlx_grpo.open_model("starter/model")
    nn.quantize(model, 32, 4, class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0)
    folder = tmp_path / "q4"
    folder.mkdir()
    config["quantization"] = {"group_size": 32, "bits": 4}
    save_model(folder, model, tokenizer, config, Path("starter/model"), load_config())
    with pytest.raises(mlx_grpo.UserError, match="is quantised and cannot be trained in full"):
        trainer_of(tmp_path, f"model_name={folder}", "fine_tune_type=full")
    trainer, records = run_and_read(tmp_path, "qlora", f"model_name={folder}", "max_train_samples=6")
    assert trainable_arrays(trainer.model) and all("lora" in name for name in trainable_arrays(trainer.model))
    assert any(record.get("grad_norm", 0) > 0 for record in records)
    from mlx_lm import load

    opened, _ = load(str(tmp_path / "qlora" / "final"))
    ids = mx.array([trainer.rows[0]["prompt_ids"]])
    trainer.model.eval()
    np.testing.assert_allclose(np.array(opened(ids)), np.array(trainer.model(ids)), atol=2e-2)


def test_dynamic_sampling_replaces_groups_without_signal(tmp_path):
    trainer = trainer_of(tmp_path, "dynamic_sampling_max_batches=3")
    real, calls, trained = trainer.rollout, [], []

    def rollout(count, watch):
        groups = real(count, watch)
        calls.append(count)
        for i, group in enumerate(groups):
            set_rewards(group, np.arange(20.0).reshape(5, 4) if len(calls) > 1 or i == 0 else np.ones((5, 4)))
        return groups

    trainer.rollout = rollout
    trainer.train_on = lambda groups, advantages: trained.extend(groups) or []
    trainer.train_step()
    assert calls == [3, 2] and trainer.state.cursor == 5
    assert len(trained) == 3 and all(trainer.advantages([group])[1].any() for group in trained)


@pytest.mark.slow
def test_the_quickstart_learns(tmp_path):
    """The bundled configuration takes held-out exact match from under 40% to over 90%, from the command line."""
    assert mlx_grpo.main(["--set", f"output_dir={tmp_path}", "--set", "seed=1"]) == 0
    evaluations = [r for r in records_of(tmp_path / "quickstart") if r.get("event") == "eval" and r["split"] == "test"]
    assert evaluations[0]["update"] == 0 and evaluations[0]["em_strict"] < 0.4
    assert evaluations[-1]["update"] <= 100 and evaluations[-1]["em_strict"] > 0.9


# Every setting of the objective reaches the weights

OFF_POLICY = ["num_iterations=2", "learning_rate=0.0005", "warmup_ratio=0", "lr_scheduler_type=constant"]
VARIANTS = {
    "grpo": [],
    **{loss: [f"loss_type={loss}"] for loss in mlx_grpo.LOSSES if loss != "grpo"},
    **{name: [f"advantage_estimator={name}"] for name in mlx_grpo.ESTIMATORS if name not in ("group", "maxrl")},
    "sequence level": ["importance_sampling_level=sequence"],
    "clip_eps": ["clip_eps=0.01"],
    "clip_eps_high": ["clip_eps_high=0.9"],
    "delta": ["delta=1.01"],
    "kl": ["kl_coeff=0.5"],
    "kl, corrected": ["kl_coeff=0.5", "use_bias_correction_kl=true"],
    "batch scale": ["scale_rewards=batch"],
    "no scale": ["scale_rewards=none"],
    "normalize_then_sum": ["multi_objective_aggregation=normalize_then_sum"],
    "reward weights": ["reward_weights=[1.0, 0.0, 0.0, 0.0, 3.0]"],
    "masked truncated": ["mask_truncated_completions=true"],
    "top entropy": ["top_entropy_quantile=0.3"],
    "entropy bonus": ["entropy_coef=0.1"],
    "off-policy mask": ["off_policy_mask_threshold=0.1"],
    "token_truncate": ["sampler_correction=token_truncate", "sampler_correction_max=1.2"],
    "token_mask": ["sampler_correction=token_mask", "sampler_correction_max=1.2"],
    "sequence_truncate": ["sampler_correction=sequence_truncate", "sampler_correction_max=1.2"],
    "sequence_mask": ["sampler_correction=sequence_mask", "sampler_correction_max=1.2"],
    "lower maximum": ["sampler_correction=token_truncate", "sampler_correction_max=0.1"],
    "minimum": ["sampler_correction=token_truncate", "sampler_correction_min=0.9"],
    "vespo, corrected": ["loss_type=vespo", "sampler_correction=token_truncate", "sampler_correction_max=1.2"],
    "adaptive entropy": ["use_adaptive_entropy=true", "entropy_coef=0.1", "entropy_target=9"],
    "sapo, other gates": ["loss_type=sapo", "sapo_temperature_pos=3.0"],
    "sapo, other negative gate": ["loss_type=sapo", "sapo_temperature_neg=3.0"],
    "dr_grpo, longer": ["loss_type=dr_grpo", "max_completion_length=48"],
    "temperature": ["temperature=0.5"],
    "clipping": ["max_grad_norm=0.01"],
    "weight decay": ["weight_decay=0.1"],
    "beta1": ["adam_beta1=0.5"],
    "beta2": ["adam_beta2=0.9"],
}


def updated(tmp_path, options):
    trainer = trainer_of(tmp_path, *OFF_POLICY, *options)
    # A sampler not far from the policy, so that the corrections are neither all 1 nor all 0.
    records = train_on(trainer, with_a_near_sampler(trainer, groups_of(trainer)))
    return records, np.concatenate([np.array(w).ravel() for w in trainable_arrays(trainer.model).values()])


def test_every_objective_and_every_option_changes_the_weights(tmp_path):
    results = {name: updated(tmp_path, options)[1] for name, options in VARIANTS.items()}
    names = list(results)
    same = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if np.allclose(results[a], results[b], rtol=0, atol=1e-7)]
    # A step takes the whole generation batch, so its tokens (bnpo) are the generation batch's (dapo).
    assert same == [("bnpo", "dapo")]


@pytest.mark.parametrize("options", [["importance_sampling_level=sequence"], ["top_entropy_quantile=0.3"], ["kl_coeff=0.1"], ["entropy_coef=0.01"]])
def test_options_hold_in_micro_batches_and_compiled(tmp_path, compiled_at_once, options):
    whole = updated(tmp_path, options)[1]
    split = updated(tmp_path, [*options, "micro_batch_tokens=150"])[1]
    compiled = updated(tmp_path, [*options, "use_compile=true"])[1]
    spread = np.abs(whole - updated(tmp_path, ["learning_rate=0"])[1]).max()
    assert np.quantile(np.abs(split - whole), 0.99) < 0.02 * spread and np.quantile(np.abs(compiled - whole), 0.99) < 0.02 * spread
