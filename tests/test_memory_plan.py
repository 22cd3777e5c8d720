"""The memory plan against worked numbers, and against what a step really holds."""

from dataclasses import replace

import mlx.core as mx
import pytest
from mlx_lm.models.llama import TransformerBlock
from test_training import trainer_of

from memory_plan import GB, Work, plan, suggestions, work_of

WORK = Work(
    weights=1000, trained=250, item=4, hidden=10, wide=20, scores=4, layers=3, vocabulary=50, kv_per_token=6, rows=8, generations=4,
    shares_prompts=True, prompt=5, completion=10, has_reference=False, micro_batch_tokens=10**6, grad_checkpoint=False,
    head_chunk=10**6, lanes=1, kv_budget=10**6,
)  # fmt: skip


def test_a_plan_by_hand():
    parts = plan(WORK)
    positions = 2 * 5 + 8 * 10  # two prompts once, eight completions
    assert parts["activations"] == positions * 3 * (80 + 60 + 4 * 15) * 4 + 8 * 5 * 6  # and the prompts' KV for each row
    assert parts["optimizer"] == 2000 and parts["gradients"] == 1000 and parts["KV cache"] == 8 * 15 * 6
    assert parts["head"] == 20 * 80 * 50
    assert parts["peak"] == 3000 + 1000 + parts["activations"] + parts["head"]
    assert plan(replace(WORK, lanes=2))["peak"] == parts["peak"] + 1000


def test_half_precision_keeps_master_weights_and_checkpointing_one_layer():
    assert plan(replace(WORK, item=2))["optimizer"] == 250 * 12
    checkpointed = plan(replace(WORK, grad_checkpoint=True))
    assert checkpointed["activations"] == (2 * 5 + 8 * 10) * (3 * 10 + 200) * 4 + 8 * 5 * 6
    assert plan(replace(WORK, micro_batch_tokens=45))["activations"] == plan(WORK)["activations"] // 2


def test_smaller_machines_get_harder_settings():
    large = replace(WORK, weights=3 * GB, trained=3 * GB // 2, item=2, layers=28, hidden=1536, wide=8960, scores=24, vocabulary=150_000,
                    kv_per_token=28_672, rows=64, generations=8, prompt=200, completion=512, micro_batch_tokens=16384,
                    head_chunk=2**25, kv_budget=4 * GB)  # fmt: skip
    lines = suggestions(large)
    assert lines[0].startswith("8 GB:") and "fine_tune_type=lora" in lines[0] and "grad_checkpoint=true" in lines[0]
    assert lines[-1].startswith("64 GB:") and "lora" not in lines[-1]
    assert "too small" in suggestions(replace(large, weights=30 * GB))[0]


MANY = ("batch_size=6", "num_generations=8", "max_completion_length=64")


@pytest.mark.parametrize("extra", [(), ("fine_tune_type=lora",), MANY, (*MANY, "grad_checkpoint=true")])
def test_the_plan_is_near_what_a_step_holds(tmp_path, monkeypatch, extra):
    monkeypatch.setattr(TransformerBlock, "__call__", TransformerBlock.__call__)  # checkpointing patches it: until the test ends
    trainer = trainer_of(tmp_path, "stop_strings=[]", *extra)
    trainer.tokenizer.eos_token_ids = set()  # every completion is as long as it may be
    trainer.build_step()
    mx.clear_cache()
    elsewhere = mx.get_active_memory() - sum(a.nbytes for a in trainer.trainable().values())
    trainer.one_rollout()
    mx.reset_peak_memory()
    trainer.one_rollout()
    assert 0.6 < plan(work_of(trainer))["peak"] / (mx.get_peak_memory() - elsewhere) < 1.7
