"""A fast BLAS for MLX's CPU backend on Linux, loaded ahead of MLX."""

import contextlib
import ctypes
import ctypes.util
import glob
import os
import sys


LOADED: list[ctypes.CDLL] = []  # the library, once it is loaded


def load_blas() -> None:
    """Load MKL or OpenBLAS ahead of MLX, where there is one and a need.

    MLX's Linux CPU build links the reference BLAS, thirty times slower than these; the first library loaded
    with global symbols wins, so this must run before `import mlx.core`.
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules or LOADED:
        return
    os.environ.setdefault("MKL_CBWR", "AUTO")  # the same bits on every run
    os.environ.setdefault("KMP_BLOCKTIME", "0")  # a thread with nothing to do sleeps: the core has other work
    in_environment = sorted(glob.glob(os.path.join(sys.prefix, "lib", "libmkl_rt.so*")))
    for name in filter(
        None, [*in_environment, ctypes.util.find_library("openblas"), ctypes.util.find_library("mkl_rt")]
    ):
        with contextlib.suppress(OSError):
            LOADED.append(ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL))
            return


def blas_name() -> str:
    """The path or name of the BLAS that was loaded, or ""."""
    return LOADED[0]._name if LOADED else ""


def set_blas_threads(count: int) -> int:
    """Let one matrix product use so many cores; how many it could use before."""
    for get, set_ in (
        ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"),
        ("openblas_get_num_threads", "openblas_set_num_threads"),
    ):
        if LOADED and hasattr(LOADED[0], set_):
            before = getattr(LOADED[0], get)()
            getattr(LOADED[0], set_)(count)
            return before
    return count
