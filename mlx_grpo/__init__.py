"""The library face of MLX-GRPO: `from mlx_grpo import MLXGRPOConfig, MLXGRPOTrainer, grpo_loss`.

The names are those of the script mlx-grpo.py, which is loaded when the first of them is asked for.
"""

import importlib.util
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "mlx-grpo.py"


def load_script():
    """The script as the module mlx_grpo.script."""
    name = f"{__name__}.script"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, SCRIPT)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)
    script = load_script()
    return script if name == "script" else getattr(script, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(load_script())})
