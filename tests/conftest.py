"""Lets the tests import mlx-grpo.py, whose name is no identifier, as mlx_grpo."""

import importlib
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the network
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.modules["mlx_grpo"] = importlib.import_module("mlx-grpo")
