"""Answers as they are graded everywhere: found in a text, and compared as numbers where they are numbers."""

import contextlib
import re
from decimal import Decimal, InvalidOperation

# A sign counts where nothing is written straight before it: "5-10" ends in 10, "x = -10" in -10.
NUMBER = re.compile(r"(?:(?<![\w)%.$])[-+−])?(?:\$\s?)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)\.?\d*|\.\d+)(?:[eE][-+]?\d+)?%?")


def parse_number(text: str) -> Decimal | None:
    """The number that the whole text is, or None: "$1,080.00" is 1080, "12 apples" is none."""
    text = re.sub(r"^(\$?)\s*([-+−]?)\s*", r"\2\1", text.strip()).rstrip(".").replace("−", "-")
    if not NUMBER.fullmatch(text):
        return None
    with contextlib.suppress(InvalidOperation):
        return Decimal(re.sub(r"[\s$,%]", "", text))
    return None


def answers_equal(given: str, gold: str) -> bool:
    """Whether two answers are the same number or, where either is no number, the same text but for case."""
    a, b = parse_number(given), parse_number(gold)
    return a == b if a is not None and b is not None else bool(given.strip()) and given.strip().lower() == gold.strip().lower()


def extract_xml_answer(text: str) -> str:
    """What stands in the last complete <answer>..</answer>, stripped; "" where there is none."""
    found = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
    return found[-1].strip() if found else ""


def extract_hash_answer(text: str) -> str | None:
    """What follows the last ####, as GSM8K writes its gold answers, without thousands commas; None without a ####."""
    if "####" not in text:
        return None
    answer = text.rsplit("####", 1)[1].strip()
    return answer.replace(",", "").replace("$", "") if parse_number(answer) is not None else answer


def last_number(text: str) -> str:
    """The last number written in the text, or ""."""
    found = NUMBER.findall(text)
    return found[-1].rstrip(".") if found else ""


def grade(text: str, gold: str) -> tuple[bool, bool]:
    """Exact match of a completion, strict (the answer tags are required) and lenient (the last number counts)."""
    strict = answers_equal(extract_xml_answer(text), gold)
    return strict, strict or answers_equal(last_number(text), gold)
