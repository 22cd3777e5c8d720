"""Independent parts of one computation side by side.

A GPU fills itself. A CPU does not: MLX runs everything but matrix products on one core a stream. So there each core gets a
stream, a lane, and works on a part of its own.
"""

import contextlib
import os

import mlx.core as mx

from mlx_grpo.backends.blas import set_blas_threads

MOST_LANES = 4
STREAMS = []  # of the lanes; made when first needed


def cores() -> int:
    """The cores this process may use, OMP_NUM_THREADS at most."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(own, int(limit) if limit.isdigit() else own))


def lane_count() -> int:
    """How many lanes there are: one on a GPU, else one a core up to MOST_LANES, since in training each holds a gradient."""
    return 1 if mx.default_device() == mx.gpu else min(MOST_LANES, cores())


@contextlib.contextmanager
def lanes(most: int):
    """The streams of up to `most` lanes; a lane's matrix products get its share of the cores."""
    count = max(1, min(most, lane_count()))
    if count == 1:
        yield [mx.default_stream(mx.default_device())]
        return
    STREAMS.extend(mx.new_stream(mx.cpu) for _ in range(count - len(STREAMS)))
    before = set_blas_threads(cores() // count)
    try:
        yield STREAMS[:count]
    finally:
        for stream in STREAMS[:count]:  # their share is theirs until they are done
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


def spread(function, items: list):
    """Yield function(item) of each item while it is evaluated, as many at a time as there are lanes.

    The next ones are built meanwhile, but wait: for these, and for what the caller has started since.
    """
    with lanes(len(items)) as streams:
        for start in range(0, len(items), len(streams)):
            results = []
            for stream, item in zip(streams, items[start : start + len(streams)]):
                with mx.stream(stream):
                    results.append(function(item))
            for stream in (mx.default_stream(mx.default_device()), *streams):
                mx.synchronize(stream)
            mx.async_eval(results)
            yield from results
