"""Prompts shared in training by models with windows and states: whole sequences' log-probs and gradients, over the window too."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from test_training import batch_of, largest_gap, log_probs, reference_stats
from tiny import ARCHITECTURES, tiny_model

import mlx_grpo
from mlx_grpo.update import shared_prompts
from mlx_grpo.update.shared_prompts import prefill, reason_not_to_share

MIXED = ["gemma3_text", "mamba2", "lfm2", "qwen3_5"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_shares_but_the_one_whose_attention_takes_no_padding(name):
    reason = reason_not_to_share(tiny_model(name))
    assert bool(reason) == (name == "gemma2"), reason


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("name", MIXED)
def test_prompts_and_completions_over_the_window_equal_plain_sequences(name, equal):
    """Prompts of up to 20 ids, completions of up to 9, a window of 6; equal prompts have no padding, and no mask but the window's."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 96, n).tolist() for n in ((20, 20) if equal else (20, 13))]
    completions = [rng.integers(1, 96, n).tolist() for n in (9, 4, 1, 7)]
    model = tiny_model(name)
    model.train()
    batch = batch_of(prompts, completions, 20, 9)
    if equal:
        del batch["pads"]
    forward = log_probs(model)
    assert forward.share_prompts and forward.shares_padded

    def shared(model):
        return (forward(batch)[0] * batch["mask"]).sum()

    def plain(model):
        return sum(reference_stats(model, prompts[n // 2], c, 1.0)[0].sum() for n, c in enumerate(completions))

    value, grads = nn.value_and_grad(model, shared)(model)
    expected, expected_grads = nn.value_and_grad(model, plain)(model)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    assert largest_gap(grads, expected_grads) < 1e-4


@pytest.mark.parametrize("name", MIXED)
def test_a_prompt_of_one_id_beside_a_longer_one(name):
    model = tiny_model(name)
    prompts, completions = [[5], [7, 8, 9]], [[1, 2, 3], [4], [5, 6], [7, 8, 9]]
    logps = log_probs(model)(batch_of(prompts, completions, 3, 3))[0]
    for n, completion in enumerate(completions):
        expected = reference_stats(model, prompts[n // 2], completion, 1.0)[0]
        np.testing.assert_allclose(np.array(logps[n, : len(completion)]), np.array(expected), atol=1e-4)


@pytest.mark.parametrize("name", ["llama", *MIXED])
def test_equal_prompts_of_two_ids(name):
    """Their one position of cache lies in a buffer with room for more, which the completions must not see."""
    model = tiny_model(name)
    prompts, completions = [[5, 6], [7, 8]], [[1, 2, 3], [4], [5, 6], [7, 8, 9]]
    batch = batch_of(prompts, completions, 2, 3)
    del batch["pads"]
    logps = log_probs(model)(batch)[0]
    for n, completion in enumerate(completions):
        expected = reference_stats(model, prompts[n // 2], completion, 1.0)[0]
        np.testing.assert_allclose(np.array(logps[n, : len(completion)]), np.array(expected), atol=1e-4)


def test_a_window_that_nothing_has_left_needs_no_mask():
    """Attention without an array mask is fused on GPUs."""
    model = tiny_model("gemma3_text", sliding_window=12)
    window, full = prefill(model, mx.array([[1, 2, 3, 4, 5]]), None, 3)
    assert window.make_mask(8, window_size=12) == full.make_mask(8, return_array=False, window_size=None) == "causal"
    assert window.make_mask(9, window_size=12).shape == (9, 13)


def test_a_model_that_sharing_would_change_takes_whole_sequences(monkeypatch):
    model = tiny_model("mamba2")
    expected = log_probs(model)(batch_of())[0]
    monkeypatch.setattr(shared_prompts, "TRIED", {})
    honest = shared_prompts.map_rows
    monkeypatch.setattr(shared_prompts, "map_rows", lambda cache, change: honest(cache, lambda x: 0 * change(x)))  # states are lost
    assert reason_not_to_share(model) == "sharing a prompt changes what this model computes"
    forward = mlx_grpo.CompletionLogProbs(model, 1.0)
    mask = np.array(batch_of()["mask"])
    np.testing.assert_allclose(np.array(forward(batch_of())[0]) * mask, np.array(expected) * mask, atol=1e-4)
