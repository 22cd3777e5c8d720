"""A fast BLAS for MLX's CPU backend on Linux. Import this ahead of MLX."""

import contextlib
import ctypes
import ctypes.util
import glob
import os
import sys


def load_blas() -> str | None:
    """Load MKL or OpenBLAS ahead of MLX and return its name, or None where there is none or no need.

    MLX's Linux CPU build links the reference BLAS, thirty times slower than these; the first library loaded with
    global symbols wins, so this must run before `import mlx.core`.
    """
    if sys.platform != "linux" or "mlx" in sys.modules:
        return None
    os.environ.setdefault("MKL_CBWR", "AUTO")  # the same bits on every run
    in_environment = sorted(glob.glob(os.path.join(sys.prefix, "lib", "libmkl_rt.so*")))
    for name in filter(None, [*in_environment, ctypes.util.find_library("openblas"), ctypes.util.find_library("mkl_rt")]):
        with contextlib.suppress(OSError):
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            return name
    return None


BLAS = load_blas()
