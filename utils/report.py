#!/usr/bin/env python3
"""Make report.html of a training run, or compare several: curves, warnings, completions, settings, machine.

The page is one file that opens offline: the curves are SVG by matplotlib with CSS colours for light and dark,
the script in it only turns pages, and whatever a model wrote is escaped. The log's fields are listed in
utils/README.md.
"""

import argparse
import contextlib
import base64
import fnmatch
import hashlib
import html
import io
import json
import math
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

EXAMPLES = """examples:
  uv run python utils/report.py outputs/quickstart --png
  uv run python utils/report.py outputs/quickstart outputs/quickstart-2 --output comparison.html"""

POINTS = 300  # of a curve; longer runs are drawn by the means of as many stretches
SHOWN_UPDATES = 40  # in the table of completions
SHOWN_COMPLETIONS = 16  # of each of these updates
SHOWN_CHARACTERS = 4000  # of each of these texts
LIGHT = ["#1f6fd6", "#d9480f", "#2b8a3e", "#9c36b5", "#a67c00", "#0c8599", "#c2255c", "#5c5f66"]
DARK = ["#6ea8fe", "#ff922b", "#69db7c", "#da77f2", "#ffd43b", "#3bc9db", "#f783ac", "#adb5bd"]
# In the page's SVG these stand for CSS variables, which differ between light and dark.
STAND_INS = {
    "#010203": "var(--ink)",
    "#010204": "var(--line)",
    **{f"#0102{i:02x}": f"var(--c{i})" for i in range(16, 24)},
}
EXACT_MATCH = {"em_strict": "tags required", "em_lenient": "last number"}
CHARTS = [  # title, unit, the log's fields, whether a moving average helps
    ("Reward", "mean of a batch, band: 1 standard deviation", ["reward_mean"], True),
    ("Reward per function", "mean of a batch, before weights", ["rewards/*"], True),
    ("Completion length", "tokens", ["completion_length_mean", "completion_length_max"], True),
    ("Entropy", "nats a token", ["entropy"], True),
    ("KL", "nats a token, to the reference; 0 where kl_coeff is 0", ["kl"], True),
    (
        "Truncated and flat",
        "share of completions cut, of groups without signal",
        ["truncated_fraction", "zero_signal_fraction"],
        True,
    ),
    ("Clip fractions", "share of tokens or rows", ["clip_ratio/*_mean", "cispo_clip_ratio"], True),
    ("VESPO weight", "mean of a row", ["vespo/*"], True),
    ("Gradient norm", "before clipping", ["grad_norm"], True),
    ("Mismatch", "sampler to policy, nats a token", ["mismatch/kl", "mismatch/mean"], True),
    ("Loss", "", ["loss"], True),
    ("Learning rate", "", ["lr"], False),
    ("Throughput", "tokens a second", ["rollout_tokens_per_s", "train_tokens_per_s"], True),
    ("Time", "seconds an update", ["seconds/*"], True),
    ("Peak memory", "GB", ["peak_memory_gb"], False),
]
OVERVIEW = (
    "Reward",
    "Held-out exact match",
    "Held-out reward",
    "Completion length",
    "Entropy",
)  # the picture for a README: the first four
FLAT_ROW = 5  # updates without signal in a row that are worth a warning


class UserError(Exception):
    """What the user asked for cannot be done; exit status 2."""


class ReportError(Exception):
    """Something failed; exit status 1."""


# --- Reading a run ------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One run's records, whatever there is of them."""

    path: Path
    name: str
    updates: list[dict]  # one an update, in order
    evals: list[dict]
    start: dict  # machine.json: machine, versions, command of the newest start; {} where there is none
    completions: list[dict]
    settings: dict[str, dict]  # settings.json: by name its value, default and source
    unreadable: int  # lines
    notes: list[dict]  # what the run said of its signal: events "check", "no_signal" and "end"

    def column(self, name: str) -> np.ndarray:
        """A field over the updates, NaN where it is missing. (n,)"""
        return np.array([number(r.get(name)) for r in self.updates])

    @property
    def step(self) -> np.ndarray:
        return self.column("update")

    def setting(self, name: str):
        """A setting's value, or None where it is unset or not known."""
        return self.settings.get(name, {}).get("value")

    def scored(self, split: str, key: str) -> list[dict]:
        """The evaluations of a split that have `key`, in order."""
        return [e for e in self.evals if e.get("split") == split and math.isfinite(number(e.get(key)))]

    def tests(self, key: str) -> list[dict]:
        return self.scored("test", key)

    @property
    def scores(self) -> dict[str, str]:
        """What held-out problems are scored by: fields of the evaluations, each with a name; rewards first.

        Exact match counts only where the correctness reward is one of the run's; old logs have nothing else.
        """
        names = dict.fromkeys(
            name for e in self.evals for name in e if name.startswith("rewards/") and not name.endswith("_ci")
        )
        rewards = {"reward_mean": "reward"} if any("reward_mean" in e for e in self.evals) else {}
        rewards |= {name: name.removeprefix("rewards/") for name in names}
        exact = {key: f"exact match, {label}" for key, label in EXACT_MATCH.items()}
        return rewards | (exact if not names or "rewards/correctness_reward_func" in names else {})

    @property
    def metric(self) -> str:
        """The score that stands for the run: that of its best checkpoint."""
        chosen = self.setting("metric_for_best_model")
        return (
            chosen if chosen in self.scores else "em_strict" if "em_strict" in self.scores else "reward_mean"
        )


def number(value) -> float:
    """A finite number as float; NaN for anything else."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else math.nan


def read_records(path: Path) -> tuple[list[dict], int]:
    """The records of a JSON Lines file, and how many lines are none: a killed run cuts its last line."""
    records = []
    unreadable = 0
    if not path.is_file():
        return records, unreadable
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict) and math.isfinite(number(record.get("update"))):
                records.append(record)
            else:
                unreadable += 1
    return records, unreadable


def read_object(path: Path) -> dict:
    """A JSON file's object, {} where it is missing or cut."""
    with contextlib.suppress(OSError, ValueError):
        facts = json.loads(path.read_text(encoding="utf-8"))
        return facts if isinstance(facts, dict) else {}
    return {}


def read_run(path: Path) -> Run:
    log = path / "training_log.jsonl"
    if not log.is_file():
        raise UserError(f"No training log: {log}. Give a run's directory; log_jsonl must have been on")
    records, unreadable = read_records(log)
    completions, cut = read_records(path / "completions.jsonl")
    if not records:
        raise ReportError(f"Nothing to report: {log} has no complete record yet")
    # A later record of the same update stands.
    updates = {r["update"]: r for r in records if r.get("event") is None}
    evaluations = [r for r in records if r.get("event") == "eval"]
    notes = [r for r in records if r.get("event") in ("check", "no_signal", "end")]
    return Run(
        path, path.resolve().name, [updates[u] for u in sorted(updates)], evaluations,
        read_object(path / "machine.json"), completions, read_object(path / "settings.json"),
        unreadable + cut, notes,
    )  # fmt: skip


# --- Tripwires ----------------------------------------------------------------------------------------------


def change(values: np.ndarray) -> tuple[float, float, int]:
    """(mean of the first fifth, of the last, direction): 0 within two standard errors, or under 20 values."""
    values = values[~np.isnan(values)]
    if len(values) < 20:
        return math.nan, math.nan, 0
    early, late = values[: len(values) // 5], values[-(len(values) // 5) :]
    error = math.sqrt(early.var(ddof=1) / len(early) + late.var(ddof=1) / len(late))
    difference = late.mean() - early.mean()
    return early.mean(), late.mean(), int(np.sign(difference)) if abs(difference) > 2 * error else 0


def difference(before: dict, after: dict, key: str) -> tuple[float, float, float]:
    """(change of a score, low, high), 95% (Newcombe 1998, method 10).

    Unpaired: for the same questions it is cautious.
    """
    p, q = before[key], after[key]
    d = after[key] - before[key]
    if not (before.get(f"{key}_ci") and after.get(f"{key}_ci")):
        return d, math.nan, math.nan
    (p_low, p_high), (q_low, q_high) = before[f"{key}_ci"], after[f"{key}_ci"]
    return d, d - math.hypot(q - q_low, p_high - p), d + math.hypot(q_high - q, p - p_low)


def repeated_share(text: str) -> float:
    """The share of a text's four-word sequences that occurred in it before."""
    words = text.split()
    fours = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return 1 - len(set(fours)) / len(fours) if len(fours) >= 8 else 0.0


def accuracy_against_reward(run: Run):
    """Yield where held-out accuracy fell from its best while the reward rose."""
    reward = run.column("reward_mean")
    steps = run.step
    steps = steps[~np.isnan(reward)]
    reward = reward[~np.isnan(reward)]
    for key, label in run.scores.items():
        tests = run.tests(key)
        if len(tests) < 2 or len(reward) < 20 or not key.startswith(("em_", "reward_mean")):
            continue
        best, last = max(tests, key=lambda e: e[key]), tests[-1]
        nearest = np.argsort(abs(steps - best["update"]), kind="stable")[: len(reward) // 5]
        then = reward[nearest].mean()
        now = change(reward)[1]
        if difference(best, last, key)[2] < 0 and now > then:
            title = (
                "Reward up, accuracy down"
                if key.startswith("em_")
                else "Reward up in training, down on held-out problems"
            )
            yield (
                title,
                (
                    f"{label} fell from {score_text(best[key], key)} at update {best['update']} "
                    f"to {score_text(last[key], key)}, "
                    f"while the reward in training went from {then:.2f} to {now:.2f}"
                ),
            )


def format_against_correctness(run: Run):
    """Yield the format rewards that rose while no correctness reward did; their names tell them apart."""
    names = [name for name in (run.updates[-1] if run.updates else {}) if name.startswith("rewards/")]
    right = [name for name in names if re.search("correct|accura", name)]
    if not right or any(change(run.column(name))[2] > 0 for name in right):
        return
    for name in names:
        early, late, direction = change(run.column(name))
        if re.search("format|xml|tag", name) and direction > 0:
            yield (
                "Format learned, not the task",
                f"{name} rose from {early:.2f} to {late:.2f}; the correctness reward did not",
            )


def repetition(run: Run):
    """Yield if the newest logged completions repeat themselves more than the first ones."""
    if not run.completions:
        return
    both = [[r for r in run.completions if r["update"] == run.completions[i]["update"]] for i in (0, -1)]
    first, last = (
        np.mean([repeated_share(text_of(r.get("completion"))) > 0.3 for r in rows]) for rows in both
    )
    if last > first + 0.1:
        yield (
            "Repeated text",
            f"{last:.0%} of the newest completions repeat themselves, {first:.0%} of the first",
        )


def skip_reason(record: dict) -> str | None:
    """Why an update changed no weight, or None where it did."""
    return record.get("skipped") or ("learning rate 0" if record.get("lr") == 0 else None)


def without_signal(run: Run):
    """Yield where nothing is learnt: no update has changed a weight, or the last ones had no signal.

    From the first update on.
    """
    reasons = [skip_reason(record) for record in run.updates]
    said = [note["message"] for note in run.notes if isinstance(note.get("message"), str)]
    advice = next(
        (text.partition(":")[2].strip() for text in reversed(said) if text.startswith("No signal:")), ""
    )
    if not reasons:
        if advice:
            yield "No signal", advice
        return
    row = next((i for i, reason in enumerate(reversed(reasons)) if reason != "no signal"), len(reasons))
    if all(reasons):
        counts = ", ".join(f"{reasons.count(reason)} {reason}" for reason in dict.fromkeys(reasons))
        ended = not unfinished(run) or any(note["event"] == "end" for note in run.notes)
        so_far = "" if ended else " so far"
        seen = f"none of {len(reasons)} updates{so_far} changed a weight ({counts}). {advice}"
        yield "Nothing was learnt" if ended else "No signal", seen.strip().rstrip(".")
    elif row >= FLAT_ROW:
        seen = f"the last {row} updates were skipped: all completions of each prompt scored alike. {advice}"
        yield "No signal", seen.strip().rstrip(".")


def level(values: np.ndarray) -> float:
    """The mean of the last fifth; with under 20 values of all."""
    known = values[~np.isnan(values)]
    return change(known)[1] if len(known) >= 20 else known.mean() if len(known) else math.nan


def tripwires(run: Run):
    """Yield (title, what was seen) for each sign of reward hacking or of a run gone wrong."""
    flat = list(without_signal(run))
    yield from flat
    yield from accuracy_against_reward(run)
    yield from format_against_correctness(run)
    yield from repetition(run)
    early, late, _ = change(run.column("completion_length_mean"))
    if late > 2 * early:
        yield "Lengths exploding", f"completions grew from {early:.0f} to {late:.0f} tokens"
    early, late, direction = change(run.column("truncated_fraction"))
    if direction > 0 and late > 0.2:
        yield "Completions cut", f"{late:.0%} end at the length limit, {early:.0%} did at first"
    elif level(run.column("truncated_fraction")) > 0.5:
        yield "Completions cut", f"{level(run.column('truncated_fraction')):.0%} end at the length limit"
    early, late, _ = change(run.column("entropy"))
    if late < early / 5:
        yield (
            "Entropy collapse",
            f"from {early:.3f} to {late:.3f} nats a token: completions hardly differ any more",
        )
    _, late, _ = change(run.column("mismatch/kl"))
    if late > 0.05:
        yield (
            "Sampler off the policy",
            f"{late:.3f} nats a token between the sampler's log-probs and the policy's",
        )
    late = level(run.column("zero_signal_fraction"))
    if late > 0.6 and not flat:
        yield (
            "Little left to learn from",
            f"{late:.0%} of the groups have equal rewards: prompts too easy or too hard",
        )
    broken = sum(r.get("skipped") == "non-finite gradient" for r in run.updates)
    if broken:
        yield "Updates left out", f"{broken} had a NaN or infinite gradient"
    if run.unreadable > 1:
        yield "Lines not readable", f"{run.unreadable} lines of the logs were left out of this report"


# --- Curves -------------------------------------------------------------------------------------------------


@dataclass
class Line:
    label: str
    x: np.ndarray  # (n,)
    y: np.ndarray  # (n,)
    low: np.ndarray | None = None  # (n,) of a band or of error bars
    high: np.ndarray | None = None
    raw: np.ndarray | None = None  # (n,) before the moving average
    points: bool = False  # few, measured ones: markers and error bars


@dataclass
class Chart:
    title: str
    unit: str
    lines: list[Line]


def moving_average(y: np.ndarray, width: int) -> np.ndarray:
    """The mean of `width` neighbours, an odd number up to n; of fewer at the ends. (n,) to (n,)"""
    ones = np.ones(width)
    return np.convolve(y, ones, "same") / np.convolve(np.ones(len(y)), ones, "same")


def thin(values: np.ndarray | None) -> np.ndarray | None:
    """At most POINTS means of equal stretches."""
    if values is None or len(values) <= POINTS:
        return values
    return np.array([part.mean() for part in np.array_split(values, POINTS)])


def update_lines(run: Run, fields: list[str], smooth: bool) -> list[Line]:
    """A line for each of the log's fields that match, without the updates where it is missing."""
    names = dict.fromkeys(name for r in run.updates for name in r)
    lines = []
    for name in (n for n in names if any(fnmatch.fnmatchcase(n, f) for f in fields)):
        y = run.column(name)
        x = run.step
        spread = run.column("reward_std") if name == "reward_mean" else np.full(len(y), np.nan)
        x = x[~np.isnan(y)]
        spread = spread[~np.isnan(y)]
        y = y[~np.isnan(y)]
        if not len(y):
            continue
        width = len(y) // 15 | 1 if smooth else 1
        raw = y if width > 1 else None
        y = moving_average(y, width) if width > 1 else y
        spread = moving_average(spread, width) if width > 1 else spread
        band = (y - spread, y + spread) if not np.isnan(spread).all() else (None, None)
        label = re.sub(
            r"^(rewards|seconds|clip_ratio|mismatch)/|^completion_length_"
            r"|_(reward_func|tokens_per_s|fraction)$",
            "",
            name,
        )
        lines.append(Line(label, *map(thin, (x, y, *band, raw))))
    return lines


def evaluation_lines(run: Run, split: str, exact: bool) -> list[Line]:
    """A split's scores with their intervals: exact match in percent, strict and lenient, or the rewards."""
    lines = []
    for key, label in run.scores.items():
        records = run.scored(split, key)
        if key.startswith("em_") != exact or not records:
            continue
        scale = 100 if exact else 1
        ends = np.array([e.get(f"{key}_ci") or (e[key], e[key]) for e in records], dtype=float)  # (n, 2)
        x, y = (np.array([e[k] for e in records], dtype=float) for k in ("update", key))
        name = (
            EXACT_MATCH[key]
            if exact
            else "weighted sum"
            if key == "reward_mean"
            else label.removesuffix("_reward_func")
        )
        lines.append(Line(name, x, scale * y, scale * ends[:, 0], scale * ends[:, 1], points=True))
    return lines


def make_charts(runs: list[Run]) -> list[Chart]:
    """A chart for each kind of curve; with several runs, one for each curve, with a line a run."""
    found = [
        (title, unit, [update_lines(run, fields, smooth) for run in runs])
        for title, unit, fields, smooth in CHARTS
    ]
    found[1:1] = [
        (
            f"{name} {'exact match' if exact else 'reward'}",
            f"{'%, ' * exact}bars: 95% interval",
            [evaluation_lines(run, split, exact) for run in runs],
        )
        for name, split in (("Held-out", "test"), ("Training subset", "train"))
        for exact in (True, False)
    ]
    charts = []
    for title, unit, lines in found:
        labels = list(dict.fromkeys(line.label for of_run in lines for line in of_run))
        if len(runs) == 1 and labels:
            charts.append(Chart(title, unit, lines[0]))
            continue
        for label in labels:
            none = Line(
                label, np.empty(0), np.empty(0)
            )  # a run without this curve keeps its colour all the same
            same = [next((line for line in of_run if line.label == label), none) for of_run in lines]
            if any(line.y.any() for line in same):  # what is zero in every run tells nothing here
                named = [replace(line, label=run.name) for run, line in zip(runs, same)]
                charts.append(
                    Chart(title if len(labels) == 1 else f"{title}: {label}", unit.split(", band")[0], named)
                )
    return charts


def line_style(i: int, colours: list[str]) -> dict:
    """How line i looks: the colours in turn, then again with dashes."""
    return {"color": colours[i % len(colours)], "linestyle": ("-", "--", ":", "-.")[i // len(colours) % 4]}


def draw(axes, chart: Chart, ink: str, grid: str, colours: list[str]) -> None:
    """Draw on matplotlib axes."""
    from matplotlib.ticker import MaxNLocator

    for i, line in enumerate(chart.lines):
        style = line_style(i, colours)
        if line.points:
            bars = np.maximum(0, [line.y - line.low, line.high - line.y])
            axes.errorbar(
                line.x,
                line.y,
                bars,
                marker="o",
                markersize=4,
                capsize=3,
                linewidth=1.6,
                elinewidth=1,
                **style,
            )
            continue
        if line.low is not None and len(chart.lines) == 1:
            axes.fill_between(line.x, line.low, line.high, color=style["color"], alpha=0.15, linewidth=0)
        if line.raw is not None:
            axes.plot(line.x, line.raw, linewidth=0.8, alpha=0.35, **style)
        axes.plot(line.x, line.y, linewidth=1.6, marker="o" if len(line.x) == 1 else None, **style)
    if chart.unit.startswith("%"):
        axes.set_ylim(-3, 103)
    elif all((line.y >= 0).all() for line in chart.lines) and chart.title != "Reward":
        axes.set_ylim(0, None if any(line.y.any() for line in chart.lines) else 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    axes.grid(color=grid, linewidth=0.8)
    axes.tick_params(colors=ink, length=0, labelsize=9)
    axes.yaxis.get_offset_text().set(color=ink, size=9)
    for side, spine in axes.spines.items():
        spine.set(visible=side == "bottom", color=grid)
    axes.set_facecolor("none")
    axes.set_axisbelow(True)


def as_svg(chart: Chart) -> str:
    """The chart as an SVG element whose colours are CSS variables."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.7, 2.0), facecolor="none", layout="constrained")
    ink, grid, *colours = STAND_INS
    draw(figure.subplots(), chart, ink, grid, colours)
    buffer = io.StringIO()
    with rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": ascii(chart.title)}
    ):  # ids differ between charts, not between runs
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
    for colour, variable in STAND_INS.items():
        svg = svg.replace(colour, variable)
    label = html.escape(f"{chart.title}, by update")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def save_picture(charts: list[Chart], path: Path, title: str = "", small_print: str = "") -> None:
    """The charts as one PNG, in two columns."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names = [[line.label for line in chart.lines] for chart in charts]
    handles = [Line2D([], [], **line_style(i, LIGHT)) for i in range(max(map(len, names)))]
    shared = len(handles) > 1 and all(n == names[0] for n in names)  # then one legend does for all
    columns = min(2, len(charts))
    rows = math.ceil(len(charts) / columns)
    height = (
        2.6 * rows + 0.3 * bool(title) + 0.3 * bool(small_print) + 0.2 * shared * math.ceil(len(handles) / 2)
    )
    with rc_context({"text.parse_math": False}):  # a $ in a name is a $
        figure = Figure(figsize=(4 * columns, height), facecolor="white", layout="constrained")
        for chart, labels, axes in zip(charts, names, figure.subplots(rows, columns, squeeze=False).flat):
            draw(axes, chart, "#333333", "#dddddd", LIGHT)
            axes.set_title(chart.title, loc="left", fontsize=10, color="#111111")
            axes.set_xlabel("update", fontsize=8, color="#555555")
            axes.set_ylabel(chart.unit, fontsize=8, color="#555555")
            if len(labels) > 1 and not shared:
                axes.legend(handles[: len(labels)], labels, fontsize=8, frameon=False)
        if shared:
            figure.legend(handles, names[0], loc="outside lower center", ncols=2, fontsize=8, frameon=False)
        if title:
            figure.suptitle(title, fontsize=11, color="#111111")
        if small_print:
            figure.supxlabel(small_print, fontsize=7, color="#555555")
        figure.savefig(path, dpi=120)


# --- The page -----------------------------------------------------------------------------------------------

CSS = """
:root { color-scheme: light dark; --page: #fff; --ink: #1d1d1f; --soft: #5f6066; --line: #dedee3; \
--box: #f5f5f7; --warn: #fff3d6; --tag: #dbeafe; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --page: #131316; --ink: #e9e9ec; --soft: #a2a3aa; --line: #37383f; --box: #1d1e22; \
--warn: #42340f; --tag: #1e3a5f; DARK } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--page); color: var(--ink); \
font: 15px/1.5 system-ui, sans-serif; overflow-wrap: break-word }
h1 { font-size: 1.5rem; margin: .3rem 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem }
p { margin: .3rem 0 } .soft, figcaption small, th { color: var(--soft) } \
code, pre { font-family: ui-monospace, monospace; font-size: .87em }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)) }
.cards { display: flex; flex-wrap: wrap } .cards .card { flex: 1 1 11rem } \
.cards .wide { flex: 2 1 18rem } .runs td { white-space: nowrap } \
.runs td:first-child { white-space: normal; min-width: min(18rem, 40vw); overflow-wrap: anywhere }
.card, figure, .warning { background: var(--box); border-radius: 8px; padding: .8rem 1rem; margin: 0 } \
.warning { background: var(--warn); margin: .5rem 0 }
.card strong { display: block; font-size: 1.35rem; line-height: 1.3 }
figure { display: flex; flex-direction: column; padding-bottom: .4rem } figcaption { font-size: .9rem } \
figcaption b { font-size: .95rem } figcaption small { display: block; min-height: 1.5em }
svg { width: 100%; height: auto; display: block; margin-top: auto } [hidden] { display: none !important }
svg text { font-family: inherit !important; fill: var(--soft) !important }
.key { display: inline-block; max-width: 100%; margin-right: .9em } \
.key::before { content: ""; display: inline-block; width: .9em; height: .25em; margin-right: .4em; \
vertical-align: middle; background: var(--key) }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0; \
border-bottom: 1px solid var(--line) } th { font-weight: 500; white-space: nowrap }
td.n, th.n { text-align: right } td + td code { display: block; min-width: 5rem; \
overflow-wrap: anywhere } pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 }
.tag { background: var(--tag); border-radius: 3px } \
.chip { display: inline-block; max-width: 100%; margin-right: .7em } .best td { font-weight: 600 }
.bar { display: flex; flex-wrap: wrap; gap: .5rem; margin: .5rem 0 } \
.bar > * { font: inherit; padding: .3rem .6rem; color: inherit; background: var(--box); \
border: 1px solid var(--line); border-radius: 6px; max-width: 100% }
#completions { table-layout: fixed } #completions col:nth-child(1) { width: 30% } \
#completions col:nth-child(3) { width: 24% }
summary { cursor: pointer; color: var(--soft); margin: .5rem 0 }
@media (max-width: 44rem) { #completions thead { display: none } \
#completions, #completions tbody { display: block } \
#completions tr { display: block; padding: .6rem 0; border-bottom: 1px solid var(--line) } \
#completions td { display: block; border: 0; padding: .2rem 0 } }
"""
JS = """
const rows = [...document.querySelectorAll("#completions tbody tr")], \
update = document.querySelector("#update");
const order = document.querySelector("#order"), find = document.querySelector("#find"), \
count = document.querySelector("#count");
function show() {
  const words = find.value.toLowerCase(), key = order.value, down = key === "index" ? 1 : -1;
  const seen = rows.filter(r => (update.value === "" || r.dataset.update === update.value) && \
r.textContent.toLowerCase().includes(words));
  for (const r of rows) r.hidden = true;
  for (const r of seen.sort((a, b) => down * (a.dataset[key] - b.dataset[key]))) { r.hidden = false; \
r.parentNode.append(r); }
  count.textContent = seen.length + " of " + rows.length + " completions";
}
function turn(by) { \
update.selectedIndex = Math.min(update.options.length - 1, Math.max(0, update.selectedIndex + by)); show(); }
if (update) {
  for (const box of [update, order, find]) box.addEventListener("input", show);
  document.querySelector("#back").addEventListener("click", () => turn(-1));
  document.querySelector("#on").addEventListener("click", () => turn(1));
  show();
}
"""


def table(header: list[str], rows: list[list[str]], name: str = "plain", best: int | None = None) -> str:
    """An HTML table of cells that are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(
        f"<tr{' class=best' if i == best else ''}>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
        for i, row in enumerate(rows)
    )
    return (
        f"<div class=scroll><table class={name}><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def score_text(value: float, key: str) -> str:
    """A score without its interval: `26.0%` of exact match, `1.250` of a reward."""
    return f"{value:.1%}" if key.startswith("em_") else f"{value:.3f}"


def with_interval(record: dict, key: str) -> str:
    """A score with its interval, such as `26.0% (20.4 to 32.5)`."""
    low, high = record.get(f"{key}_ci") or (math.nan, math.nan)
    scale, digits = (100, 1) if key.startswith("em_") else (1, 3)
    shown = f" ({scale * low:.{digits}f} to {scale * high:.{digits}f})" if math.isfinite(low) else ""
    return score_text(record[key], key) + shown


def change_text(first: dict, last: dict, key: str) -> str:
    """`+12.0 points (+5.1 to +18.6)` of exact match, `+0.500 (+0.210 to +0.790)` of a reward."""
    share = key.startswith("em_")
    d, low, high = ((100 if share else 1) * x for x in difference(first, last, key))
    form = "+.1f" if share else "+.3f"
    return f"{d:{form}}{' points' * share}" + (
        f" ({low:{form}} to {high:{form}})" if math.isfinite(low) else ""
    )


def ends(values: np.ndarray) -> tuple[float, float]:
    """The means of the first and of the last tenth of what is known."""
    values = values[~np.isnan(values)]
    tenth = max(1, len(values) // 10)
    return (values[:tenth].mean(), values[-tenth:].mean()) if len(values) else (math.nan, math.nan)


def held_out_table(run: Run) -> str:
    """The scores on held-out problems, the run's rewards first.

    Before training or at the first evaluation, at the last, and the change.
    """
    rows = []
    for key, label in run.scores.items():
        tests = run.tests(key)
        if not tests:
            continue
        first, last = tests[0], tests[-1]
        cells = [label, with_interval(first, key), "", ""]
        if len(tests) > 1:
            cells[2:] = [with_interval(last, key), change_text(first, last, key)]
        rows.append([html.escape(cell) for cell in cells])
    if not rows:
        return ""
    updates = [e["update"] for e in run.evals if e.get("split") == "test"]
    when = ["before" if u == 0 else f"update {u}" for u in (updates[0], updates[-1])]
    asked = next(e.get("n", "?") for e in reversed(run.evals) if e.get("split") == "test")
    note = f"<p class=soft>Greedy answers to {asked} held-out problems; in brackets: 95% intervals.</p>"
    return (
        table(["Held-out problems", when[0], when[1] if len(updates) > 1 else "", "change"], rows, "scores")
        + note
    )


def headline(run: Run) -> str:
    """The held-out scores; then the cards: the run's one score, how the completions changed, what it cost."""
    key = run.metric
    cards = []
    tests = run.tests(key)
    if tests:
        shown = [tests[0], tests[-1]][: len(tests)]
        notes = [f"change: {change_text(*shown, key)}"] if len(tests) > 1 else []
        cards.append(
            (f"Held-out {run.scores[key]}", " → ".join(score_text(e[key], key) for e in shown), notes)
        )
    else:
        cards.append(("Held-out problems", "not evaluated", []))
    for title, name, form in (
        ("Reward", "reward_mean", ".2f"),
        ("Completion length", "completion_length_mean", ".0f"),
    ):
        first, last = ends(run.column(name))
        if math.isfinite(first):
            cards.append((title, f"{first:{form}} → {last:{form}}", ["first and last tenth of the updates"]))
    memory = np.nanmax(run.column("peak_memory_gb"), initial=0)
    cards.append(("Cost", duration(run), [f"{tokens(run)} tokens sampled", f"{memory:.2f} GB at the peak"]))
    each = ""
    for title, big, notes in cards:
        lines = "".join(f"<p class=soft>{html.escape(note)}</p>" for note in notes)
        wide = " wide" if title.startswith("Held-out") else ""
        each += (
            f'<div class="card{wide}">{html.escape(title)}<strong>{html.escape(big)}</strong>{lines}</div>'
        )
    return f'{held_out_table(run)}<div class="grid cards">{each}</div>'


def duration(run: Run) -> str:
    """Time in updates and evaluations, without what lay between two starts."""
    rollouts = {
        r.get("total_tokens", r["update"]): r for r in run.updates
    }.values()  # updates on one rollout share its times
    spent = [number(v) for r in rollouts for k, v in r.items() if k.startswith("seconds/")] + [
        number(e.get("seconds")) for e in run.evals
    ]
    seconds = np.nansum(spent)
    return (
        f"{seconds:.0f} s"
        if seconds < 600
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def tokens(run: Run) -> str:
    return f"{np.nanmax(run.column('total_tokens'), initial=0):,.0f}"


def progress(run: Run) -> str:
    """How far the run is; the number of updates it will make is in machine.json."""
    done = run.updates[-1]["update"] if run.updates else 0
    planned = run.start.get("updates")
    if not planned:
        return f"{done} updates"
    return f"{done} of {planned} updates" + (": not finished" if unfinished(run) else "")


def unfinished(run: Run) -> bool:
    """Whether the run has updates before it, as far as machine.json tells."""
    done = run.updates[-1]["update"] if run.updates else 0
    return done < number(run.start.get("updates"))


def warning(title: str, text: str) -> str:
    """A box. The words of the terminal and the log, `No signal: ...`, stand here unbroken."""
    head = (
        f"<b>{title}: </b>"
        if title in ("No signal", "Nothing was learnt")
        else f"<b>{html.escape(title)}</b>: "
    )
    return f"<div class=warning>{head}{html.escape(text)}.</div>"


def warnings(run: Run) -> str:
    found = list(tripwires(run))
    if found:
        return "".join(warning(title, text) for title, text in found)
    if not run.updates:
        return "<p class=soft>No update yet.</p>"
    enough = "" if len(run.updates) >= 20 else " Most need 20 updates to judge by."
    return (
        "<p class=soft>No sign of reward hacking, exploding lengths, entropy collapse or repeated text."
        f"{enough}</p>"
    )


def key(i: int, label: str) -> str:
    """The label with the colour of line i."""
    return f'<span class=key style="--key: var(--c{i % len(LIGHT) + 16})">{html.escape(label)}</span>'


def figures(charts: list[Chart], keys: list[str] | None = None) -> str:
    """The charts with captions and legends; `keys` are shorter names for the lines."""
    parts = []
    for chart in charts:
        names = keys or [line.label for line in chart.lines]
        legend = "".join(key(i, name) for i, name in enumerate(names)) if len(names) > 1 else ""
        caption = f"<b>{html.escape(chart.title)}</b> <small>{html.escape(chart.unit)}</small>{legend}"
        parts.append(f"<figure><figcaption>{caption}</figcaption>{as_svg(chart)}</figure>")
    return (
        "<p class=soft>By update; thin lines are single updates, thick ones moving averages.</p>"
        f"<div class=grid>{''.join(parts)}</div>"
    )


def text_of(value) -> str:
    """A prompt is text or a list of chat messages."""
    if isinstance(value, list):
        return "\n".join(text_of(m.get("content")) if isinstance(m, dict) else str(m) for m in value)
    return "" if value is None else str(value)


def escaped(text: str) -> str:
    """Text of a model or a data set as HTML, cut where it is very long, its tags marked."""
    cut = f"\n[{len(text) - SHOWN_CHARACTERS} more characters]" if len(text) > SHOWN_CHARACTERS else ""
    safe = html.escape(text[:SHOWN_CHARACTERS])
    return re.sub(r"&lt;/?\w+&gt;", r"<span class=tag>\g<0></span>", safe) + cut


def total_reward(row: dict, weights: list[float]) -> float:
    """The weighted sum of a completion's rewards, without the functions that abstained."""
    rewards = row["rewards"].values() if isinstance(row.get("rewards"), dict) else []
    known = [
        w * number(r) for w, r in zip(weights or [1.0] * len(rewards), rewards) if math.isfinite(number(r))
    ]
    return sum(known)


def chosen_completions(run: Run, weights: list[float]) -> list[dict]:
    """The best and the worst of each group, for updates spread over the run: as many as one can read."""
    groups = {}
    for row in run.completions:
        groups.setdefault(row["update"], {}).setdefault(
            json.dumps([row.get("prompt"), row.get("answer")]), []
        ).append(row)
    logged = sorted(groups)
    picked = (
        sorted({logged[int(i)] for i in np.linspace(0, len(logged) - 1, min(SHOWN_UPDATES, len(logged)))})
        if logged
        else []
    )
    rows = []
    for update in picked:
        for group in list(groups[update].values())[: SHOWN_COMPLETIONS // 2]:
            group.sort(key=lambda row: -total_reward(row, weights))
            rows += [group[0]] if len(group) == 1 else [group[0], group[-1]]
    return rows


def completions_table(run: Run) -> str:
    weights = run.setting("reward_weights") or []
    chosen = chosen_completions(run, weights)
    if not chosen:
        return "<p class=soft>No completions logged (log_completions_steps).</p>"
    rows = []
    for i, row in enumerate(chosen):
        total = total_reward(row, weights)
        length = number(row.get("length"))
        rewards = row["rewards"].items() if isinstance(row.get("rewards"), dict) else []
        values = (
            (n.removesuffix("_reward_func"), "-" if math.isnan(number(r)) else f"{r:g}") for n, r in rewards
        )
        chips = "".join(f"<span class=chip>{html.escape(n)} {r}</span> " for n, r in values)
        facts = f"{length:.0f} tokens, ended by {html.escape(text_of(row.get('finish_reason')))}"
        rows.append(
            f"<tr data-index={i} data-update={row['update']} data-total={total:g} "
            f"data-length={np.nan_to_num(length):g}>"
            f"<td><pre>{escaped(text_of(row.get('prompt')))}</pre>"
            f"<span class=soft>gold: {escaped(text_of(row.get('answer')))}</span></td>"
            f"<td><pre>{escaped(text_of(row.get('completion')))}</pre></td>"
            f"<td><b>{total:.2f}</b> <span class=soft>update {row['update']}</span><br>{chips}<br>"
            f"<span class=soft>{facts}</span></td></tr>"
        )
    updates = list(dict.fromkeys(row["update"] for row in chosen))
    choices = "".join(
        f"<option value={u}{' selected' * (u == updates[-1])}>update {u}</option>" for u in updates
    )
    return f"""<p class=soft>The best and the worst of each group: {len(chosen)} of {len(run.completions)} \
logged. All are in completions.jsonl.</p>
<div class=bar><button id=back type=button aria-label="earlier update">←</button>\
<select id=update aria-label="update">
<option value="">all updates</option>{choices}</select>
<button id=on type=button aria-label="later update">→</button>\
<select id=order aria-label="order"><option value=index>by prompt</option>
<option value=total>by reward</option><option value=length>by length</option></select>
<input id=find type=search placeholder="find text" aria-label="find text"></div>
<p id=count class=soft></p><table id=completions><colgroup><col><col><col></colgroup>
<thead><tr><th>Prompt</th><th>Completion</th><th>Reward</th></tr></thead>
<tbody>{"".join(rows)}</tbody></table>"""


def code(text: str) -> str:
    return f"<code>{html.escape(text)}</code>"


def setting_text(run: Run, name: str) -> str:
    """A setting's value as JSON, or "unset"."""
    value = run.setting(name)
    return "unset" if value is None else json.dumps(value, ensure_ascii=False)


def settings_tables(run: Run) -> str:
    if not run.settings:
        return "<p class=soft>No settings.json.</p>"
    rows = [
        [
            code(name),
            code(setting_text(run, name)),
            code(json.dumps(setting.get("default"))),
            html.escape(str(setting.get("source"))),
        ]
        for name, setting in run.settings.items()
        if setting.get("value") != setting.get("default")
    ]
    all_of_them = table(
        ["Setting", "Value"], [[code(name), code(setting_text(run, name))] for name in run.settings]
    )
    given = (
        table(["Differs from the default", "Value", "Default", "From"], rows)
        if rows
        else "<p class=soft>All defaults.</p>"
    )
    return f"{given}<details><summary>All {len(run.settings)} settings</summary>{all_of_them}</details>"


def machine_table(run: Run) -> str:
    facts = {k: v for k, v in run.start.items() if k != "updates"}
    rows = [
        [html.escape(k.replace("_", " ")), f"<code>{html.escape(text_of(v))}</code>"]
        for k, v in facts.items()
    ]
    return table(["", ""], rows) if rows else "<p class=soft>There is no machine.json.</p>"


def page(title: str, body: str) -> str:
    """The whole document. Its policy lets no request out and no script in but ours, by its hash."""
    digest = base64.b64encode(hashlib.sha256(JS.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    css = CSS
    for name, colours in (("LIGHT", LIGHT), ("DARK", DARK)):
        css = css.replace(name, " ".join(f"--c{i}: {colour};" for i, colour in enumerate(colours, 16)))
    return f"""<!DOCTYPE html>
<html lang=en><head><meta charset=utf-8><meta http-equiv=Content-Security-Policy content="{policy}">
<meta name=viewport content="width=device-width, initial-scale=1"><link rel=icon href="data:,">\
<title>{html.escape(title)}</title>
<style>{css}</style></head><body>
{body}
<script>{JS}</script></body></html>
"""


def run_page(run: Run, charts: list[Chart]) -> str:
    facts = [run.setting("model_name"), run.setting("dataset"), progress(run)]
    return page(
        f"{run.name}: MLX-GRPO",
        f"<h1>{html.escape(run.name)}</h1><p class=soft>{html.escape(' · '.join(filter(None, facts)))}</p>"
        f"{headline(run)}<h2>Warnings</h2>{warnings(run)}<h2>Curves</h2>{figures(charts)}"
        f"<h2>Completions</h2>{completions_table(run)}"
        f"<h2>Configuration</h2>{settings_tables(run)}<h2>Machine</h2>{machine_table(run)}",
    )


def comparison_page(runs: list[Run], charts: list[Chart]) -> str:
    names = dict.fromkeys(n for run in runs for n in run.settings if n not in ("output_dir", "run_name"))
    differ = [n for n in names if len({setting_text(run, n) for run in runs}) > 1]
    numbers = [str(i) for i in range(1, len(runs) + 1)]
    metrics = {run.metric for run in runs}
    metric = metrics.pop() if len(metrics) == 1 else "em_strict"  # the one score that all runs have
    rows = []
    scores = []
    for i, run in enumerate(runs):
        tests = run.tests(metric)
        reward = ends(run.column("reward_mean"))[1]
        scores.append((tests[-1][metric] if tests else -math.inf, np.nan_to_num(reward)))
        cells = [setting_text(run, n) for n in differ[:3]]
        cells += [with_interval(e, metric) for e in (tests[0], tests[-1])] if tests else ["-", "-"]
        cells += [
            f"{reward:.2f}",
            f"{ends(run.column('completion_length_mean'))[1]:.0f}",
            progress(run),
            tokens(run),
            duration(run),
        ]
        rows.append(
            [
                key(i, f"{numbers[i]}  {run.name}"),
                *map(html.escape, cells),
                html.escape(", ".join(t for t, _ in tripwires(run)) or "none"),
            ]
        )
    header = [
        "Run",
        *differ[:3],
        "Before",
        "After",
        "Reward",
        "Length",
        "Updates",
        "Tokens",
        "Time",
        "Warnings",
    ]
    settings = [[code(cell) for cell in (n, *(setting_text(run, n) for run in runs))] for n in differ]
    return page(
        "Comparison: MLX-GRPO",
        f"<h1>{len(runs)} runs</h1><p class=soft>Before and after: "
        f"held-out {html.escape(runs[0].scores.get(metric, metric))}, with its 95% interval. "
        "Bold: the highest, of equals the one with more reward. "
        "Curves that are zero in every run are left out.</p>"
        f"{table(header, rows, 'runs', scores.index(max(scores)))}<h2>Settings that differ</h2>"
        f"{table(['Setting', *numbers], settings) if differ else '<p class=soft>None.</p>'}"
        f"<h2>Curves</h2>{figures(charts, numbers)}",
    )


# --- Command line -------------------------------------------------------------------------------------------


def pictures(runs: list[Run], charts: list[Chart], folder: Path) -> None:
    """curves.png, the four that matter most, and curves/ with one picture a chart."""
    start = runs[0].start if len(runs) == 1 else {}
    machine = [str(start[k]) for k in ("chip", "device", "platform") if start.get(k)]
    versions = [f"{k} {start[k]}" for k in ("mlx", "python") if start.get(k)]
    title = ": ".join(filter(None, [runs[0].name, start.get("command")])) if len(runs) == 1 else ""
    first = {chart.title.split(":")[0]: chart for chart in reversed(charts)}  # of a kind, the first chart
    overview = [first[kind] for kind in OVERVIEW if kind in first]
    save_picture(overview[:4] or charts[:4], folder / "curves.png", title, ", ".join(machine + versions))
    (folder / "curves").mkdir(exist_ok=True)
    for chart in charts:
        save_picture(
            [chart], folder / "curves" / (re.sub(r"\W+", "-", chart.title.lower()).strip("-") + ".png")
        )


def write_report(paths: list[Path], output: Path | None = None, png: bool = False) -> Path:
    """Write the report of one run, or the comparison of several; its path. Raises UserError, ReportError."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ReportError("The report needs matplotlib, one of the project's dependencies: uv sync") from None
    runs = [read_run(path) for path in paths]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = "/".join(run.path.resolve().parts[-2:])
    if output is None:
        output = (
            paths[0] / "report.html"
            if len(runs) == 1
            else Path(os.path.commonpath([p.resolve().parent for p in paths])) / "comparison.html"
        )
    charts = make_charts(runs)
    text = run_page(runs[0], charts) if len(runs) == 1 else comparison_page(runs, charts)
    aside = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8", errors="replace")  # half characters of a cut text too
        os.replace(aside, output)  # a browser never sees half a page
        if png and charts:
            pictures(runs, charts, output.parent)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise ReportError(
            f"Failed to write the report: {error.filename or output}: {error.strerror}"
        ) from None
    return output


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="report.py",
        description=__doc__.split("\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="a run's directory; several are compared"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="default: report.html in the run, or comparison.html beside the runs",
    )
    parser.add_argument(
        "--png",
        action="store_true",
        help="also curves.png (the four main ones) and curves/ (one picture each)",
    )
    arguments = parser.parse_args(argv)
    try:
        print(write_report(arguments.runs, arguments.output, arguments.png))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except ReportError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
