"""Lets the tests import mlx-grpo.py, whose name is no identifier, as mlx_grpo."""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.modules["mlx_grpo"] = importlib.import_module("mlx-grpo")
