"""What machine this is: every question that decides between backends is asked here."""

import os
import platform
import shutil
import sys

import mlx.core as mx


def on_cpu() -> bool:
    return mx.default_device() == mx.cpu


def on_cuda() -> bool:
    return mx.default_device() == mx.gpu and not mx.metal.is_available()


def has_slow_exp() -> bool:
    """On x86 CPUs MLX's exp takes 13 ns a number, its power 5."""
    return on_cpu() and platform.machine() == "x86_64"


def cores() -> int:
    """The cores this process may use, OMP_NUM_THREADS at most."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(own, int(limit) if limit.isdigit() else own))


def memory_bytes() -> int:
    """Memory of the machine's accelerator, or of the machine where there is none."""
    info = mx.device_info()
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(info.get("memory_size") or info.get("total_memory") or whole)


def queued_bytes() -> int:
    """Memory that queued work may hold on CUDA, in bytes: ten command buffers. Elsewhere 0."""
    return 10 * 2**20 * int(os.environ.get("MLX_MAX_MB_PER_BUFFER", "400")) if on_cuda() else 0


def compile_works() -> bool:
    """Whether mx.compile can be used: on Linux CPUs it needs a C++ compiler at run time."""
    return not on_cpu() or sys.platform != "linux" or bool(shutil.which("g++"))
