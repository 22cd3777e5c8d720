"""What people see of a run: the terminal while it trains, trackers, the table at the end, the report, the machine's facts."""

import collections
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np

from mlx_grpo.errors import RunError, UserError

ROOT = Path(__file__).resolve().parents[2]
MISMATCH_WARNING = 0.05  # nats a token between sampler and policy


# --- Words and records ------------------------------------------------------------------------------------------


def describe_evaluation(record: dict) -> str:
    low, high = (100 * x for x in record["em_strict_ci"])
    split = "held-out" if record["split"] == "test" else "training subset"
    return f"{split} exact match {100 * record['em_strict']:.1f}% ({low:.1f}-{high:.1f}), lenient {100 * record['em_lenient']:.1f}%, n={record['n']}"


def figures(record: dict) -> dict[str, str]:
    """The few numbers of an update that matter, as words by name."""
    shown = {"reward": "none" if record["reward_mean"] is None else f"{record['reward_mean']:.3f}"}
    if record.get("kl"):  # 0 where there is no reference
        shown["kl"] = f"{record['kl']:.4f}"
    shown |= {
        "length": f"{record['completion_length_mean']:.0f}",
        "truncated": f"{record['truncated_fraction']:.0%}",
        "no-signal": f"{record['zero_signal_fraction']:.0%}",
        "rollout": f"{record['rollout_tokens_per_s']:.0f} tok/s",
        "train": f"{record['train_tokens_per_s']:.0f} tok/s",
        "memory": f"{record['peak_memory_gb']:.2f} GB",
        "lr": f"{record['lr']:.1e}",
    }
    return shown | ({"skipped": record["skipped"]} if "skipped" in record else {})


def completion_records(update: int, groups: list, names: list[str]) -> list[dict]:
    """The lines of completions.jsonl for an update's groups. names: of the reward functions, in the order of their rewards."""
    return [
        {
            "update": update, "prompt": group.row["prompt"], "answer": group.row["answer"], "completion": text,
            "rewards": {n: None if np.isnan(r) else float(r) for n, r in zip(names, rewards)},
            "finish_reason": reason, "length": len(ids),
        }
        for group in groups
        for text, reason, rewards, ids in zip(group.texts, group.finish_reasons, group.rewards.T, group.completions)
    ]  # fmt: skip


def nan_mean(values: np.ndarray) -> float | None:
    """Mean of what is not NaN; None where all is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def update_facts(trainer, groups: list, names: list[str], prompts_drawn: int, sampled: int, seconds: dict) -> dict:
    """What the log says of an update's completions and of its time.

    names: of the reward functions; prompts_drawn, sampled: prompts and completion tokens, those of replaced groups included; seconds: by phase.
    """
    import mlx.core as mx

    lengths = np.array([len(c) for group in groups for c in group.completions])
    per_function = np.stack([group.rewards for group in groups], axis=1)  # (F, B, G)
    scored = trainer.totals[~np.isnan(trainer.totals)]
    record = {
        "epoch": round(trainer.cursor / len(trainer.rows), 4),
        "reward_mean": float(scored.mean()) if scored.size else None,
        "reward_std": float(scored.std()) if scored.size else None,
        **{f"rewards/{name}": nan_mean(r) for name, r in zip(names, per_function)},
        "completion_length_mean": float(lengths.mean()),
        "completion_length_max": int(lengths.max()),
        "truncated_fraction": float(np.mean([r == "length" for group in groups for r in group.finish_reasons])),
        "zero_signal_fraction": float(np.mean(~trainer.advantages.any(axis=1))),
        "prompts_drawn": prompts_drawn,
        "rollout_tokens_per_s": sampled / seconds["rollout"],
        "train_tokens_per_s": int(lengths.sum()) * trainer.config.num_iterations / seconds["train"],
        **{f"seconds/{phase}": value for phase, value in seconds.items()},
        "peak_memory_gb": mx.get_peak_memory() / 2**30,
        "total_tokens": trainer.tokens,
    }
    return record if trainer.reference else {"kl": 0.0, **record}


def machine_facts(memory: int) -> dict:
    """What the report says of the machine, the versions and the command. memory: the machine's, in bytes."""
    import mlx.core as mx  # here: it must load after the BLAS that the trainer looks for

    versions = {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm", "transformers")}
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), "chip": mx.device_info().get("device_name", "unknown"),
        "device": mx.default_device().type.name, "cores": os.cpu_count(), "memory_gb": round(memory / 2**30, 1),
        "platform": f"{platform.system()} {platform.machine()}", "python": platform.python_version(), **versions,
    }  # fmt: skip


# --- Text that is safe to show ----------------------------------------------------------------------------------


def escaped(text: str, encoding: str = "utf-8") -> str:
    """`text` on one line, with all that a terminal would act on or cannot show as escapes: control characters, ANSI codes,
    marks of direction and width, halves of surrogate pairs, and what `encoding` lacks."""
    shown = "".join(c if c.isprintable() else " " if c in "\u00a0\u3000" else c.encode("unicode_escape").decode() for c in text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def shortened(text: str, most: int) -> str:
    """At most `most` characters of the text: its beginning and its end, where the answer is."""
    half = (most - 5) // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def question_text(prompt: str | list[dict]) -> str:
    """A prompt as one text: of a chat, the last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))


def sparkline(values: list[float | None], width: int, ascii_only: bool = False) -> str:
    """The values as at most `width` bars from the least to the greatest; more values are drawn by the means of stretches.

    None (and what is not finite) is a gap.
    """
    levels = "_.-=*#" if ascii_only else "▁▂▃▄▅▆▇█"
    stretches = [s for s in np.array_split(np.array(values, dtype=float), min(width, len(values)) or 1) if s.size]
    means = [s[np.isfinite(s)].mean() if np.isfinite(s).any() else math.nan for s in stretches]
    known = [m for m in means if m == m]
    if not known:
        return ""
    low, spread = min(known), max(known) - min(known)
    place = lambda m: round((m - low) / spread * (len(levels) - 1)) if spread else len(levels) // 2  # noqa: E731
    return "".join(levels[place(m)] if m == m else " " for m in means)


def clock(seconds: float) -> str:
    """3725 -> 1:02:05"""
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


# --- The run in the terminal ------------------------------------------------------------------------------------


class Monitor:
    """Shows a run while it trains: a live display in a terminal, plain lines that grep can find elsewhere; and passes it on
    to the trackers.

        with monitor:  phase("sampling"), update(record), evaluation(record, "update 25"), completions(records, totals)
    """

    MARGIN = 3  # columns left free: a ^C that the terminal writes behind the last line must not wrap it

    def __init__(self, updates: int, logging_steps: int = 1, console=None):
        from rich.console import Console

        self.console = console or Console(highlight=False, markup=False, emoji=False)
        self.updates, self.logging_steps = updates, logging_steps
        self.trackers = Trackers()
        self.done = 0  # updates
        self.record = None  # the last one shown; between them the display keeps its numbers
        self.rewards, self.shown_rewards = [], 0  # of each update since the start of this process; how many are shown
        self.held_out = None  # the newest evaluation on held-out data
        self.times = collections.deque(maxlen=20)  # (updates done, when), for the time that is left
        self.doing, self.since, self.note = "", 0.0, ""
        self.live = None
        self.warned = False  # that the sampler has drifted too far from the policy to learn from: once is enough

    def __enter__(self):
        if self.console.file.isatty() and self.console.is_interactive:
            from rich.live import Live

            # Twice a second moves the clock; updates and phases redraw at once. A stderr that goes elsewhere is let alone.
            self.live = Live(self, console=self.console, refresh_per_second=2, redirect_stderr=sys.stderr.isatty())
            self.live.start()
        return self

    def __exit__(self, kind, error, trace):
        self.doing = ""
        if self.live:
            self.live.stop()
            self.live = None

    def begin(self, done: int, held_out: dict | None) -> None:
        """What there is already: nothing, or after a resume the updates done and the evaluation before the first."""
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
        self.trackers.scalars({f"eval/{record['split']}/{k}": v for k, v in numbers(record).items()}, record["update"])
        self.say(f"{when}: {describe_evaluation(record)}")
        self.phase("reporting")

    def update(self, record: dict) -> None:
        """Show an update's log record: the progress each time, its numbers every logging_steps."""
        self.trackers.scalars(numbers(record), record["update"])
        if (record.get("mismatch/kl") or 0.0) > MISMATCH_WARNING and not self.warned:
            self.warned = True
            print(
                f"Warning: sampler and policy differ by {record['mismatch/kl']:.3f} nats a token; raise bits, lower sync_every, "
                "or set top_p = 1, top_k = 0, min_p = 0, repetition_penalty = 1",
                file=sys.stderr,
            )
        self.done = record["update"]
        self.times.append((self.done, time.monotonic()))
        self.rewards.append(record["reward_mean"])
        if self.done % self.logging_steps == 0:
            self.record, self.shown_rewards = record, len(self.rewards)
            if not self.live:
                words = " ".join(f"{name} {value}" for name, value in figures(record).items())
                left = self.seconds_left()
                self.say(f"update {self.done}/{self.updates} {words}" + (f" left {clock(left)}" if left else ""))
        if self.live:
            self.live.refresh()

    def completions(self, records: list[dict], totals) -> None:
        """Show one prompt's best and worst completion: of the first group whose rewards differ, else of the first group.

        records: of completions.jsonl, B*G of them; totals: (B, G), the weighted rewards, NaN where all abstained.
        """
        self.trackers.completions(records)
        totals = np.asarray(totals, dtype=float)
        lowest, highest = (np.nan_to_num(totals, nan=nan) for nan in (np.inf, -np.inf))
        b = int(np.argmax(highest.max(axis=1) > lowest.min(axis=1)))
        chosen = [(name, int(i)) for name, i in (("best", highest[b].argmax()), ("worst", lowest[b].argmin()))]
        update, question = records[0]["update"], records[b * totals.shape[1]]["prompt"]
        told = [(name, totals[b, i], records[b * totals.shape[1] + i]) for name, i in chosen]
        if self.live:
            self.console.print(self.sample_table(update, question_text(question), told))
            return
        self.say(f"sample {update} prompt: {shortened(question_text(question), 400)}")
        for name, total, record in told:
            self.say(f"sample {update} {name} {total:.3f} ({reward_words(record)}): {shortened(record['completion'], 400)}")

    def stopping(self) -> None:
        """Called by a signal handler, which may have interrupted a write: nothing is printed where the display can tell."""
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

        width, plain = max(10, options.max_width - self.MARGIN), not console.encoding.lower().startswith("utf")
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
        head, tail = f"update {self.done:>{len(str(self.updates))}}/{self.updates} ", "  ".join(words)
        bar = min(40, width - len(head) - 32)  # of one length, whatever stands behind it
        line = Text(head)
        if bar >= 5:
            full = bar * self.done // max(1, self.updates)
            line.append(("#" if plain else "━") * full, "green").append(("-" if plain else "─") * (bar - full), "dim").append(" ")
        return line.append(tail)

    def reward_line(self, width: int, plain: bool):
        """reward 2.310 ▁▂▂▃▅▆▇█  from 0.51 to 2.93"""
        from rich.text import Text

        values = self.rewards[: self.shown_rewards]
        known = [v for v in values if v is not None and math.isfinite(v)]
        tail = f" {min(known):.2f} to {max(known):.2f}" if known else ""
        line = Text("reward ").append(figures(self.record)["reward"], "bold").append(" ")
        return line.append(sparkline(values, max(1, width - line.cell_len - len(tail)), plain), "cyan").append(tail, "dim")

    def figure_lines(self, width: int) -> list:
        """The other numbers, in as many columns as there is room for."""
        from rich.text import Text

        shown = {name: value for name, value in figures(self.record).items() if name != "reward"}
        if self.held_out:
            shown = {"held-out": f"{self.held_out['em_strict']:.1%} at {self.held_out['update']}", **shown}
        room = 24  # columns of the widest pair: held-out 100.0% at 99999
        across = max(1, (width + 2) // (room + 2))
        pairs, lines = list(shown.items()), []
        for start in range(0, len(pairs), across):
            line = Text()
            for place, (name, value) in enumerate(pairs[start : start + across]):
                line.pad_right(max(0, place * (room + 2) - line.cell_len))
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
            head = Text(f"{total:.3f}", "bold").append(f" = {escaped(reward_words(record), self.console.encoding)}", "dim")
            table.add_row(Text(name, "dim"), head)
            table.add_row("", self.few_lines(record["completion"], width, 6))
        return table

    def few_lines(self, text: str, width: int, most: int):
        """At most `most` lines of a text, its beginning and its end, escaped and wrapped at `width` columns."""
        from rich.text import Text

        text = shortened(text, 2 * most * width)  # at least all that can be shown
        lines = [Text(escaped(line, self.console.encoding)) for line in text.strip("\n").split("\n")]
        lines = [part for line in lines for part in line.wrap(self.console, width) or [line]]
        if len(lines) > most:
            lines = [*lines[: most - 3], Text("...", "dim"), *lines[-2:]]
        return Text("\n").join(lines)


def reward_words(record: dict) -> str:
    """correctness 2.0, int 0.5, ...: each reward function's own, before its weight."""
    words = [f"{n.removesuffix('_reward_func')} {'none' if r is None else f'{r:.3g}'}" for n, r in record["rewards"].items()]
    return ", ".join(words)


@contextlib.contextmanager
def stopping_on_signals(trainer):
    """Ctrl-C and SIGTERM let the update finish and be saved; a second one stops at once."""
    received = []

    def on_signal(number, frame):
        if received:
            trainer.monitor.abandon()
            os._exit(128 + number)
        received.append(number)
        if number == signal.SIGHUP:  # the launcher's connection is gone, and the terminal with it
            sys.stdout = sys.stderr = open(os.devnull, "w")
        trainer.stop_signal = number
        trainer.monitor.stopping()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[: 2 if trainer.ranks.size == 1 else 3]
    previous = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# --- Trackers ---------------------------------------------------------------------------------------------------
# Each takes scalars(values, update), completions(columns, rows, update) and close(failed). Their files go under the run's
# directory, and each goes on with the run it had after a resume, by the id in the run's file tracker_id.


def numbers(record: dict) -> dict[str, float]:
    """The numeric fields of a log record; an interval as NAME/low and NAME/high."""
    flat = {}
    for name, value in record.items():
        pairs = zip((f"{name}/low", f"{name}/high"), value) if isinstance(value, (list, tuple)) else [(name, value)]
        flat |= {n: float(v) for n, v in pairs if isinstance(v, (int, float)) and math.isfinite(v)}
    flat.pop("update", None)  # the x axis
    return flat


class TensorBoard:
    """Event files in RUN/tensorboard: `tensorboard --logdir outputs` shows all runs.

    A resumed run writes another file there, and TensorBoard drops what the stopped run had beyond the checkpoint.
    """

    def __init__(self, run_dir: Path, config: dict, run_id: str, update: int, resumed: bool):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.Event, self.scalar, self.text = event_pb2.Event, scalar_pb, text_pb
        self.writer = EventFileWriter(str(run_dir / "tensorboard"))
        # The second START that a reader meets, and each later one, drops the points from its step on.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self.writer.add_event(event_pb2.Event(wall_time=time.time(), step=update + 1, session_log=start))
        self.add(self.text("config", self.code(json.dumps(config, indent=2))), update)

    @staticmethod
    def code(text: str) -> str:
        """Text as Markdown that shows it letter by letter: TensorBoard would drop <answer> as unknown HTML."""
        return "\n".join("    " + line for line in text.splitlines())

    def add(self, summary, update: int) -> None:
        self.writer.add_event(self.Event(wall_time=time.time(), step=update, summary=summary))
        self.writer.flush()

    def scalars(self, values, update):
        summary = None
        for name, value in values.items():
            one = self.scalar(name, value)
            summary = one if summary is None else (summary.MergeFrom(one), summary)[1]
        self.add(summary, update)

    def completions(self, columns, rows, update):
        cells = [columns, *([self.code(str(cell)) for cell in row] for row in rows)]
        self.add(self.text("completions", np.array(cells, dtype=object)), update)

    def close(self, failed):
        self.writer.close()


class Wandb:
    """Weights & Biases, in RUN/wandb and on its server; WANDB_MODE=offline stays on this machine, for `wandb sync` later.

    A resumed run keeps its id, so that the server (or the sync) joins the parts. `update` is an x axis of its own:
    W&B's step may not go back, as a resume from an earlier checkpoint does.
    """

    def __init__(self, run_dir: Path, config: dict, run_id: str, update: int, resumed: bool):
        import wandb

        self.Table = wandb.Table
        # Its own capture of the terminal would record every frame of the live display.
        settings = wandb.Settings(console="off", quiet=True)
        project = os.environ.get("WANDB_PROJECT", "mlx-grpo")
        self.run = wandb.init(project=project, name=run_dir.name, id=run_id, resume="allow", dir=run_dir, config=config, settings=settings)
        self.run.define_metric("update")
        self.run.define_metric("*", step_metric="update")

    def scalars(self, values, update):
        self.run.log({**values, "update": update})

    def completions(self, columns, rows, update):
        table = self.Table(columns=columns, data=rows, allow_mixed_types=True)  # a reward may be none
        self.run.log({"completions": table, "update": update})

    def close(self, failed):
        self.run.finish(exit_code=int(failed))


class Trackio:
    """Trackio, a database in RUN/trackio: `TRACKIO_DIR=RUN/trackio trackio show`. A TRACKIO_DIR or TRACKIO_SPACE_ID of the
    user's wins. A resumed run goes on under its name."""

    def __init__(self, run_dir: Path, config: dict, run_id: str, update: int, resumed: bool):
        os.environ.setdefault("TRACKIO_DIR", str(run_dir / "trackio"))  # read when it is imported
        import trackio

        self.Table, self.finish = trackio.Table, trackio.finish
        project = os.environ.get("TRACKIO_PROJECT", "mlx-grpo")
        self.run = trackio.init(project=project, name=f"{run_dir.name}-{run_id}", config=config, resume="allow" if resumed else "never")

    def scalars(self, values, update):
        self.run.log(dict(values), step=update)

    def completions(self, columns, rows, update):
        self.run.log({"completions": self.Table(columns=columns, data=rows)}, step=update)

    def close(self, failed):
        self.finish()


class SwanLab:
    """SwanLab, in RUN/swanlog and on its server; SWANLAB_MODE=offline or local stays on this machine.

    A resumed run keeps its id, by which the server joins the parts; offline each part is a run of its own.
    """

    def __init__(self, run_dir: Path, config: dict, run_id: str, update: int, resumed: bool):
        import swanlab

        self.swanlab = swanlab
        settings = swanlab.Settings(terminal=swanlab.Settings.Terminal(proxy_type="none"))  # as with W&B
        named = [os.environ.get(name) for name in ("SWANLAB_PROJECT_NAME", "SWANLAB_PROJ_NAME")]  # the latter up to 0.7
        self.run = swanlab.init(
            project=next(filter(None, named), "mlx-grpo"), name=run_dir.name, id=run_id, resume="allow",
            log_dir=str(run_dir / "swanlog"), config=config, settings=settings,
        )  # fmt: skip

    def scalars(self, values, update):
        self.run.log(values, step=update)

    def completions(self, columns, rows, update):
        cells = [["" if cell is None else cell for cell in row] for row in rows]
        self.run.log({"completions": self.swanlab.echarts.Table().add(columns, cells)}, step=update)

    def close(self, failed):
        self.run.finish(*(("crashed", "the run failed") if failed else ("success",)))


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio, "swanlab": SwanLab}


def check_trackers(names: list[str]) -> None:
    """Raise UserError for trackers whose package is not installed."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # no origin: a folder such as wandb/, which its runs leave behind
            raise UserError(f"report_to: {name} is not installed; install it with uv sync --extra trackers, or uv pip install {name}")


class Trackers:
    """The trackers of a run, [(name, tracker)]. One that fails is named once and let go: training does not depend on it.

        with trackers:  closes them at the end, as failed after an exception
    """

    def __init__(self, members: list[tuple] = ()):
        self.members = list(members)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close(failed=kind is not None)

    def scalars(self, values: dict[str, float], update: int) -> None:
        self.each("scalars", values, update)

    def completions(self, records: list[dict]) -> None:
        """A table of completions.jsonl's records, all of one update."""
        columns = ["update", "prompt", "answer", "completion", *records[0]["rewards"], "finish_reason", "length"]
        texts = lambda r: [t.encode("utf-8", "replace").decode() for t in (question_text(r["prompt"]), str(r["answer"]), r["completion"])]  # noqa: E731
        rows = [[r["update"], *texts(r), *r["rewards"].values(), r["finish_reason"], r["length"]] for r in records]  # no half characters
        self.each("completions", columns, rows, records[0]["update"])

    def close(self, failed: bool) -> None:
        self.each("close", failed)
        self.members = []

    def each(self, method: str, *arguments) -> None:
        for name, tracker in list(self.members):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # other people's code, disks and networks
                self.members.remove((name, tracker))
                print(f"Warning: {name} failed and is left out from here on: {reason(error)}", file=sys.stderr)


def start_trackers(names: list[str], run_dir: Path, config: dict, update: int) -> Trackers:
    """Open the named trackers for a run. update: those done before. Raises RunError where one does not start."""
    run_dir = run_dir.resolve()
    id_file = run_dir / "tracker_id"
    resumed = id_file.is_file()
    if names and not resumed:
        id_file.write_text(uuid.uuid4().hex[:12])
    trackers = Trackers()
    for name in dict.fromkeys(names):
        try:
            trackers.members.append((name, TRACKERS[name](run_dir, config, id_file.read_text(), update, resumed)))
        except Exception as error:  # as above; now somebody is still there to mend it
            trackers.close(failed=True)
            offline = f"set {name.upper()}_MODE=offline, " if name in ("wandb", "swanlab") else ""
            raise RunError(f"Cannot start tracker {name}: {reason(error)}; mend that, {offline}or leave it out of report_to") from None
    return trackers


def reason(error: Exception) -> str:
    """An error on one line."""
    return shortened(escaped(" ".join(str(error).split())).rstrip(".") or type(error).__name__, 300)


# --- After the run ----------------------------------------------------------------------------------------------


def print_outcome(run_dir: Path, outcome: dict) -> None:
    """The table of held-out scores before and after, and where the model is."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Held-out problems, greedy answers")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    for label, key in (("exact match, tags required", "em_strict"), ("exact match, last number", "em_lenient")):
        cells = []
        for when in ("before", "after"):
            record = outcome[when].get("test")
            low, high = (100 * x for x in record[f"{key}_ci"]) if record else (0, 0)
            cells.append(f"{100 * record[key]:.1f}% ({low:.1f}-{high:.1f})" if record else "not evaluated")
        table.add_row(label, *cells)
    Console().print(table)
    final = run_dir / "final"
    if (run_dir / "report.html").is_file():
        print(f"Report     {run_dir / 'report.html'}")
    print(f"Model      {final}\nTry it     uv run python utils/inference.py --model {final} --chat")


def write_report(run_dir: Path) -> None:
    """Rewrite report.html, in a process of its own: whatever goes wrong with it, the run goes on."""
    command = [sys.executable, str(ROOT / "utils" / "report.py"), str(run_dir)]
    result = subprocess.run(command, capture_output=True, text=True, start_new_session=True)  # Ctrl-C is for the trainer
    if result.returncode:
        print(f"Warning: no report.html: {(result.stderr.strip() or 'stopped').splitlines()[-1]}", file=sys.stderr)
