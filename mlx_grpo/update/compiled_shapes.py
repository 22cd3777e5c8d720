"""The gradient of a micro-batch: compiled for the few shapes that come again and again, else eager.

A compiled shape of a 28-layer model costs 5 to 22 s on CUDA and 3 to 5 s elsewhere, and 16 to 32 MB of the
host's memory for as long as it is kept; it makes an update about a quarter shorter. With completions that end
when they end, most shapes of a run come only now and then, so a shape has to earn it.
"""

from collections.abc import Callable

import mlx.core as mx

from mlx_grpo.backends.device import on_cpu, on_cuda

MOST_SHAPES = 8  # compiled ones alive at once
HOST_BYTES_A_LAYER = 2**20  # of a compiled shape: 16 to 32 MB were seen at 28 layers


def compiling_pays() -> bool:
    """Whether compiled gradients are worth it on this device.

    On CPUs they were 2 to 4% faster, and each takes seconds of g++.
    """
    return not on_cpu()


def updates_to_earn_it() -> int:
    """Updates that a shape must have come in before it is compiled.

    About so many compiled updates save the time that compiling takes.
    """
    return 100 if on_cuda() else 10


def shape_name(batch: dict) -> str:
    """A micro-batch's shape as text, such as "4x32 16x48 padded": prompts (P, L), completion ids (N, T)."""
    sizes = ("x".join(map(str, batch[name].shape)) for name in ("prompts", "ids"))
    return " ".join([*sizes, *(["padded"] if "pads" in batch else [])])


def note_shapes(
    history: dict[str, list[int]], batches: list[dict], update: int, most: int = MOST_SHAPES
) -> None:
    """Count an update's micro-batch shapes in `history`: {shape: [updates it came in, the last of them]}.

    A shape that has come in `updates_to_earn_it` updates is compiled from then on. Where `most` are compiled
    already, the least recently used one is dropped if it has not come in as many updates; else the new
    shape's count starts again. Only the history decides: it is part of a run's saved state.
    """
    for name in dict.fromkeys(map(shape_name, batches)):
        count, _ = history.get(name, (0, 0))
        history[name] = [count + 1, update]
        if count + 1 == updates_to_earn_it():
            others = [other for other in earned(history) if other != name]
            if len(others) >= most:
                oldest = min(others, key=lambda other: history[other][1])
                is_idle = update - history[oldest][1] > updates_to_earn_it()
                del history[oldest if is_idle else name]


def earned(history: dict[str, list[int]]) -> list[str]:
    """The shapes that are compiled."""
    return [name for name, (count, _) in history.items() if count >= updates_to_earn_it()]


class CompiledShapes:
    """`function(batch)`, compiled where its shape has earned it.

    state: what the function reads and writes besides its batch, as for mx.compile. Each shape has its own
    compiled function, so that it can be dropped: mx.compile never drops one shape of a function.
    """

    def __init__(self, function: Callable, state: list, history: Callable[[], dict]):
        self.function, self.state, self.history = function, state, history
        self.compiled = {}

    def __call__(self, batch: dict):
        name = shape_name(batch)
        kept = earned(self.history())
        self.compiled = {shape: made for shape, made in self.compiled.items() if shape in kept}
        if name not in kept:
            return self.function(batch)
        if name not in self.compiled:
            self.compiled[name] = mx.compile(self.function, self.state, self.state)
        return self.compiled[name](batch)
