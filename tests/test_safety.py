"""No work is lost and nothing gets in: exact resume, kills, full disks, torn logs, bad input, attacks, long runs."""

import ast
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_grpo.run import memory_plan
import mlx_grpo
from mlx_grpo import MLXGRPOTrainer, load_config
from mlx_grpo.update import compiled_shapes
from mlx_grpo.run.directory import checkpoints, damage, file_digest, remove_old_checkpoints

ROOT = Path(mlx_grpo.__file__).parents[1]
REWARD = """
def noise(completions, **kwargs):
    return [float(sum(map(ord, completion[0]["content"])) % 3) for completion in completions]
"""  # tells completions apart, and some groups not
TIMED = ("seconds", "tokens_per_s", "memory")


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """The report is a process of its own after each evaluation: slow, and tested elsewhere."""
    monkeypatch.setattr(mlx_grpo.script, "write_report", lambda run_dir: None)


def small(folder, *extra):
    """Settings of a run of a few updates in FOLDER/run, saved at every one; 7 prompts, 2 at a time: it is mostly mid-epoch."""
    (folder / "noise.py").write_text(REWARD)
    return [
        "model_name=starter/model", "dataset=starter/data", f"output_dir={folder}", "run_name=run", "max_train_samples=7",
        "batch_size=2", "num_generations=3", "num_epochs=1.8", "max_completion_length=10", "eval_samples=2", "eval_steps=2",
        f'reward_funcs=["{folder / "noise.py"}:noise"]', "learning_rate=1e-3", "save_steps=1", "save_total_limit=0",
        "log_completions_steps=1", "use_compile=false", "lr_scheduler_type=cosine", "micro_batch_tokens=2048", *extra,
    ]  # fmt: skip


def arguments(folder, *extra, more=()):
    return [part for setting in small(folder, *extra) for part in ("--set", setting)] + list(more)


def train(folder, *extra, more=()):
    """The command line in this process: its exit status."""
    return mlx_grpo.main(arguments(folder, *extra, more=more))


def records(run):
    lines = [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not any(t in k for t in TIMED)} for line in lines]


def updates(run):
    return [record["update"] for record in records(run) if "event" not in record]


def learnt(run):
    """Everything a run leaves that must not depend on how often it was stopped: bits, records, texts."""
    files = [p for folder in [*checkpoints(run), run / "final"] for p in sorted(folder.glob("*.safetensors"))]
    return {str(p.relative_to(run)): digest(p) for p in files}, records(run), (run / "completions.jsonl").read_text()


def left_over(run):
    """What saves that were killed have left."""
    return [*run.glob(".*.partial"), *run.glob(".*.removed")]


def digest(path):
    """Of a file's arrays, whatever their order."""
    arrays = sorted(mx.load(str(path)).items())
    return hashlib.sha256(b"".join(name.encode() + repr(a.dtype).encode() + np.array(a).tobytes() for name, a in arrays)).hexdigest()


def rewind(source, target, update):
    """A copy of a finished run as a kill after checkpoint-UPDATE leaves it: its logs had gone on."""
    shutil.copytree(source, target / "run")
    shutil.rmtree(target / "run" / "final")
    for folder in checkpoints(target / "run"):
        if int(folder.name.rpartition("-")[2]) > update:
            shutil.rmtree(folder)
    return target / "run"


# Exact resume

COURSES = {
    "full": [],
    "adapters": ["fine_tune_type=lora", "kl_coeff=0.05", "learning_rate=1e-2"],
    "iterations": ["num_iterations=2"],
    "accumulation": ["gradient_accumulation_steps=2", "batch_size=1"],
    "stale sampler": ["sync_every=3"],
    "quantised sampler": ["quantize_for_rollouts=true", "group_size=32"],
    "quantised stale sampler": ["quantize_for_rollouts=true", "group_size=32", "sync_every=2", "fine_tune_type=dora"],
    "dynamic sampling": ["dynamic_sampling_max_batches=2"],
    "by difficulty": [
        "easy_prompt_weight=0.2", "hard_prompt_weight=0.2", "difficulty_window=1", "max_train_samples=4", "num_epochs=3.5",
        "num_generations=2", "dynamic_sampling_max_batches=1",
    ],
    "two evaluations": ["eval_every_updates=3", "eval_subset_size=2", "kl_coeff=0.1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("course", COURSES)
def test_a_run_resumed_from_any_update_is_the_run_in_one_go(tmp_path, course):
    options = COURSES[course]
    assert train(tmp_path, *options) == 0
    whole = learnt(tmp_path / "run")
    saved = [int(p.name.rpartition("-")[2]) for p in checkpoints(tmp_path / "run")]
    assert len(saved) >= 5 and sum("grad_norm" in r and r["grad_norm"] > 0 for r in whole[1]) >= 3
    for update in (saved[0], saved[-2]):
        other = tmp_path / str(update)
        other.mkdir()
        rewind(tmp_path / "run", other, update)
        assert train(tmp_path, *options, f"output_dir={other}", more=["--resume"]) == 0
        assert learnt(other / "run") == whole
        states = [json.loads((p / "run" / f"checkpoint-{saved[-1]}" / "trainer_state.json").read_text()) for p in (tmp_path, other)]
        for state in states:
            del state["config"]["output_dir"]
        assert all(states[0][name] == states[1][name] for name in ("state", "config", "inputs"))


def test_dynamic_sampling_does_draw_more_in_the_course_above(tmp_path):
    assert train(tmp_path, "dynamic_sampling_max_batches=2") == 0
    assert max(r["prompts_drawn"] for r in records(tmp_path / "run") if "event" not in r) > 2


def test_drawing_by_difficulty_does_pass_over_prompts_in_the_course_above(tmp_path):
    assert train(tmp_path, *COURSES["by difficulty"]) == 0
    logged = [r for r in records(tmp_path / "run") if "prompts/skipped_easy" in r]
    assert sum(r["prompts/skipped_easy"] + r["prompts/skipped_hard"] for r in logged) > 0
    passed = json.loads((checkpoints(tmp_path / "run")[-1] / "trainer_state.json").read_text())["state"]
    drawn = sum(r["prompts_drawn"] for r in logged if r["update"] <= passed["update"])
    assert passed["cursor"] == drawn + passed["passed_easy"] + passed["passed_hard"]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A finished run of six updates; tests take copies."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlx_grpo.script, "write_report", lambda run_dir: None)
        assert train(folder) == 0
    return folder


@pytest.fixture
def stopped(finished_run, tmp_path):
    """(settings' folder, run directory) of a copy that was killed after update 3 was saved."""
    run = rewind(finished_run / "run", tmp_path, 3)
    return tmp_path, run


def resume(finished_run, stopped, *extra, more=("--resume",)):
    """Resume the copy with the settings of the original: the reward file's path is among them."""
    return train(finished_run, f"output_dir={stopped[0]}", *extra, more=more)


def test_rate_and_lengths_may_be_set_on_resume_and_are_recorded(finished_run, stopped):
    asked = ["learning_rate=0.002", "max_completion_length=8", "num_epochs=2.5"]
    assert resume(finished_run, stopped, *asked) == 0
    resolved = (stopped[1] / "config.resolved.toml").read_text()
    assert "learning_rate = 0.002  # --set" in resolved and "max_completion_length = 8  # --set" in resolved
    note = next(r for r in records(stopped[1]) if r.get("event") == "resume")
    assert note["update"] == 3 and note["changed"]["learning_rate"] == [0.001, 0.002] and set(note["changed"]) == {"learning_rate", "max_completion_length", "num_epochs"}
    assert updates(stopped[1]) == list(range(1, 9))
    assert max(r["lr"] for r in records(stopped[1]) if r.get("update", 0) > 3 and "event" not in r) > 0.001


@pytest.mark.parametrize("change", ["num_generations=4", "seed=1", "batch_size=1", "clip_eps=0.3", "max_train_samples=6", "dataset=other", "sync_every=2", "temperature=0.9"])
def test_what_would_alter_the_run_is_refused_by_name_and_nothing_is_touched(finished_run, stopped, capsys, monkeypatch, change):
    monkeypatch.setattr(mlx_grpo.script, "load_dataset_split", lambda config, split, real=mlx_grpo.load_dataset_split: real(load_config(None, small(finished_run)), split))
    before = {p: p.read_bytes() for p in stopped[1].rglob("*") if p.is_file()}
    assert resume(finished_run, stopped, change) == 2
    assert capsys.readouterr().err == f"Cannot resume {stopped[1] / 'checkpoint-3'}: changed settings would alter the run: {change.split('=')[0]}\n"
    assert {p: p.read_bytes() for p in stopped[1].rglob("*") if p.is_file()} == before


def test_a_rate_changed_in_the_file_or_forgotten_is_refused(finished_run, stopped, capsys):
    given = [setting for setting in small(finished_run, f"output_dir={stopped[0]}") if not setting.startswith("learning_rate")]
    line = [part for setting in given for part in ("--set", setting)]
    (stopped[0] / "mine.toml").write_text("learning_rate = 5e-4\n")
    for more in (["--config", str(stopped[0] / "mine.toml")], []):
        assert mlx_grpo.main([*line, *more, "--resume"]) == 2
        assert capsys.readouterr().err.endswith("would alter the run: learning_rate\n")


def test_resuming_from_an_older_checkpoint_sets_the_newer_ones_aside(finished_run, stopped):
    assert resume(finished_run, stopped, more=["--resume", str(stopped[1] / "checkpoint-1")]) == 0
    assert sorted(p.name for p in stopped[1].glob("superseded-*")) == ["superseded-checkpoint-2", "superseded-checkpoint-3"]
    assert learnt(stopped[1]) == learnt(finished_run / "run")


# Crash safety

SERVER = """
import json, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import datasets, jinja2, rich.progress, rich.table, tiktoken, tomli_w, transformers
import mlx_lm.models.llama, mlx_lm.sample_utils, mlx_lm.utils
from mlx_grpo.backends import use_fast_backend
use_fast_backend()
from mlx_grpo import script
script.write_report = lambda run_dir: None
[hasattr(module, "__file__") for module in list(sys.modules.values())]  # wakes what is imported lazily
for line in sys.stdin:
    arguments, delay = json.loads(line)
    pid = os.fork()  # nothing of MLX has run here: a trainer's start costs no imports
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(script.main(arguments))
    end = time.monotonic() + delay
    while time.monotonic() < end and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)  # where it has ended this does nothing
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture
def trainer_process(child):
    """Start the program as a process and kill it after so many seconds: its exit status, -9 where it was killed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    server = child([sys.executable, "-c", SERVER, str(ROOT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def start(line, delay=120.0):
        server.stdin.write(json.dumps([line, delay]) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    yield start
    server.stdin.close()
    server.stdout.close()
    server.wait()


@pytest.mark.slow
def test_fifty_kills_at_random_moments_lose_nothing(tmp_path, trainer_process):
    options = ["num_epochs=3", "eval_samples=1", "eval_steps=5", "save_total_limit=2"]
    line, run = arguments(tmp_path, *options), tmp_path / "run"
    assert trainer_process(line) == 0  # the first start is slow
    whole = learnt(run)
    assert updates(run) == list(range(1, 11))
    shutil.rmtree(run)
    start = time.monotonic()
    assert trainer_process(line) == 0
    longest, kills, rng = time.monotonic() - start, 0, random.Random(0)
    while kills < 50:
        shutil.rmtree(run)
        status, more = -9, []
        while status == -9:
            status = trainer_process(line + more, rng.uniform(0, 0.8 * longest) if kills < 50 else 120.0)
            kills += status == -9
            assert not any(map(damage, checkpoints(run)))
            more = ["--resume"] if (run / "config.resolved.toml").exists() else []
        assert status == 0 and learnt(run) == whole and not left_over(run)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_kill_at_every_step_of_a_save_leaves_it_complete_or_absent(tmp_path, replaced):
    """A child writes a checkpoint, removes the oldest, and kills itself at its n-th call to the file system, for every n."""
    oldest, old, new = (tmp_path / f"checkpoint-{n}" for n in range(3))

    def write(folder):
        (folder / "trainer_state.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(1000))

    mlx_grpo.write_directory(old, write)
    for step in range(1, 300):
        mlx_grpo.write_directory(oldest, write)
        if replaced:
            mlx_grpo.write_directory(new, write)
        pid = os.fork()
        if not pid:
            calls = iter(range(1, step))
            touches = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree")
            sys.addaudithook(lambda event, _: event in touches and next(calls, None) is None and os.kill(os.getpid(), signal.SIGKILL))
            mlx_grpo.write_directory(new, write)
            remove_old_checkpoints(tmp_path, 2, 0 if replaced else -1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert damage(old) == "" and (damage(new) == "" or not new.exists()) and (damage(oldest) == "" or not oldest.exists())
        shutil.rmtree(new, ignore_errors=True)
        if status == 0:
            break
    assert status == 0 and step > 10 and oldest.exists() == replaced


def test_what_a_killed_save_leaves_is_cleaned_up(finished_run, stopped):
    for name in (".checkpoint-4.partial", ".checkpoint-9.partial", ".final.partial", ".checkpoint-1.removed"):
        (stopped[1] / name).mkdir()
        (stopped[1] / name / "model.safetensors").write_text("half")
    assert resume(finished_run, stopped) == 0
    assert not left_over(stopped[1]) and learnt(stopped[1]) == learnt(finished_run / "run")


@pytest.mark.parametrize("harm", ["truncate model.safetensors", "flip optimizer.safetensors", "remove trainer_state.json", "empty manifest.json", "list manifest.json", "remove manifest.json"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(finished_run, stopped, capsys, harm):
    action, name = harm.split()
    path = stopped[1] / "checkpoint-3" / name
    data = path.read_bytes()
    {
        "truncate": lambda: path.write_bytes(data[:-1]), "flip": lambda: path.write_bytes(data[:-1] + bytes([data[-1] ^ 1])),
        "remove": path.unlink, "empty": lambda: path.write_text("{}"), "list": lambda: path.write_text("[1]"),
    }[action]()  # fmt: skip
    assert resume(finished_run, stopped) == 0
    captured = capsys.readouterr()
    fault = f"{name} is damaged\n" if action in ("truncate", "flip") else ""
    assert f"{stopped[1] / 'checkpoint-3'} is skipped: {fault}" in captured.err and "update 2 of" in captured.out
    assert learnt(stopped[1]) == learnt(finished_run / "run")


def test_a_resume_removes_the_checkpoint_that_a_killed_save_should_have(finished_run, stopped):
    assert resume(finished_run, stopped, "save_total_limit=2") == 0
    assert [p.name for p in checkpoints(stopped[1])][-2:] == [p.name for p in checkpoints(finished_run / "run")][-2:]
    assert not (stopped[1] / "checkpoint-1").exists()


def test_a_run_killed_before_its_first_checkpoint_starts_again(finished_run, stopped, capsys):
    for folder in checkpoints(stopped[1]):
        shutil.rmtree(folder)
    assert resume(finished_run, stopped) == 0
    assert "No checkpoint yet" in capsys.readouterr().out
    assert learnt(stopped[1]) == learnt(finished_run / "run")


def test_a_finished_run_without_checkpoints_is_not_started_again(finished_run, stopped, capsys):
    (stopped[1] / "final").mkdir()
    for folder in checkpoints(stopped[1]):
        shutil.rmtree(folder)
    log = (stopped[1] / "training_log.jsonl").read_text()
    assert resume(finished_run, stopped) == 2
    assert capsys.readouterr().err.startswith("Checkpoint not found: ")
    assert (stopped[1] / "training_log.jsonl").read_text() == log


@pytest.mark.parametrize("name", ["training_log.jsonl", "completions.jsonl"])
@pytest.mark.parametrize("cut", [1, 20, 2000])
def test_a_torn_log_is_mended_on_resume(finished_run, stopped, name, cut):
    """By a kill: the last line of a log that had gone on. By a power cut: lines the checkpoint had seen."""
    log = stopped[1] / name
    log.write_bytes(log.read_bytes()[:-cut])
    assert resume(finished_run, stopped) == 0
    assert learnt(stopped[1]) == learnt(finished_run / "run")


def test_a_log_shorter_than_the_checkpoint_says_is_cut_at_a_line_and_never_padded(finished_run, stopped):
    log = stopped[1] / "training_log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(lines[0] + lines[1][:10])
    assert resume(finished_run, stopped) == 0
    assert b"\0" not in log.read_bytes() and updates(stopped[1])[-1] == 6


def test_a_log_begun_after_the_checkpoint_begins_anew(tmp_path):
    options = ["log_completions_steps=4", "num_epochs=1.8"]
    assert train(tmp_path, *options) == 0
    other = tmp_path / "other"
    other.mkdir()
    rewind(tmp_path / "run", other, 2)
    assert train(tmp_path, *options, f"output_dir={other}", more=["--resume"]) == 0
    assert learnt(other / "run") == learnt(tmp_path / "run")


# Disks


@pytest.fixture
def disk(tmp_path):
    """A disk of 30 MB: three checkpoints fit."""
    place = tmp_path / "disk"
    place.mkdir()
    if sys.platform != "linux" or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30m", "none", str(place)], capture_output=True).returncode:
        pytest.skip("mounting needs root on Linux")
    yield place
    while place.is_mount():
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place):
    """Take every last byte of a disk."""
    with contextlib.suppress(OSError), open(place / "ballast", "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def before_saves(monkeypatch, actions):
    """Do actions[n] before the n-th save."""
    real, calls = MLXGRPOTrainer.save_checkpoint, []

    def save_checkpoint(self):
        calls.append(self.state.update)
        actions.get(len(calls), lambda: None)()
        real(self)

    monkeypatch.setattr(MLXGRPOTrainer, "save_checkpoint", save_checkpoint)


def test_a_disk_that_fills_up_stops_the_run_at_the_third_failure_with_the_rest_intact(finished_run, disk, capsys):
    assert train(finished_run, f"output_dir={disk}", "num_epochs=4") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("Failed to save checkpoint: ") for line in lines)
    assert [line.endswith("training goes on, the next save will try again") for line in lines] == [True, True, False]
    run = disk / "run"
    found = checkpoints(run)
    assert len(found) >= 2 and not any(map(damage, found)) and not left_over(run)
    records(run)  # every line is whole
    for old in found[:-1]:
        shutil.rmtree(old)
    limit = "save_total_limit=1"
    assert train(finished_run, f"output_dir={disk}", "num_epochs=4", limit, more=["--resume"]) == 0
    assert updates(run) == list(range(1, 15))


def test_a_disk_that_is_freed_in_time_loses_nothing_not_even_a_line_of_the_log(finished_run, disk, monkeypatch, capsys):
    before_saves(monkeypatch, {2: lambda: fill(disk), 4: (disk / "ballast").unlink})
    limit = "save_total_limit=1"
    assert train(finished_run, f"output_dir={disk}", limit) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("No space left" in line or "Unable to write" in line for line in lines)
    whole, here = learnt(finished_run / "run"), learnt(disk / "run")
    assert here[1:] == whole[1:] and here[0]["final/model.safetensors"] == whole[0]["final/model.safetensors"]


def test_a_directory_that_becomes_read_only(finished_run, disk, monkeypatch, capsys):
    def make_read_only():
        subprocess.run(["mount", "--bind", str(disk), str(disk)], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", str(disk)], check=True)

    before_saves(monkeypatch, {2: make_read_only})
    assert train(finished_run, f"output_dir={disk}") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("Failed to save checkpoint: ") and "Read-only" in line for line in lines)
    assert [p.name for p in checkpoints(disk / "run")] == ["checkpoint-1"] and not damage(disk / "run" / "checkpoint-1")
    assert train(finished_run, f"output_dir={disk}", more=["--resume"]) == 1
    assert capsys.readouterr().err.startswith("Cannot write to the run directory ")


@pytest.mark.slow
def test_a_file_size_limit_is_a_failed_save_too(tmp_path):
    """The same without root: no file may grow over 1 MB."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))  # noqa: E731
    command = [sys.executable, str(ROOT / "mlx-grpo.py"), *arguments(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=limit, env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")})
    lines = [line for line in done.stderr.splitlines() if not line.startswith("Warning: no report")]
    assert done.returncode == 1 and len(lines) == 3 and all(line.startswith("Failed to save checkpoint: ") for line in lines), done.stderr
    assert not checkpoints(tmp_path / "run") and updates(tmp_path / "run") == [1, 2, 3]


# Retention, locks, signals, failures on the way


def scores_of(monkeypatch, scores):
    """Held-out scores in the order of the evaluations."""
    each, real = iter(scores), mlx_grpo.evaluate
    monkeypatch.setattr(mlx_grpo.script, "evaluate", lambda *given, **named: {**real(*given, **named), "reward_mean": next(each)})


@pytest.mark.parametrize("save_steps, kept", [(1, [2, 4, 5]), (4, [2, 4])])
def test_the_newest_are_kept_and_the_best(tmp_path, monkeypatch, save_steps, kept):
    scores_of(monkeypatch, [0.1, 0.2, 0.9, 0.3, 0.4, 0.8, 0.5, 0.6])
    assert train(tmp_path, "eval_steps=1", "save_total_limit=2", f"save_steps={save_steps}") == 0
    assert [int(p.name.rpartition("-")[2]) for p in checkpoints(tmp_path / "run")] == kept


def test_a_resumed_run_knows_its_best(finished_run, stopped, monkeypatch):
    state = json.loads((stopped[1] / "checkpoint-3" / "trainer_state.json").read_text())
    trainer = MLXGRPOTrainer(load_config(None, small(finished_run, f"output_dir={stopped[0]}")), stopped[1])
    trainer.resume(stopped[1] / "checkpoint-3")
    assert dataclasses.asdict(trainer.state) == state["state"] and trainer.state.best >= 0


def test_a_lock_holds_while_its_process_lives_and_no_longer(tmp_path):
    pid = os.fork()
    if not pid:
        lock = mlx_grpo.lock_directory(tmp_path)
        (tmp_path / "locked").touch()
        time.sleep(60)
        os._exit(bool(lock))
    try:
        while not (tmp_path / "locked").exists():
            time.sleep(0.01)
        with pytest.raises(mlx_grpo.UserError, match="^Run directory is in use by another process: "):
            mlx_grpo.lock_directory(tmp_path)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    mlx_grpo.lock_directory(tmp_path).close()


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_first_evaluation_or_in_an_update_is_a_stop_that_resumes_exactly(finished_run, tmp_path, monkeypatch, capsys, number, status):
    real = MLXGRPOTrainer.evaluate_em

    def interrupted(self, split):
        if self.state.update in (0, 2):
            os.kill(os.getpid(), number)
        return real(self, split)

    monkeypatch.setattr(MLXGRPOTrainer, "evaluate_em", interrupted)
    assert train(finished_run, f"output_dir={tmp_path}") == status
    assert "To continue, run the same command with --resume" in capsys.readouterr().err
    assert train(finished_run, f"output_dir={tmp_path}", more=["--resume"]) == status
    monkeypatch.setattr(MLXGRPOTrainer, "evaluate_em", real)
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-0", "checkpoint-1", "checkpoint-2"]
    assert train(finished_run, f"output_dir={tmp_path}", more=["--resume"]) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoint-0")
    assert learnt(tmp_path / "run") == learnt(finished_run / "run")


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_stops_at_once(child, tmp_path, number, status):
    (tmp_path / "slow.py").write_text("import pathlib, time\ndef wait(completions, **_):\n    pathlib.Path('begun').touch()\n    time.sleep(300)\n    return [0.0] * len(completions)\n")
    command = [sys.executable, str(ROOT / "mlx-grpo.py"), *arguments(tmp_path, f'reward_funcs=["{tmp_path / "slow.py"}:wait"]')]
    process = child(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    while "Stopping after this update" not in process.stderr.readline():  # the first one waits for the update
        assert process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=60)  # the reward alone would take 300 s
    assert process.returncode == status


def test_a_reward_that_fails_in_the_night_loses_no_update(finished_run, tmp_path, monkeypatch, capsys):
    real, calls = mlx_grpo.score, []

    def score(*given):
        calls.append(1)
        if len(calls) == 7:  # after the check, an evaluation, three updates with one more between them
            raise mlx_grpo.RunError("Reward function noise raised OSError: the network is away")
        return real(*given)

    monkeypatch.setattr(mlx_grpo.script, "score", score)
    assert train(finished_run, f"output_dir={tmp_path}", "save_steps=0") == 1
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    assert train(finished_run, f"output_dir={tmp_path}", "save_steps=1", more=["--resume"]) == 0
    assert learnt(tmp_path / "run")[1:] == learnt(finished_run / "run")[1:]


# Bad input: one line, the right status, nothing written


def model_copy(folder, **changes):
    """The starter's model in FOLDER/model with changes of its config.json."""
    copy = shutil.copytree(ROOT / "starter" / "model", folder / "model")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    return copy


def shorten(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def without_template(model):
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "chat_template"}))
    (model / "chat_template.jinja").unlink(missing_ok=True)


BROKEN_MODELS = {
    "empty directory": (lambda m: [p.unlink() for p in m.iterdir()], "Not a model directory: "),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "Failed to load model "),
    "truncated weights": (lambda m: shorten(m / "model.safetensors", 10**6), "Failed to load model "),
    "truncated header": (lambda m: shorten(m / "model.safetensors", 20), "Failed to load model "),
    "empty weights": (lambda m: shorten(m / "model.safetensors", 0), "Failed to load model "),
    "config.json cut": (lambda m: shorten(m / "config.json", 60), "Failed to load model "),
    "config.json is a list": (lambda m: (m / "config.json").write_text("[1, 2]"), "Failed to load model "),
    "config.json is empty": (lambda m: (m / "config.json").write_text("{}"), "Failed to load model "),
    "foreign": (lambda m: (m / "config.json").write_text('{"model_type": "resnet", "vocab_size": 640}'), "Failed to load model "),
    "another architecture": (lambda m: (m / "config.json").write_text((m / "config.json").read_text().replace('"llama"', '"mamba2"')), "Failed to load model "),
    "another width": (lambda m: (m / "config.json").write_text((m / "config.json").read_text().replace('"hidden_size": 128', '"hidden_size": 64')), "Failed to load model "),
    "no tokenizer": (lambda m: [p.unlink() for p in m.glob("tokenizer*")], "Failed to load model "),
    "tokenizer cut": (lambda m: shorten(m / "tokenizer.json", 9000), "Failed to load model "),
    "no chat template": (without_template, "The model's tokenizer has no chat template"),
}


@pytest.fixture
def refused(tmp_path, capsys):
    """Exit status and stderr of a run that must not begin: nothing is written."""

    def run(*extra):
        out = tmp_path / "out"
        status = mlx_grpo.main(arguments(tmp_path, f"output_dir={out}", *extra))
        assert not out.exists()
        return status, capsys.readouterr().err

    return run


@pytest.mark.parametrize("case", BROKEN_MODELS)
def test_a_broken_model_directory_is_one_line(tmp_path, refused, case):
    harm, line = BROKEN_MODELS[case]
    model = model_copy(tmp_path)
    harm(model)
    status, error = refused(f"model_name={model}")
    assert status == 2 and error.startswith(line) and error.count("\n") == 1, error


def test_a_vocabulary_that_does_not_fit_the_tokenizer(tmp_path, refused):
    model = model_copy(tmp_path, vocab_size=600)
    weights = mx.load(str(model / "model.safetensors"))
    mx.save_safetensors(str(model / "model.safetensors"), {k: v[:600] if "embed_tokens" in k else v for k, v in weights.items()})
    status, error = refused(f"model_name={model}")
    assert (status, error) == (2, f"The tokenizer does not fit the model in {model}: token id 639, vocabulary of 600\n")


def test_a_prompt_longer_than_the_context(tmp_path, refused):
    model = model_copy(tmp_path, max_position_embeddings=40)
    status, error = refused(f"model_name={model}")
    assert status == 2 and error.startswith("No training prompt is within 30 tokens; raise max_prompt_length")
    status, error = refused(f"model_name={model}", "max_completion_length=40")
    assert status == 2 and error.startswith("max_completion_length (40) leaves no room for a prompt in the model's context of 40")


@pytest.mark.parametrize(
    "body, says",
    [
        ("[float('nan')] * len(completions)", "returned nan for completion 0"), ("[1.0]", "returned 1 values for 6 completions"),
        ("1 / 0", "raised ZeroDivisionError: division by zero"), ("__import__('sys').exit(0)", "raised SystemExit: 0"),
        ("[float('inf')] * len(completions)", "returned inf for completion 0"), ("__import__('time').sleep(9)", "took longer than reward_timeout = 0.5 s"),
    ],
)  # fmt: skip
def test_a_bad_reward_ends_the_run_with_its_name(tmp_path, capsys, body, says):
    (tmp_path / "bad.py").write_text(f"def bad(completions, **kwargs):\n    return {body}\n")
    assert train(tmp_path, f'reward_funcs=["{tmp_path / "bad.py"}:bad"]', "reward_timeout=0.5") == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"Reward function bad {says}")
    assert not checkpoints(tmp_path / "run") and not (tmp_path / "run" / "final").exists()


def test_a_reward_that_swallows_every_exception_is_still_timed_out(tmp_path, capsys):
    source = "import time\ndef stubborn(completions, **kwargs):\n    while True:\n        try:\n            time.sleep(5)\n        except Exception:\n            pass\n"
    (tmp_path / "stubborn.py").write_text(source)
    assert train(tmp_path, f'reward_funcs=["{tmp_path / "stubborn.py"}:stubborn"]', "reward_timeout=0.5") == 1
    assert "stubborn took longer than reward_timeout" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["final", ".", "checkpoint-3/manifest.json", "nowhere"])
def test_what_is_no_checkpoint_is_refused(finished_run, stopped, capsys, given):
    (stopped[1] / "final").mkdir()
    mlx_grpo.write_directory(stopped[1] / "final", lambda folder: (folder / "model.safetensors").write_text("x"))
    assert resume(finished_run, stopped, more=["--resume", str(stopped[1] / given)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"Checkpoint not found: {stopped[1] / given}") and error.count("\n") == 1


def test_folders_that_only_look_like_checkpoints_are_left_alone(finished_run, stopped):
    for name in ("checkpoint-best", "checkpoint-3-copy", "checkpoint-"):
        shutil.copytree(stopped[1] / "checkpoint-3", stopped[1] / name)
    assert resume(finished_run, stopped, "save_total_limit=1") == 0
    assert {"checkpoint-best", "checkpoint-3-copy", "checkpoint-"} <= {p.name for p in stopped[1].iterdir()}


# Memory


def test_memory_that_will_not_suffice_is_said_by_the_estimate(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory_plan, "memory_bytes", lambda: 10 * 2**20)
    assert mlx_grpo.main(arguments(tmp_path, more=["--dry-run"])) == 0
    error = capsys.readouterr().err
    assert error.startswith("Warning: memory may not suffice: about 0.0 GB at the peak of 0.0 GB.") and "micro_batch_tokens" in error
    monkeypatch.undo()
    assert mlx_grpo.main(arguments(tmp_path, more=["--dry-run"])) == 0 and capsys.readouterr().err == ""


@pytest.mark.parametrize("extra", [[], ["num_iterations=2", "top_entropy_quantile=0.5", "kl_coeff=0.1"], ["micro_batch_tokens=60"]])
def test_the_longest_batch_is_probed_before_the_first_update(tmp_path, capsys, monkeypatch, extra):
    shapes, real = [], mlx_grpo.Learner.build

    def build(self, loss):
        gradient, apply = real(self, loss)

        def watched(batch):
            shapes.append({name: a.shape for name, a in batch.items() if isinstance(a, mx.array)})
            return gradient(batch)

        return watched, apply

    monkeypatch.setattr(mlx_grpo.Learner, "build", build)
    assert train(tmp_path, *extra) == 0
    shown = capsys.readouterr().out
    assert shown.index("probe  ") < shown.index("before training")
    probe, *later = shapes
    assert later and all(set(shape) == set(probe) for shape in later)  # no compiled variant of its own
    for shape in later:
        assert shape["ids"][0] <= probe["ids"][0] and shape["ids"][1] <= probe["ids"][1] and shape["prompts"][1] <= probe["prompts"][1]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[metal::malloc] Attempting to allocate 41818614016 bytes which is greater than the maximum allowed buffer size of 22613000192 bytes."),
        RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"),
        RuntimeError("cudaMallocAsync(&buf, size, stream) failed: out of memory"), MemoryError("std::bad_alloc"),
    ],
)  # fmt: skip
def test_running_out_of_memory_in_the_probe_is_one_line_before_the_first_update(tmp_path, monkeypatch, capsys, error):
    def out_of_memory(self, groups):
        raise error

    monkeypatch.setattr(mlx_grpo.Learner, "trial_gradient", out_of_memory)
    assert train(tmp_path) == 1
    line = capsys.readouterr().err
    assert line.startswith(f"Out of memory: {error}") and line.count("\n") == 1
    assert all(name in line for name in ("micro_batch_tokens", "grad_checkpoint", "kv_budget_gb"))
    assert not (tmp_path / "run" / "training_log.jsonl").exists()


def test_another_runtime_error_is_no_matter_of_memory(tmp_path, monkeypatch):
    def broken(self, groups):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(mlx_grpo.Learner, "trial_gradient", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        train(tmp_path)


# Attacks


def forge(checkpoint, **changes):
    """Change a checkpoint's state as somebody would who knows of the manifest."""
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    for name, value in changes.items():
        part = state["state"] if name in state["state"] else state
        part[name] = value
    path.write_text(json.dumps(state))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest[path.name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["../victim.jsonl", "../../victim.jsonl", "/{}/victim.jsonl"])
def test_a_checkpoints_log_names_cannot_reach_outside_the_run(finished_run, stopped, name):
    victim = stopped[0] / "victim.jsonl"
    victim.write_text("precious\n")
    forge(stopped[1] / "checkpoint-3", logs={name.format(stopped[0]): 0, "training_log.jsonl": 10**6})
    resume(finished_run, stopped)
    assert victim.read_text() == "precious\n"


@pytest.mark.parametrize(
    "changes",
    [{"update": "../../escaped"}, {"update": None}, {"cursor": "0"}, {"best": {}}, {"logs": []}, {"logs": {"training_log.jsonl": "x"}}, {"config": 3}, {"before": 1}],
)
def test_a_forged_state_is_refused_in_one_line(finished_run, stopped, capsys, changes):
    forge(stopped[1] / "checkpoint-3", **changes)
    inside = sorted(stopped[0].rglob("*"))
    assert resume(finished_run, stopped) == 2
    error = capsys.readouterr().err
    assert error.startswith("Cannot resume ") and error.count("\n") == 1
    assert sorted(stopped[0].rglob("*")) == inside


def test_a_checkpoint_of_another_model_is_refused(finished_run, stopped, capsys):
    checkpoint = stopped[1] / "checkpoint-3"
    weights = mx.load(str(checkpoint / "model.safetensors"))
    mx.save_safetensors(str(checkpoint / "model.safetensors"), {k: v for k, v in weights.items() if "layers.3" not in k})
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    path = checkpoint / "model.safetensors"
    manifest[path.name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert resume(finished_run, stopped) == 2
    assert "is not a checkpoint of this model" in capsys.readouterr().err


@pytest.mark.parametrize("name", [".lock", "config.resolved.toml", "training_log.jsonl", "completions.jsonl", "final"])
def test_a_link_in_a_run_directory_is_not_followed(finished_run, stopped, capsys, name):
    victim = stopped[0] / "victim"
    victim.write_text("precious\n")
    (stopped[1] / name).unlink(missing_ok=True)
    (stopped[1] / name).symlink_to(victim)
    assert resume(finished_run, stopped) == 2
    assert capsys.readouterr().err.startswith(f"Run directory holds a link, which would lead writes elsewhere: {stopped[1] / name}")
    assert victim.read_text() == "precious\n"


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/b", "..", "."])
def test_a_run_name_cannot_lead_outside(tmp_path, refused, name):
    status, error = refused(f"run_name={name}")
    assert status == 2 and error.startswith("run_name must be a plain name")


def test_a_chat_templates_name_cannot_lead_a_checkpoint_outside(tmp_path, capsys):
    """transformers saves each named template as a file of that name."""
    model = model_copy(tmp_path)
    without = json.loads((model / "tokenizer_config.json").read_text())
    template = without.pop("chat_template", None) or (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink(missing_ok=True)
    without["chat_template"] = [{"name": "default", "template": template}, {"name": "../../../escaped", "template": "x"}]
    (model / "tokenizer_config.json").write_text(json.dumps(without))
    status = train(tmp_path, f"model_name={model}")
    error = capsys.readouterr().err
    assert status == 1 and error.startswith("Failed to save checkpoint: ") and "Traceback" not in error
    assert not list(tmp_path.rglob("escaped*"))


def test_remote_code_does_not_run_unless_asked_for_and_asking_says_what_it_means(tmp_path, refused, capsys):
    model = model_copy(tmp_path, model_file="own.py")
    canary = tmp_path / "canary"
    (model / "own.py").write_text(f"open({str(canary)!r}, 'w')\nfrom mlx_lm.models.llama import Model, ModelArgs\n")
    status, error = refused(f"model_name={model}")
    assert status == 2 and error.startswith("Failed to load model ") and "trust_remote_code" in error and not canary.exists()
    assert mlx_grpo.main(arguments(tmp_path, f"model_name={model}", "trust_remote_code=true", more=["--dry-run"])) == 0
    error = capsys.readouterr().err
    assert error.startswith(f"trust_remote_code: Python files that come with {model} run on this machine with all your rights") and canary.exists()


def test_a_tokenizers_own_code_neither_runs_nor_asks(tmp_path, refused, monkeypatch):
    model = model_copy(tmp_path)
    canary = tmp_path / "canary"
    config = json.loads((model / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(f"open({str(canary)!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask at the terminal
    mlx_grpo.main(arguments(tmp_path, f"model_name={model}", more=["--dry-run"]))
    assert not canary.exists()


def calls_in(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}, node.lineno


def test_no_shell_no_eval_no_pickle_in_the_program():
    sources = [*ROOT.glob("*.py"), *(ROOT / "utils").glob("*.py")]
    assert len(sources) > 5
    banned = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads"}
    for path in sources:
        for name, keywords, line in calls_in(path):
            where = f"{path.name}:{line}: {name}"
            assert name not in banned and keywords.get("shell", "False") == "False", where
            assert name != "torch.load" or keywords.get("weights_only") == "True", where


# Long runs


@pytest.mark.slow
def test_three_hundred_updates_take_no_more_memory_than_the_first(tmp_path, monkeypatch):
    seen, train_step = [], MLXGRPOTrainer.train_step
    monkeypatch.setattr(mlx_grpo.script, "compiling_pays", lambda: True)  # as on a GPU
    monkeypatch.setattr(compiled_shapes, "updates_to_earn_it", lambda: 10)

    def measured(self):
        result = train_step(self)
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if sys.platform == "linux" else 0
        seen.append((mx.get_active_memory(), resident, len(compiled_shapes.earned(self.state.shapes))))
        return result

    monkeypatch.setattr(MLXGRPOTrainer, "train_step", measured)
    options = ["max_train_samples=300", "batch_size=2", "num_epochs=2", "learning_rate=1e-5", "eval_steps=100", "save_steps=100", "log_completions_steps=10", "use_compile=true", "kl_coeff=0.01"]
    assert train(tmp_path, *options) == 0
    active, resident, variants = np.array(seen).T
    assert len(seen) == 300
    first, last = slice(50, 150), slice(200, 300)
    assert np.median(active[last]) <= 1.02 * np.median(active[first])
    assert np.median(resident[last]) <= 1.05 * np.median(resident[first])
    assert 1 <= max(variants) <= compiled_shapes.MOST_SHAPES


def test_a_model_too_large_for_a_rank_is_refused(monkeypatch, tmp_path):
    trainer = MLXGRPOTrainer(load_config(None, small(tmp_path)), tmp_path / "run")
    monkeypatch.setattr(memory_plan, "memory_bytes", lambda: 5 * 2**20)
    with pytest.raises(mlx_grpo.UserError, match="The model does not fit one rank"):
        memory_plan.print_plan(trainer.work, trainer.config, training=1, held_out=1, updates=1, ranks=2)
