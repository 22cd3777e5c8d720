"""Independent parts of one computation side by side, on streams.

A GPU fills itself. A CPU does not: MLX runs everything but matrix products on one core a stream. So there
each core gets a stream, and works on a part of its own.
"""

import contextlib

import mlx.core as mx

from mlx_grpo.backends.blas import set_blas_threads
from mlx_grpo.backends.device import cores, on_cpu

MOST_STREAMS = 4
MADE = []  # streams, when first needed


def stream_count() -> int:
    """How many streams work side by side: one on a GPU, else one a core.

    Few, since in training each holds a gradient.
    """
    return 1 if not on_cpu() else min(MOST_STREAMS, cores())


@contextlib.contextmanager
def streams_of_cores(most: int):
    """Up to `most` streams, one a core; the matrix products of each get its share of the cores."""
    count = max(1, min(most, stream_count()))
    if count == 1:
        yield [mx.default_stream(mx.default_device())]
        return
    MADE.extend(mx.new_stream(mx.cpu) for _ in range(count - len(MADE)))
    before = set_blas_threads(cores() // count)
    try:
        yield MADE[:count]
    finally:
        for stream in MADE[:count]:  # each keeps its share until it is done
            mx.synchronize(stream)
        set_blas_threads(before)


def evaluate_by_turns(streams: list, computations: list) -> None:
    """Run generators of arrays side by side, each on its stream: one item of each is evaluated by turns."""
    running = list(zip(streams, computations))
    while running:
        started = []
        for stream, computation in running:
            with mx.stream(stream):
                started.append(next(computation, None))
        mx.async_eval(started)
        running = [each for each, arrays in zip(running, started) if arrays is not None]


def run_on_streams(function, items: list):
    """Yield function(item) of each item while it is evaluated, as many at a time as there are streams.

    The next ones are built meanwhile, but wait: for these, and for what the caller has started since.
    """
    with streams_of_cores(len(items)) as streams:
        for start in range(0, len(items), len(streams)):
            results = []
            for stream, item in zip(streams, items[start : start + len(streams)]):
                with mx.stream(stream):
                    results.append(function(item))
            for stream in (mx.default_stream(mx.default_device()), *streams):
                mx.synchronize(stream)
            mx.async_eval(results)
            yield from results
