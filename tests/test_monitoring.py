"""What people see of a run: the live display, the lines in a pipe, trackers that come, fail and go on."""

import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

import mlx_grpo
from mlx_grpo.run import terminal, trackers
from mlx_grpo.run.terminal import Monitor
from mlx_grpo.run.text import clock, escaped, sparkline
from mlx_grpo.run.trackers import Trackers, numbers, start_trackers

ROOT = Path(mlx_grpo.__file__).parents[1]
NASTY = "\x1b[2J\x1b]0;title\x07\x1b[31mred\r\nback\x08\x08 \u202eright to left\u202c \u200b zero width\tétage 漢字漢字 [bold]no markup[/bold] :smile: \ud800"
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # what the display itself writes: colours, cursor movements


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def monitor_of(file, width=80, height=24, updates=40, logging_steps=1):
    live = file.isatty()
    console = Console(
        file=file, width=width, height=height, force_terminal=live, force_interactive=live, color_system=None, highlight=False,
        markup=False, emoji=False, _environ={},
    )  # fmt: skip
    return Monitor(updates, logging_steps, console)


def update_record(update, reward=1.0, **more):
    return {
        "update": update, "reward_mean": reward, "kl": 0.01, "completion_length_mean": 64.0, "truncated_fraction": 0.25,
        "zero_signal_fraction": 0.5, "rollout_tokens_per_s": 1234.5, "train_tokens_per_s": 2345.6, "peak_memory_gb": 12.5, "lr": 2e-4,
        **more,
    }  # fmt: skip


def eval_record(update=0):
    return {
        "event": "eval", "update": update, "split": "test", "em_strict": 1.0, "em_strict_ci": (0.981, 1.0), "em_lenient": 1.0,
        "em_lenient_ci": (0.981, 1.0), "n": 200, "completion_length": 60.0, "seconds": 2.0,
    }  # fmt: skip


def completion_lines(texts, update=10, prompt="What is 1 + 1?"):
    return [
        {
            "update": update, "prompt": prompt, "answer": "2", "completion": text, "finish_reason": "eos", "length": 7,
            "rewards": {"correctness_reward_func": 2.0 * i, "strict_format_reward_func": None},
        }
        for i, text in enumerate(texts)
    ]  # fmt: skip


def drawn(monitor):
    """The lines of the live display as it would be drawn now."""
    options = monitor.console.options
    return ["".join(s.text for s in line) for line in monitor.console.render_lines(monitor, options, pad=False)]


def a_short_run(monitor, texts=("good", "bad")):
    with monitor:
        monitor.begin(0, None)
        monitor.evaluating(200, "before training")
        monitor.evaluation(eval_record(), "before training")
        for update in range(1, 41):
            monitor.phase("sampling")
            monitor.phase("training")
            if update % 10 == 0:
                monitor.completions(completion_lines(texts, update), [[0.0, 2.0]])
            monitor.update(update_record(update, reward=update / 10, skipped="no signal") if update == 7 else update_record(update, update / 10))
        monitor.evaluation(eval_record(40), "after training")


# The display


@pytest.mark.parametrize("width", [200, 80, 60, 40, 20])
@pytest.mark.parametrize("height", [24, 5, 2])
def test_no_line_is_wider_than_the_terminal_nor_the_display_higher(width, height):
    file = Terminal()
    monitor = monitor_of(file, width, height, updates=123456)
    a_short_run(monitor, (NASTY * 30, "漢" * 500))
    for line in re.split(r"[\n\r]|\x1b\[\d*A", file.getvalue()):
        assert cell_len(CONTROL.sub("", line)) <= width
    monitor.doing, monitor.note = "evaluating", "stopping after this update; Ctrl-C again: at once"
    lines = drawn(monitor)
    assert len(lines) < height and all(cell_len(line) <= width - Monitor.MARGIN or width < 13 for line in lines)


def test_the_display_has_the_numbers_that_matter():
    monitor = monitor_of(Terminal())
    a_short_run(monitor)
    shown = "\n".join(drawn(monitor))
    for part in ("update 40/40", "reward 4.000 ▁", "█", "held-out 100.0% at 40", "kl 0.0100", "length 64", "truncated 25%", "no-signal 50%",
                 "rollout 1234 tok/s", "train 2346 tok/s", "memory 12.50 GB", "lr 2.0e-04"):  # fmt: skip
        assert part in shown
    assert len(drawn(monitor)) <= 6
    monitor.update(update_record(41, kl=0.0))
    assert "kl" not in "\n".join(drawn(monitor))  # without a reference there is none


def test_a_terminal_without_unicode_gets_plain_bars():
    monitor = monitor_of(Terminal())
    monitor.update(update_record(1, None))
    assert "reward none" in drawn(monitor)[1]
    file = Terminal()
    file.encoding = "ascii"
    monitor = monitor_of(file)
    a_short_run(monitor, (NASTY, "漢字"))
    assert file.getvalue().isascii() and "\\u6f22\\u5b57" in file.getvalue() and "####" in drawn(monitor)[0]


def test_the_cursor_is_given_back_and_prints_stand_above_the_display(capsys):
    file = Terminal()
    with monitor_of(file) as monitor:
        monitor.update(update_record(1))
        print("a reward function's own line")
        monitor.stopping()
        monitor.live.refresh()
    text = file.getvalue()
    assert "a reward function's own line\n" in CONTROL.sub("", text) and "stopping after this update" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_signal_outside_the_display_is_answered_on_stderr(capsys):
    monitor_of(io.StringIO()).stopping()
    assert capsys.readouterr().err == "Stopping after this update; once more to stop at once\n"


def test_the_time_left_is_that_of_the_last_updates(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    monitor = monitor_of(io.StringIO(), updates=50)
    assert monitor.seconds_left() is None
    monitor.begin(10, None)
    monitor.phase("sampling")
    for update in range(11, 41):
        now[0] += 5.0 if update > 15 else 60.0
        monitor.update(update_record(update))
    assert monitor.seconds_left() == 50.0
    now[0] += 3.0
    assert monitor.seconds_left() == 47.0
    assert clock(3725.9) == "1:02:05"


def test_sparklines():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 1, 2, 3, 4, 5], 8, ascii_only=True) == "_.-=*#"
    assert sparkline([0.0, 0.0, 7.0, 7.0], 2) == "▁█"  # the means of two stretches
    assert sparkline([1.0, None, float("nan"), 3.0], 10) == "▁  █"
    assert sparkline([2.0, 2.0], 10) == "▅▅"
    assert sparkline([], 10) == sparkline([None], 10) == ""


# Text


@given(st.text(st.characters(codec=None, categories=None)))
def test_escaped_text_is_one_line_that_moves_no_cursor(text):
    for encoding in ("utf-8", "ascii"):
        shown = escaped(text, encoding)
        assert shown.isprintable()
        shown.encode(encoding)


def test_what_can_be_shown_is_shown():
    assert escaped("étage 漢字 🙂 \t\\n\n") == "étage 漢字 🙂 \\t\\n\\n"
    assert escaped("\x1b[31m\u202e\ud800") == "\\x1b[31m\\u202e\\ud800"
    assert escaped("漢 é", "latin-1") == "\\u6f22 é"


@pytest.mark.parametrize("width", [80, 60, 30])
def test_completions_are_shown_as_text(width):
    monitor = monitor_of(Terminal(), width)
    records = completion_lines([NASTY + "\n" + "x" * 5000 + "\nthe end", "good"])
    told = [("best", 2.0, records[1]), ("worst", 0.0, records[0])]
    lines = monitor.console.render_lines(monitor.sample_table(10, "q" * 900, told), pad=False)
    shown = ["".join(s.text for s in line) for line in lines]
    assert len(lines) < 24 and all(cell_len(line) <= width and line.isprintable() for line in shown)
    text = "\n".join(shown)
    assert "\\x1b[2J" in text and "..." in text and "the end" in text and "good" in text
    assert "best   2.000 = correctness 2" in text


def test_the_group_shown_is_one_whose_rewards_differ():
    file = io.StringIO()
    records = completion_lines(["a", "b", "c", "d"])
    monitor_of(file).completions(records, [[1.0, 1.0], [0.5, 2.5]])
    lines = file.getvalue().splitlines()
    assert lines[1].startswith("sample 10 best 2.500 (correctness 6, strict_format none): d")
    assert lines[2].startswith("sample 10 worst 0.500 (correctness 4, strict_format none): c")
    monitor_of(file).completions(records, [[np.nan, np.nan], [np.nan, np.nan]])  # every function abstained
    chat = completion_lines(["a", "b"], prompt=[{"role": "system", "content": "s"}, {"role": "user", "content": "How many?"}])
    monitor_of(file).completions(chat, [[0.0, np.nan]])
    assert "sample 10 prompt: How many?" in file.getvalue()


# A pipe, and logging_steps


def test_a_pipe_gets_plain_lines():
    file = io.StringIO()
    a_short_run(monitor_of(file), (NASTY, "bad\nlines"))
    lines = file.getvalue().splitlines()
    assert all(line.isprintable() for line in lines)
    assert lines[:2] == ["before training: evaluating 200 problems", "before training: held-out exact match 100.0% (98.1-100.0), lenient 100.0%, n=200"]
    updates = [line for line in lines if line.startswith("update ")]
    assert len(updates) == 40 and sum(line.startswith("sample ") for line in lines) == 12
    assert updates[6].startswith(
        "update 7/40 reward 0.700 kl 0.0100 length 64 truncated 25% no-signal 50% rollout 1234 tok/s train 2346 tok/s memory 12.50 GB "
        "lr 2.0e-04 skipped no signal left 0:00:"
    )


def test_logging_steps_hold_in_a_pipe():
    file = io.StringIO()
    monitor = monitor_of(file, logging_steps=3)
    for update in range(1, 11):
        monitor.update(update_record(update))
    assert re.findall(r"^update (\d+)/40", file.getvalue(), re.M) == ["3", "6", "9"]


def test_logging_steps_hold_in_the_display():
    monitor = monitor_of(Terminal(), logging_steps=3)
    for update in range(1, 3):
        monitor.update(update_record(update))
    assert len(drawn(monitor)) == 1  # no numbers yet
    for update in range(3, 6):
        monitor.update(update_record(update, reward=float(update)))
    progress, reward, *_ = drawn(monitor)
    assert progress.startswith("update  5/40") and reward.startswith("reward 3.000 ▁▁█ ")


# Trackers


def test_unknown_trackers_are_refused_with_the_choices():
    with pytest.raises(mlx_grpo.UserError) as refused:
        mlx_grpo.load_config(None, ['report_to=["tensorboard", "wanbd"]'])
    assert str(refused.value) == "Invalid report_to: wanbd; choose from tensorboard, wandb, trackio, swanlab (did you mean wandb?)"


@pytest.mark.parametrize("found", [None, types.SimpleNamespace(origin=None)], ids=["nothing", "only a folder of its runs"])
def test_a_tracker_that_is_not_installed_is_refused_before_the_model_is_opened(tmp_path, monkeypatch, capsys, found):
    real = importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name, *rest: found if name == "wandb" else real(name, *rest))
    pairs = ['report_to=["wandb"]', "model_name=no/such-model", f"output_dir={tmp_path}"]
    assert mlx_grpo.main([part for pair in pairs for part in ("--set", pair)]) == 2
    assert capsys.readouterr().err == "report_to: wandb is not installed; install it with uv sync --extra trackers, or uv pip install wandb\n"
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_a_record():
    record = {**eval_record(3), "text": "x", "flag": None, "reward": float("inf"), "whole": 2}
    assert numbers(record) == {
        "em_strict": 1.0, "em_strict_ci/low": 0.981, "em_strict_ci/high": 1.0, "em_lenient": 1.0, "em_lenient_ci/low": 0.981,
        "em_lenient_ci/high": 1.0, "n": 200, "completion_length": 60.0, "seconds": 2.0, "whole": 2.0,
    }  # fmt: skip


class Kept:
    """A tracker that keeps all it is given."""

    def __init__(self, run_dir=None, config=None, run_id="", update=0, resumed=False):
        self.config, self.run_id, self.resumed, self.seen = config, run_id, resumed, []

    def scalars(self, values, update):
        self.seen.append((update, values))

    def completions(self, columns, rows, update):
        self.seen.append((update, columns, rows))

    def close(self, failed):
        self.seen.append(("closed", failed))


class Failing(Kept):
    def scalars(self, values, update):
        if update == 2:
            raise ConnectionError("the network\nis gone")
        super().scalars(values, update)


def short_settings(tmp_path, *more):
    return mlx_grpo.load_config(None, [
        "model_name=starter/model", "dataset=starter/data", f"output_dir={tmp_path}", "run_name=run", "max_train_samples=9", "batch_size=3",
        "num_generations=4", "max_completion_length=24", "eval_samples=4", "eval_steps=2", "learning_rate=1e-3", "save_steps=0",
        "use_compile=false", "log_completions_steps=2", *more,
    ])  # fmt: skip


def test_trackers_get_every_number_and_one_that_fails_does_not_stop_the_run(tmp_path, capsys):
    trainer = mlx_grpo.MLXGRPOTrainer(short_settings(tmp_path), tmp_path / "run")
    trainer.run_dir.mkdir()
    kept, failing = Kept(), Failing()
    with Trackers([("failing", failing), ("kept", kept)]) as trainer.monitor.trackers:
        trainer.train()
    output = capsys.readouterr()
    assert output.err == "Warning: failing failed and is left out from here on: the network is gone\n"
    assert [u for u, *_ in failing.seen] == [0, 1, 1, 2] and kept.seen[-1] == ("closed", False)
    expected = []
    for line in (tmp_path / "run" / "training_log.jsonl").read_text().splitlines():
        record = json.loads(line)
        prefix = f"eval/{record['split']}/" if record.get("event") == "eval" else ""
        expected.append((record["update"], {prefix + k: v for k, v in numbers(record).items()}))
    assert [one for one in kept.seen if len(one) == 2][:-1] == expected and len(expected) == 6
    assert {"reward_mean", "lr", "kl", "rewards/int_reward_func", "mismatch/kl", "total_tokens"} <= set(expected[1][1])
    written = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    tables = [one for one in kept.seen if len(one) == 3]
    assert [u for u, *_ in tables] == [1, 2] and len(tables[0][2]) == 12
    first = dict(zip(*[tables[0][1], tables[0][2][0]]))
    assert first == {**{k: v for k, v in written[0].items() if k != "rewards"}, **written[0]["rewards"]}
    assert re.findall(r"^(update \d|sample \d \w+)", output.out, re.M).count("update 3") == 1


def test_a_failure_while_closing_is_said_and_the_others_are_closed(capsys):
    broken, kept = types.SimpleNamespace(), Kept()
    with pytest.raises(KeyboardInterrupt), Trackers([("broken", broken), ("kept", kept)]):
        raise KeyboardInterrupt
    assert kept.seen == [("closed", True)] and capsys.readouterr().err.startswith("Warning: broken failed")


def test_a_tracker_that_does_not_start_ends_the_run_with_what_to_do(tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("No API key.\nLog in")

    opened = Kept()
    monkeypatch.setattr(trackers, "TRACKERS", {"tensorboard": lambda *_: opened, "wandb": refuse})
    with pytest.raises(mlx_grpo.RunError) as failed:
        start_trackers(["tensorboard", "wandb"], tmp_path, {}, 0)
    assert str(failed.value) == "Cannot start tracker wandb: No API key. Log in; mend that, set WANDB_MODE=offline, or leave it out of report_to"
    assert opened.seen == [("closed", True)]


def test_a_resumed_run_keeps_its_trackers_id(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "TRACKERS", {"wandb": Kept})
    assert start_trackers([], tmp_path, {}, 0).members == [] and list(tmp_path.iterdir()) == []
    (_, first), = start_trackers(["wandb", "wandb"], tmp_path, {"seed": 1}, 0).members  # fmt: skip
    (_, second), = start_trackers(["wandb"], tmp_path, {"seed": 1}, 5).members  # fmt: skip
    assert (first.resumed, second.resumed) == (False, True) and first.run_id == second.run_id != "" and first.config == {"seed": 1}


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from mlx_grpo.run.trackers import start_trackers

name, run_dir = sys.argv[2], Path(sys.argv[3])
for update in (0, 1):  # the second time as after a resume from the checkpoint of update 1
    with start_trackers([name], run_dir, {"learning_rate": 1e-3, "stop_strings": ["</answer>"], "delta": None}, update) as trackers:
        for number in range(update + 1, 4 - update):
            trackers.scalars({"reward_mean": number + 0.5 + update, "rewards/f": 1.0}, number)
        record = {"update": 2, "prompt": "q", "answer": "2", "completion": "<answer>漢字</answer>", "finish_reason": "eos", "length": 3}
        trackers.completions([{**record, "rewards": {"f": None}}, {**record, "rewards": {"f": 0.25}}])
        assert trackers.members, "it failed"
"""


@pytest.fixture
def tracked(tmp_path):
    """tracked(name) -> the run's directory, written by the installed tracker in a process of its own, without a network."""

    def write(name):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: uv sync --extra trackers")
        environment = {**os.environ, "WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "HOME": str(tmp_path), "WANDB_SILENT": "true"}
        environment = {k: v for k, v in environment.items() if k not in ("TRACKIO_DIR", "TRACKIO_SPACE_ID")}
        run_dir = tmp_path / "run"
        run_dir.mkdir()
        command = [sys.executable, "-c", SCRIPT, str(ROOT), name, str(run_dir)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr.replace("FutureWarning", ""), done.stderr
        assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")} == {"run"}  # nothing lies beside it
        return run_dir

    return write


@pytest.mark.slow
def test_tensorboard(tracked):
    folder = tracked("tensorboard") / "tensorboard"
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator  # TensorBoard's own reader
    from tensorboard.util import tensor_util

    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    value = lambda e: tensor_util.make_ndarray(e.tensor_proto)  # noqa: E731
    assert [(e.step, value(e).item()) for e in events.Tensors("reward_mean")] == [(1, 1.5), (2, 3.5)]  # what was beyond the checkpoint is gone
    cells = value(events.Tensors("completions")[-1])
    assert cells.shape == (3, 7) and cells[0, 3] == b"completion" and cells[1, 3].decode() == "    <answer>漢字</answer>"
    assert b'"learning_rate": 0.001' in value(events.Tensors("config")[0]).item()


@pytest.mark.slow
def test_wandb(tracked):
    runs = sorted((tracked("wandb") / "wandb").glob("offline-run-*"))
    # Two parts with one id: offline-run-TIME-ID, and -1 after it where both began in one second.
    assert len(runs) == 2 and len({run.name.split("-")[3] for run in runs}) == 1
    data = next(runs[0].glob("*.wandb")).read_bytes()
    assert b"reward_mean" in data and b"learning_rate" in data
    table = json.loads(next(runs[0].glob("files/media/table/*.json")).read_text())
    assert table["columns"][3:5] == ["completion", "f"] and [row[3:5] for row in table["data"]] == [["<answer>漢字</answer>", None], ["<answer>漢字</answer>", 0.25]]


@pytest.mark.slow
def test_trackio(tracked):
    import sqlite3

    (database,) = (tracked("trackio") / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics order by rowid").fetchall()
        (config,) = connection.execute("select distinct config from configs").fetchall()
    assert len({name for name, _, _ in rows}) == 1  # the resumed part is in the same run
    values = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert [(step, v["reward_mean"]) for step, v in values if "reward_mean" in v] == [(1, 1.5), (2, 2.5), (3, 3.5), (2, 3.5)]
    assert any("漢字" in json.dumps(v, ensure_ascii=False) for _, v in values) and json.loads(config[0])["learning_rate"] == 1e-3


@pytest.mark.slow
def test_swanlab(tracked):
    parts = sorted((tracked("swanlab") / "swanlog").glob("run-*"))
    assert len(parts) == 2
    assert "learning_rate" in (parts[0] / "files" / "config.yaml").read_text()
    assert b"reward_mean" in next(parts[0].glob("*.swanlab")).read_bytes()
    table = json.loads(next(parts[0].glob("media/echarts/*.json")).read_text())
    assert "<answer>漢字</answer>" in json.dumps(table, ensure_ascii=False)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_ctrl_c_in_a_terminal_leaves_it_as_it_was(tmp_path):
    """The whole program in a terminal of 60 columns, stopped twice: by one Ctrl-C, and resumed, by two."""
    import fcntl
    import pty
    import select
    import struct
    import termios
    import time

    def in_terminal(interrupts, *more):
        settings = ["max_train_samples=300", "batch_size=3", "num_generations=4", "max_completion_length=24", "eval_samples=4",
                    "use_compile=false", "run_name=run", f"output_dir={tmp_path}"]  # fmt: skip
        command = [sys.executable, str(ROOT / "mlx-grpo.py"), *(part for s in settings for part in ("--set", s)), *more]
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 60, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color"}
        environment = {k: v for k, v in environment.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "TTY_INTERACTIVE")}

        def before_it_starts():
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the tests may run with it ignored
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment,
                                   preexec_fn=before_it_starts)  # fmt: skip
        os.close(slave)
        seen, deadline = b"", time.monotonic() + 60
        while time.monotonic() < deadline:
            if select.select([master], [], [], 0.05)[0]:
                try:
                    seen += os.read(master, 65536)
                except OSError:  # Linux, when the other end is closed
                    break
            if interrupts and b"tok/s" in seen:
                os.write(master, b"\x03")
                interrupts -= 1
                time.sleep(0.02)
        os.close(master)
        try:
            return process.wait(timeout=60), seen.decode()
        finally:
            process.kill()
            process.wait()

    status, text = in_terminal(1)
    assert status == 130 and "To continue, run the same command with --resume" in text.replace("\r\n", "")
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    display = text[text.index("\x1b[?25l") : text.rindex("\x1b[?25h")]
    for line in re.split(r"[\n\r]|\x1b\[\d*A", display):
        assert cell_len(CONTROL.sub("", line)) <= 60
    status, text = in_terminal(2, "--resume")
    assert status == 130 and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
