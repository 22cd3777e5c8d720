"""Which directory a run takes: names that are free, free again, taken or in use."""

import json
from pathlib import Path

import pytest

import mlx_grpo
from mlx_grpo import UserError
from mlx_grpo.run.directory import choose_run_dir, lock_directory

EVALUATION, UPDATE = {"event": "eval", "update": 0, "split": "test"}, {"update": 1, "loss": 0.0}


def log(folder, *records):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training_log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_a_directory_without_an_update_is_used_again(tmp_path):
    first = log(tmp_path / "mine", EVALUATION)
    assert choose_run_dir(tmp_path, "mine", "config", None) == first
    assert choose_run_dir(tmp_path, "", "mine", None) == first
    log(first, EVALUATION, UPDATE)
    with pytest.raises(UserError, match="^Run directory holds a run already: "):
        choose_run_dir(tmp_path, "mine", "config", None)
    assert choose_run_dir(tmp_path, "", "mine", None) == tmp_path / "mine-2"


@pytest.mark.parametrize("name", ["checkpoint-3", "final"])
def test_a_directory_with_a_model_in_it_is_taken(tmp_path, name):
    (tmp_path / "mine" / name).mkdir(parents=True)
    assert choose_run_dir(tmp_path, "", "mine", None) == tmp_path / "mine-2"
    with pytest.raises(UserError, match="^Run directory holds a run already: "):
        choose_run_dir(tmp_path, "mine", "config", None)


def test_a_run_that_has_just_begun_keeps_its_number(tmp_path):
    first = log(tmp_path / "mine", EVALUATION)
    held = lock_directory(first)
    assert choose_run_dir(tmp_path, "", "mine", None) == tmp_path / "mine-2"
    held.close()
    assert choose_run_dir(tmp_path, "", "mine", None) == first


def test_resume_takes_the_newest_that_has_begun(tmp_path):
    assert choose_run_dir(tmp_path, "", "mine", "") == tmp_path / "mine"
    log(tmp_path / "mine", UPDATE)
    second = log(tmp_path / "mine-2", EVALUATION)
    assert choose_run_dir(tmp_path, "", "mine", "") == second
    assert choose_run_dir(tmp_path, "mine", "config", "") == tmp_path / "mine"


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choose_run_dir(Path("~/runs"), "mine", "config", None) == tmp_path / "runs" / "mine"
    assert choose_run_dir(Path("outputs"), "", "x", "~/runs/mine/checkpoint-3") == tmp_path / "runs" / "mine"


def test_a_run_that_fails_before_its_first_update_leaves_its_name_free(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.py").write_text("def fails(completions, **kwargs): return [1 / 0]\ndef works(completions, **kwargs): return [float(len(c[0]['content'])) for c in completions]\n")
    settings = [
        "model_name=starter/model", "dataset=starter/data", "output_dir=~/runs", "run_name=mine", "max_train_samples=2", "batch_size=2", "num_generations=2",
        "max_completion_length=6", "eval_samples=2", "use_compile=false",
    ]  # fmt: skip
    train = lambda name: mlx_grpo.main([p for s in [*settings, f'reward_funcs=["{tmp_path}/r.py:{name}"]'] for p in ("--set", s)])  # noqa: E731
    assert train("fails") == 1
    assert train("works") == 0
    lines = [json.loads(line) for line in (tmp_path / "runs" / "mine" / "training_log.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines if line.get("event") == "eval" and line["split"] == "test"] == [0, 1]  # nothing of the failed one
    assert train("works") == 2 and "Run directory holds a run already" in capsys.readouterr().err
