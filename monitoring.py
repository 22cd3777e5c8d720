"""What people see of a run: its lines in the terminal, the table at the end, the report."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def describe_evaluation(record: dict) -> str:
    low, high = (100 * x for x in record["em_strict_ci"])
    split = "held-out" if record["split"] == "test" else "training subset"
    return f"{split} exact match {100 * record['em_strict']:.1f}% ({low:.1f} to {high:.1f}), lenient {100 * record['em_lenient']:.1f}%, n = {record['n']}"


def progress_text(record: dict) -> str:
    """The few numbers of an update that matter, in one line that fits a terminal beside the bar."""
    kl = f" kl {record['kl']:.3f}" if record.get("kl") else ""
    reward = "none" if record["reward_mean"] is None else f"{record['reward_mean']:.2f}"
    return (
        f"reward {reward} length {record['completion_length_mean']:.0f} cut {record['truncated_fraction']:.0%} "
        f"flat {record['zero_signal_fraction']:.0%}{kl} lr {record['lr']:.0e}"
    )


def print_outcome(run_dir: Path, outcome: dict) -> None:
    """The table of held-out scores before and after, and where the model is."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Held-out problems, greedy answers")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    for label, key in (("exact match, tags required", "em_strict"), ("exact match, last number", "em_lenient")):
        cells = []
        for when in ("before", "after"):
            record = outcome[when].get("test")
            low, high = (100 * x for x in record[f"{key}_ci"]) if record else (0, 0)
            cells.append(f"{100 * record[key]:.1f}% ({low:.1f}-{high:.1f})" if record else "not evaluated")
        table.add_row(label, *cells)
    Console().print(table)
    final = run_dir / "final"
    if (run_dir / "report.html").is_file():
        print(f"Report     {run_dir / 'report.html'}")
    print(f"Model      {final}\nTry it     uv run python utils/inference.py --model {final} --chat")


def write_report(run_dir: Path) -> None:
    """Rewrite report.html, in a process of its own: whatever goes wrong with it, the run goes on."""
    command = [sys.executable, str(ROOT / "utils" / "report.py"), str(run_dir)]
    result = subprocess.run(command, capture_output=True, text=True, start_new_session=True)  # Ctrl-C is for the trainer
    if result.returncode:
        print(f"Warning: no report.html: {(result.stderr.strip() or 'stopped').splitlines()[-1]}", file=sys.stderr)
