"""The arithmetic recipe's data: what the command writes is what is committed, right, and held out."""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "starter" / "arithmetic"

spec = importlib.util.spec_from_file_location("make_arithmetic", ROOT / "utils" / "make_arithmetic.py")
make_arithmetic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_arithmetic)


def read(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def parts(row):
    """(a, sign, b) of a question."""
    a, sign, b = re.fullmatch(r"What is (\d+) ([-+*]) (\d+)\?", row["question"]).groups()
    return int(a), sign, int(b)


def test_the_command_writes_the_committed_bytes(tmp_path):
    folder = tmp_path / "new" / "folder"
    assert make_arithmetic.main(["--out", str(folder)]) == 0
    for name in ("train.jsonl", "test.jsonl"):
        assert (folder / name).read_bytes() == (DATA / name).read_bytes()


def test_another_seed_makes_other_questions(tmp_path):
    assert make_arithmetic.main(["--out", str(tmp_path), "--seed", "1", "--train", "90", "--test", "18"]) == 0
    assert len(read(tmp_path, "train")) == 90 and len(read(tmp_path, "test")) == 18
    assert make_arithmetic.make_rows(0, 90, 18) != make_arithmetic.make_rows(1, 90, 18)


COUNTS = {"train": {"+": 800, "-": 800, "*": 200}, "test": {"+": 200, "-": 200, "*": 50}}


@pytest.mark.parametrize("split, counts", COUNTS.items())
def test_answers_are_right_and_numbers_in_their_range(split, counts):
    rows = read(DATA, split)
    assert Counter(parts(row)[1] for row in rows) == counts
    for row in rows:
        a, sign, b = parts(row)
        assert int(row["answer"]) == {"+": a + b, "-": a - b, "*": a * b}[sign], row
        if sign == "*":
            assert min(a, b) >= 2 and a * b < 100, row
        else:
            assert 10 <= min(a, b) and max(a, b) <= 99 and (sign == "+" or a > b), row


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_pair_of_numbers_is_in_both_splits_in_either_order(seed):
    train, test = make_arithmetic.make_rows(seed, 1800, 450)
    asked = [{(sign, min(a, b), max(a, b)) for a, sign, b in map(parts, rows)} for rows in (train, test)]
    assert not asked[0] & asked[1]
    questions = [row["question"] for row in train + test]
    assert len(set(questions)) == len(questions) == 2250


def test_more_questions_than_there_are_is_an_error(tmp_path, capsys):
    assert make_arithmetic.main(["--out", str(tmp_path / "none"), "--train", "9000"]) == 2
    assert "lower --train or --test" in capsys.readouterr().err and not (tmp_path / "none").exists()
