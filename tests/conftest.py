"""Settings of all tests: no network, exact float32, and this machine's fast backend, as the programs have it."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core: more threads would wait for each other
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the network
os.environ["MLX_ENABLE_TF32"] = "0"  # GPUs multiply float32 at less than its precision otherwise (MLX, Numerical Precision)
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):  # a script that a test starts imports 3,000 files: compiled once, and not beside them
    os.environ["PYTHONPYCACHEPREFIX"] = str(ROOT / ".pytest_cache" / "bytecode")
sys.path.insert(0, str(ROOT))

from mlx_grpo.backends import use_fast_backend  # noqa: E402

use_fast_backend()
