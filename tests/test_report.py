"""The report: what it reads, what trips its wires, what it escapes, and how it looks to a browser."""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the report needs matplotlib (extra `report`)")

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "utils" / "report.py"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
NASTY = "</td></script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'> $x_1$ & \"quoted\" \ud800"

spec = importlib.util.spec_from_file_location("report", SCRIPT)
report = importlib.util.module_from_spec(spec)
sys.modules["report"] = report
spec.loader.exec_module(report)


def update_record(i: int, n: int) -> dict:
    """Update i of n of a healthy run."""
    done, noise = i / n, math.sin(i)
    return {
        "update": i, "lr": 1e-5, "loss": 1e-7 * noise, "grad_norm": 0.3 + 0.1 * noise, "clip_ratio/low_mean": 0.0, "clip_ratio/high_mean": 0.01,
        "clip_ratio/region_mean": 0.01, "clip_ratio/low_min": 0.0, "clip_ratio/high_max": 0.1, "entropy": 0.5 - 0.1 * done, "mismatch/mean": 1e-8,
        "mismatch/kl": 0.001, "mismatch/max": 1e-6, "kl": 0.0, "epoch": done, "reward_mean": 1 + done + 0.1 * noise, "reward_std": 0.5,
        "rewards/correctness_reward_func": 0.5 + done + 0.1 * noise, "rewards/strict_format_reward_func": 0.2 + 0.2 * done,
        "completion_length_mean": 40 + 5 * done + noise, "completion_length_max": 60, "truncated_fraction": 0.05, "zero_signal_fraction": 0.1,
        "prompts_drawn": 8, "rollout_tokens_per_s": 2000.0, "train_tokens_per_s": 1000.0, "seconds/rollout": 1.0, "seconds/reward": 0.01,
        "seconds/train": 2.0, "peak_memory_gb": 0.5, "total_tokens": 2500 * i,
    }  # fmt: skip


def evaluation_record(update: int, strict: float, lenient: float = 0.9, split: str = "test") -> dict:
    interval = lambda p: [max(0.0, p - 0.06), min(1.0, p + 0.06)]  # noqa: E731
    return {
        "event": "eval", "update": update, "split": split, "em_strict": strict, "em_strict_ci": interval(strict), "em_lenient": lenient,
        "em_lenient_ci": interval(lenient), "n": 200, "completion_length": 40.0, "seconds": 3.0,
    }  # fmt: skip


def completion_record(update: int, text: str, right: bool, prompt="What is 2 + 3?") -> dict:
    rewards = {"correctness_reward_func": 2.0 * right, "strict_format_reward_func": None}
    return {"update": update, "prompt": prompt, "answer": "5", "completion": text, "rewards": rewards, "finish_reason": "stop", "length": 9}


def write_settings(folder: Path, settings: dict) -> None:
    """settings.json of {name: (value, default, source)}."""
    record = {name: dict(zip(("value", "default", "source"), setting)) for name, setting in settings.items()}
    (folder / "settings.json").write_text(json.dumps(record))


def make_run(folder: Path, n: int = 50, change=lambda record: {}, evals=(0.3, 0.5, 0.7), completions=True, start=True, tail="") -> Path:
    """A run's directory with n updates, each changed by change(record), and held-out scores spread over them."""
    folder.mkdir(parents=True, exist_ok=True)
    if start:
        (folder / "machine.json").write_text(json.dumps({"updates": n, "command": "mlx-grpo.py", "chip": "A chip", "mlx": "1.0"}))
    records = [evaluation_record(round(i * n / max(1, len(evals) - 1)), score) for i, score in enumerate(evals)]
    records += [(record := update_record(i, n)) | change(record) for i in range(1, n + 1)]
    (folder / "training_log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    settings = {
        "model_name": ("starter/model", "starter/model", "default"), "learning_rate": (1e-05, 1e-06, "my.toml"),
        "system_prompt": ("two  # signs", "", "--set"), "batch_size": (8, 8, "--set"), "delta": (None, None, "default"),
    }  # fmt: skip
    write_settings(folder, settings)
    if completions:
        rows = [completion_record(u, f"<answer>{g}</answer>", g == 5) for u in (10, 20, 30) for g in (4, 5, 6)]
        (folder / "completions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def page_of(*runs: Path) -> str:
    return report.write_report(list(runs)).read_text()


# --- Numbers ----------------------------------------------------------------------------------------------------


def test_the_difference_of_two_proportions_is_newcombes():
    """Newcombe (1998), table II, first column: 56/70 against 48/80, method 10: 0.0524 to 0.3339."""
    import mlx_grpo

    before, after = ({"p": hits / n, "p_ci": mlx_grpo.wilson_interval(hits, n)} for hits, n in ((48, 80), (56, 70)))
    assert report.difference(before, after, "p") == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_moving_average():
    assert report.moving_average(np.array([1.0, 2.0, 6.0]), 3) == pytest.approx([1.5, 3.0, 4.0])


def test_change_needs_twenty_values_and_two_standard_errors():
    assert report.change(np.arange(20.0))[2] == 1 and report.change(-np.arange(20.0))[2] == -1
    assert report.change(np.arange(19.0))[2] == 0
    assert report.change(np.tile([0.0, 1.0], 20))[2] == 0
    assert report.change(np.r_[np.nan, np.zeros(10), np.ones(10)]) == (0, 1, 1)


def test_long_runs_are_thinned_by_means():
    values = np.arange(6000.0)
    assert len(report.thin(values)) == report.POINTS and report.thin(values).mean() == pytest.approx(values.mean())
    assert report.thin(values[:300]) is not None and (report.thin(values[:300]) == values[:300]).all()


def test_repeated_text():
    assert report.repeated_share("the cat sat on " * 20) > 0.9
    assert report.repeated_share("one two three four five six seven eight nine ten eleven twelve") == 0
    assert report.repeated_share("2 2 2 2") == 0  # too short to tell


def test_total_reward_leaves_out_abstentions():
    row = {"rewards": {"a": 1.0, "b": None, "c": 2.0}}
    assert report.total_reward(row, []) == 3.0 and report.total_reward(row, [0.5, 9.0, 2.0]) == 4.5
    assert report.total_reward({}, []) == 0


# --- Reading ----------------------------------------------------------------------------------------------------


def test_a_cut_last_line_and_foreign_lines_are_left_out(tmp_path):
    folder = make_run(tmp_path / "run", 30, tail='{"update": 31, "rew')
    run = report.read_run(folder)
    assert len(run.updates) == 30 and run.unreadable == 1
    with open(folder / "training_log.jsonl", "a") as file:
        file.write('\n[1]\n{"no": "update"}\n{"update": NaN}\n')
    assert report.read_run(folder).unreadable == 4


def test_settings_and_their_defaults(tmp_path):
    run = report.read_run(make_run(tmp_path / "run"))
    assert run.setting("learning_rate") == 1e-5
    assert run.setting("system_prompt") == "two  # signs" and run.setting("delta") is None
    differing = page_of(tmp_path / "run").split("Differs from the default")[1].split("<details>")[0]
    assert "learning_rate" in differing and "system_prompt" in differing and "batch_size" not in differing and "delta" not in differing


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "options",
    [
        {"n": 0}, {"n": 1}, {"n": 3, "evals": ()}, {"n": 30, "evals": (), "completions": False, "start": False}, {"n": 30, "evals": (0.5,)},
        {"change": lambda r: dict.fromkeys(("reward_mean", "entropy", "loss", "peak_memory_gb"))},
        {"change": lambda r: {"reward_mean": math.nan, "entropy": math.inf, "grad_norm": None, "skipped": "non-finite gradient"}},
        {"change": lambda r: {k: None for k in r if k != "update"}},
    ],
)  # fmt: skip
def test_a_run_with_gaps_has_a_report(tmp_path, options):
    page = page_of(make_run(tmp_path / "run", **options))
    assert "</html>" in page and not re.search(r"\bnan\b", page)


def test_several_thousand_updates_stay_a_small_page(tmp_path):
    page = page_of(make_run(tmp_path / "run", 4000))
    assert len(page) < 1_000_000


def test_chat_messages_as_prompt():
    assert report.text_of([{"role": "user", "content": "a"}, {"role": "user", "content": None}]) == "a\n"


# --- Tripwires --------------------------------------------------------------------------------------------------


def test_a_healthy_run_trips_nothing(tmp_path):
    assert list(report.tripwires(report.read_run(make_run(tmp_path / "run")))) == []


def late(field, value):
    """Set a field in the last half of the updates."""
    return lambda record: {field: value} if record["update"] > 25 else {}


@pytest.mark.parametrize(
    "title, options",
    [
        ("Reward up, accuracy down", {"evals": (0.7, 0.5, 0.3)}),
        ("Reward up, accuracy down", {"evals": (0.3, 0.7, 0.4)}),
        ("Lengths exploding", {"change": late("completion_length_mean", 200)}),
        ("Completions cut", {"change": late("truncated_fraction", 0.5)}),
        ("Format learned, not the task", {"change": lambda r: {"rewards/correctness_reward_func": 0.5 + 0.1 * math.sin(r["update"])}}),
        ("Entropy collapse", {"change": late("entropy", 0.01)}),
        ("Sampler off the policy", {"change": late("mismatch/kl", 0.2)}),
        ("Little left to learn from", {"change": late("zero_signal_fraction", 0.9)}),
        ("Updates left out", {"change": lambda r: {"skipped": "non-finite gradient"} if r["update"] == 7 else {}}),
        ("Lines not readable", {"tail": "{\n{\n"}),
    ],
)
def test_each_tripwire(tmp_path, title, options):
    run = report.read_run(make_run(tmp_path / "run", **options))
    assert {t for t, _ in report.tripwires(run)} == {title}
    assert f"<b>{title}</b>" in page_of(run.path)


def test_the_tripwire_of_repeated_text(tmp_path):
    folder = make_run(tmp_path / "run")
    rows = [completion_record(5, "so the answer is five", True), completion_record(50, "so the answer is five " * 9, True)]
    (folder / "completions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert [t for t, _ in report.tripwires(report.read_run(folder))] == ["Repeated text"]


# --- The page ---------------------------------------------------------------------------------------------------


def test_the_headline_has_scores_with_intervals(tmp_path):
    page = page_of(make_run(tmp_path / "run"))
    assert "30.0% → 70.0%" in page and "30.0% (24.0 to 36.0)" in page and "change: +40.0 points" in page and "200 held-out" in page
    assert "50 of 50 updates" in page and "not finished" not in page


def test_best_and_worst_of_each_group_are_shown(tmp_path):
    run = report.read_run(make_run(tmp_path / "run"))
    assert [r["completion"] for r in report.chosen_completions(run, [])] == ["<answer>5</answer>", "<answer>6</answer>"] * 3
    page = page_of(run.path)
    assert "6 of 9 logged" in page and "<span class=tag>&lt;answer&gt;</span>5<span class=tag>&lt;/answer&gt;</span>" in page


def nasty_run(folder: Path) -> Path:
    make_run(folder, change=lambda r: {f"rewards/{NASTY}": 0.5})
    rows = [completion_record(u, NASTY, True, NASTY) | {"answer": NASTY, "finish_reason": NASTY, "rewards": {NASTY: 1.0}} for u in (1, 2)]
    (folder / "completions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    write_settings(folder, {"model_name": (NASTY, NASTY + "1", NASTY)})
    (folder / "machine.json").write_text(json.dumps({"updates": 50, "chip": NASTY}))
    return folder


def test_what_a_model_wrote_is_escaped(tmp_path):
    folder = nasty_run(tmp_path / "<script>window.hacked=1<-script>")
    for page in (page_of(folder), page_of(folder, make_run(tmp_path / "other"))):
        assert page.count("<script") == 1 and "<img" not in page


def test_several_runs_are_compared(tmp_path):
    first, second = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", evals=(0.3, 0.9))
    write_settings(second, {"learning_rate": (5e-05, 1e-06, "my.toml")})
    path = report.write_report([first, second])
    page = path.read_text()
    assert path == tmp_path / "comparison.html" and "a/run" in page and "b/run" in page
    assert "<tr class=best><td><span class=key" in page and "90.0% (84.0 to 96.0)" in page.split("class=best")[1].split("</tr>")[0]
    assert "<td>5e-05</td>" in page and page.count("<svg") > 15 and "Held-out exact match: tags required" in page


def test_png(tmp_path):
    folder = make_run(tmp_path / "run", change=lambda r: {"rewards/_$x^{": 0.1})
    assert report.main([str(folder), "--png"]) == 0
    pictures = [folder / "curves.png", *(folder / "curves").iterdir()]
    assert len(pictures) >= 13
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size <= 150_000


# --- Command line -----------------------------------------------------------------------------------------------


def test_errors_are_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "training_log.jsonl").write_text('{"upd')
    run = make_run(tmp_path / "run", 2)
    for arguments, status, start in (
        ([tmp_path / "none"], 2, "No training log: "),
        ([tmp_path / "empty"], 2, "No training log: "),
        ([tmp_path / "cut"], 1, "Nothing to report: "),
        ([run, "--output", tmp_path / "no" / "such" / "folder.html"], 1, "Failed to write the report: "),
        ([run, "--output", tmp_path / "empty"], 1, "Failed to write the report: "),
    ):
        assert report.main(list(map(str, arguments))) == status
        error = capsys.readouterr().err
        assert error.startswith(start) and error.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"empty", "cut", "run"}  # nothing half-written stays


def test_the_command(tmp_path):
    run = make_run(tmp_path / "run", 2)
    result = subprocess.run([sys.executable, SCRIPT, run], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, str(run / "report.html"), "")


# --- In a browser -----------------------------------------------------------------------------------------------

FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
CURVES = "[...document.querySelectorAll('svg')].map(s => [...s.querySelectorAll('path')].filter(p => getComputedStyle(p).fill === 'none' && p.getTotalLength() > 20).length)"


class Browser:
    """Headless Chromium, spoken to over its debugging pipe (file descriptors 3 and 4, messages end in NUL)."""

    def __init__(self, profile: Path):
        (child_in, self.write), (self.read, child_out) = os.pipe(), os.pipe()
        command = f'exec "$0" {FLAGS} "--user-data-dir=$1" --remote-debugging-pipe about:blank 3<&{child_in} 4>&{child_out}'
        self.process = subprocess.Popen(["bash", "-c", command, CHROMIUM, str(profile)], pass_fds=[child_in, child_out], stderr=subprocess.DEVNULL)
        os.close(child_in)
        os.close(child_out)
        self.number, self.events, self.unread, self.session = 0, [], b"", {}
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def message(self) -> dict:
        while b"\0" not in self.unread:
            part = os.read(self.read, 1 << 20)
            assert part, "the browser ended"
            self.unread += part
        text, _, self.unread = self.unread.partition(b"\0")
        return json.loads(text)

    def call(self, method: str, **params) -> dict:
        self.number += 1
        os.write(self.write, json.dumps({"id": self.number, "method": method, "params": params, **self.session}).encode() + b"\0")
        while (message := self.message()).get("id") != self.number:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def open(self, path: Path, width: int = 1200, scheme: str = "light") -> None:
        self.events.clear()
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self.message())

    def value(self, expression: str):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def complaints(self) -> list:
        """Console messages, exceptions, and requests for anything but the page itself and data within it."""
        self.value("0")  # what was reported before the answer has been read
        loud = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        requests = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [e for e in self.events if e.get("method") in loud] + [u for u in requests[1:] if not u.startswith("data:")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.process.terminate()
    browser.process.wait(30)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    one = report.write_report([make_run(folder / "one")])
    two = report.write_report([folder / "one", make_run(folder / "two", evals=(0.3, 0.4))])
    return {"one": one, "two": two, "nasty": report.write_report([nasty_run(folder / "nasty")])}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["one", "two"])
def test_the_page_opens_quietly_with_its_curves(browser, pages, which, scheme):
    browser.open(pages[which], scheme=scheme)
    assert browser.complaints() == []
    curves = browser.value(CURVES)
    assert len(curves) >= 13 and min(curves) >= 1
    background, ink, line = (
        [int(x) for x in re.findall(r"\d+", browser.value(e))[:3]]
        for e in (
            "getComputedStyle(document.body).backgroundColor",
            "getComputedStyle(document.querySelector('svg text')).fill",
            "getComputedStyle([...document.querySelectorAll('svg path')].find(p => p.getAttribute('style')?.includes('--c16'))).stroke",
        )
    )
    assert (np.mean(background) > 200) == (scheme == "light")
    assert abs(np.mean(background) - np.mean(ink)) > 80 and max(abs(np.subtract(background, line))) > 80


@pytest.mark.parametrize("which", ["one", "two", "nasty"])
def test_a_phone_needs_no_sideways_scrolling(browser, pages, which):
    browser.open(pages[which], width=390)
    assert browser.value("document.documentElement.scrollWidth") <= 390
    assert browser.value("document.querySelector('svg').getBoundingClientRect().width") > 300


def test_completions_can_be_browsed(browser, pages):
    browser.open(pages["one"])
    shown = "[...document.querySelectorAll('#completions tbody tr')].filter(r => r.offsetHeight).map(r => r.dataset.update + ':' + r.dataset.total)"
    assert browser.value(shown) == ["30:2", "30:0"]
    browser.value("document.querySelector('#back').click()")
    assert browser.value(shown) == ["20:2", "20:0"]
    choose = "document.querySelector('#{}').value = '{}'; document.querySelector('#{}').dispatchEvent(new Event('input'))"
    browser.value(choose.format("update", "", "update"))
    browser.value(choose.format("order", "total", "order"))
    assert browser.value(shown) == ["10:2", "20:2", "30:2", "10:0", "20:0", "30:0"]
    browser.value(choose.format("find", "<ANSWER>6", "find"))
    assert browser.value(shown) == ["10:0", "20:0", "30:0"] and browser.complaints() == []


def test_nothing_a_model_wrote_runs(browser, tmp_path):
    browser.open(report.write_report([nasty_run(tmp_path / "run")]))
    assert browser.value("window.hacked") is None and browser.complaints() == []
    assert "onerror='window.hacked=1'" in browser.value("document.querySelector('#completions pre').textContent")
    browser.value("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked=1'}))")
    assert browser.value("window.hacked") is None  # nor would it if escaping failed: the page's policy knows one script


# --- What a run learns ------------------------------------------------------------------------------------------


def flat(record: dict) -> dict:
    return {"skipped": "no signal", "reward_mean": 0.0, "zero_signal_fraction": 1.0, "train_tokens_per_s": None}


def with_notes(folder: Path, *notes: dict) -> Path:
    with open(folder / "training_log.jsonl", "a") as log:
        log.write("".join(json.dumps(note) + "\n" for note in notes))
    return folder


@pytest.mark.parametrize("updates", [1, 8, 50])
def test_a_run_that_learnt_nothing_is_never_praised(tmp_path, updates):
    folder = make_run(tmp_path / "run", n=updates, change=flat, evals=(0.3, 0.3))
    note = {"event": "no_signal", "update": 1, "message": "No signal: every completion scored 0. What to try: a shorter form"}
    page = page_of(with_notes(folder, note))
    assert f"Nothing was learnt: </b>none of {updates} updates changed a weight ({updates} no signal). every completion scored 0" in page
    assert "No sign of reward hacking" not in page and "Little left to learn from" not in page


def test_a_run_without_signal_so_far_is_warned_of_from_the_first_update(tmp_path):
    folder = make_run(tmp_path / "run", n=3, change=flat, evals=(0.3,))
    (folder / "machine.json").write_text(json.dumps({"updates": 50}))
    assert "No signal: </b>none of 3 updates so far changed a weight (3 no signal)." in page_of(folder)
    later = make_run(tmp_path / "later", n=30, change=lambda r: flat(r) if r["update"] > 24 else {})
    assert ("No signal", "the last 6 updates were skipped: all completions of each prompt scored alike") in list(
        report.without_signal(report.read_run(later))
    )
    checked = make_run(tmp_path / "checked", n=0, evals=(0.3,), completions=False)
    assert "No update yet" in page_of(checked)
    note = {"event": "check", "update": 0, "message": "No signal: in none of 4 groups"}
    assert "No signal: </b>in none of 4 groups." in page_of(with_notes(checked, note))


def test_short_runs_are_warned_of_what_is_cut_and_flat(tmp_path):
    run = report.read_run(make_run(tmp_path / "run", n=4, change=lambda r: {"truncated_fraction": 1.0, "zero_signal_fraction": 0.75}))
    assert [title for title, _ in report.tripwires(run)] == ["Completions cut", "Little left to learn from"]


def rewarded(update: int, mean: float, name: str = "brevity") -> dict:
    """A held-out evaluation by a run's own reward, while exact match falls to nothing."""
    scores = {"reward_mean": mean, "reward_mean_ci": [mean - 0.1, mean + 0.1], f"rewards/{name}": mean / 2, f"rewards/{name}_ci": None}
    return evaluation_record(update, 0.24 if not update else 0.0, 0.0) | scores


def test_held_out_problems_are_scored_by_the_runs_own_rewards(tmp_path):
    folder = make_run(tmp_path / "run", evals=())
    page = page_of(with_notes(folder, rewarded(0, 0.5), rewarded(50, 1.5)))
    assert page.index("<td>reward</td><td>0.500 (0.400 to 0.600)</td><td>1.500 (1.400 to 1.600)</td><td>+1.000") < page.index("<td>brevity</td>")
    assert "0.500 → 1.500" in page and "exact match" not in page.split("<h2>Configuration")[0]
    assert "Reward up, accuracy down" not in page and "Held-out reward" in page
    shown = page_of(with_notes(make_run(tmp_path / "right", evals=()), rewarded(0, 0.5, "correctness_reward_func")))
    assert "exact match, tags required" in shown


def test_an_overfitted_reward_is_warned_of(tmp_path):
    folder = make_run(tmp_path / "run", evals=())
    found = dict(report.tripwires(report.read_run(with_notes(folder, rewarded(0, 1.5), rewarded(50, 0.5)))))
    assert found.keys() == {"Reward up in training, down on held-out problems"}
