"""Settings of all tests: no network, exact float32, and this machine's fast backend, as the programs have it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

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


def interruptible() -> None:
    """In a child before its program starts: Ctrl-C interrupts it, though the tests may run with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def ctrl_c_interrupts():
    """A SIGINT raises KeyboardInterrupt in this process, though the tests may run with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def child():
    """subprocess.Popen whose process a SIGINT reaches, and which the test's end kills where it still runs."""
    children = []

    def start(*arguments, **options) -> subprocess.Popen:
        children.append(subprocess.Popen(*arguments, preexec_fn=interruptible, **options))
        return children[-1]

    yield start
    for process in children:
        with process:  # closes its pipes, and waits
            process.kill()
