"""Write the table of settings in docs/CONFIG_GUIDE.md from MLXGRPOConfig: fields, types, defaults, comments.

examples:
  uv run python utils/config_guide.py            rewrite the table
  uv run python utils/config_guide.py --check    exit 1 where the table is stale
"""

import argparse
import dataclasses
import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import mlx_grpo  # noqa: E402

GUIDE = ROOT / "docs" / "CONFIG_GUIDE.md"
BEGIN, END = "<!-- settings: written by utils/config_guide.py -->", "<!-- end of settings -->"
# Settings that name an entry of a table.
TABLES = {"loss_type": mlx_grpo.LOSSES, "advantage_estimator": mlx_grpo.ESTIMATORS}
SHARED = {"adam_beta1": "first moment's decay", "adam_beta2": "second moment's decay"}


def settings_table() -> str:
    """Markdown: one table for each group of fields, in the order of the dataclass."""
    source = inspect.getsource(mlx_grpo.MLXGRPOConfig).split("def __post_init__")[0]
    fields = {f.name: f for f in dataclasses.fields(mlx_grpo.MLXGRPOConfig)}
    lines = []
    name = None
    for line in source.splitlines():
        if heading := re.fullmatch(r"    # (\w+)", line):
            lines += [
                "",
                f"### {heading[1]}",
                "",
                "| key | type | default | meaning |",
                "| --- | --- | --- | --- |",
            ]
        elif start := re.match(r"    (\w+): ", line):
            name = start[1]
        comment = re.search(r"  # (.*)", line)
        if name and (comment or name in SHARED):
            field = fields[name]
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            kind = (
                field.type.__name__
                if isinstance(field.type, type)
                else str(field.type).replace(" | None", " or none")
            )
            shown = (
                "none"
                if default is None
                else "the text at the top of mlx-grpo.py"
                if name == "system_prompt"
                else f"`{default!r}`"
            )
            meaning = comment[1] if comment else SHARED[name]
            if name in TABLES:
                meaning += f": {', '.join(TABLES[name])}"
            meaning = meaning.replace("|", "\\|").replace("<", "&lt;")
            lines.append(f"| `{name}` | {kind.replace('|', 'or')} | {shown} | {meaning} |")
            name = None
    return "\n".join(lines).strip()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the table is stale")
    arguments = parser.parse_args()
    text = GUIDE.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    fresh = f"{head}{BEGIN}\n\n{settings_table()}\n\n{END}{tail}"
    if arguments.check:
        if fresh != text:
            print("docs/CONFIG_GUIDE.md is stale: run uv run python utils/config_guide.py", file=sys.stderr)
        return int(fresh != text)
    GUIDE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
