"""Make the arithmetic recipe's data: sums, differences and small products as plain questions.

examples:
  uv run python utils/make_arithmetic.py --out starter/arithmetic
  uv run python utils/make_arithmetic.py --out problems --seed 1 --train 500 --test 100

Sums and differences are of two numbers from 10 to 99, the first of a difference being the larger; products
are below 100, of two numbers from 2 on. Four of nine questions are sums, four differences, one is a product.
A pair of numbers that one split asks for is not in the other, in either order. The same seed gives the same
bytes anywhere.
"""

import argparse
import json
import random
import sys
from pathlib import Path

SHARES = {"+": 4, "-": 4, "*": 1}  # of the questions, by kind: there are few products


def all_problems() -> dict[str, list[tuple[int, int]]]:
    """Every pair of numbers that may be asked for, by the sign between them."""
    two_digits = range(10, 100)
    return {
        "+": [(a, b) for a in two_digits for b in two_digits],
        "-": [(a, b) for a in two_digits for b in two_digits if a > b],
        "*": [(a, b) for a in range(2, 50) for b in range(2, 50) if a * b < 100],
    }


def split_pairs(pairs: list[tuple[int, int]], test: int, generator: random.Random) -> tuple[list, list]:
    """The pairs in random order as (training, held-out), `test` or more held out; (a, b) goes with (b, a)."""
    together = {}
    for a, b in pairs:
        together.setdefault((min(a, b), max(a, b)), []).append((a, b))
    groups = list(together.values())
    generator.shuffle(groups)
    held_out = []
    training = []
    for group in groups:
        (held_out if len(held_out) < test else training).extend(group)
    generator.shuffle(held_out)
    generator.shuffle(training)
    return training, held_out


def as_row(a: int, sign: str, b: int) -> dict:
    """A question with its answer, both as text."""
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return {"question": f"What is {a} {sign} {b}?", "answer": str(result)}


def make_rows(seed: int, train: int, test: int) -> tuple[list[dict], list[dict]]:
    """The rows of both splits, in random order. Raises ValueError where a kind has fewer questions."""
    generator = random.Random(seed)
    splits = {"train": [], "test": []}
    for sign, pairs in all_problems().items():
        wanted_train = train * SHARES[sign] // sum(SHARES.values())
        wanted_test = test * SHARES[sign] // sum(SHARES.values())
        training, held_out = split_pairs(pairs, wanted_test, generator)
        if wanted_train > len(training) or wanted_test > len(held_out):
            wanted = f"{wanted_train} + {wanted_test} are too many: lower --train or --test"
            raise ValueError(f"There are {len(pairs)} questions with {sign}; {wanted}")
        splits["train"] += [as_row(a, sign, b) for a, b in training[:wanted_train]]
        splits["test"] += [as_row(a, sign, b) for a, b in held_out[:wanted_test]]
    for rows in splits.values():
        generator.shuffle(rows)
    return splits["train"], splits["test"]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


def main(argv: list[str] | None = None) -> int:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write train.jsonl and test.jsonl into")
    add("--seed", type=int, default=0, help="of the choice and the order (default: 0)")
    add("--train", type=int, default=1800, help="training questions, about (default: 1800)")
    add("--test", type=int, default=450, help="held-out questions, about (default: 450)")
    args = parser.parse_args(argv)
    try:
        train, test = make_rows(args.seed, args.train, args.test)
        write_jsonl(args.out / "train.jsonl", train)
        write_jsonl(args.out / "test.jsonl", test)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(train)} training and {len(test)} held-out questions in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
