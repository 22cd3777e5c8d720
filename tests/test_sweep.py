"""The sweep: its grid, what it runs again and what it leaves, and a real one of two points."""

import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlx_grpo.run.directory import checkpoints

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "utils" / "sweep.py"

spec = importlib.util.spec_from_file_location("sweep", SCRIPT)
sweep = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweep)

# Stands in for the trainer: notes how it was called, logs one update, and finishes unless its seed says otherwise.
STAND_IN = """
import json, pathlib, sys
settings = dict(s.split("=", 1) for s in sys.argv[1:] if "=" in s)
run = pathlib.Path(settings["output_dir"]) / settings["run_name"]
run.mkdir(parents=True, exist_ok=True)
with open(run.parent / "calls.jsonl", "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
(run / "training_log.jsonl").write_text('{"update": 1, "reward_mean": 1.0}\\n')
if settings["seed"] in ("130", "1"):
    sys.exit(int(settings["seed"]))
(run / "final").mkdir()
"""


def test_an_axis():
    assert sweep.parse_axis("learning_rate=1e-6,5e-6") == ("learning_rate", ["1e-6", "5e-6"])
    assert sweep.parse_axis("reward_weights=[1, 0],[1, 1]") == ("reward_weights", ["[1, 0]", "[1, 1]"])
    assert sweep.parse_axis('stop_strings=["a,b"],[]') == ("stop_strings", ['["a,b"]', "[]"])
    assert sweep.parse_axis("seed=1,1,2") == ("seed", ["1", "2"])


def test_the_grid_is_every_combination():
    points = sweep.grid_points(["a=1,2", "b=3,4"])
    assert points == [{"a": "1", "b": "3"}, {"a": "1", "b": "4"}, {"a": "2", "b": "3"}, {"a": "2", "b": "4"}]


def test_names_are_plain_and_differ():
    assert sweep.point_name({"learning_rate": "1e-6", "num_generations": "4"}) == "learning_rate=1e-6,num_generations=4"
    names = {sweep.point_name({"model_name": model}) for model in ("a/b", "a-b", "a b")}
    assert len(names) == 3 and not any("/" in name or " " in name for name in names)
    long = [sweep.point_name({"system_prompt": "x" * 300 + end}) for end in "ab"]
    assert long[0] != long[1] and len(long[0]) < 120


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["quickstart", "--grid", "learning_rat=1"], "Unknown config key: learning_rat (did you mean learning_rate?)"),
        (["quickstart", "--grid", "batch_size=4,many"], "Failed to coerce value: 'many' to <class 'int'> (for batch_size)"),
        (["quickstart", "--grid", "seed=1", "--grid", "seed=2"], "--grid seed is given twice"),
        (["quickstart", "--grid", "run_name=a,b"], "--grid run_name: each point has a directory of its own"),
        (["quickstart", "--grid", "seed"], "--grid takes KEY=VALUE,VALUE,..., not 'seed'"),
        (["nowhere", "--grid", "seed=1"], "Config file not found: "),
    ],
)
def test_mistakes_are_found_before_anything_runs(tmp_path, capsys, arguments, message):
    config = ROOT / "configs" / f"{arguments[0]}.toml"
    assert sweep.main([str(config), *arguments[1:], "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1 and not (tmp_path / "out").exists()



@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A sweep whose trainer is the stand-in; returns a function that runs it over seeds: (status, calls)."""
    (tmp_path / "utils").mkdir()
    (tmp_path / "mlx-grpo.py").write_text(STAND_IN)
    (tmp_path / "utils" / "report.py").write_text("import sys; open(sys.argv[-1], 'w').write(' '.join(sys.argv[1:-2]))")
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*seeds):
        calls = tmp_path / "out" / "calls.jsonl"
        calls.unlink(missing_ok=True)
        status = sweep.main([str(ROOT / "configs" / "quickstart.toml"), "--grid", "seed=" + ",".join(seeds), "--set", "batch_size=4", "--output", str(tmp_path / "out")])
        return status, [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_each_point_is_run_once_in_its_own_directory(stand_in, tmp_path, capfd):
    status, calls = stand_in("5", "6")
    assert status == 0 and [c[c.index("seed=5") if "seed=5" in c else c.index("seed=6")] for c in calls] == ["seed=5", "seed=6"]
    assert all(c[:2] == ["--config", str(ROOT / "configs" / "quickstart.toml")] and "batch_size=4" in c and "--resume" not in c for c in calls)
    assert (tmp_path / "out" / "comparison.html").read_text() == f"{tmp_path}/out/seed=5 {tmp_path}/out/seed=6"
    assert stand_in("5", "6") == (0, []) and "1/2 seed=5: finished already" in capfd.readouterr().out
    status, calls = stand_in("5", "6", "7")  # a point more: only that one runs
    assert status == 0 and len(calls) == 1 and "seed=7" in calls[0]


def test_a_failed_point_does_not_stop_the_others(stand_in, tmp_path, capfd):
    status, calls = stand_in("1", "5")
    assert status == 1 and len(calls) == 2 and "Failed: seed=1 (status 1)" in capfd.readouterr().err
    assert (tmp_path / "out" / "comparison.html").read_text() == f"{tmp_path}/out/seed=1 {tmp_path}/out/seed=5"  # both have a log


def test_a_stopped_sweep_continues(stand_in, tmp_path, capfd):
    status, calls = stand_in("130", "5")
    assert status == 130 and len(calls) == 1 and "To continue, run the same command" in capfd.readouterr().err
    assert not (tmp_path / "out" / "comparison.html").exists()
    log = tmp_path / "out" / "seed=130" / "training_log.jsonl"
    log.write_text("of the first start")
    stand_in("130", "5")  # without a checkpoint it begins anew, and the old records stay
    assert (tmp_path / "out" / "seed=130.interrupted-1" / log.name).read_text() == "of the first start"
    assert log.read_text() == '{"update": 1, "reward_mean": 1.0}\n'


def test_an_interrupted_point_resumes_from_its_checkpoint(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "checkpoints", lambda run_dir: [run_dir / "checkpoint-1"])
    status, calls = stand_in("5")
    assert status == 0 and calls[0][-1] == "--resume"


FIELDS = re.findall(r"^\| `([^`]+)` \|", (ROOT / "utils" / "README.md").read_text().split("## The logs")[1], re.MULTILINE)


def documented(field: str) -> bool:
    """Whether utils/README.md lists the field; `rewards/NAME` there stands for every function."""
    return field in FIELDS or (field.startswith("rewards/") and "rewards/NAME" in FIELDS)


@pytest.mark.slow
def test_a_real_sweep_ends_in_the_comparison_and_its_logs_are_as_documented(tmp_path):
    """Two points of one update on the starter; pandas reads both logs, and utils/README.md lists every field in them."""
    pytest.importorskip("matplotlib")
    import pandas

    small = ["max_train_samples=2", "batch_size=2", "num_generations=2", "eval_samples=4", "max_completion_length=16", "log_completions_steps=1"]
    command = [sys.executable, SCRIPT, ROOT / "configs" / "quickstart.toml", "--grid", "learning_rate=1e-5,2e-5", "--output", tmp_path / "out"]
    result = subprocess.run([*command, *(x for s in small for x in ("--set", s))], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "learning_rate=1e-5" in page and "learning_rate=2e-5" in page and "<td>2e-05</td>" in page

    run = tmp_path / "out" / "learning_rate=1e-5"
    log, completions = (pandas.read_json(run / f"{name}.jsonl", lines=True) for name in ("training_log", "completions"))
    assert len(log[log["event"].isna()] if "event" in log else log) == 1 and len(completions) == 4
    missing = [field for field in (*log.columns, *completions.columns) if not documented(field)]
    assert missing == []


@pytest.mark.slow
def test_sigterm_reaches_the_trainer_and_the_sweep_can_go_on(child, tmp_path):
    command = [sys.executable, SCRIPT, ROOT / "configs" / "quickstart.toml", "--grid", "seed=1,2", "--set", "eval_samples=4", "--output", tmp_path / "out"]
    process = child(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    log, deadline = tmp_path / "out" / "seed=1" / "training_log.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (log.is_file() and '"reward_mean"' in log.read_text()):
        time.sleep(0.2)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143 and "Sweep stopped at 1/2 seed=1" in errors and "Traceback" not in errors
    assert checkpoints(tmp_path / "out" / "seed=1") and not (tmp_path / "out" / "seed=2").exists()
