"""Prompts by what was earned on them lately: those that were all right or all wrong are drawn less often.

A group whose completions all score alike has no signal. Its prompt is easy where they earn more than the
middle of all rewards seen in the run, else hard. A history is plain data, {row: the last outcomes, a letter
each, newest last}, so that a checkpoint can hold it; it depends on rewards and seed alone, and is the same on
all ranks.
"""

import numpy as np

EASY, HARD, MIXED = "e", "h", "m"
WORDS = {EASY: "easy", HARD: "hard"}


def outcome(rewards: np.ndarray, has_signal: bool, lowest: float, highest: float) -> str:
    """How a group of rewards (G,) went, among rewards from lowest to highest in the run so far."""
    known = rewards[~np.isnan(rewards)]
    if has_signal or not known.size:
        return MIXED
    return EASY if known.mean() > (lowest + highest) / 2 else HARD


def remembered(history: dict[str, str], outcomes: list[tuple[int, str]], window: int) -> dict[str, str]:
    """A new history, with (row, outcome) added; the last `window` outcomes of a row are kept."""
    history = dict(history)
    for row, letter in outcomes:
        history[str(row)] = (history.get(str(row), "") + letter)[-window:]
    return history


def lately(history: dict[str, str], row: int, window: int) -> str:
    """ "easy" or "hard" where all of a row's last `window` outcomes were that; else ""."""
    letters = history.get(str(row), "")
    return WORDS.get(letters[0], "") if len(letters) == window and len(set(letters)) == 1 else ""
