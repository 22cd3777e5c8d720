"""Prompts that were all right or all wrong lately are drawn less often: by hand, exactly, and back again."""

import math

import numpy as np
import pytest

import mlx_grpo
from mlx_grpo import RunState, draw_by_difficulty, draw_rows, load_config, row_of
from mlx_grpo.rollout.difficulty import lately, outcome, remembered

ROWS = [{"prompt": str(i)} for i in range(10)]


def config_of(*settings):
    return load_config(None, list(settings))


def test_how_a_group_went_by_hand():
    right, wrong = np.array([2.0, 2.0]), np.array([0.0, 0.0])
    assert outcome(right, False, 0.0, 2.0) == "e" and outcome(wrong, False, 0.0, 2.0) == "h"
    assert outcome(np.array([0.0, 2.0]), True, 0.0, 2.0) == "m"
    assert outcome(np.array([1.0, 1.0]), False, 0.0, 2.0) == "h"  # half is not right
    assert outcome(np.array([-1.0, math.nan]), False, -1.0, 0.0) == "h" and outcome(wrong, False, -1.0, 0.0) == "e"
    assert outcome(np.array([math.nan, math.nan]), False, 0.0, 1.0) == "m"


def test_the_window_by_hand():
    history = remembered({"3": "ee"}, [(3, "e"), (3, "m"), (4, "h"), (4, "h")], 3)
    assert history == {"3": "eem", "4": "hh"}
    assert lately(history, 3, 3) == "" and lately(history, 4, 3) == "" and lately(history, 4, 2) == "hard"
    assert lately({"1": "e"}, 1, 1) == "easy" and lately({"1": "m"}, 1, 1) == "" and lately({}, 1, 1) == ""


def test_without_weights_every_epoch_has_every_prompt_in_the_order_of_before():
    state, config = RunState(), config_of()
    drawn = [state.draw(ROWS, config, 4) for _ in range(5)]
    assert sum(drawn, []) == draw_rows(ROWS, 0, 0, 20) and state.cursor == 20 and state.difficulty == {}
    assert sorted(row["prompt"] for _, row in sum(drawn, [])[:10]) == [str(i) for i in range(10)]
    order = np.random.default_rng([0, 2, 1]).permutation(10)  # of the second epoch, as seeds have always had it
    assert [row["prompt"] for _, row in sum(drawn, [])[10:]] == [str(i) for i in order]


def test_an_easy_prompt_is_drawn_as_often_as_its_weight_says():
    config = config_of("easy_prompt_weight=0.25", "hard_prompt_weight=0.5")
    history = {"0": "e", "1": "h", "2": "m"}
    numbers, passed = draw_by_difficulty(ROWS, config, history, 0, 8000)
    times = np.bincount([row_of(n, 10, 0) for n in numbers], minlength=10)
    epochs = (numbers[-1] + 1) / 10
    assert times[0] / epochs == pytest.approx(0.25, abs=0.05) and times[1] / epochs == pytest.approx(0.5, abs=0.05)
    assert all(abs(t - epochs) <= 1 for t in times[2:])
    assert passed.count("easy") + passed.count("hard") + 8000 == numbers[-1] + 1


def test_draws_do_not_depend_on_how_they_are_cut():
    config = config_of("easy_prompt_weight=0.3")
    history = {str(i): "e" for i in range(6)}
    whole, _ = draw_by_difficulty(ROWS, config, history, 0, 30)
    first, _ = draw_by_difficulty(ROWS, config, history, 0, 11)
    assert whole == first + draw_by_difficulty(ROWS, config, history, first[-1] + 1, 19)[0]


def test_where_every_prompt_is_easy_some_are_drawn_all_the_same():
    config = config_of("easy_prompt_weight=1e-9")
    numbers, passed = draw_by_difficulty(ROWS, config, {str(i): "e" for i in range(10)}, 0, 3)
    assert numbers == [10, 21, 32] and len(passed) == 30  # an epoch is passed over at the most


def test_a_state_counts_and_remembers():
    config = config_of("easy_prompt_weight=0.5", "hard_prompt_weight=0.5")
    state = RunState()
    drawn = state.draw(ROWS, config, 3)
    start = mlx_grpo.script.dataclasses.replace(state)
    rewards, advantages = np.array([[2.0, 2.0], [0.0, 0.0], [0.0, 2.0]]), np.array([[0.0, 0.0], [0.0, 0.0], [-1.0, 1.0]])
    state.note_difficulty(drawn, rewards, advantages, 10, config)
    rows = [row_of(n, 10, 0) for n, _ in drawn]
    assert state.difficulty == {str(rows[0]): "e", str(rows[1]): "h", str(rows[2]): "m"}
    assert (state.lowest_reward, state.highest_reward) == (0.0, 2.0) and start.difficulty == {}
    state.draw(ROWS, config, 60)
    counts = state.drawn_since(start)
    assert counts["prompts_drawn"] == 60 and counts["prompts/skipped_easy"] == state.passed_easy > 0
    assert counts["prompts/skipped_hard"] == state.passed_hard > 0
    assert state.cursor == 63 + state.passed_easy + state.passed_hard
    assert RunState.read(mlx_grpo.script.dataclasses.asdict(state)) == state


def test_a_run_draws_less_of_what_teaches_nothing(tmp_path):
    """Of 8 prompts half are easy: their share of what is drawn falls, and the log counts what is passed over."""
    shares = []
    for weight in ("1.0", "0.2"):
        config = config_of(f"easy_prompt_weight={weight}")
        state, rows = RunState(), [{"prompt": str(i)} for i in range(8)]
        seen = []
        for _ in range(40):
            drawn = state.draw(rows, config, 4)
            seen += [row["prompt"] for _, row in drawn]
            rewards = np.array([[1.0, 1.0] if int(row["prompt"]) < 4 else [0.0, 1.0] for _, row in drawn])
            if config.draws_by_difficulty:
                state.note_difficulty(drawn, rewards, rewards - rewards.mean(axis=1, keepdims=True), 8, config)
        shares.append(np.mean([int(prompt) < 4 for prompt in seen]))
    assert shares[0] == 0.5 and shares[1] < 0.25


@pytest.mark.parametrize("setting", ["easy_prompt_weight=0", "hard_prompt_weight=1.1", "difficulty_window=0", "difficulty_window=2"])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(mlx_grpo.UserError, match=setting.partition("=")[0]):
        load_config(None, [setting])
