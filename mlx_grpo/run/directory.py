"""The run's directory on disk: its name, its lock, checkpoints that are complete or absent, and the logs.

OUTPUT_DIR/RUN_NAME/    config.resolved.toml  training_log.jsonl  completions.jsonl  checkpoint-STEP/  final/
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
from pathlib import Path

from mlx_grpo.errors import RunError, UserError


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_directory(folder: Path) -> None:
    """Remove `folder` if it is there.

    It is renamed first: where the process is killed half-way, no half of it keeps the name.
    """
    if folder.exists():
        leaving = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(leaving, ignore_errors=True)
        folder.rename(leaving)
        shutil.rmtree(leaving, ignore_errors=True)


@contextlib.contextmanager
def complete_or_absent(folder: Path):
    """A directory beside `folder` to write into; synced, it takes that name at the end.

    Where something stops that, it goes, and what stood at `folder` stays.
    """
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    aside, old = scratch / "new", scratch / "old"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        for path in [*aside.rglob("*"), aside]:
            sync_to_disk(path)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
        sync_to_disk(folder.parent)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(scratch, ignore_errors=True)


def write_directory(folder: Path, write) -> None:
    """Make `folder` by write(path), with a manifest: complete or absent.

    Raises RunError("Failed to save checkpoint: REASON"); what stood at `folder` is then untouched.
    """
    try:
        with complete_or_absent(folder) as aside:
            write(aside)
            files = sorted(p for p in aside.rglob("*") if p.is_file())
            manifest = {
                str(p.relative_to(aside)): {"bytes": p.stat().st_size, "sha256": file_digest(p)}
                for p in files
            }
            (aside / "manifest.json").write_text(json.dumps(manifest, indent=2))
    except (OSError, RuntimeError, ValueError) as error:
        # MLX's failed write is a RuntimeError, a name that leads outside the folder a ValueError.
        raise RunError(f"Failed to save checkpoint: {error}") from None


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint against its manifest, or ""."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return "no readable manifest.json"
    for name in ["trainer_state.json", *expected]:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (path.stat().st_size, file_digest(path)) != expected.get(name):
            return f"{name} is damaged"
    return ""


def checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoint directories, oldest first."""
    found = [p for p in run_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def remove_old_checkpoints(run_dir: Path, limit: int, best: int) -> None:
    """Keep the newest `limit` checkpoints (0: all) and that of update `best`."""
    for folder in checkpoints(run_dir)[: -limit or 0]:
        if folder.name != f"checkpoint-{best}":
            remove_directory(folder)


def find_checkpoint(run_dir: Path, given: str) -> Path | None:
    """The checkpoint to resume from: the one given, or the newest of the run that is whole. Raises UserError.

    None for a run that was stopped before its first one: it starts again, and its seed makes it the same run.
    """
    if given:
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise UserError(f"Checkpoint not found: {folder}")
        if fault := damage(folder):
            raise UserError(
                f"Checkpoint not found: {folder} is not complete ({fault}); resume from an earlier one"
            )
        return folder
    for folder in reversed(checkpoints(run_dir)):
        if not (fault := damage(folder)):
            return folder
        print(f"Checkpoint {folder} is skipped: {fault}", file=sys.stderr)
    if (
        (run_dir / "config.resolved.toml").is_file()
        and not checkpoints(run_dir)
        and not (run_dir / "final").exists()
    ):
        print(f"No checkpoint yet in {run_dir}: the run starts again")
        return None
    raise UserError(f"Checkpoint not found: {run_dir} has none to resume from")


def holds_update(run_dir: Path) -> bool:
    """Whether a run got as far as an update here. Where it failed before, its directory is free again."""
    if any(run_dir.glob("checkpoint-*")) or (run_dir / "final").exists():
        return True
    log = run_dir / "training_log.jsonl"
    lines = log.read_bytes().splitlines() if log.is_file() else []
    return any(b'"update": ' in line and b'"event": ' not in line for line in lines)


def is_locked(run_dir: Path) -> bool:
    """Whether another process is at work in a directory."""
    try:
        with open(run_dir / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # none there, or none of ours
        return False
    return False


def choose_run_dir(output_dir: Path, run_name: str, name: str, resume: str | None) -> Path:
    """The run's directory: the one to resume, a run_name that is free, or the next free number of `name`."""
    if resume:
        return Path(resume).expanduser().resolve().parent
    base = output_dir.expanduser() / (run_name or name)
    numbered = [base] + [base.with_name(f"{base.name}-{n}") for n in range(2, 10000)]
    if resume is not None:
        begun = [
            path
            for path in itertools.takewhile(
                lambda path: any(path.glob("*.jsonl")) or holds_update(path), numbered
            )
        ]
        return base if run_name or not begun else begun[-1]
    if run_name and holds_update(base):
        raise UserError(
            f"Run directory holds a run already: {base}. Continue it with --resume, or choose another "
            "run_name"
        )
    return (
        base
        if run_name
        else next(path for path in numbered if not holds_update(path) and not is_locked(path))
    )


def lock_directory(path: Path):
    """Hold `path` for this process; the lock goes when the process does, however it ends.

    Raises UserError when taken.
    """
    file = open(path / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"Run directory is in use by another process: {path}. Wait for it, or choose another run_name"
        ) from None
    return file


class RunLogs:
    """The run's NAME.jsonl files. What a full disk refuses waits in memory, in order."""

    def __init__(self, run_dir: Path, enabled: bool = True):
        self.run_dir, self.enabled = run_dir, enabled
        self.waiting = []  # (path, line)

    def add(self, name: str, *records: dict) -> None:
        """Append a line for each record to NAME.jsonl, out of the process when this returns."""
        if not self.enabled:
            return
        self.waiting += [(self.run_dir / f"{name}.jsonl", json.dumps(record) + "\n") for record in records]
        with contextlib.suppress(OSError):  # the next save meets it too, and says so
            self.write()

    def write(self) -> None:
        """Write what waits. Raises OSError where the disk refuses it."""
        while self.waiting:
            path, line = self.waiting[0]
            size = path.stat().st_size if path.exists() else 0
            try:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(line)
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(path, size)  # half a line would spoil the next
                raise
            del self.waiting[0]

    def sync(self) -> dict[str, int]:
        """Write what waits, onto the disk itself; each file's size in bytes by name."""
        self.write()
        files = sorted(self.run_dir.glob("*.jsonl"))
        for path in files:
            sync_to_disk(path)
        return {path.name: path.stat().st_size for path in files}

    def cut(self, sizes: dict[str, int]) -> None:
        """Truncate each file to its size in a checkpoint, by name: what came after will be logged again."""
        for path in self.run_dir.glob("*.jsonl"):
            os.truncate(path, path.read_bytes()[: sizes.get(path.name, 0)].rfind(b"\n") + 1)
