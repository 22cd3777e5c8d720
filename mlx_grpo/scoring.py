"""Reward functions: found by name, called each within its time, and a failure named with the completion it was met on."""

import asyncio
import contextlib
import importlib.util
import inspect
import math
import signal
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_grpo.loading import local_path
from mlx_grpo.errors import RunError, UserError


class OutOfTime(BaseException):
    """A reward function took too long. No Exception, so that a function's own `except Exception` does not swallow it."""


@contextlib.contextmanager
def alarm(seconds: float):
    """Raise OutOfTime in whatever Python code is running after so many seconds, and each second from then on."""

    def ring(signum, frame):
        raise OutOfTime

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def reward_files(config) -> list[Path]:
    """The files that hold reward functions, each once."""
    files = [local_path(name.rpartition(":")[0]) for name in config.reward_funcs if ":" in name]
    return list(dict.fromkeys(file for file in files if file is not None))


def load_rewards(config, built_in: dict) -> tuple[list, list[float]]:
    """The reward functions with their weights. A user's file may define `reward_weights = {"name": weight}`.

    The file is the user's own code and runs with their rights. Raises UserError or RunError with its name.
    """
    functions, weights = [], []
    for name in config.reward_funcs:
        path, _, attribute = name.rpartition(":")
        if path:
            if (file := local_path(path)) is None:
                raise UserError(f"Reward file not found: {path}")
            spec = importlib.util.spec_from_file_location(f"reward_file_{file.stem}", file)
            if spec is None or not file.is_file():
                raise UserError(f"Reward file is no Python file: {path}; its name must end in .py")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # where its data classes look themselves up
            try:
                spec.loader.exec_module(module)
            except Exception as error:  # whatever the user's file raises, named and passed on with its traceback
                raise RunError(f"Reward file failed to import: {path}: {type(error).__name__}: {error}") from error
        function = getattr(module, attribute, None) if path else built_in.get(attribute)
        if not callable(function):
            raise UserError(f"Unknown reward function: {name}; built in are {', '.join(built_in)}, or use file.py:function")
        functions.append(function)
        own = getattr(module, "reward_weights", {}) if path else {}
        weight = own.get(attribute, 1.0) if isinstance(own, dict) else None
        if type(weight) not in (int, float) or not math.isfinite(weight):
            raise UserError(f"{path}: reward_weights must be a dict from function names to finite numbers")
        weights.append(float(weight))
    return functions, list(config.reward_weights) or weights


def call_rewards(functions, timeout: float, arguments: dict) -> list:
    """What each function returned or raised: plain ones in turn, async ones beside each other, each within `timeout` s."""

    async def in_time(awaitable):
        try:
            async with asyncio.timeout(timeout) as limit:
                return await awaitable
        except TimeoutError:
            if limit.expired():
                raise OutOfTime from None
            raise  # the function's own

    async def all_of(places):
        found = await asyncio.gather(*(in_time(results[i]) for i in places), return_exceptions=True)
        for i, result in zip(places, found):
            results[i] = result

    results = []
    for function in functions:
        try:
            with alarm(timeout):
                results.append(function(**arguments))
        except (Exception, OutOfTime, SystemExit) as error:  # the user's code: reported with its name by the caller
            results.append(error)
    waiting = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
    if waiting:
        # The alarm is for a coroutine that blocks and so never meets its own limit, or whose threads outlive it.
        with contextlib.suppress(OutOfTime), alarm(timeout + 0.5):
            asyncio.run(all_of(waiting))
    return [OutOfTime() if inspect.isawaitable(result) else result for result in results]


def name_of(function) -> str:
    """A reward function's name, also of a partial or of an object with __call__."""
    return getattr(getattr(function, "func", function), "__name__", type(function).__name__)


def score(functions, timeout: float, texts: list[str], columns: dict) -> np.ndarray:
    """Rewards (F, N) of N texts by F functions, NaN where a function abstained. `columns` hold N values each.

    Raises RunError with the function's name, and the row where one is to blame; a failure is never a zero.
    """

    def call(functions, rows):
        chats = [[{"role": "assistant", "content": text}] for text in texts[rows]]
        given = {name: values[rows] if isinstance(values, list) else values for name, values in columns.items()}
        return call_rewards(functions, timeout, {**given, "completions": chats})

    rewards = np.full((len(functions), len(texts)), np.nan)
    for f, (function, result) in enumerate(zip(functions, call(functions, slice(None)))):
        name = name_of(function)
        if isinstance(result, OutOfTime):
            raise RunError(f"Reward function {name} took longer than reward_timeout = {timeout:g} s")
        if isinstance(result, BaseException):
            until = time.monotonic() + timeout
            alone = ((n, call([function], slice(n, n + 1))[0]) for n in range(len(texts)) if time.monotonic() < until)
            row = next((n for n, again in alone if type(again) is type(result)), None)
            where = "" if row is None else f" on completion {row}, {texts[row][:80]!r}"
            raise RunError(f"Reward function {name} raised {type(result).__name__}: {result}{where}") from result
        result = result.tolist() if isinstance(result, mx.array) else result
        if not isinstance(result, (list, tuple, np.ndarray)) or len(result) != len(texts):
            sized, kind = hasattr(result, "__len__"), type(result).__name__
            got = repr(result) if not sized else f"{len(result)} values" if kind in ("list", "tuple", "ndarray") else f"a {kind}"
            raise RunError(f"Reward function {name} returned {got} for {len(texts)} completions")
        for row, value in enumerate(result):
            if value is None:
                continue
            if isinstance(value, (str, bytes)) or not np.isscalar(value) or not math.isfinite(value):
                raise RunError(f"Reward function {name} returned {value!r} for completion {row}: {texts[row][:80]!r}")
            rewards[f, row] = value
    return rewards
