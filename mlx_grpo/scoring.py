"""Reward functions: found by name, called within a time limit, failures reported with their completion."""

import asyncio
import contextlib
import ctypes
import faulthandler
import functools
import importlib.util
import inspect
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_grpo.loading import local_path
from mlx_grpo.errors import OutOfTime, RunError, UserError


GRACE = 10  # seconds for which what is out of time is asked to end, once a second; then the process ends
USERS_SIGNALS = (signal.SIGALRM, signal.SIGINT, signal.SIGTERM)  # whose handlers are put back after each call


def wake(signum, frame) -> None:
    """A signal handler that does nothing.

    That it runs lets the watchdog's thread in, and ends a blocking call's wait.
    """


def raise_in_thread(thread: int, kind: type | None) -> None:
    """Raise an exception in another thread at its next step of Python.

    None takes back one that has not been raised yet.
    """
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), None if kind is None else ctypes.py_object(kind)
    )


class Watchdog:
    """Ends a call that takes too long, by means that the call cannot undo by accident.

    SIGALRM would not do: libraries such as math-verify set and clear it. Here a thread raises OutOfTime in
    the caller's thread. Two signals help it: SIGURG wakes a sleeping call, and SIGPROF, from a timer of
    processor time, comes through where native code holds the interpreter but looks for signals, as regular
    expressions do. What outlasts GRACE seconds of this ends the process with one line and status 1; where
    even the thread cannot run, faulthandler does, with a traceback.
    """

    def __init__(self, seconds: float, what: str):
        self.seconds, self.what = seconds, what
        self.rang = False
        self.caller = threading.get_ident()
        # Python runs signal handlers in the main thread only.
        self.has_signals = threading.current_thread() is threading.main_thread()
        self.over = threading.Lock()
        self.over.acquire()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def start(self) -> None:
        if self.has_signals:
            self.alarm = signal.getitimer(signal.ITIMER_REAL)
            self.handlers = {number: signal.getsignal(number) for number in USERS_SIGNALS}
            signal.signal(signal.SIGURG, wake)
            signal.signal(signal.SIGPROF, wake)  # and stays: a late signal would end the process otherwise
            signal.setitimer(signal.ITIMER_PROF, 1.0, 1.0)
        faulthandler.dump_traceback_later(self.seconds + 2 * GRACE, exit=True, file=sys.__stderr__)
        self.thread.start()

    def watch(self) -> None:
        if self.over.acquire(timeout=self.seconds):
            return
        self.rang = True
        for _ in range(GRACE):
            raise_in_thread(self.caller, OutOfTime)
            if self.has_signals:
                signal.pthread_kill(self.caller, signal.SIGURG)
            if self.over.acquire(timeout=1.0):
                return
        message = (
            f"Reward function {self.what} took longer than reward_timeout = {self.seconds:g} s "
            "and cannot be stopped"
        )
        print(
            f"{message}: the process ends here. --resume goes on from the last checkpoint",
            file=sys.__stderr__,
            flush=True,
        )
        os._exit(1)

    def stop(self) -> None:
        """End the watch; what the call did to alarms and to the run's own signal handlers is undone."""
        while self.thread.is_alive():
            try:
                with contextlib.suppress(RuntimeError):  # released already
                    self.over.release()
                self.thread.join()
            except OutOfTime:  # rang as the call ended
                continue
        raise_in_thread(self.caller, None)
        faulthandler.cancel_dump_traceback_later()
        if self.has_signals:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in self.handlers.items():
                if handler is not None and signal.getsignal(number) is not handler:
                    signal.signal(number, handler)
            signal.setitimer(signal.ITIMER_REAL, *self.alarm)


def watched(call, seconds: float, what: str):
    """What call() returned or raised; OutOfTime where it took longer than `seconds`.

    what: its name for the user.
    """
    watchdog = Watchdog(seconds, what)
    try:
        watchdog.start()
        result = call()
    except (Exception, OutOfTime, SystemExit) as error:  # the user's code; the caller reports it by name
        result = error
    finally:
        watchdog.stop()
    return OutOfTime() if watchdog.rang else result


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
            except Exception as error:  # whatever the user's file raises, passed on with its traceback
                raise RunError(
                    f"Reward file failed to import: {path}: {type(error).__name__}: {error}"
                ) from error
        function = getattr(module, attribute, None) if path else built_in.get(attribute)
        if not callable(function):
            raise UserError(
                f"Unknown reward function: {name}; built in are {', '.join(built_in)}, or use "
                "file.py:function"
            )
        package, extra = getattr(function, "needs", (None, None))
        if package and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{attribute} needs the package {package}, which is not installed: uv sync --extra {extra}"
            )
        functions.append(function)
        own = getattr(module, "reward_weights", {}) if path else {}
        weight = own.get(attribute, 1.0) if isinstance(own, dict) else None
        if type(weight) not in (int, float) or not math.isfinite(weight):
            raise UserError(f"{path}: reward_weights must be a dict from function names to finite numbers")
        weights.append(float(weight))
    return functions, list(config.reward_weights) or weights


def call_rewards(functions, timeout: float, arguments: dict) -> list:
    """What each function returned or raised, each within `timeout` seconds.

    Plain functions are called in turn, async ones run side by side.
    """

    async def in_time(awaitable):
        try:
            async with asyncio.timeout(timeout) as limit:
                return await awaitable
        except TimeoutError:
            if limit.expired():
                raise OutOfTime from None
            raise  # the function's own
        except SystemExit as error:  # which would end the loop, and with it the run
            return error

    async def all_of(positions):
        found = await asyncio.gather(*(in_time(results[i]) for i in positions), return_exceptions=True)
        for i, result in zip(positions, found):
            results[i] = result

    results = [
        watched(functools.partial(function, **arguments), timeout, name_of(function))
        for function in functions
    ]
    waiting = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
    if waiting:
        # The watchdog ends a coroutine that blocks, which its own limit cannot, or whose threads go on.
        names = ", ".join(name_of(functions[i]) for i in waiting)
        watched(lambda: asyncio.run(all_of(waiting)), timeout + 0.5, names)
    return [OutOfTime() if inspect.isawaitable(result) else result for result in results]


def name_of(function) -> str:
    """A reward function's name, also of a partial or of an object with __call__."""
    return getattr(getattr(function, "func", function), "__name__", type(function).__name__)


def names_of(functions) -> list[str]:
    return [name_of(function) for function in functions]


def score(functions, timeout: float, texts: list[str], columns: dict) -> np.ndarray:
    """Rewards (F, N) of N texts by F functions, NaN where a function abstained. `columns` hold N values each.

    Raises RunError with the function's name, and the row where one is to blame; a failure is never a zero.
    """

    def call(functions, rows):
        chats = [[{"role": "assistant", "content": text}] for text in texts[rows]]
        given = {
            name: values[rows] if isinstance(values, list) else values for name, values in columns.items()
        }
        return call_rewards(functions, timeout, {**given, "completions": chats})

    rewards = np.full((len(functions), len(texts)), np.nan)
    for f, (function, result) in enumerate(zip(functions, call(functions, slice(None)))):
        name = name_of(function)
        if isinstance(result, OutOfTime):
            raise RunError(f"Reward function {name} took longer than reward_timeout = {timeout:g} s")
        if isinstance(result, BaseException):
            until = time.monotonic() + timeout
            alone = (
                (n, call([function], slice(n, n + 1))[0])
                for n in range(len(texts))
                if time.monotonic() < until
            )
            row = next((n for n, again in alone if type(again) is type(result)), None)
            where = "" if row is None else f" on completion {row}, {texts[row][:80]!r}"
            raise RunError(
                f"Reward function {name} raised {type(result).__name__}: {result}{where}"
            ) from result
        result = result.tolist() if isinstance(result, mx.array) else result
        if not isinstance(result, (list, tuple, np.ndarray)) or len(result) != len(texts):
            kind = type(result).__name__
            if not hasattr(result, "__len__"):
                got = repr(result)
            else:
                got = f"{len(result)} values" if kind in ("list", "tuple", "ndarray") else f"a {kind}"
            raise RunError(f"Reward function {name} returned {got} for {len(texts)} completions")
        for row, value in enumerate(result):
            if value is None:
                continue
            if isinstance(value, (str, bytes)) or not np.isscalar(value) or not math.isfinite(value):
                raise RunError(
                    f"Reward function {name} returned {value!r} for completion {row}: {texts[row][:80]!r}"
                )
            rewards[f, row] = value
    return rewards
