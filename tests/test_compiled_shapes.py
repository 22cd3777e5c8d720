"""Which shapes of an update are compiled: those that come again and again, few at a time, the same after a resume."""

import dataclasses
import json

import mlx.core as mx
import numpy as np
import pytest
from test_training import groups_of, records_of, settings, trainer_of

import mlx_grpo
from mlx_grpo import MLXGRPOTrainer, trainable_arrays
from mlx_grpo.update import compiled_shapes, micro_batches
from mlx_grpo.update.compiled_shapes import CompiledShapes, earned, note_shapes, shape_name
from mlx_grpo.update.micro_batches import grid


@pytest.fixture
def three_updates(monkeypatch):
    """A device on which compiling pays after three updates."""
    monkeypatch.setattr(compiled_shapes, "updates_to_earn_it", lambda: 3)
    monkeypatch.setattr(mlx_grpo.script, "compiling_pays", lambda: True)


def batch(width: int, rows: int = 2) -> dict:
    return {"prompts": mx.zeros((1, 4), mx.int32), "ids": mx.ones((rows, width), mx.int32)}


def noted(history: dict, widths: list[int], most: int = 8, first: int = 0) -> dict:
    """The history after updates of one micro-batch each, of these widths."""
    for update, width in enumerate(widths, first):
        note_shapes(history, [batch(width)], update, most)
    return history


def test_a_shape_says_what_it_is():
    assert shape_name(batch(8)) == "1x4 2x8" and shape_name(batch(8) | {"pads": mx.array([1])}) == "1x4 2x8 padded"


def test_a_shape_earns_it_by_updates_and_not_by_micro_batches(three_updates):
    history = {}
    for update in range(3):
        assert earned(history) == []
        note_shapes(history, [batch(8), batch(8), batch(16)] if update else [batch(8), batch(8)], update)
    assert earned(history) == ["1x4 2x8"] and history == {"1x4 2x8": [3, 2], "1x4 2x16": [2, 2]}


def test_the_least_recently_used_shape_makes_way_once_it_is_idle(three_updates):
    history = noted({}, [8] * 3 + [16] * 3 + [24] * 3, most=2)
    assert earned(history) == ["1x4 2x16", "1x4 2x24"]  # 8 had not come for six updates
    busy = noted({}, [8] * 3 + [16] * 3 + [24, 24, 8, 16, 24], most=2)
    assert earned(busy) == ["1x4 2x8", "1x4 2x16"] and "1x4 2x24" not in busy  # which starts again from nothing


def test_never_more_than_eight_and_the_history_alone_decides(three_updates):
    widths = np.random.default_rng(0).geometric(0.1, 400).tolist()
    whole = noted({}, widths)
    assert 1 < len(earned(whole)) <= compiled_shapes.MOST_SHAPES
    for cut in (7, 150, 399):
        half = json.loads(json.dumps(noted({}, widths[:cut])))  # as a checkpoint keeps it
        assert noted(half, widths[cut:], first=cut) == whole


def test_a_dropped_shape_is_freed_and_the_others_stay(three_updates):
    history, traces = {}, []

    def total(batch):
        traces.append(batch["ids"].shape)
        return batch["ids"].sum() + mx.array(np.zeros(500_000, np.int32)).sum()  # 2 MB that a trace keeps

    function = CompiledShapes(total, [], lambda: history)
    for update in range(3):
        note_shapes(history, [batch(8)], update, 1)
        assert function(batch(8)).item() == 16
    assert len(traces) == 3 and function(batch(8)).item() == 16 and len(traces) == 3  # two eager, one traced
    held = mx.get_active_memory()
    noted(history, [16] * 6, most=1, first=3)
    assert function(batch(24)).item() == 48 and not function.compiled
    assert mx.get_active_memory() < held - 1_000_000
    assert function(batch(16)).item() == 32 and list(function.compiled) == ["1x4 2x16"]


def test_few_shapes_on_gpus_and_no_padding_on_cpus(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)
    assert [grid(n) for n in (1, 9, 33)] == [1, 9, 33]
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert sorted({grid(n) for n in range(1, 300)}) == [8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384]
    assert sorted({grid(n, 1) for n in range(1, 17)}) == [1, 2, 3, 4, 6, 8, 12, 16] and all(grid(n) >= n for n in range(1, 300))


@pytest.fixture
def compiled(monkeypatch):
    """Names of the functions that are compiled from here on."""
    names, compile_function = [], mx.compile

    def recorded(function, *args, **kwargs):
        names.append(function.__name__)
        return compile_function(function, *args, **kwargs)

    monkeypatch.setattr(mx, "compile", recorded)
    return names


def test_a_short_run_compiles_the_optimizers_step_alone(tmp_path, compiled, three_updates):
    trainer = trainer_of(tmp_path)
    del compiled[:]
    trainer.learner.config = dataclasses.replace(trainer.config, use_compile=True)
    trainer.learner.gradient, trainer.learner.apply = trainer.learner.build(trainer.compute_grpo_loss)
    groups = groups_of(trainer)
    trainer.train_on(groups, trainer.advantages(groups)[1])
    trainer.learner.trial_gradient(groups)
    assert compiled == (["apply"] if mlx_grpo.compile_works() else []) and [count for count, _ in trainer.state.shapes.values()] == [1]


def test_a_run_that_compiles_resumes_to_the_bit(tmp_path, monkeypatch, compiled, three_updates):
    """Eager and compiled gradients differ by rounding: the run that goes on must switch where the other one did."""
    monkeypatch.setattr(micro_batches, "grid", lambda n, least=8: 2 if least == 1 else -(-n // 128) * 128)  # one shape alone
    options = [
        "use_compile=true", "num_generations=3", "batch_size=2", "max_completion_length=4", "stop_strings=[]", "max_train_samples=10",
        "eval_samples=1", "save_steps=1", "save_total_limit=0", "log_completions_steps=1", "micro_batch_tokens=100000",
    ]  # fmt: skip

    def trainer(name):
        made = MLXGRPOTrainer(settings(tmp_path, f"run_name={name}", *options), tmp_path / name)
        made.reward_functions = [lambda completions, **_: [float(sum(map(ord, c[0]["content"])) % 7) for c in completions]]
        made.reward_weights = [1.0]
        made.run_dir.mkdir()
        return made

    whole = trainer("whole")
    whole.train()
    assert whole.updates == 5 and earned(whole.state.shapes) and len(compiled) > compiled.count("apply")
    for update in (2, 4):
        cut = trainer(f"cut{update}")
        for name in ("training_log.jsonl", "completions.jsonl"):
            (cut.run_dir / name).write_bytes((whole.run_dir / name).read_bytes())
        cut.resume(whole.run_dir / f"checkpoint-{update}")
        cut.train()
        assert cut.state.shapes == whole.state.shapes and records_of(cut.run_dir) == records_of(whole.run_dir)
        for name, weight in trainable_arrays(whole.model).items():
            assert mx.array_equal(weight, trainable_arrays(cut.model)[name]), name
