"""Half-precision models on CPUs: computed in float32, saved in their own precision, resumed to the bit."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_training import records_of, run_and_read, settings, trainer_of

import mlx_grpo
from mlx_grpo import MLXGRPOTrainer, load_config, trainable_arrays
from mlx_grpo.backends import precision
from mlx_grpo.run.directory import checkpoints
from mlx_grpo.export import save_model

STARTER = "starter/model"
pytestmark = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="GPUs compute half precision as it is")


def dtypes(model) -> set:
    return {a.dtype for _, a in tree_flatten(model.parameters())}


def weights_of(folder) -> dict:
    return mx.load(str(folder / "model.safetensors"))


def half_model(folder, half=mx.bfloat16, change=lambda model, config: None):
    """The starter in half precision, its first norm's weight in float32."""
    model, tokenizer, config = mlx_grpo.open_model(STARTER)
    model.set_dtype(half)
    model.layers[0].input_layernorm.set_dtype(mx.float32)
    change(model, config)
    folder.mkdir()
    save_model(folder, model, tokenizer, config, Path(STARTER), load_config())
    return folder


def quantised(model, config):
    nn.quantize(model, 32, 4, class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0)
    config["quantization"] = {"group_size": 32, "bits": 4}


SHORT = ("batch_size=2", "num_generations=3", "max_completion_length=8", "eval_samples=1", "save_steps=1", "stop_strings=[]")  # a run of few seconds
EXACT = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def half(request, tmp_path_factory):
    return half_model(tmp_path_factory.mktemp(request.param) / "model", getattr(mx, request.param)), request.param


def test_a_half_precision_model_is_opened_in_float32_and_says_so_once(half, capsys):
    folder, name = half
    model = mlx_grpo.open_model(str(folder))[0]
    assert dtypes(model) == {mx.float32} and model(mx.array([[1, 2, 3]])).dtype == mx.float32
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1 and f"{name}, computed in float32" in said.err
    for key, array in tree_flatten(model.parameters()):
        assert mx.array_equal(array, weights_of(folder)[key].astype(mx.float32)), key
    mlx_grpo.open_model(STARTER)
    assert not capsys.readouterr().err


def test_where_half_precision_is_fast_it_stays(half, monkeypatch, capsys):
    folder, name = half
    monkeypatch.setattr(precision, "half_is_slow", lambda: False)
    model = mlx_grpo.open_model(str(folder))[0]
    assert dtypes(model) == {getattr(mx, name), mx.float32} and not capsys.readouterr().err


@pytest.mark.parametrize("extra", [[], ["fine_tune_type=lora"], ["fine_tune_type=dora"]])
def test_what_a_run_saves_is_its_float32_weights_rounded(half, tmp_path, extra):
    from mlx_lm import load

    folder, name = half
    trainer, _ = run_and_read(tmp_path, "run", f"model_name={folder}", "max_train_samples=4", *SHORT, *extra)
    assert dtypes(trainer.model) == {mx.float32} and trainer.work.item == 4
    assert not any(key.endswith("master") for key, _ in tree_flatten(trainer.learner.optimizer.state))
    now = dict(tree_flatten(mlx_grpo.fused(trainer.model).parameters()))
    saved = weights_of(tmp_path / "run" / "final")
    assert {key for key, a in saved.items() if a.dtype == mx.float32} == {EXACT}
    assert all(mx.array_equal(now[key].astype(a.dtype), a) for key, a in saved.items())
    assert any(mx.any(a != weights_of(folder)[key]).item() for key, a in saved.items())  # it has learnt
    for checkpoint in (tmp_path / "run" / "final", *checkpoints(tmp_path / "run")):
        if extra and checkpoint.name != "final":  # adapters alone, which belong on their base
            opened = load(str(folder), adapter_path=str(checkpoint))[0]
        else:
            opened = load(str(checkpoint))[0]
        assert dtypes(opened) == {getattr(mx, name), mx.float32}
        if extra:
            kinds = {a.dtype for a in mx.load(str(checkpoint / "adapters.safetensors")).values()}
            assert kinds == {mx.float32 if "dora" in extra[0] else getattr(mx, name)}


COURSES = {"full": [], "lora": ["fine_tune_type=lora", "kl_coeff=0.05", "learning_rate=1e-2"], "dora": ["fine_tune_type=dora"], "stale": ["sync_every=2"]}


@pytest.mark.parametrize("course", COURSES)
def test_a_resumed_run_equals_an_uninterrupted_one(half, tmp_path, course):
    if half[1] == "float16" and course != "full":
        pytest.skip("the same as with bfloat16")
    options = [f"model_name={half[0]}", "max_train_samples=6", "log_completions_steps=1", *SHORT, *COURSES[course]]
    whole, log = run_and_read(tmp_path, "whole", *options)
    resumed = MLXGRPOTrainer(settings(tmp_path, "run_name=cut", *options), tmp_path / "cut")
    resumed.run_dir.mkdir()
    for name in ("training_log.jsonl", "completions.jsonl"):
        (resumed.run_dir / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    resumed.resume(tmp_path / "whole" / "checkpoint-1")
    resumed.train()
    assert records_of(tmp_path / "cut") == log
    for name, weight in trainable_arrays(whole.model).items():
        assert (np.array(weight) == np.array(trainable_arrays(resumed.model)[name])).all(), name


def test_a_checkpoint_without_its_float32_weights_is_refused(half, tmp_path):
    options = [f"model_name={half[0]}", "max_train_samples=4", *SHORT]
    trainer, _ = run_and_read(tmp_path, "run", *options)
    file = tmp_path / "run" / "checkpoint-1" / "optimizer.safetensors"
    kept = {name: a for name, a in mx.load(str(file)).items() if not name.endswith("master")}
    mx.eval(kept)
    mx.save_safetensors(str(file), kept)
    with pytest.raises(mlx_grpo.UserError, match="is not a checkpoint of this model"):
        trainer.resume(file.parent)


def test_checkpoints_go_from_a_cpu_to_a_gpu_and_back(half, tmp_path, monkeypatch):
    """Either holds the float32 weights, under the same names."""
    options = [f"model_name={half[0]}", "max_train_samples=4", *SHORT]
    wide, _ = run_and_read(tmp_path, "wide", *options)
    monkeypatch.setattr(precision, "half_is_slow", lambda: False)
    narrow = trainer_of(tmp_path, *options)
    narrow.resume(tmp_path / "wide" / "checkpoint-1")
    saved = mx.load(str(tmp_path / "wide" / "checkpoint-1" / "optimizer.safetensors"))
    state = dict(tree_flatten(narrow.learner.optimizer.state))
    assert set(state) == set(saved) and any(name.endswith("master") for name in state)
    for name, weight in trainable_arrays(narrow.model).items():
        assert weight.dtype == (mx.float32 if name == EXACT else getattr(mx, half[1]))
        if name != EXACT:
            assert mx.array_equal(weight, state[f"{name}.master"].astype(weight.dtype))
    narrow.state.update = 7
    narrow.save_checkpoint()
    monkeypatch.undo()
    wide.resume(narrow.run_dir / "checkpoint-7")
    assert all(mx.array_equal(weight, state.get(f"{name}.master", weight)) for name, weight in trainable_arrays(wide.model).items())


def test_a_quantised_models_scales_are_float32_and_its_merged_weights_are_not(tmp_path):
    folder = half_model(tmp_path / "q4", change=quantised)
    trainer, records = run_and_read(tmp_path, "run", f"model_name={folder}", "max_train_samples=4", "learning_rate=1e-2", *SHORT)
    assert dtypes(trainer.model) == {mx.uint32, mx.float32} and any(r.get("grad_norm", 0) > 0 for r in records)
    saved = {name: a.dtype for name, a in weights_of(tmp_path / "run" / "final").items()}
    assert set(saved.values()) <= {mx.uint32, mx.bfloat16, mx.float32} and [n for n, d in saved.items() if d == mx.float32] == [EXACT]
    assert "model.layers.0.self_attn.q_proj.scales" not in saved and saved["model.layers.0.self_attn.q_proj.weight"] == mx.bfloat16


def test_the_scripts_say_it_too(half, tmp_path, capsys):
    import sys

    sys.path.insert(0, "utils")
    import evaluate
    import inference

    assert inference.main(["--model", str(half[0]), "--prompt", "Add 2 and 3.", "--max-tokens", "2"]) == 0
    assert "computed in float32 on this CPU" in capsys.readouterr().err
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"question": "Add 2 and 3.", "answer": "5"}) + "\n")
    assert evaluate.main(["--model", str(half[0]), "--dataset", str(data), "--max-tokens", "2"]) == 0
    assert "computed in float32 on this CPU" in capsys.readouterr().err
