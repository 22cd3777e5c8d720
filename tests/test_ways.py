"""The plan's lines that say which way a run's rollouts and updates go, and why."""

import mlx.core as mx
import pytest
from test_precision import half_model
from test_training import trainer_of
from tiny import tiny_model

import mlx_grpo
from mlx_grpo.backends.cuda_decoding import CompiledDecoder
from mlx_grpo.rollout.kv_cache import reason_not_to_pad
from mlx_grpo.run import ways
from mlx_grpo.run.memory_plan import host_bytes, print_plan, work_of


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="GPUs compute half precision as it is")
def test_the_plan_says_how_rollouts_and_updates_go_and_in_which_precision(tmp_path):
    trainer = trainer_of(tmp_path, f"model_name={half_model(tmp_path / 'half')}")
    assert ways.plan_lines(trainer.learner, trainer.model_old, trainer.old_policy.decoder) == [
        "precision  bfloat16; computed in float32, which is faster on this CPU, and saved in bfloat16",
        "rollout    prompts of different length together; a position is not compiled",
        "update     a group's prompt computed once; not compiled",
    ]


def test_a_run_prints_them(tmp_path, capsys):
    overrides = ["max_train_samples=4", "eval_samples=1", "use_compile=false", f"output_dir={tmp_path}"]
    arguments = [part for setting in overrides for part in ("--set", setting)]
    assert mlx_grpo.main([*arguments, "--dry-run"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "rollout    prompts of different length together; a position is not compiled" in said
    assert "update     a group's prompt computed once; not compiled" in said and not any(line.startswith("precision") for line in said)


def test_a_slow_path_says_why():
    model = tiny_model("gemma2")
    reason = reason_not_to_pad(model)
    assert reason and f"prompts of one length at a time, which is slow: {reason};" in ways.rollout_way(model, False)
    assert f"whole sequences, prompts computed once a row: {reason};" in ways.update_way(model, False, False)
    assert "which is slow on CUDA" in ways.update_way(tiny_model("llama"), False, False)


def test_when_an_update_is_compiled(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(ways, "compiling_pays", lambda: False)
    assert ways.update_way(model, True, True).endswith("not compiled, which earns too little on CPUs")
    monkeypatch.setattr(ways, "compiling_pays", lambda: True)
    assert ways.update_way(model, True, True).endswith("a shape is compiled once it has come in 10 updates, 8 shapes at most")


def test_compiled_shapes_are_counted_in_the_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ways, "compiling_pays", lambda: True)
    model = tiny_model("llama")
    compiled, plain = CompiledDecoder(model), mlx_grpo.Decoder(model)
    assert ways.rollout_way(model, True).endswith("a position is compiled once the run has decoded 1,500 of them")
    found = [ways.compiled_shapes(decoder, True, updates) for decoder in (compiled, plain) for updates in (9, 10)]
    assert found == [8, 16, 0, 8] and ways.compiled_shapes(plain, False, 100) == 0
    trainer = trainer_of(tmp_path)
    work = work_of(trainer.learner, {50}, 12, 16)
    assert host_bytes(work) == 16 * len(trainer.model.layers) * 2**20 and host_bytes(trainer.work) == 0
    print_plan(work, trainer.config, 24, 4, 10, 1)
    assert "of the host's, for at most 16 compiled shapes" in capsys.readouterr().out
    print_plan(trainer.work, trainer.config, 24, 4, 10, 1)
    assert "compiled shapes" not in capsys.readouterr().out
