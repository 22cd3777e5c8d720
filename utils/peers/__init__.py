"""The other programs that utils/benchmark.py runs on the same work, each in an environment of its own."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import distributions, version
from pathlib import Path

import mlx.core as mx
import mlx_grpo
from mlx_grpo.backends.blas import blas_name

SPEEDS = ("rollout", "train", "step")
PEERS = {  # packages, and the commands that it can run
    "trl": (("trl==1.16.0", "torch"), (*SPEEDS, "learn")),
    "mlx-lm": (("mlx-lm==0.32.2", "rich"), ("rollout",)),
    "mlx-lm-lora": (("mlx-lm-lora==5.10.2", "rich"), SPEEDS),
}
LOG_LINES = 12  # of a crashed peer, to show


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-grpo-benchmark"


def peer_python(peer: str) -> str:
    """The Python of the peer's own environment, made at its first use in the cache folder.

    Raises RunError.
    """
    packages = list(PEERS[peer][0])
    # MLX's compute library is a package of its own: the peer gets the one that this environment has.
    here = {d.name for d in distributions()} & {"mlx-cpu", "mlx-cuda-12", "mlx-cuda-13"}
    if peer != "trl":
        extra = "".join(f"[{name.removeprefix('mlx-').replace('-', '')}]" for name in here)
        packages.append(f"mlx{extra}=={version('mlx')}")
    folder = cache_folder() / "peers" / peer
    python = folder / "bin" / "python"
    mark = folder / "packages.json"
    if mark.is_file() and json.loads(mark.read_text()) == packages:
        return str(python)
    uv = shutil.which("uv")
    if uv:
        steps = (
            [uv, "venv", "--clear", str(folder), "--python", sys.executable],
            [uv, "pip", "install", "--python", str(python), *packages],
        )
    else:
        steps = (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [str(python), "-m", "pip", "install", *packages],
        )
    print(f"Installing {', '.join(packages)} into {folder}", flush=True)
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = " ".join(done.stderr.split())[-300:]
            raise mlx_grpo.RunError(f"Cannot install {peer}: {reason}")
    mark.write_text(json.dumps(packages))
    return str(python)


class PeerCrashed(mlx_grpo.RunError):
    """A peer that ended before its work was done. `log`: the last lines it wrote."""

    def __init__(self, name: str, status: int, log: list[str]):
        super().__init__(f"{name} crashed with status {status}: {log[-1] if log else 'no message'}")
        self.log = log

    def show(self) -> None:
        print("\n".join([*self.log, str(self)]), file=sys.stderr, flush=True)


class Peer:
    """A running driver with the `work` that it does, a turn a line."""

    def __init__(self, args, config, folder: Path, **work):
        python = args.peer_python or peer_python(args.peer)
        self.name = args.peer
        self.log = folder / "peer.log"
        work = {"settings": {}, "prompts": config.prompts_per_update, **work}
        work |= {
            "completions": config.num_generations,
            "tokens": config.max_completion_length,
            "folder": str(folder),
        }
        work |= {
            "model": str(mlx_grpo.resolve_model(config.model_name)),
            "gpu": mx.default_device() == mx.gpu,
            "blas": blas_name(),
        }
        command = [python, str(Path(__file__).with_name("drivers.py")), args.peer]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        try:
            with open(self.log, "w") as log:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment,
                )
        except OSError as error:
            raise mlx_grpo.UserError(
                f"Cannot run {python}: {error.strerror}; --peer-python takes an interpreter"
            ) from None
        self.send(work)

    def send(self, message) -> None:
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.crashed()

    def read(self) -> dict:
        answer = self.process.stdout.readline()
        return json.loads(answer) if answer else self.crashed()

    def ask(self, message="go") -> dict:
        """Send a message and return the answer to it. Raises PeerCrashed."""
        self.send(message)
        return self.read()

    def crashed(self):
        status = self.process.wait()
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        raise PeerCrashed(self.name, status, lines[-LOG_LINES:])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
