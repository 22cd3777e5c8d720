"""Answers as they are graded everywhere: found in a text, and compared as numbers where they are numbers."""

import contextlib
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction

# A sign counts where nothing is written straight before it: "5-10" ends in 10, "x = -10" in -10.
NUMBER = re.compile(
    r"(?:(?<![\w)%.$])[-+−])?(?:\$\s?)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)\.?\d*|\.\d+)(?:[eE][-+]?\d+)?%?"
)
THINK, THINK_END = "<think>", "</think>"  # what stands between them is the model's own, and is not graded
# Characters; what is longer is compared as it is, so that grading stays linear in the text.
LONGEST_ANSWER = 200


# --- Texts of models that think -----------------------------------------------------------------------------


def has_thought(text: str) -> bool:
    """Whether a completion begins with <think>."""
    return text.lstrip().startswith(THINK)


def is_thinking(text: str) -> bool:
    """Whether a completion begins with <think> and never reaches </think>: cut there, it has no answer."""
    return has_thought(text) and THINK_END not in text


def cut_while_thinking(texts: list[str]) -> float | None:
    """The share of completions that are still thinking at their end; None where none thinks at all."""
    return sum(map(is_thinking, texts)) / len(texts) if any(map(has_thought, texts)) else None


def after_thinking(text: str) -> str:
    """The part of a completion that is graded: what follows </think>, or all of it without thinking.

    It is "" where thinking never ended.
    """
    if THINK_END in text:
        return text.split(THINK_END, 1)[1].lstrip()
    return "" if is_thinking(text) else text


# --- Plain numbers ------------------------------------------------------------------------------------------


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
    return (
        a == b
        if a is not None and b is not None
        else bool(given.strip()) and given.strip().lower() == gold.strip().lower()
    )


# --- Numbers as people write them ---------------------------------------------------------------------------

WRAPPERS = (
    ("$$", "$$"),
    ("$", "$"),
    (r"\(", r"\)"),
    (r"\[", r"\]"),
    ("**", "**"),
    ("__", "__"),
    ("*", "*"),
    ("`", "`"),
)
LATEX = [  # (what is written, what it means), applied in this order
    (re.compile(r"\\(?:text\w*|math\w+|mbox|operatorname)\s*\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r" \1/\2"),
    (re.compile(r"\\[dtc]?frac\s*(\d)\s*(\d)"), r" \1/\2"),
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})"), "°"),
    (re.compile(r"\{,\}|(?<=\d)\\!,?(?=\d)"), ","),
    (re.compile(r"\\left|\\right|\\!"), ""),
    (re.compile(r"\\[,;: ]|~|[\u00a0\u2009\u202f]"), " "),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"[−–—﹣－]"), "-"),
    (re.compile(r"^\s*\\?[A-Za-z]\w*(?:_\{\w+\})?\s*=\s*"), ""),  # x = 12
]
COUNT = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)"
WRITTEN = re.compile(
    rf"(?P<sign>[-+]?)\s*[$€£¥₹]?\s*(?P<inner>[-+]?)\s*"
    rf"(?:(?:(?P<whole>\d+) +)?(?P<top>{COUNT})\s*/\s*(?P<bottom>{COUNT})"
    rf"|(?P<number>(?:{COUNT}(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{{1,3}})?))"
    r"\s*(?P<unit>(?:[^\W\d_]|[%°€£¥₹$'])(?:[^\W\d_]|[ /.²³°%()'-]|\^\{?[23]\}?)*)?"
)
SCALES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
NO_UNITS = set(
    "and or to times plus minus over divided by point half pi sqrt "
    "x y z a b c d e i j k n p q r u v w".split()
)
MOST_UNIT_WORDS = 4


@dataclass(frozen=True)
class Quantity:
    """A number as people write it: "15 dollars", "12 000", "x = 12", "3/4", "50%"."""

    value: Fraction
    unit: str  # in small letters, without a plural's s; "" for none, and for money
    percent: bool

    @property
    def text(self) -> str:
        """The number alone."""
        decimal = Decimal(self.value.numerator) / Decimal(self.value.denominator)
        exact = Fraction(decimal) == self.value
        return (f"{decimal.normalize():f}" if exact else str(self.value)) + "%" * self.percent

    def equals(self, other: "Quantity") -> bool:
        """Whether the numbers are equal and no unit contradicts it; 50% is both 50 and 0.5."""
        if self.unit and other.unit and self.unit != other.unit:
            return False
        if self.percent != other.percent:
            share, plain = (self, other) if self.percent else (other, self)
            return plain.value in (share.value, share.value / 100)
        return self.value == other.value


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{...} of the text holds, braces matched; None where no closed one is found."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    begin = start + len(r"\boxed{")
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, begin):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return text[begin : brace.start()].strip()
    return None


def unwrapped(text: str) -> str:
    r"""The answer without its markup: \boxed{12}, $12$, \(12\), **12** and `12` are 12."""
    boxed = last_boxed(text)
    text = (text if boxed is None else boxed).strip()
    if len(text) > LONGEST_ANSWER:
        return text
    found = True
    while found:
        found = next(
            (
                w
                for w in WRAPPERS
                if len(text) > sum(map(len, w)) and text.startswith(w[0]) and text.endswith(w[1])
            ),
            None,
        )
        if found:
            text = text[len(found[0]) : -len(found[1])].strip()
    return text


def read_quantity(text: str) -> Quantity | None:
    """The one number that the whole text is, with its unit; None where it is more, or none.

    "12 or 13" is none.
    """
    text = unwrapped(text)
    if len(text) > LONGEST_ANSWER:
        return None
    for pattern, meaning in LATEX:
        text = pattern.sub(meaning, text)
    found = WRITTEN.fullmatch(text.strip().rstrip(".,;").strip())
    if not found or found["sign"] and found["inner"]:
        return None

    def count(name: str) -> Fraction:
        return Fraction(re.sub(r"[, ]", "", found[name] or "0"))

    if found["number"]:
        value = count("number")
    elif count("bottom"):
        value = count("whole") + count("top") / count("bottom")
    else:
        return None
    words = (found["unit"] or "").lower().rstrip(". ").split()
    if len(words) > MOST_UNIT_WORDS or NO_UNITS & set(words):
        return None
    if words and words[0].rstrip("s") in SCALES:
        value *= SCALES[words.pop(0).rstrip("s")]
    unit = " ".join(words).replace("per cent", "percent")
    percent = unit.startswith(("%", "percent"))
    plain = percent or unit in ("$", "€", "£", "¥", "₹")
    return Quantity(
        -value if "-" in (found["sign"], found["inner"]) else value,
        "" if plain else unit.rstrip("s"),
        percent,
    )


def same_answer(given: str, gold: str) -> bool:
    r"""Whether two answers are the same, however people write them.

    "15 dollars" is 15, \frac{1}{2} is 0.5, **Paris** is Paris.
    """
    if answers_equal(given, gold):
        return True
    a, b = read_quantity(given), read_quantity(gold)
    if a and b:
        return a.equals(b)
    given, gold = unwrapped(given).lower(), unwrapped(gold).lower()
    return bool(given) and given == gold


# --- Answers in a text --------------------------------------------------------------------------------------


def last_number(text: str) -> str:
    """The last number written in the text, or ""."""
    found = NUMBER.findall(text)
    return found[-1].rstrip(".") if found else ""


BEFORE_LAST_NUMBER = 64  # characters that a fraction or a number with spaces may take
ENDING = re.compile(
    r"(?:(?<![\w)%.$])[-−])?"
    r"(?:\d{1,3}(?:[ \u00a0\u2009\u202f]\d{3})+|(?:\d+ +)?\d+\s*/\s*\d+"
    r"|\\[dtc]?frac\s*\{[^{}]*\}\s*\{[^{}]*\})"
    r"%?$"
)


def last_quantity(text: str) -> str:
    r"""The last number where it is written as a fraction or with spaces, such as 3/4, \frac{3}{4} and 12 000;
    else "".
    """
    ends = [number.end() for number in NUMBER.finditer(text)]
    if not ends:
        return ""
    end = ends[-1] + (text[ends[-1] : ends[-1] + 1] == "}")
    found = ENDING.search(text[max(0, end - BEFORE_LAST_NUMBER) : end].rstrip("."))
    return found[0] if found else ""
