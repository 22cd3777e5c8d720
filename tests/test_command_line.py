"""The program as its user starts it: plan, stop and resume, a full disk, two runs in one directory."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_grpo
from mlx_grpo.run.directory import complete_or_absent

ROOT = Path(mlx_grpo.__file__).parents[1]
SMALL = [
    "max_train_samples=60", "batch_size=3", "num_generations=4", "max_completion_length=24", "eval_samples=4", "eval_steps=0",
    "use_compile=false", "run_name=run",
]  # fmt: skip


def command(folder, *arguments, settings=()):
    pairs = [part for setting in [*SMALL, f"output_dir={folder}", *settings] for part in ("--set", setting)]
    return [sys.executable, str(ROOT / "mlx-grpo.py"), *pairs, *arguments]


@pytest.fixture
def started(child):
    def start(folder, *arguments, settings=()):
        line = command(folder, *arguments, settings=settings)
        return child(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)

    return start


def finished(folder, *arguments, settings=()):
    return subprocess.run(command(folder, *arguments, settings=settings), capture_output=True, text=True, cwd=folder, timeout=120)


def updates(folder):
    log = folder / "run" / "training_log.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    return [record["update"] for record in map(json.loads, lines) if "event" not in record]


def wait_for_update(process, folder, number):
    log = folder / "run" / "training_log.jsonl"
    for _ in range(3000):
        if log.is_file() and log.read_text().count('"grad_norm"') >= number:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("no update in five minutes")



def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    done = finished(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "updates    20 of 3 prompts x 4 completions" in done.stdout and "GB at the peak" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ctrl_c_saves_and_the_run_is_resumed_to_its_end(started, tmp_path):
    process = started(tmp_path)
    wait_for_update(process, tmp_path, 2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in error
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1
    again = finished(tmp_path)
    assert again.returncode == 2 and again.stderr.startswith("Run directory holds a run already:")
    resumed = finished(tmp_path, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert updates(tmp_path) == list(range(1, 21))
    assert "Held-out problems" in resumed.stdout
    base, final = (mx.load(str(folder / "model.safetensors")) for folder in (ROOT / "starter" / "model", tmp_path / "run" / "final"))
    assert final.keys() == base.keys()
    assert not any(mx.array_equal(final[name].astype(mx.float32), base[name].astype(mx.float32)) for name in base)



@pytest.mark.slow
def test_a_second_run_in_one_directory_is_refused_while_the_first_lives(started, tmp_path):
    process = started(tmp_path, settings=["save_steps=1"])
    wait_for_update(process, tmp_path, 2)
    second = finished(tmp_path, "--resume", settings=["save_steps=1"])
    process.kill()
    process.communicate()
    assert second.returncode == 2 and second.stderr.startswith("Run directory is in use by another process:")




def test_a_failed_save_is_one_line_and_leaves_earlier_checkpoints(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "kept").write_text("whole")

    def write(aside):
        (aside / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(mlx_grpo.RunError, match="^Failed to save checkpoint: .*No space left on device"):
        mlx_grpo.write_directory(folder, write)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"] and (folder / "kept").read_text() == "whole"


def test_what_stood_there_comes_back_where_the_new_directory_cannot_take_its_place(tmp_path, monkeypatch):
    folder, rename = tmp_path / "model", Path.rename
    folder.mkdir()
    (folder / "kept").write_text("whole")

    def refuse_the_new(path, target):
        if path.name == "new":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new)
    with pytest.raises(OSError, match="Input/output error"), complete_or_absent(folder) as aside:
        (aside / "half").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["model"] and (folder / "kept").read_text() == "whole"



def test_running_in_a_process_leaves_its_signal_handlers(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    pairs = [part for setting in [*SMALL, f"output_dir={tmp_path}", "max_train_samples=3"] for part in ("--set", setting)]
    assert mlx_grpo.main(pairs) == 0
    assert signal.getsignal(signal.SIGINT) is before
