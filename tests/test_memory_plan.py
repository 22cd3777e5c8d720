"""The memory plan against worked numbers, and against what a step really holds."""

import gc
from dataclasses import replace

import mlx.core as mx
import pytest
from mlx_lm.models.llama import TransformerBlock
from test_training import trainer_of

from mlx_grpo.run.memory_plan import GB, Work, plan, suggestions

WORK = Work(
    weights=1000, trained=250, item=4, hidden=10, wide=20, scores=4, layers=3, vocabulary=50, kv_per_token=6, rows=8, generations=4,
    shares_prompts=True, shares_padded=True, prompt=5, completion=10, has_reference=False, micro_batch_tokens=10**6,
    grad_checkpoint=False, head_chunk=10**6, streams=1, kv_budget=10**6, ahead=0, memory_limit=10**9,
)  # fmt: skip
LAYER = (80 + 60 + 4 * 15) * 4  # bytes of a position
PREFIXES = 8 * 5 * 6  # the prompts' KV, once a row


def test_a_plan_by_hand():
    parts = plan(WORK)
    positions = 2 * 5 + 8 * 10  # two prompts once, eight completions
    assert parts["activations"] == positions * 3 * LAYER + PREFIXES
    assert parts["optimizer"] == 2000 and parts["gradients"] == 1000 and parts["KV cache"] == 8 * 15 * 6
    assert parts["head"] == 20 * 80 * 50 and parts["their sum"] == 0
    assert parts["peak"] == 3000 + 1000 + parts["activations"] + max(parts["head"], positions * LAYER)
    assert plan(replace(WORK, streams=2))["peak"] == parts["peak"] + 1000
    assert plan(replace(WORK, vocabulary=1, hidden=1))["peak"] < plan(replace(WORK, vocabulary=1, hidden=1, trained=10**6))["peak"]
    assert plan(replace(WORK, shares_prompts=False))["activations"] == 8 * 15 * 3 * LAYER


def test_half_precision_keeps_master_weights_and_checkpointing_one_layer():
    assert plan(replace(WORK, item=2))["optimizer"] == 250 * 12
    checkpointed = plan(replace(WORK, grad_checkpoint=True))
    assert checkpointed["activations"] == (2 * 5 + 8 * 10) * 3 * 10 * 4 + PREFIXES
    wide = plan(replace(WORK, grad_checkpoint=True, vocabulary=1))  # no head to speak of: a layer's recomputation and all gradients
    assert wide["peak"] == 3000 + checkpointed["activations"] + 3 * (2 * 5 + 8 * 10) * LAYER


def test_micro_batches_hold_groups_of_an_equal_share_and_the_sum_of_gradients():
    assert plan(replace(WORK, micro_batch_tokens=45))["activations"] == plan(WORK)["activations"] // 2
    halves = plan(replace(WORK, micro_batch_tokens=89))  # one position too few
    assert halves["activations"] == plan(WORK)["activations"] // 2 and halves["their sum"] == 1000
    assert plan(replace(WORK, micro_batch_tokens=30))["activations"] == 30 * 3 * LAYER + 30 * 40 // 45 // 10 * 5 * 6  # rows of a group
    padded = replace(WORK, shares_padded=False, micro_batch_tokens=119)  # what is counted is 8 whole sequences
    assert plan(padded)["activations"] == plan(WORK)["activations"] // 2


def test_a_host_ahead_of_its_gpu_holds_more_up_to_the_limit():
    peak = plan(WORK)["peak"]
    assert plan(replace(WORK, ahead=5000))["peak"] == peak + 5000
    assert plan(replace(WORK, ahead=5000, memory_limit=peak + 300))["peak"] == peak + 300
    assert plan(replace(WORK, ahead=5000, memory_limit=10))["peak"] == peak
    assert plan(replace(WORK, ahead=10**9))["in flight"] == (2 * 5 + 8 * 10) * 3 * LAYER * 3 // 5  # no more than there is


def test_smaller_machines_get_harder_settings():
    large = replace(WORK, weights=3 * GB, trained=3 * GB // 2, item=2, layers=28, hidden=1536, wide=8960, scores=24, vocabulary=150_000,
                    kv_per_token=28_672, rows=64, generations=8, prompt=200, completion=512, micro_batch_tokens=16384,
                    head_chunk=2**25, kv_budget=4 * GB)  # fmt: skip
    lines = suggestions(large)
    assert lines[0].startswith("8 GB:") and "fine_tune_type=lora" in lines[0] and "grad_checkpoint=true" in lines[0]
    assert lines[-1].startswith("64 GB:") and "lora" not in lines[-1]
    assert "too small" in suggestions(replace(large, weights=30 * GB))[0]
    assert "lora" not in suggestions(replace(WORK, micro_batch_tokens=1))[0]  # which the ladder halves three times


MANY = ("batch_size=6", "num_generations=8", "max_completion_length=64")


@pytest.mark.parametrize("extra", [(), ("fine_tune_type=lora",), MANY, (*MANY, "grad_checkpoint=true")])
@pytest.mark.parametrize("compiled", ["true", "false"])
def test_the_plan_is_within_a_fifth_of_what_a_step_holds(tmp_path, monkeypatch, extra, compiled):
    monkeypatch.setattr(TransformerBlock, "__call__", TransformerBlock.__call__)  # checkpointing patches it: until the test ends
    gc.collect()
    elsewhere = mx.get_active_memory()
    trainer = trainer_of(tmp_path, "stop_strings=[]", f"use_compile={compiled}", *extra)
    trainer.tokenizer.eos_token_ids = set()  # every completion is as long as it may be
    trainer.reward_functions = [lambda completions, **_: [i % 2 for i in range(len(completions))]] * len(trainer.reward_functions)
    trainer.train_step()
    mx.reset_peak_memory()
    trainer.train_step()
    low, high = (0.8, 1.2) if mx.default_device() == mx.cpu else (0.6, 1.7)  # of so small a model, which no GPU is needed for
    assert low < plan(trainer.work)["peak"] / (mx.get_peak_memory() - elsewhere) < high
    del trainer
    gc.collect()
    assert mx.get_active_memory() - elsewhere < 10**6  # nothing of it is left
