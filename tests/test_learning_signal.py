"""A run that cannot learn says so: before its first update, while it trains and at its end; and held-out problems are scored
by the run's own rewards."""

import dataclasses
import json
import math

import mlx.core as mx
import numpy as np
import pytest

import mlx_grpo
from mlx_grpo import Completion, Group, MLXGRPOTrainer, RunState, load_config
from mlx_grpo.run import learning_signal
from mlx_grpo.run.learning_signal import nothing_learnt, should_say, why_stop
from mlx_grpo.run.terminal import describe_evaluation, print_outcome, score_rows

REWARDS = """
def zero(completions, **columns):
    return [0.0] * len(completions)

def length(completions, **columns):
    return [len(completion[0]["content"]) / 100 - 0.1 for completion in completions]

def shy(completions, **columns):
    return [None] * len(completions)
"""


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """The report is a process of its own after each evaluation: slow, and tested elsewhere."""
    monkeypatch.setattr(mlx_grpo.script, "write_report", lambda run_dir: None)


def settings(folder, *extra, reward="zero"):
    file = folder / "rewards.py"
    file.write_text(REWARDS)
    return [
        "model_name=starter/model", "dataset=starter/data", f"output_dir={folder}", "run_name=run", "max_train_samples=16",
        "batch_size=2", "num_generations=2", "max_completion_length=6", "eval_samples=3", "eval_steps=0", "save_steps=0",
        "log_completions_steps=0", "use_compile=false", "learning_rate=1e-3", "warmup_ratio=0",
        f'reward_funcs=["{file}:{reward}"]', *extra,
    ]  # fmt: skip


def train(folder, *extra, reward="zero", more=()):
    """The command line in this process: its exit status."""
    pairs = [part for setting in settings(folder, *extra, reward=reward) for part in ("--set", setting)]
    return mlx_grpo.main([*pairs, *more])


def trainer_of(folder, *extra, reward="zero"):
    trainer = MLXGRPOTrainer(load_config(None, settings(folder, *extra, reward=reward)), folder / "run")
    trainer.run_dir.mkdir()
    return trainer


def records(folder):
    return [json.loads(line) for line in (folder / "run" / "training_log.jsonl").read_text().splitlines()]


def events(folder, name):
    return [record for record in records(folder) if record.get("event") == name]


def group_of(rewards, texts=None, answer="4", reason="eos"):
    """A group whose completions have these rewards (G, F)."""
    texts = texts or [f"text {i}" for i in range(len(rewards))]
    each = [Completion([1], [0.0], [1], reason, text, list(values)) for text, values in zip(texts, rewards)]
    return Group({"prompt": "2 + 2?", "answer": answer}, [1], each)


# Before the first update


def test_the_check_has_each_functions_values_by_hand():
    groups = [group_of([[2.0, math.nan], [0.0, 0.5]]), group_of([[0.0, 0.5], [0.0, math.nan]])]
    rewards, advantages = np.array([[2.0, 0.5], [0.5, 0.0]]), np.array([[1.0, -1.0], [0.0, 0.0]])
    record = learning_signal.check_record(groups, rewards, advantages, ["a", "b"])
    assert record["signal_fraction"] == 0.5 and record["reward_mean"] == 0.75 and record["completions"] == 4
    assert record["rewards/a"] == {"least": 0.0, "mean": 0.5, "greatest": 2.0, "abstained": 0}
    assert record["rewards/b"] == {"least": 0.5, "mean": 0.5, "greatest": 0.5, "abstained": 2}
    lines = learning_signal.check_lines(record, groups, rewards, ["a", "b"])
    assert "1 of 2 groups (50%)" in lines[0]
    assert [line.split()[1] for line in lines[3:]] == ["best", "middle", "worst"]
    assert "best 2.000 (a 2, b nan): text 0" in lines[3] and "worst 0.000 (a 0, b nan): text 1" in lines[5]


def test_the_check_changes_nothing_of_the_run(tmp_path):
    trainer = trainer_of(tmp_path, reward="length")
    state, random = dataclasses.asdict(trainer.state), np.array(mx.random.state[0])
    weights = {name: np.array(array) for name, array in mlx_grpo.trainable_arrays(trainer.model).items()}
    trainer.check_signal()
    assert dataclasses.asdict(trainer.state) == state and (np.array(mx.random.state[0]) == random).all()
    assert all((np.array(a) == weights[name]).all() for name, a in mlx_grpo.trainable_arrays(trainer.model).items())
    sampled = trainer.rollout(2, mlx_grpo.Stopwatch())
    again = MLXGRPOTrainer(trainer.config, trainer.run_dir).rollout(2, mlx_grpo.Stopwatch())
    assert [c.ids for g in sampled for c in g.completions] == [c.ids for g in again for c in g.completions]


def test_a_dry_run_shows_the_check_and_warns(tmp_path, capsys):
    assert train(tmp_path, more=["--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "check      zero: least 0, mean 0, greatest 0" in shown and "\nNo signal: " in shown and shown.count("check      best") == 1
    assert not (tmp_path / "run").exists()
    assert train(tmp_path, reward="length", more=["--dry-run"]) == 0
    assert "No signal" not in capsys.readouterr().out


def cures(groups, names=("correctness_reward_func",), golds=("4", "5")):
    rewards = np.array([[sum(completion.rewards) for completion in group.completions] for group in groups])
    return learning_signal.likely_cures(groups, rewards, list(names), list(golds), 64)


def test_what_to_do_comes_in_the_order_of_likelihood():
    flat = [group_of([[0.0], [0.0]])]
    found = cures(flat, golds=["about four", "5", "it depends"])
    assert [cure.split(":")[0].split(" (")[0] for cure in found] == [
        "the gold answers do not parse as numbers", "no completion has an <answer>", "partial credit",
        "an easier slice of the data", "a stronger model",
    ]  # fmt: skip
    assert "(2 of 3; one is 'about four')" in found[0] and "completion_prefix" in found[1] and "last_number_reward_func" in found[2]
    assert not cures(flat)[0].startswith("the gold") and not cures(flat, ["mine"], ["x"])[0].startswith("the gold")
    assert "form that the reward asks for" in cures(flat, ["mine"])[0]
    with_tags = [group_of([[0.0], [0.0]], ["<answer>3</answer>", "<answer>5</answer>"])]
    assert cures(with_tags)[0].startswith("partial credit")


def test_what_was_seen_decides_what_to_do():
    assert "2 of 2 completions were cut at 64 tokens" in cures([group_of([[0.0], [0.0]], reason="length")])[0]
    assert any("raise temperature" in cure for cure in cures([group_of([[0.0], [0.0]], ["same", "same"])]))
    assert cures([group_of([[2.0], [2.0]])]) == ["every answer is right already: take harder prompts"]
    assert "if 0.7 is all there is to earn" in cures([group_of([[0.7], [0.7]])], ["mine"])[0]
    assert cures([group_of([[math.nan], [math.nan]])], ["mine"])[0].startswith("look at what makes the reward functions return None")
    assert learning_signal.scores_seen(np.array([[0.0, 0.0], [2.0, 2.0]])) == "each group's scored alike, between 0 and 2"


# While it trains


def state_of(**values):
    return RunState(**values)


def test_no_signal_is_said_after_five_updates_and_then_every_fifty():
    said, state = [], RunState()
    for update in range(1, 121):
        state.note({"lr": 1.0, "skipped": "no signal"}, load_config())
        if should_say(state, 0):
            said.append(update)
            state.said_no_signal = update
    assert said == [5, 55, 105]
    assert should_say(RunState(flat_updates=3, update=3), 3) and not should_say(RunState(flat_updates=2, update=9), 3)
    broken = RunState(update=20, flat_updates=5, said_no_signal=5)
    assert not should_say(broken, 50)  # a second row of five, soon after the first


def test_a_run_stops_at_each_full_row_of_flat_updates():
    config = load_config(None, ["max_flat_updates=4"])
    assert [n for n in range(1, 13) if why_stop(RunState(flat_updates=n), 1, config)] == [4, 8, 12]
    assert why_stop(RunState(flat_updates=5), 2, config) and not why_stop(RunState(flat_updates=5), 1, config)
    never = load_config(None, ["max_flat_updates=0"])
    assert not any(why_stop(RunState(flat_updates=n), 1, never) for n in range(200))


def test_counts_of_updates_by_hand():
    state, config = RunState(), load_config()
    for reason in ("no signal", None, "non-finite gradient", "no signal", "no signal"):
        state.note({"lr": 0.1, **({"skipped": reason} if reason else {})}, config)
    assert (state.flat_updates, state.changed_updates, state.skipped) == (2, 1, {"no signal": 3, "non-finite gradient": 1})
    assert nothing_learnt(state) == "" and nothing_learnt(RunState()) == ""
    idle = RunState()
    idle.note({"lr": 0.0}, config)
    assert nothing_learnt(idle).startswith("Nothing was learnt: none of 1 updates changed a weight (1 at learning rate 0)")


def test_a_run_without_signal_saves_says_so_and_ends_with_status_1_and_goes_on_when_told(tmp_path, capsys):
    assert train(tmp_path, "max_flat_updates=3") == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("No signal: 3 updates in a row changed nothing (max_flat_updates = 3; 0 goes on)")
    assert "Nothing was learnt: none of 3 updates" in shown.err and len(shown.err.splitlines()) == 1
    assert shown.out.count("\nNo signal: ") == 2 and "train none" in shown.out  # by the check, and after 3 updates
    assert (tmp_path / "run" / "checkpoint-3").is_dir() and not (tmp_path / "run" / "final").exists()
    assert events(tmp_path, "end")[0]["skipped"] == {"no signal": 3}
    assert [r["train_tokens_per_s"] for r in records(tmp_path) if "event" not in r] == [None] * 3
    assert train(tmp_path, "max_flat_updates=0", more=["--resume"]) == 0
    shown = capsys.readouterr().out
    assert "Nothing was learnt: none of 8 updates changed a weight (8 no signal)" in shown and "Try it" not in shown
    assert len(events(tmp_path, "check")) == 1 and [r["update"] for r in events(tmp_path, "no_signal")] == [3]
    end = events(tmp_path, "end")[-1]
    assert end["changed"] == 0 and end["message"].startswith("Nothing was learnt: ")


def test_a_run_that_learns_says_nothing_of_it(tmp_path, capsys):
    assert train(tmp_path, "max_train_samples=4", "num_generations=4", reward="length") == 0
    shown = capsys.readouterr().out
    assert "No signal" not in shown and "Nothing was learnt" not in shown and "Try it" in shown
    assert not events(tmp_path, "end") and not events(tmp_path, "check")


# Held-out problems


def test_intervals_of_means_by_hand():
    assert mlx_grpo.mean_interval(np.array([1.0, 0.0, 1.0, 1.0])) == pytest.approx(mlx_grpo.wilson_interval(3, 4))
    assert mlx_grpo.mean_interval(np.zeros(10), 2.0) == pytest.approx([2 * x for x in mlx_grpo.wilson_interval(0, 10)])
    # mean 2, deviation 1, 1.96 / sqrt(3)
    assert mlx_grpo.mean_interval(np.array([1.0, 2.0, 3.0])) == pytest.approx((2 - 1.131607, 2 + 1.131607))
    assert mlx_grpo.mean_interval(np.array([-0.5])) == (-0.5, -0.5)


def test_scores_are_weighted_and_leave_abstentions_out():
    rewards = np.array([[1.0, 0.0, math.nan], [0.5, math.nan, math.nan]])
    scores = mlx_grpo.reward_scores(rewards, ["a", "b"], [2.0, 1.0])
    assert scores["reward_mean"] == 1.25 and scores["rewards/a"] == 0.5 and scores["rewards/b"] == 0.5
    assert scores["rewards/a_ci"] == pytest.approx(mlx_grpo.wilson_interval(1, 2))
    nothing = mlx_grpo.reward_scores(np.full((1, 2), math.nan), ["a"], [1.0])
    assert nothing == {"reward_mean": None, "reward_mean_ci": None, "rewards/a": None, "rewards/a_ci": None}


def test_evaluations_speak_of_the_runs_own_rewards(tmp_path, capsys):
    assert train(tmp_path, "max_train_samples=4", reward="length") == 0
    shown = capsys.readouterr().out
    rows = [line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│")]
    assert rows == ["reward", "length"] and "exact match" not in shown
    first = events(tmp_path, "eval")[0]
    assert first["reward_mean"] == first["rewards/length"] and first["n"] == 3 and "em_strict" in first and "em_lenient" in first
    state = RunState()
    state.note_evaluation({"split": "test", "reward_mean": -2.0}, "reward_mean")
    assert state.best == -2.0
    state.note_evaluation({"split": "train", "reward_mean": 5.0}, "reward_mean")
    state.note_evaluation({"split": "test", "reward_mean": None}, "reward_mean")
    assert state.best == -2.0


def test_exact_match_is_shown_where_correctness_is_a_reward(capsys, tmp_path):
    record = {
        "split": "test", "n": 4, "reward_mean": 2.0, "reward_mean_ci": (1.0, 3.0), "rewards/correctness_reward_func": 1.5,
        "rewards/correctness_reward_func_ci": (1.0, 1.9), "em_strict": 0.75, "em_strict_ci": (0.3, 0.95), "em_lenient": 1.0,
        "em_lenient_ci": (0.5, 1.0),
    }  # fmt: skip
    assert describe_evaluation(record) == "held-out reward 2.000 (1.000 to 3.000), exact match 75.0% (30.0-95.0), lenient 100.0%, n=4"
    assert [key for _, key in score_rows(record)] == ["reward_mean", "rewards/correctness_reward_func", "em_strict", "em_lenient"]
    print_outcome(tmp_path, {"before": {"test": record}, "after": {"test": record}}, "Nothing was learnt: so it is")
    shown = capsys.readouterr().out
    assert "exact match, tags required" in shown and shown.endswith("Nothing was learnt: so it is\n") and "Try it" not in shown


def test_a_reward_that_fails_in_an_evaluation_loses_no_update(tmp_path, monkeypatch):
    real, calls = mlx_grpo.evaluate, []

    def evaluate(*given, **named):
        calls.append(1)
        if len(calls) == 2:
            raise mlx_grpo.RunError("Reward function length raised OSError: the network is away")
        return real(*given, **named)

    monkeypatch.setattr(mlx_grpo.script, "evaluate", evaluate)
    assert train(tmp_path, "eval_steps=2", reward="length") == 1
    assert (tmp_path / "run" / "checkpoint-2").is_dir()


@pytest.mark.parametrize(
    "functions, given, metric",
    [
        (["correctness_reward_func"], "", "em_strict"),
        (["last_number_reward_func"], "", "reward_mean"),
        (["correctness_reward_func"], "reward_mean", "reward_mean"),
        (["my.py:brevity", "last_number_reward_func"], "rewards/brevity", "rewards/brevity"),
    ],
)  # fmt: skip
def test_what_chooses_the_best_checkpoint(functions, given, metric):
    config = load_config(None, [f"reward_funcs={json.dumps(functions)}", f"metric_for_best_model={given}"])
    assert config.best_metric == metric


def test_an_unknown_metric_is_refused_with_the_choices():
    with pytest.raises(mlx_grpo.UserError, match=r"^Invalid metric_for_best_model: 'accuracy'; choose one of reward_mean, rewards/"):
        load_config(None, ["metric_for_best_model=accuracy"])
