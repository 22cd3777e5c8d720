"""Answers, numbers and rewards: what counts as right, and what happens when a user's reward function misbehaves."""

import asyncio
import functools
import math
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

import mlx_grpo
from mlx_grpo import scoring
from mlx_grpo.answers import answers_equal, last_number, same_answer
from mlx_grpo import (
    MLXGRPOConfig, RunError, UserError, correctness_reward_func, extract_hash_answer, extract_xml_answer, grade,
    int_reward_func, last_number_reward_func, parse_number, repetition_reward_func, score, soft_format_reward_func,
    soft_overlong_reward_func, strict_format_reward_func, xmlcount_reward_func,
)  # fmt: skip

load_rewards = functools.partial(scoring.load_rewards, built_in=mlx_grpo.BUILT_IN_REWARDS)

WELL_FORMED = "<reasoning>\n6 times 3 is 18.\n</reasoning>\n<answer>\n18\n</answer>\n"


def chats(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


# Numbers


@pytest.mark.parametrize(
    "text, number",
    [
        ("1080", "1080"), ("1,080", "1080"), ("$1080", "1080"), ("$1,080.00", "1080"), ("1080.00", "1080"), ("1080.", "1080"), ("$1,080.", "1080"),
        ("$ 5", "5"), (" 5\n", "5"), ("007", "7"), ("0", "0"), ("-0", "0"), ("+7", "7"), ("-5", "-5"), ("- 5", "-5"), ("−5", "-5"), ("-$5", "-5"),
        ("−$1,000", "-1000"), (".5", "0.5"), ("-.5", "-0.5"), ("5%", "5"), ("12.5%", "12.5"), ("1e3", "1000"), ("+5e+3", "5000"), ("2E-2", "0.02"),
        ("1,080,000.50", "1080000.5"),
    ],
)  # fmt: skip
def test_a_number_is_read_however_it_is_written(text, number):
    assert parse_number(text) == Decimal(number)


@pytest.mark.parametrize(
    "text",
    ["", " ", ".", "-", "$", "%", "e5", "5e", "1,08", "10,00", "1,0800", "1080,000", ",080", "1,080,", "--5", "+-5", "1.2.3", "12 apples", "x = 12", "1/2",
     "3:30", "1 080", "1_000", "five", "nan", "inf", "∞", "²", "5%%", "1e99999999999999999999"],
)  # fmt: skip
def test_what_is_not_wholly_a_number_is_none(text):
    assert parse_number(text) is None


@pytest.mark.parametrize(
    "given, gold, equal",
    [
        ("1,080", "1080", True), ("$1080", "1,080", True), ("1080.00", "$1080", True), ("1080", "1080", True), ("12", "120", False),
        ("120", "12", False), ("-12", "12", False), ("−12", "-12", True), ("12.", "12", True), ("12.0", "12", True), ("12.01", "12", False),
        ("50%", "50", True), ("1,08", "108", False), ("1,08", "1080", False), ("0.1", "0.10", True), ("1e3", "1000", True),
        ("100000000000000000001", "100000000000000000002", False), ("0.1000000000000000000001", "0.1", False), ("Paris", "paris", True),
        ("Paris ", " paris", True), ("Paris", "London", False), ("12 apples", "12", False), ("", "", False), (" ", "", False), ("", "0", False),
        ("nan", "5", False), ("1/2", "1/2", True),
    ],
)  # fmt: skip
def test_answers_are_compared_as_numbers_else_as_text(given, gold, equal):
    assert answers_equal(given, gold) is equal
    assert answers_equal(gold, given) is equal


numbers = st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=3)


@st.composite
def written_numbers(draw):
    """(a number, one of the ways to write it)."""
    number = draw(numbers)
    text = f"{abs(number):{draw(st.sampled_from(['', ',']))}f}"
    if draw(st.booleans()):
        text = text.rstrip("0")
    sign = draw(st.sampled_from(["-", "−", "- "])) if number < 0 else draw(st.sampled_from(["", "+"]))
    return number, draw(st.sampled_from(["", " ", "\n"])) + sign + draw(st.sampled_from(["", "$"])) + text + draw(st.sampled_from(["", "%", ".", " "]))


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(written_numbers(), written_numbers())
def test_two_writings_are_equal_exactly_when_their_numbers_are(one, other):
    hypothesis.assume(not (one[1].rstrip().endswith("..") or other[1].rstrip().endswith("..")))
    assert parse_number(one[1]) == one[0]
    assert answers_equal(one[1], other[1]) is (one[0] == other[0])
    assert answers_equal(one[1], str(one[0]))


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(st.text(max_size=30), st.text(max_size=30))
def test_no_text_at_all_breaks_the_graders(one, other):
    assert answers_equal(one, other) is answers_equal(other, one)
    assert grade(one, other)[1] >= grade(one, other)[0]
    number = last_number(one)
    assert number == "" or number in one
    extract_hash_answer(one), extract_xml_answer(one)


@pytest.mark.parametrize("text", ["1e999999", "9" * 5000, "0." + "3" * 5000, "<answer>" * 3000, "-" * 5000, "1," * 5000, "1,000" * 2000, "####" * 2000])
def test_monstrous_answers_are_graded_as_any_other(text):
    assert grade(f"<answer>{text}</answer>", "5") == (False, False)
    equals_itself = "<answer>" not in text  # the last block's text is what was answered
    assert grade(f"<answer>{text}</answer>", text) == (equals_itself, equals_itself)
    whole = text in ("1e999999", "9" * 5000)
    assert int_reward_func(chats(f"<answer>{text}</answer>")) == [0.5 if whole else 0.0]
    assert last_number_reward_func(chats(text), answer=["5"]) == [0.0]
    assert strict_format_reward_func(chats(text)) == [0.0]
    assert soft_format_reward_func(chats("<reasoning>" * 500 + text)) == [0.0]


# Answers in a text


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<answer>5</answer>", "5"), ("<answer>\n 5 \n</answer>", "5"), ("<answer>two\nlines</answer>", "two\nlines"), ("<answer></answer>", ""),
        ("", ""), ("5", ""), ("<answer>5", ""), ("5</answer>", ""), ("</answer>5<answer>", ""), ("<Answer>5</Answer>", ""), ("<answer >5</answer>", ""),
        ("<answer>5</answer><answer>6</answer>", "6"), ("<answer>5</answer> or <answer>6", "5"), ("<answer>5<answer>6</answer>", "6"),
        ("<answer>a<answer>6</answer>b</answer>", "6"), ("<answer>5</answer>6</answer>", "5"), ("</answer><answer>7</answer>", "7"),
        ("<reasoning><answer>1</answer></reasoning><answer>2</answer>", "2"), ("<answer>5</answer></answer>", "5"),
    ],
)  # fmt: skip
def test_the_last_complete_answer_counts(text, answer):
    assert extract_xml_answer(text) == answer


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(before=st.text(max_size=40), answer=st.text(max_size=20), after=st.text(max_size=40))
def test_an_answer_is_found_whatever_stands_around_it(before, answer, after):
    hypothesis.assume("<answer>" not in answer + after and "</answer>" not in answer + after and "<answer>" not in before)
    assert extract_xml_answer(f"{before}<answer>{answer}</answer>{after}") == answer.strip()


@pytest.mark.parametrize(
    "text, answer",
    [
        ("He has 5.\n#### 5", "5"), ("#### 1,080", "1080"), ("#### $1,080", "1080"), ("####5", "5"), ("#### -5", "-5"), ("#### 1 #### 2", "2"),
        ("#### blue", "blue"), ("#### red, blue", "red, blue"), ("#### 5\n", "5"), ("5", None), ("### 5", None), ("", None),
    ],
)  # fmt: skip
def test_gsm8ks_gold_answer_follows_the_hashes(text, answer):
    assert extract_hash_answer(text) == answer


@pytest.mark.parametrize(
    "text, number",
    [
        ("The answer is 18.", "18"), ("6 * 3 = 18", "18"), ("18 dollars", "18"), ("$1,080.50!", "$1,080.50"), ("It is -5", "-5"), ("x=-5", "-5"),
        ("It is −5.", "−5"), ("20%", "20%"), ("120", "120"), ("3/4", "4"), ("(7)", "7"), ("18\n\n", "18"), ("none", ""), ("", ""), (".", ""), ("- $ %", ""),
        ("3, 4 and 5", "5"), ("**42**", "42"), ("1,080 and 12", "12"),
    ],
)  # fmt: skip
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize("text, number", [("pages 5-10", 10), ("from $5-$10", 10), ("what is left is 20 - 5", 5), ("(2+3)-4", 4), ("apples:\n- 18", 18), ("17% - 3%", 3), ("x = -4", -4), ("(-4)", -4), ("from 3 to -4", -4), ("-4", -4)])
def test_a_minus_is_a_sign_only_where_it_can_be_none_else(text, number):
    assert parse_number(last_number(text)) == number


@pytest.mark.parametrize(
    "text, gold, strict, lenient",
    [
        (WELL_FORMED, "18", True, True), ("<answer>$18.00</answer>", "18", True, True), ("The answer is 18.", "18", False, True),
        ("<answer>18", "18", False, True), ("<answer>180</answer>", "18", False, False), ("<answer>1,080</answer>", "1080", True, True),
        ("<answer>18</answer> not 19", "18", True, True), ("<answer>17</answer> or 18", "18", False, True), ("<answer>Paris</answer>", "paris", True, True),
        ("", "18", False, False), ("<answer></answer>", "", False, False),
    ],
)  # fmt: skip
def test_exact_match_is_strict_and_lenient(text, gold, strict, lenient):
    assert grade(text, gold) == (strict, lenient)


# The reward functions


def test_correctness_is_worth_2_and_wants_the_tags():
    texts = (WELL_FORMED, "18", "<answer>18", "<answer>$18.0</answer>", "<answer>17</answer><answer>18</answer>", "<answer>18</answer><answer>17</answer>", "")
    assert correctness_reward_func(chats(*texts), answer=["18"] * 7) == [2.0, 0.0, 0.0, 2.0, 2.0, 0.0, 0.0]
    assert correctness_reward_func(chats("<answer>1</answer>", "<answer>2</answer>"), answer=["2", "2"], prompts=["a", "b"], colour=["red", "red"]) == [0.0, 2.0]


def test_the_last_number_is_worth_1_in_whatever_form():
    right = ("60", "41 + 19 = 60", "It is 60.", "**60**", "$60.00", "59? No: 60", WELL_FORMED.replace("18", "60"))
    assert last_number_reward_func(chats(*right), answer=["60"] * len(right)) == [1.0] * len(right)
    wrong = ("", "sixty", "600", "6", "-60", "60 is 41 + 19", "60 - 1 = 59", "60.5")
    assert last_number_reward_func(chats(*wrong), answer=["60"] * len(wrong)) == [0.0] * len(wrong)
    assert last_number_reward_func(chats("-5", "1,080", ""), answer=["-5", "1080", ""], prompts=["a", "b", "c"]) == [1.0, 1.0, 0.0]


def test_a_whole_number_is_worth_a_half():
    texts = ("18", "$1,080", "-3", "18.0", "18.5", "eighteen", "", "18 apples", "1,08")
    assert int_reward_func(chats(*(f"<answer>{text}</answer>" for text in texts))) == [0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert int_reward_func(chats("18")) == [0.0]


@pytest.mark.parametrize(
    "text, strict, soft",
    [
        (WELL_FORMED, 0.5, 0.5), (WELL_FORMED.rstrip("\n"), 0.5, 0.5), (WELL_FORMED + "\n", 0.0, 0.5), (WELL_FORMED + "so 18", 0.0, 0.5),
        ("Sure! " + WELL_FORMED, 0.0, 0.5), ("<reasoning>r</reasoning><answer>18</answer>", 0.0, 0.5), ("<reasoning>r</reasoning> \n <answer>18</answer>", 0.0, 0.5),
        ("<reasoning>\na\nb\n</reasoning>\n<answer>\n18\n</answer>", 0.5, 0.5), ("<reasoning>\nr\n</reasoning>\n<answer>\n18", 0.0, 0.0),
        ("<answer>\n18\n</answer>\n<reasoning>\nr\n</reasoning>", 0.0, 0.0), ("<reasoning>\nr\n</reasoning>\nwell\n<answer>\n18\n</answer>", 0.0, 0.0),
        (WELL_FORMED + WELL_FORMED, 0.0, 0.5), ("<reasoning>\n<reasoning>\nr\n</reasoning>\n<answer>\n18\n</answer>", 0.0, 0.5), ("", 0.0, 0.0), ("18", 0.0, 0.0),
    ],
)  # fmt: skip
def test_the_format_rewards(text, strict, soft):
    assert strict_format_reward_func(chats(text)) == [strict]
    assert soft_format_reward_func(chats(text)) == [soft]


@pytest.mark.parametrize(
    "text, reward",
    [
        (WELL_FORMED, 0.5), ("", 0.0), ("<reasoning>", 0.125), ("<answer></answer>", 0.25), ("<reasoning></reasoning><answer>", 0.375),
        ("<answer><answer></answer>", 0.125), (WELL_FORMED + "12345678", 0.492), (WELL_FORMED + "\n \n", 0.5), ("<answer></answer>" + "x" * 1000, 0.0),
        ("x" * 1000, 0.0), (WELL_FORMED * 2, 0.0),
    ],
)  # fmt: skip
def test_each_tag_that_occurs_once_counts_less_what_trails(text, reward):
    assert xmlcount_reward_func(chats(text)) == pytest.approx([reward])


def test_the_overlong_penalty_falls_over_the_last_fifth():
    ids = [[0] * n for n in (1, 80, 85, 90, 100)]
    found = soft_overlong_reward_func(chats(*"abcde"), completion_ids=ids, max_completion_length=100)
    assert found == pytest.approx([0.0, 0.0, -0.25, -0.5, -1.0])


def test_the_repetition_guard_counts_repeated_fours():
    texts = ("", "a b c", "a b c d e f g", "a b c d a b c d", "again " * 103)
    assert repetition_reward_func(chats(*texts)) == pytest.approx([0.0, 0.0, 0.0, 4 / 5 - 1, 1 / 100 - 1])


def test_the_default_rewards_of_a_perfect_answer_are_4():
    functions, weights = load_rewards(MLXGRPOConfig())
    rewards = score(functions, 10, [WELL_FORMED, "18"], {"answer": ["18", "18"], "prompts": ["q", "q"]})
    assert rewards.shape == (5, 2) and weights == [1.0] * 5
    assert rewards.sum(axis=0) == pytest.approx([4.0, 0.0])


# A user's own


@pytest.fixture
def reward_file(tmp_path):
    """Write a reward file and load the functions named from it."""

    def load(source, *names, **config):
        path = tmp_path / "my_rewards.py"
        path.write_text(textwrap.dedent(source))
        return load_rewards(MLXGRPOConfig(reward_funcs=[f"{path}:{name}" for name in names], **config))

    return load


def scored(functions, texts=("one", "two", "three"), timeout=5.0, **columns):
    return score(functions, timeout, list(texts), columns)


def test_a_plain_function_gets_chats_and_columns(reward_file):
    functions, _ = reward_file(
        """
        def brevity(completions, prompts, colour, **kwargs):
            assert all(c[0]["role"] == "assistant" for c in completions)
            return [len(c[0]["content"]) + len(p) + (colour == "red") for c, p, colour in zip(completions, prompts, colour)]
        """,
        "brevity",
    )
    rewards = scored(functions, prompts=["a", "bb", "ccc"], colour=["red", "blue", "red"])
    np.testing.assert_array_equal(rewards, [[5.0, 5.0, 9.0]])


def test_a_column_named_completions_does_not_replace_what_is_scored(reward_file):
    functions, _ = reward_file("def length(completions, **kwargs): return [len(c[0]['content']) for c in completions]", "length")
    assert scored(functions, completions=chats("x" * 50, "y", "z")).tolist() == [[3.0, 3.0, 5.0]]


def test_async_functions_run_beside_each_other(reward_file):
    source = """
        import asyncio
        async def meet(started, name):
            started.add(name)
            while len(started) < 3:
                await asyncio.sleep(0.001)
        async def slow(completions, started, **kwargs):
            await meet(started, 'slow')
            return [1.0] * len(completions)
        async def also_slow(completions, started, **kwargs):
            await meet(started, 'also slow')
            return [2.0] * len(completions)
        def plain(completions, **kwargs):
            return [3.0] * len(completions)
        class Callable:
            async def __call__(self, completions, started, **kwargs):
                await meet(started, 'an object')
                return [4.0] * len(completions)
        an_object = Callable()
    """
    functions, _ = reward_file(source, "slow", "plain", "also_slow", "an_object")
    assert scored(functions, started=set())[:, 0].tolist() == [1.0, 3.0, 2.0, 4.0]  # each waits for the other two


def test_a_function_may_abstain(reward_file):
    functions, _ = reward_file("def some(completions, **kwargs): return [None, 0.0, 1]", "some")
    np.testing.assert_array_equal(scored(functions), [[np.nan, 0.0, 1.0]])


def test_numpy_numbers_arrays_tuples_and_booleans_are_rewards(reward_file):
    source = """
        import numpy as np
        def array(completions, **kwargs): return np.arange(3)
        def scalars(completions, **kwargs): return [np.float32(0.5), np.int64(2), np.bool_(True)]
        def flags(completions, **kwargs): return (True, False, True)
    """
    functions, _ = reward_file(source, "array", "scalars", "flags")
    assert scored(functions).tolist() == [[0.0, 1.0, 2.0], [0.5, 2.0, 1.0], [1.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    "result, message",
    [
        ("[1.0, 2.0]", "Reward function bad returned 2 values for 3 completions"),
        ("[]", "Reward function bad returned 0 values for 3 completions"),
        ("1.0", "Reward function bad returned 1.0 for 3 completions"),
        ("None", "Reward function bad returned None for 3 completions"),
        ("[0.0, float('nan'), 1.0]", "Reward function bad returned nan for completion 1: 'two'"),
        ("[0.0, 1.0, float('inf')]", "Reward function bad returned inf for completion 2: 'three'"),
        ("['1.0', 0.0, 0.0]", "Reward function bad returned '1.0' for completion 0: 'one'"),
        ("[[1.0], 0.0, 0.0]", "Reward function bad returned [1.0] for completion 0: 'one'"),
    ],
)
def test_a_result_that_is_no_reward_stops_the_run(reward_file, result, message):
    functions, _ = reward_file(f"def bad(completions, **kwargs): return {result}", "bad")
    with pytest.raises(RunError) as caught:
        scored(functions)
    assert str(caught.value) == message


@pytest.mark.parametrize("kind", ["", "async "])
def test_a_function_that_raises_stops_the_run_with_its_name_and_traceback(reward_file, kind):
    functions, _ = reward_file(f"{kind}def bad(completions, **kwargs):\n    return [1 / 0]", "bad")
    with pytest.raises(RunError, match="^Reward function bad raised ZeroDivisionError: division by zero on completion 0, 'one'$") as caught:
        scored(functions)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert caught.value.__cause__.__traceback__ is not None


@pytest.mark.parametrize("kind", ["", "async "])
def test_the_row_that_makes_a_function_raise_is_named(reward_file, kind):
    functions, _ = reward_file(f"{kind}def bad(completions, limit, **kwargs):\n    return [1 / (c[0]['content'] != w) for c, w in zip(completions, limit)]", "bad")
    with pytest.raises(RunError, match="^Reward function bad raised ZeroDivisionError: .* on completion 1, 'two'$"):
        scored(functions, limit=["x", "two", "x"])


def test_a_failure_that_no_single_row_explains_is_still_reported(reward_file):
    functions, _ = reward_file("def bad(completions, **kwargs): return [1 / (len(completions) < 3)]", "bad")
    with pytest.raises(RunError, match="^Reward function bad raised ZeroDivisionError: division by zero$"):
        scored(functions)


def test_looking_for_the_row_takes_no_longer_than_the_timeout(reward_file):
    # A judge that fails slowly, asked again for each of 64 completions, would keep its error back for an hour.
    source = """
        import time
        asked = []
        def bad(completions, **kwargs):
            asked.append(len(completions))
            time.sleep(0.1)
            return [1 / (len(completions) < 40)] * len(completions)
    """
    functions, _ = reward_file(source, "bad")
    with pytest.raises(RunError, match="^Reward function bad raised ZeroDivisionError"):
        scored(functions, ["text"] * 40, timeout=0.5)
    asked = functions[0].__globals__["asked"]
    assert asked[:2] == [40, 1] and len(asked) <= 1 + 5  # all at once, then at most 0.5 s of 0.1 s each


def test_a_missing_column_is_named(reward_file):
    functions, _ = reward_file("def needy(completions, colour): return [0.0] * 3", "needy")
    with pytest.raises(RunError, match="Reward function needy raised TypeError: .*prompts"):
        scored(functions, prompts=["a", "b", "c"])


@pytest.mark.parametrize(
    "source",
    [
        "def hangs(completions, **kwargs):\n    time.sleep(2)",
        "def hangs(completions, **kwargs):\n    while not ended: pass",
        "async def hangs(completions, **kwargs):\n    await asyncio.sleep(2)",
        "async def hangs(completions, **kwargs):\n    time.sleep(2)",
        "async def hangs(completions, **kwargs):\n    await asyncio.to_thread(time.sleep, 2)",
    ],
    ids=["sleep", "loop", "await", "sleep in async", "sleep in a thread"],
)
def test_a_function_that_hangs_is_stopped(reward_file, source):
    # "sleep in a thread": asyncio.run waits for the thread as it closes, and an alarm that rings there is no function's result.
    functions, _ = reward_file(f"import asyncio, time\nended = []\n{source}\n    ended.append(1)\n    return [0.0] * 3", "hangs")
    with pytest.raises(RunError, match=r"^Reward function hangs took longer than reward_timeout = 0\.2 s$"):
        scored(functions, timeout=0.2)
    assert functions[0].__globals__["ended"] == []


def test_the_timer_is_off_afterwards(reward_file):
    functions, _ = reward_file("def quick(completions, **kwargs): return [0.0] * 3", "quick")
    assert scored(functions, timeout=0.5).tolist() == [[0.0] * 3]
    assert signal.getitimer(signal.ITIMER_REAL) == signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_a_timeout_of_the_functions_own_is_not_taken_for_reward_timeout(reward_file):
    # A judge's HTTP call that gives up after 5 s is not "longer than reward_timeout = 60 s".
    functions, _ = reward_file("def judge(completions, **kwargs): raise TimeoutError('the judge did not answer')", "judge")
    with pytest.raises(RunError, match="Reward function judge raised TimeoutError: the judge did not answer"):
        scored(functions, timeout=60)


def test_weights_come_from_the_config_else_from_the_file(reward_file):
    source = """
        reward_weights = {"a": 0.25}
        def a(completions, **kwargs): return [0.0]
        def b(completions, **kwargs): return [0.0]
    """
    assert reward_file(source, "a", "b")[1] == [0.25, 1.0]
    assert reward_file(source, "a", "b", reward_weights=[3.0, 4.0])[1] == [3.0, 4.0]


def test_built_in_and_own_functions_mix(tmp_path):
    (tmp_path / "own.py").write_text("def own(completions, **kwargs): return [1.0] * len(completions)")
    functions, weights = load_rewards(MLXGRPOConfig(reward_funcs=["correctness_reward_func", f"{tmp_path / 'own.py'}:own"], reward_weights=[1.0, 0.5]))
    assert scored(functions, ["<answer>1</answer>"], answer=["1"]).tolist() == [[2.0], [1.0]] and weights == [1.0, 0.5]


def test_a_reward_file_may_define_data_classes(reward_file):
    source = """
        from __future__ import annotations
        from dataclasses import dataclass
        @dataclass
        class Rule:
            worth: float
        def ruled(completions, **kwargs): return [Rule(2.0).worth] * len(completions)
    """
    assert scored(reward_file(source, "ruled")[0]).tolist() == [[2.0] * 3]


@pytest.mark.parametrize("name", ["no_such_func", "load_config", "correctness", "numpy", "no_such_reward_func", "my_rewards.py"])
def test_an_unknown_function_is_refused_with_those_there_are(name):
    with pytest.raises(UserError, match=f"^Unknown reward function: {name}; built in are .*correctness_reward_func.*file.py:function"):
        load_rewards(MLXGRPOConfig(reward_funcs=[name]))


def test_trouble_with_the_reward_file_is_one_line(tmp_path):
    load = lambda name: load_rewards(MLXGRPOConfig(reward_funcs=[f"{tmp_path / name}:f"]))  # noqa: E731
    with pytest.raises(UserError, match="^Reward file not found: .*absent.py$"):
        load("absent.py")
    (tmp_path / "broken.py").write_text("def f(:")
    with pytest.raises(RunError, match="^Reward file failed to import: .*broken.py: SyntaxError: "):
        load("broken.py")
    (tmp_path / "raises.py").write_text("import no_such_module_at_all")
    with pytest.raises(RunError, match="^Reward file failed to import: .*raises.py: ModuleNotFoundError: "):
        load("raises.py")
    (tmp_path / "empty.py").write_text("f = 3")
    with pytest.raises(UserError, match="^Unknown reward function: .*empty.py:f"):
        load("empty.py")


@pytest.mark.parametrize("name", ["rewards.txt", "folder"])
def test_a_reward_file_that_is_no_python_file_is_refused(tmp_path, name):
    (tmp_path / "rewards.txt").write_text("def f(completions, **kwargs): return [0.0]")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=name):
        load_rewards(MLXGRPOConfig(reward_funcs=[f"{tmp_path / name}:f"]))


def test_scoring_works_where_no_function_is_async_and_where_all_are(reward_file):
    assert asyncio.iscoroutinefunction(reward_file("async def f(completions, **kwargs): return [1.0] * 3", "f")[0][0])
    assert scored(reward_file("async def f(completions, **kwargs): return [1.0] * 3", "f")[0]).tolist() == [[1.0] * 3]
    assert math.isfinite(scored(reward_file("def f(completions, **kwargs): return [1.0] * 3", "f")[0]).sum())


def test_every_built_in_is_found_by_its_name():
    names = [name for name in dir(mlx_grpo.script) if name.endswith("_reward_func") and not hasattr(getattr(mlx_grpo, name), "needs")]
    assert {"correctness_reward_func", "int_reward_func", "strict_format_reward_func", "soft_format_reward_func", "xmlcount_reward_func"} <= set(names)
    assert len(load_rewards(MLXGRPOConfig(reward_funcs=names))[0]) == len(names)


# Answers as people write them


@pytest.mark.parametrize(
    "given, gold, same",
    [
        (r"\boxed{12}", "12", True), ("$12$", "12", True), (r"\(12\)", "12", True), ("**12**", "12", True), ("15 dollars", "15", True), ("x = 12", "12", True),
        ("12 000", "12000", True), ("12\u202f000", "12,000", True), (r"12\,000", "12000", True), (r"1{,}080", "1080", True), ("−12", "-12", True), ("–12", "-12", True),
        ("1/2", "0.5", True), (r"\frac{1}{2}", "0.5", True), (r"-\dfrac{1}{3}", "-1/3", True), ("3 1/2", "3.5", True), ("2/4", "1/2", True), ("1/3", "0.333", False),
        ("50%", "50", True), ("50%", "0.5", True), (r"50\%", "50 percent", True), ("0.5%", "50", False), ("5%", "50", False),
        ("12 km/h", "12", True), ("12 km", "12 km", True), ("12 km", "12 miles", False), ("5 square feet", "5 square foot", False), ("12 m^2", "12", True), ("€12", "12 dollars", True),
        ("3 million", "3000000", True), ("3 million", "3", False), ("2 dozen eggs", "24", True), (r"12^\circ", "12", True), (r"12 \text{ cm}", "12", True),
        ("12", "120", False), ("12 or 13", "12", False), ("12x", "12", False), ("12 and a half", "12", False), (r"2\sqrt{3}", "2", False), (r"5\pi", "5", False),
        ("1/0", "1", False), ("1,08", "108", False), ("12 Angry Men", "12 Monkeys", False), (r"\boxed{Paris}", "paris", True), ("**Paris**", "Paris", True), ("$", "$$", False),
    ],
)  # fmt: skip
def test_answers_are_compared_however_people_write_them(given, gold, same):
    assert same_answer(given, gold) is same
    assert same_answer(gold, given) is same
    assert grade(f"<answer>{given}</answer>", gold)[0] is same
    assert correctness_reward_func(chats(f"<answer>\n{given}\n</answer>"), answer=[gold]) == [2.0 * same]


@pytest.mark.parametrize(
    "text, gold, lenient",
    [
        ("It is 3/4.", "0.75", True), (r"It is $\frac{3}{4}$.", "3/4", True), ("That makes 12 000.", "12000", True), (r"So \boxed{7}, not 8.", "7", True),
        ("He has 3 of 4.", "0.75", False), ("Of 3 000 he has 4.", "3000", False), ("It is 50%.", "0.5", True), ("<think>9</think>It is 8.", "9", False),
    ],
)  # fmt: skip
def test_the_last_number_may_be_a_fraction_or_have_spaces(text, gold, lenient):
    assert grade(text, gold) == (False, lenient)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(st.text(alphabet="0123456789 ,./-−%$xab{}\\^frac", max_size=30), st.text(alphabet="0123456789 ,./-%$", max_size=12))
def test_no_text_at_all_breaks_the_comparison(one, other):
    assert same_answer(one, other) is same_answer(other, one)
    grade(f"{one}<answer>{other}</answer>", one), grade(one, other)


# Texts of any length


ADVERSARIES = """
texts = {
    "a loop of the form": "<reasoning>\\nr\\n</reasoning>\\n<answer>\\n1\\n</answer>\\n",
    "openings": "<reasoning>\\n", "closings": "</reasoning> ", "joins": "</reasoning>\\n<answer>\\n", "ends": "\\n</answer>", "answers": "<answer>",
    "boxes": "\\\\boxed{", "fractions": "\\\\frac{1}{", "digits": "1", "groups": "1,000", "spaced groups": " 111", "slashes": "1/ ", "signs": "-$ ", "spaces": " ", "hashes": "####",
    "dots": "1.", "thoughts": "<think>", "thoughts ended": "</think>", "stars": "**", "dollars": "$", "words": "a b ", "exponents": "1e9",
}
for text in texts.values():
    long = (text * (100_000 // len(text) + 1))[:100_000]
    for whole in (long, "<reasoning>" + long, f"<answer>{long}</answer>", f"<reasoning>\\n{long}\\n</reasoning>\\n<answer>\\n1\\n</answer>", f"<think>{long}</think>1"):
        for function in functions:
            for gold in ("1", long):
                function([[{"role": "assistant", "content": whole}]], answer=[gold], prompts=["?"], completion_ids=[[1]], max_completion_length=100)
        grade(whole, "1"), extract_hash_answer(whole), extract_gold_answer(whole), last_number(whole)
print("done", len(functions))
"""


def test_built_in_rewards_are_linear_in_the_text(tmp_path):
    # 220 texts of 100,000 characters: linear work takes seconds; a single quadratic search in one of them would take minutes.
    lines = [
        f"import sys; sys.path.insert(0, {str(Path(mlx_grpo.script.__file__).parent)!r})",
        "import mlx_grpo", "from mlx_grpo import extract_gold_answer, extract_hash_answer, grade", "from mlx_grpo.answers import last_number",
        "functions = [f for n, f in mlx_grpo.script.BUILT_IN_REWARDS.items() if not hasattr(f, 'needs')]",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", "\n".join(lines) + ADVERSARIES], capture_output=True, text=True, timeout=240)
    assert done.stdout.startswith("done "), done.stderr


# A guard that user code cannot disarm


DISARMED = {
    "alarm cleared": "signal.alarm(0); signal.setitimer(signal.ITIMER_REAL, 0)", "handler replaced": "signal.signal(signal.SIGALRM, signal.SIG_IGN); signal.alarm(1)",
    "exceptions swallowed": "\n        try: time.sleep(1)\n        except Exception: pass",
}  # fmt: skip
HANGS = {"sleep": "time.sleep(4)", "loop": "until = time.monotonic() + 4\n    while time.monotonic() < until: pass"}


@pytest.mark.parametrize("kind", ["", "async "])
@pytest.mark.parametrize("hang", HANGS)
@pytest.mark.parametrize("disarm", ["alarm cleared", "handler replaced"])
def test_a_function_that_clears_alarms_is_stopped(reward_file, kind, hang, disarm):
    functions, _ = reward_file(f"import signal, time\n{kind}def hangs(completions, **kwargs):\n    {DISARMED[disarm]}\n    {HANGS[hang]}\n    return [0.0] * 3", "hangs")
    with pytest.raises(RunError, match=r"^Reward function hangs took longer than reward_timeout = 0\.2 s$"):
        scored(functions, timeout=0.2)


def test_an_async_function_that_clears_alarms_and_waits_is_stopped(reward_file):
    functions, _ = reward_file("import asyncio, signal\nasync def hangs(completions, **kwargs):\n    signal.alarm(0)\n    await asyncio.sleep(60)", "hangs")
    with pytest.raises(RunError, match="hangs took longer than reward_timeout"):
        scored(functions, timeout=0.2)


def test_an_async_function_that_will_not_be_cancelled_is_stopped(reward_file):
    source = """
        import asyncio
        async def hangs(completions, **kwargs):
            for _ in range(5):
                try: await asyncio.sleep(60)
                except asyncio.CancelledError: pass
    """
    functions, _ = reward_file(source, "hangs")
    with pytest.raises(RunError, match="hangs took longer than reward_timeout"):
        scored(functions, timeout=0.2)


def test_a_regular_expression_that_backtracks_without_end_is_stopped(reward_file):
    functions, _ = reward_file("import re\ndef hangs(completions, **kwargs): return [float(bool(re.match('(a+)+$', 'a' * 60 + 'b')))] * 3", "hangs")
    with pytest.raises(RunError, match="hangs took longer than reward_timeout"):
        scored(functions, timeout=0.2)


def test_a_function_that_swallows_the_end_and_returns_is_out_of_time_all_the_same(reward_file):
    source = "import time\ndef hangs(completions, **kwargs):\n    try: time.sleep(60)\n    except BaseException: pass\n    return [1.0] * 3"
    with pytest.raises(RunError, match="hangs took longer than reward_timeout"):
        scored(reward_file(source, "hangs")[0], timeout=0.2)


@pytest.mark.parametrize(
    "body, line",
    [
        ("while True:\n        try: time.sleep(60)\n        except BaseException: pass", "Reward function hangs took longer than reward_timeout = 0.2 s and cannot be stopped: the process ends here. --resume"),
        ("ctypes.PyDLL(None).sleep(60)", "Timeout (0:00:02"),
    ],
    ids=["swallows all", "native code that holds the interpreter"],
)  # fmt: skip
def test_what_cannot_be_stopped_ends_the_process_with_status_1(tmp_path, body, line):
    lines = [
        f"import sys; sys.path.insert(0, {str(Path(mlx_grpo.script.__file__).parent)!r})", "import ctypes, time", "from mlx_grpo import scoring", "scoring.GRACE = 1",
        f"def hangs(completions, **kwargs):\n    {body}", "scoring.score([hangs], 0.2, ['a'], {})",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1 and done.stderr.startswith(line), done.stderr


def test_handlers_and_alarms_of_a_function_do_not_outlive_it(reward_file):
    source = """
        import signal
        def rude(completions, **kwargs):
            for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            signal.alarm(1)
            return [0.0] * 3
    """
    functions, _ = reward_file(source, "rude")
    before = [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM)]
    scored(functions)
    assert [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM)] == before
    assert signal.getitimer(signal.ITIMER_REAL) == signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_functions_are_watched_in_other_threads_too(reward_file):
    functions, _ = reward_file("import time\ndef hangs(completions, **kwargs):\n    while True: time.sleep(0.01)", "hangs")
    with ThreadPoolExecutor(1) as pool, pytest.raises(RunError, match="hangs took longer than reward_timeout"):
        pool.submit(scored, functions, timeout=0.2).result()


def test_an_async_function_that_exits_is_named(reward_file):
    functions, _ = reward_file("async def quits(completions, **kwargs): raise SystemExit(3)", "quits")
    with pytest.raises(RunError, match="^Reward function quits raised SystemExit"):
        scored(functions)


# Mathematics


def test_without_math_verify_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.setattr(scoring.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="^math_verify_reward_func needs the package math_verify, which is not installed: uv sync --extra math$"):
        load_rewards(MLXGRPOConfig(reward_funcs=["math_verify_reward_func"]))


@pytest.mark.parametrize(
    "text, gold, reward",
    [
        (r"<answer>\frac{1}{2}</answer>", "0.5", 2.0), (r"<answer>x^2 + 2x + 1</answer>", "(x+1)^2", 2.0), (r"So it is \boxed{\sqrt{8}}.", r"2\sqrt{2}", 2.0),
        ("<answer>3</answer>", "4", 0.0), ("nothing", "4", 0.0), ("<think>4</think><answer>5</answer>", "4", 0.0),
    ],
)  # fmt: skip
def test_math_verify_compares_as_mathematics(text, gold, reward):
    pytest.importorskip("math_verify", reason="needs the extra math")
    functions, _ = load_rewards(MLXGRPOConfig(reward_funcs=["math_verify_reward_func"]))
    assert score(functions, 60, [text], {"answer": [gold]}).tolist() == [[reward]]
