#!/usr/bin/env python3
"""Draw the rooms of the program, their files and what each imports: docs/map.png, for CONTRIBUTING.md."""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {  # name: (folder, column, row); the script stands above all of them
    "the script": (".", 1, 2),
    "mlx_grpo": ("mlx_grpo", 0, 1),
    "rollout": ("mlx_grpo/rollout", 1, 1),
    "update": ("mlx_grpo/update", 2, 1),
    "run": ("mlx_grpo/run", 0, 0),
    "backends": ("mlx_grpo/backends", 1, 0),
    "models": ("mlx_grpo/models", 2, 0),
}
EXAMPLES = """examples:
  uv run python utils/draw_map.py
  uv run python utils/draw_map.py --output /tmp/map.png"""
WIDTH, HEIGHT = 4.6, 1.9


def files_of(folder: str) -> list[Path]:
    """The Python files of a room; of the top level the script alone."""
    if folder == ".":
        return [ROOT / "mlx-grpo.py"]
    return [path for path in sorted((ROOT / folder).glob("*.py")) if path.name != "__init__.py"]


def room_of(module: str) -> str | None:
    """The room of an imported module such as mlx_grpo.run.text, or None."""
    parts = module.split(".")
    if parts[0] != "mlx_grpo" or len(parts) < 2:
        return None
    return parts[1] if parts[1] in ROOMS else "mlx_grpo"


def imports_of(path: Path) -> set[str]:
    """The rooms that a file imports from."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {room for room in map(room_of, modules) if room}


def corner(room: str) -> tuple[float, float]:
    """The lower left corner of a room."""
    _, column, row = ROOMS[room]
    return column * (WIDTH + 0.3), row * (HEIGHT + 0.3)


def draw_room(axes, name: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    x, y = corner(name)
    box = FancyBboxPatch(
        (x, y), WIDTH, HEIGHT, boxstyle="round,pad=0.05", facecolor="#f2f5fa", edgecolor="#44546a"
    )
    axes.add_patch(box)
    axes.text(x + 0.1, y + HEIGHT - 0.1, name, weight="bold", va="top", fontsize=10)
    names = [path.name for path in files_of(ROOMS[name][0])]
    half = (len(names) + 1) // 2
    columns = [names[:half], names[half:]] if len(names) > 5 else [names]
    for place, column in enumerate(columns):
        at = x + 0.1 + place * 2.2
        axes.text(at, y + HEIGHT - 0.45, "\n".join(column), va="top", fontsize=8, family="monospace")
    needed = set().union(*map(imports_of, files_of(ROOMS[name][0]))) - {name}
    axes.text(
        x + 0.1,
        y + 0.1,
        f"imports {', '.join(sorted(needed)) or 'none of these'}",
        fontsize=8,
        color="#c55a11",
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", metavar="FILE", type=Path, default=ROOT / "docs" / "map.png", help="the picture"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    target = parse_arguments(argv).output
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(13, 6))
    for name in ROOMS:
        draw_room(axes, name)
    axes.set_xlim(-0.3, 3 * WIDTH + 1.0)
    axes.set_ylim(-0.3, 3 * HEIGHT + 1.0)
    axes.axis("off")
    figure.savefig(target, dpi=100, bbox_inches="tight", metadata={"Software": None})
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
