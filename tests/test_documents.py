"""The documents say what the program is: paths and links exist, settings are the dataclass's, commands parse."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_grpo

ROOT = Path(mlx_grpo.__file__).parent
PAGES = sorted(p for p in [*ROOT.glob("*.md"), *ROOT.glob("*/README.md")] if ".venv" not in p.parts)


def test_the_table_of_settings_is_fresh():
    assert subprocess.run([sys.executable, "utils/config_guide.py", "--check"], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"(?<![\w/-])((?:configs|utils|starter)/[\w./-]+\.(?:toml|py|sh|md))", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_settings_named_in_commands_are_settings(page):
    for setting in re.findall(r"--set '?(\w+=[^\s'`]*)", page.read_text(encoding="utf-8")):
        if re.fullmatch(r"\w+=[^A-Z$]*", setting) and not setting.startswith(("key=", "reward_funcs=")):
            mlx_grpo.load_config(None, [setting])


def test_no_page_has_emoji_or_this_machines_paths():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search("[\U0001f300-\U0001faff✅❌⚠]", text) and not re.search("/(home|root|Users)/", text), page


def test_no_page_has_a_placeholder_left():
    for page in [*PAGES, *ROOT.glob("configs/*.toml")]:
        assert not re.search(r"@\w+@|TODO|FIXME", page.read_text(encoding="utf-8")), page
