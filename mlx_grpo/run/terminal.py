"""The run in the terminal: a live display while it trains, the table at the end, and the report."""

import collections
import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from mlx_grpo.run.text import clock, escaped, question_text, shortened, sparkline
from mlx_grpo.run.trackers import Trackers, numbers

ROOT = Path(__file__).resolve().parents[2]
MOSTLY = 0.5  # share of completions cut while thinking above which it is warned of
MISMATCH_WARNING = 0.05  # nats a token between sampler and policy


def has_exact_match(record: dict) -> bool:
    """Whether an evaluation's exact match means something: the correctness reward is in it, or no reward."""
    return "rewards/correctness_reward_func" in record or not any(
        name.startswith("rewards/") for name in record
    )


def score_rows(record: dict) -> list[tuple[str, str]]:
    """(what it is, its field) of each score in an evaluation's record, in the order of the tables."""
    names = [name for name in record if name.startswith("rewards/") and not name.endswith("_ci")]
    rows = [("reward", "reward_mean")] if "reward_mean" in record else []
    rows += [(name.removeprefix("rewards/"), name) for name in names]
    exact = [("exact match, tags required", "em_strict"), ("exact match, last number", "em_lenient")]
    return rows + (exact if has_exact_match(record) else [])


def score_text(record: dict, key: str, with_interval: bool = True) -> str:
    """A score in words: `26.0% (20.4-32.5)`; a reward, which may be negative: `1.250 (1.103 to 1.397)`."""
    value, interval = record[key], record.get(f"{key}_ci")
    if value is None:
        return "none"
    share = key.startswith("em_")
    scale, digits = (100, 1) if share else (1, 3)
    shown = f"{scale * value:.{digits}f}{'%' * share}"
    if not with_interval or not interval:
        return shown
    low, high = (f"{scale * end:.{digits}f}" for end in interval)
    return f"{shown} ({low}{'-' if share else ' to '}{high})"


def describe_evaluation(record: dict) -> str:
    """held-out reward 2.310 (2.205 to 2.415), exact match 26.0% (20.4-32.5), lenient 100.0%, n=200"""
    parts = [f"reward {score_text(record, 'reward_mean')}"] if "reward_mean" in record else []
    if has_exact_match(record):
        parts += [
            f"exact match {score_text(record, 'em_strict')}",
            f"lenient {score_text(record, 'em_lenient', False)}",
        ]
    split = "held-out" if record["split"] == "test" else "training subset"
    parts.append(f"n={record['n']}")
    if record.get("cut_thinking"):
        parts.append(f"{record['cut_thinking']:.0%} cut while thinking")
    return f"{split} {', '.join(parts)}"


def figures(record: dict) -> dict[str, str]:
    """The few numbers of an update that matter, as words by name."""
    shown = {"reward": "none" if record["reward_mean"] is None else f"{record['reward_mean']:.3f}"}
    if record.get("kl"):  # 0 where there is no reference
        shown["kl"] = f"{record['kl']:.4f}"
    shown |= {
        "length": f"{record['completion_length_mean']:.0f}",
        "truncated": f"{record['truncated_fraction']:.0%}",
        **(
            {"thinking": f"{record['cut_thinking_fraction']:.0%}"}
            if record.get("cut_thinking_fraction")
            else {}
        ),
        "no-signal": f"{record['zero_signal_fraction']:.0%}",
        "rollout": f"{record['rollout_tokens_per_s']:.0f} tok/s",
        "train": "none"
        if record["train_tokens_per_s"] is None
        else f"{record['train_tokens_per_s']:.0f} tok/s",
        "memory": f"{record['peak_memory_gb']:.2f} GB",
        "lr": f"{record['lr']:.1e}",
    }
    return shown | ({"skipped": record["skipped"]} if "skipped" in record else {})


class Monitor:
    """Shows a run while it trains, and passes it on to the trackers.

    A live display in a terminal; plain lines that grep can find elsewhere.

        with monitor:  phase("sampling"), update(record), completions(records, totals),
                       evaluation(record, "update 25")
    """

    MARGIN = 3  # columns left free: a ^C that the terminal writes behind the last line must not wrap it

    def __init__(self, updates: int, logging_steps: int = 1, console=None, metric: str = "em_strict"):
        from rich.console import Console

        self.console = console or Console(highlight=False, markup=False, emoji=False)
        self.updates, self.logging_steps, self.metric = updates, logging_steps, metric
        self.trackers = Trackers()
        self.done = 0  # updates
        self.record = None  # the last one shown; between them the display keeps its numbers
        self.rewards = []  # of each update since the start of this process
        self.shown_rewards = 0  # how many of them are shown
        self.held_out = None  # the newest evaluation on held-out data
        self.times = collections.deque(maxlen=20)  # (updates done, when), for the time that is left
        self.doing, self.since = "", 0.0
        self.note = ""
        self.live = None
        # Each warning comes once: of a sampler too far from the policy, of completions cut while thinking.
        self.warned = self.warned_of_thinking = False

    def __enter__(self):
        if self.console.file.isatty() and self.console.is_interactive:
            from rich.live import Live

            # Redrawn twice a second for the clock, and at once for updates and phases. A stderr that does not
            # go to the terminal is left alone.
            self.live = Live(
                self, console=self.console, refresh_per_second=2, redirect_stderr=sys.stderr.isatty()
            )
            self.live.start()
        return self

    def __exit__(self, kind, error, trace):
        self.doing = ""
        if self.live:
            self.live.stop()
            self.live = None

    def begin(self, done: int, held_out: dict | None) -> None:
        """Start from the updates done before a resume, and from the evaluation before the first update."""
        self.done, self.held_out = done, held_out

    def say(self, text: str) -> None:
        """One line for the user, above the display where there is one."""
        text = escaped(text, self.console.encoding)
        if self.live:
            self.console.print(text, soft_wrap=False)
        else:
            print(text, file=self.console.file, flush=True)

    def phase(self, doing: str) -> None:
        """What the trainer does from now on, such as "sampling"."""
        self.doing, self.since = doing, time.monotonic()
        if doing == "sampling" and not self.times:
            self.times.append((self.done, self.since))
        if self.live:
            self.live.refresh()

    def evaluating(self, count: int, when: str) -> None:
        self.phase("evaluating")
        if not self.live:
            self.say(f"{when}: evaluating {count} problems")

    def evaluation(self, record: dict, when: str) -> None:
        """Show an evaluation's log record; the report comes next. when: "update 25", or "before training"."""
        if record["split"] == "test":
            self.held_out = record
        self.trackers.scalars(
            {f"eval/{record['split']}/{k}": v for k, v in numbers(record).items()}, record["update"]
        )
        self.say(f"{when}: {describe_evaluation(record)}")
        self.phase("reporting")

    def update(self, record: dict) -> None:
        """Show an update's log record: the progress each time, its numbers every logging_steps."""
        self.trackers.scalars(numbers(record), record["update"])
        if (record.get("mismatch/kl") or 0.0) > MISMATCH_WARNING and not self.warned:
            self.warned = True
            print(
                f"Warning: sampler and policy differ by {record['mismatch/kl']:.3f} nats a token; raise "
                "bits, lower sync_every, or set top_p = 1, top_k = 0, min_p = 0, repetition_penalty = 1",
                file=sys.stderr,
            )
        if record.get("cut_thinking_fraction", 0.0) > MOSTLY and not self.warned_of_thinking:
            self.warned_of_thinking = True
            print(
                f"Warning: {record['cut_thinking_fraction']:.0%} of the completions were cut while thinking, "
                "before any answer; raise max_completion_length, or set chat_template_kwargs = { "
                "enable_thinking = false } where the model's template takes it",
                file=sys.stderr,
            )
        self.done = record["update"]
        self.times.append((self.done, time.monotonic()))
        self.rewards.append(record["reward_mean"])
        if self.done % self.logging_steps == 0:
            self.record = record
            self.shown_rewards = len(self.rewards)
            if not self.live:
                words = " ".join(f"{name} {value}" for name, value in figures(record).items())
                left = self.seconds_left()
                self.say(
                    f"update {self.done}/{self.updates} {words}" + (f" left {clock(left)}" if left else "")
                )
        if self.live:
            self.live.refresh()

    def completions(self, records: list[dict], totals) -> None:
        """Show one prompt's best and worst completion.

        They are of the first group whose rewards differ, else of the first group. records: B*G of
        completions.jsonl; totals: (B, G), the weighted rewards, NaN where all abstained.
        """
        self.trackers.completions(records)
        totals = np.asarray(totals, dtype=float)
        lowest, highest = (np.nan_to_num(totals, nan=nan) for nan in (np.inf, -np.inf))
        b = int(np.argmax(highest.max(axis=1) > lowest.min(axis=1)))
        chosen = [
            (name, int(i)) for name, i in (("best", highest[b].argmax()), ("worst", lowest[b].argmin()))
        ]
        update = records[0]["update"]
        question = records[b * totals.shape[1]]["prompt"]
        told = [(name, totals[b, i], records[b * totals.shape[1] + i]) for name, i in chosen]
        if self.live:
            self.console.print(self.sample_table(update, question_text(question), told))
            return
        self.say(f"sample {update} prompt: {shortened(question_text(question), 400)}")
        for name, total, record in told:
            self.say(
                f"sample {update} {name} {total:.3f} ({reward_words(record)}): "
                f"{shortened(record['completion'], 400)}"
            )

    def stopping(self) -> None:
        """Called by a signal handler, which may have interrupted a write: the live display tells it later."""
        if self.live:
            self.note = "stopping after this update; Ctrl-C again: at once"
        else:
            print("Stopping after this update; once more to stop at once", file=sys.stderr)

    def abandon(self) -> None:
        """Give the terminal its cursor back, when the process ends without leaving the `with`."""
        if self.live:
            os.write(self.console.file.fileno(), b"\x1b[?25h\n")

    def seconds_left(self) -> float | None:
        """Until the last update, at the pace of the last twenty; None before the first."""
        if len(self.times) < 2:
            return None
        (first, start), (last, end) = self.times[0], self.times[-1]
        return max(0.0, (end - start) / (last - first) * (self.updates - last) - (time.monotonic() - end))

    # Drawing

    def __rich_console__(self, console, options):
        from rich.text import Text

        width = max(10, options.max_width - self.MARGIN)
        plain = not console.encoding.lower().startswith("utf")
        lines = [self.progress_line(width, plain)]
        if self.record:
            lines.append(self.reward_line(width, plain))
            lines += self.figure_lines(width)
        if self.note:
            lines.append(Text(self.note, style="yellow"))
        for line in lines[: max(1, console.height - 1)]:  # a line that scrolls away could not be redrawn
            line.truncate(width)
            line.no_wrap = True
            yield line

    def progress_line(self, width: int, plain: bool):
        """update 23/50 ━━━━━━━───────  0:01:12 left  sampling 3 s"""
        from rich.text import Text

        left = self.seconds_left()
        words = [f"{clock(left)} left"] if left is not None and self.done < self.updates else []
        if self.doing:
            words.append(f"{self.doing} {time.monotonic() - self.since:.0f} s")
        head = f"update {self.done:>{len(str(self.updates))}}/{self.updates} "
        tail = "  ".join(words)
        bar = min(40, width - len(head) - 32)  # of one length, whatever stands behind it
        line = Text(head)
        if bar >= 5:
            full = bar * self.done // max(1, self.updates)
            line.append(("#" if plain else "━") * full, "green").append(
                ("-" if plain else "─") * (bar - full), "dim"
            ).append(" ")
        return line.append(tail)

    def reward_line(self, width: int, plain: bool):
        """reward 2.310 ▁▂▂▃▅▆▇█  from 0.51 to 2.93"""
        from rich.text import Text

        values = self.rewards[: self.shown_rewards]
        known = [v for v in values if v is not None and math.isfinite(v)]
        tail = f" {min(known):.2f} to {max(known):.2f}" if known else ""
        line = Text("reward ").append(figures(self.record)["reward"], "bold").append(" ")
        return line.append(
            sparkline(values, max(1, width - line.cell_len - len(tail)), plain), "cyan"
        ).append(tail, "dim")

    def figure_lines(self, width: int) -> list:
        """The other numbers, in as many columns as there is room for."""
        from rich.text import Text

        shown = {name: value for name, value in figures(self.record).items() if name != "reward"}
        if self.held_out:
            score = score_text(self.held_out, self.metric, with_interval=False)
            shown = {"held-out": f"{score} at {self.held_out['update']}", **shown}
        room = 24  # columns of the widest pair: held-out 100.0% at 99999
        across = max(1, (width + 2) // (room + 2))
        pairs = list(shown.items())
        lines = []
        for start in range(0, len(pairs), across):
            line = Text()
            for column, (name, value) in enumerate(pairs[start : start + across]):
                line.pad_right(max(0, column * (room + 2) - line.cell_len))
                line.append(f"{name} ", "dim").append(escaped(value))
            lines.append(line)
        return lines

    def sample_table(self, update: int, question: str, told: list[tuple]):
        """One prompt with its best and worst completion and their rewards, a few lines each."""
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 1))
        table.add_column(width=6, no_wrap=True)
        table.add_column()
        width = max(10, self.console.width - 7 - self.MARGIN)
        table.add_row("sample", f"update {update}")
        table.add_row(Text("prompt", "dim"), self.few_lines(question, width, 4))
        for name, total, record in told:
            head = Text(f"{total:.3f}", "bold").append(
                f" = {escaped(reward_words(record), self.console.encoding)}", "dim"
            )
            table.add_row(Text(name, "dim"), head)
            table.add_row("", self.few_lines(record["completion"], width, 6))
        return table

    def few_lines(self, text: str, width: int, most: int):
        """The beginning and end of a text: at most `most` lines, escaped and wrapped at `width` columns."""
        from rich.text import Text

        text = shortened(text, 2 * most * width)  # at least all that can be shown
        lines = [Text(escaped(line, self.console.encoding)) for line in text.strip("\n").split("\n")]
        lines = [part for line in lines for part in line.wrap(self.console, width) or [line]]
        if len(lines) > most:
            lines = [*lines[: most - 3], Text("...", "dim"), *lines[-2:]]
        return Text("\n").join(lines)


def reward_words(record: dict) -> str:
    """correctness 2.0, int 0.5, ...: each reward function's own, before its weight."""
    words = [
        f"{n.removesuffix('_reward_func')} {'none' if r is None else f'{r:.3g}'}"
        for n, r in record["rewards"].items()
    ]
    return ", ".join(words)


@contextlib.contextmanager
def stopping_on_signals(request_stop, monitor: Monitor, with_hangup: bool):
    """Ctrl-C and SIGTERM let the update finish and be saved, by request_stop(number); a second ends it."""
    received = []

    def on_signal(number, frame):
        if received:
            monitor.abandon()
            os._exit(128 + number)
        received.append(number)
        if number == signal.SIGHUP:  # the launcher's connection is gone, and the terminal with it
            sys.stdout = sys.stderr = open(os.devnull, "w")
        request_stop(number)
        monitor.stopping()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[: 3 if with_hangup else 2]
    previous = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def print_outcome(run_dir: Path, outcome: dict, nothing_learnt: str = "") -> None:
    """Print the held-out scores before and after, and where the model is.

    nothing_learnt: what to print instead of how to try the model, where nothing was learnt.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Held-out problems, greedy answers")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    records = [outcome[when].get("test") or {} for when in ("before", "after")]
    for label, key in score_rows(records[1] or records[0]):
        table.add_row(
            label, *(score_text(record, key) if key in record else "not evaluated" for record in records)
        )
    Console().print(table)
    final = run_dir / "final"
    if (run_dir / "report.html").is_file():
        print(f"Report     {run_dir / 'report.html'}")
    print(f"Model      {final}")
    print(nothing_learnt or f"Try it     uv run python utils/inference.py --model {final} --chat")


def write_report(run_dir: Path) -> None:
    """Rewrite report.html, in a process of its own: whatever goes wrong with it, the run goes on."""
    command = [sys.executable, str(ROOT / "utils" / "report.py"), str(run_dir)]
    # In a session of its own: Ctrl-C is for the trainer.
    result = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    if result.returncode:
        print(
            f"Warning: no report.html: {(result.stderr.strip() or 'stopped').splitlines()[-1]}",
            file=sys.stderr,
        )
