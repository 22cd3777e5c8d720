#!/usr/bin/env python3
"""Run the trainer once for each point of a grid of settings, then compare the runs in one page.

A sweep that stops is continued by the same command: finished points are kept, an interrupted one goes on from
its newest checkpoint, or anew where it has none.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import mlx_grpo  # noqa: E402
from mlx_grpo.run.terminal import describe_evaluation  # noqa: E402
from mlx_grpo.run.directory import checkpoints  # noqa: E402

EXAMPLES = """examples:
  uv run python utils/sweep.py configs/quickstart.toml --grid learning_rate=1e-4,2e-4 \
--grid num_generations=4,8
  uv run python utils/sweep.py configs/prod.toml --grid kl_coeff=0,0.04 --set max_train_samples=200 \
--output outputs/kl"""

STOPPED = {-2: 130, 130: 130, -15: 143, 143: 143}  # the trainer's status after Ctrl-C and SIGTERM, and ours


def parse_axis(text: str) -> tuple[str, list[str]]:
    """`key=a,b` as ("key", ["a", "b"]).

    Commas within brackets or quotes do not divide: `weights=[1,0],[1,1]` has two values.
    """
    key, _, values = text.partition("=")
    quoted, bracketed = r"\"[^\"]*\"|'[^']*'", r"\[[^\]]*\]|\{[^}]*\}"
    parts = [part.strip() for part in re.findall(rf"(?:{quoted}|{bracketed}|[^,])+", values)]
    if not key.strip() or not all(parts) or not parts:
        raise mlx_grpo.UserError(f"--grid takes KEY=VALUE,VALUE,..., not {text!r}")
    return key.strip(), list(dict.fromkeys(parts))


def grid_points(axes: list[str]) -> list[dict[str, str]]:
    """Every combination of the axes' values, as settings.

    Raises UserError for an axis that is named twice or that the sweep sets itself.
    """
    parsed = [parse_axis(axis) for axis in axes]
    names = [key for key, _ in parsed]
    for key in names:
        if names.count(key) > 1:
            raise mlx_grpo.UserError(f"--grid {key} is given twice; list all its values in one")
        if key in ("run_name", "output_dir"):
            raise mlx_grpo.UserError(
                f"--grid {key}: each point has a directory of its own; "
                "use --output for the folder that holds them"
            )
    return [dict(zip(names, values)) for values in itertools.product(*(values for _, values in parsed))]


def point_name(point: dict[str, str]) -> str:
    """The point's directory, such as `learning_rate=1e-6,num_generations=4`.

    With a hash where that is no plain or short name.
    """
    text = ",".join(f"{key}={value}" for key, value in point.items())
    plain = re.sub(r"[^\w.=,+-]", "-", text)[:100]
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def finished(run_dir: Path) -> bool:
    """Whether the run has its final model, the last thing the trainer writes."""
    return (run_dir / "final").is_dir()


def run_point(config: Path, run_dir: Path, settings: list[str]) -> int:
    """Train one point, from its newest checkpoint if it has one; the trainer's exit status."""
    command = [sys.executable, str(ROOT / "mlx-grpo.py"), "--config", str(config)]
    for setting in [*settings, f"output_dir={run_dir.parent}", f"run_name={run_dir.name}"]:
        command += ["--set", setting]
    if checkpoints(run_dir):
        command.append("--resume")
    elif (
        run_dir / "training_log.jsonl"
    ).is_file():  # stopped before its first checkpoint: keep the records, begin anew
        aside = next(
            p
            for i in itertools.count(1)
            if not (p := run_dir.with_name(f"{run_dir.name}.interrupted-{i}")).exists()
        )
        run_dir.rename(aside)
    # Ctrl-C reaches the trainer by itself, which saves a checkpoint and ends; a SIGTERM is passed on to it.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    child = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number))
    return child.wait()


def summary(run_dir: Path) -> str:
    """One line: the point's name, the last reward, the held-out reward and, where it counts, exact match."""
    reward = held_out = None
    with open(run_dir / "training_log.jsonl", encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed run
                record = json.loads(line)
                if "event" not in record:
                    reward = record.get("reward_mean", reward)
                elif record.get("split") == "test":
                    held_out = record
    scores = describe_evaluation(held_out) if held_out else "not evaluated"
    return f"{run_dir.name}: reward {'-' if reward is None else f'{reward:.3f}'}, {scores}"


def sweep(config: Path, points: list[dict[str, str]], folder: Path, settings: list[str]) -> int:
    """Run what is not finished yet, then write the comparison; the exit status: 1 if a point failed."""
    failed = []
    run_dirs = [folder / point_name(point) for point in points]
    for i, (point, run_dir) in enumerate(zip(points, run_dirs), 1):
        title = f"{i}/{len(points)} {' '.join(f'{key}={value}' for key, value in point.items())}"
        if finished(run_dir):
            print(f"{title}: finished already", flush=True)
            continue
        print(title, flush=True)
        status = run_point(config, run_dir, [*settings, *(f"{key}={value}" for key, value in point.items())])
        if status in STOPPED:  # the user's wish, not a failure of this point
            print(f"Sweep stopped at {title}. To continue, run the same command", file=sys.stderr)
            return STOPPED[status]
        if status:
            failed.append(f"{run_dir.name} (status {status})")
    logs = [run_dir for run_dir in run_dirs if (run_dir / "training_log.jsonl").is_file()]
    if logs:
        report = [
            sys.executable,
            str(ROOT / "utils" / "report.py"),
            *map(str, logs),
            "--output",
            str(folder / "comparison.html"),
        ]
        if subprocess.run(report).returncode:
            failed.append("the comparison")
        print("\n".join(map(summary, logs)))
    if failed:
        print(f"Failed: {'; '.join(failed)}. The same command runs them again", file=sys.stderr)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="sweep.py",
        description=__doc__.split("\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="the trainer's TOML file")
    parser.add_argument(
        "--grid",
        metavar="KEY=VALUE,VALUE",
        action="append",
        required=True,
        help="a setting and its values; repeat for more axes",
    )
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="a setting of every point; repeatable"
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help="holds the runs and comparison.html; outputs/sweep-CONFIG by default",
    )
    arguments = parser.parse_args(argv)
    try:
        points = grid_points(arguments.grid)
        for point in points:  # a wrong value is found before the first point trains
            mlx_grpo.load_config(
                arguments.config, [*arguments.set, *(f"{key}={value}" for key, value in point.items())]
            )
        return sweep(
            arguments.config,
            points,
            arguments.output or Path("outputs") / f"sweep-{arguments.config.stem}",
            arguments.set,
        )
    except mlx_grpo.UserError as error:
        print(error, file=sys.stderr)
        return 2
    except (mlx_grpo.RunError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
