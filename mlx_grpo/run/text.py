"""Text that is safe and short enough to show in a terminal."""

import math

import numpy as np


def escaped(text: str, encoding: str = "utf-8") -> str:
    """`text` on one line, with all that a terminal would act on or cannot show as escapes: control
    characters, ANSI codes, marks of direction and width, halves of surrogate pairs, and what `encoding`
    lacks."""
    shown = "".join(
        c if c.isprintable() else " " if c in "\u00a0\u3000" else c.encode("unicode_escape").decode()
        for c in text
    )
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def shortened(text: str, most: int) -> str:
    """At most `most` characters of the text: its beginning and its end, where the answer is."""
    half = (most - 5) // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def question_text(prompt: str | list[dict]) -> str:
    """A prompt as one text: of a chat, the last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))


def sparkline(values: list[float | None], width: int, ascii_only: bool = False) -> str:
    """The values as at most `width` bars, from the least to the greatest.

    Where there are more values than bars, a bar is the mean of a stretch. None, as any
    value that is not finite, is a gap.
    """
    levels = "_.-=*#" if ascii_only else "▁▂▃▄▅▆▇█"
    stretches = [
        s for s in np.array_split(np.array(values, dtype=float), min(width, len(values)) or 1) if s.size
    ]
    means = [s[np.isfinite(s)].mean() if np.isfinite(s).any() else math.nan for s in stretches]
    known = [m for m in means if m == m]
    if not known:
        return ""
    low, spread = min(known), max(known) - min(known)

    def bar(mean: float) -> str:
        return levels[round((mean - low) / spread * (len(levels) - 1)) if spread else len(levels) // 2]

    return "".join(bar(m) if m == m else " " for m in means)


def clock(seconds: float) -> str:
    """3725 -> 1:02:05"""
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
