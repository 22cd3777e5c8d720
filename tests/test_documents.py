"""The documents say what the program is: links and settings exist, messages are explained, and every command runs.

A command in a ```bash block is run in a copy of the repository, scaled down, unless a remark (in a comment above its
block, or behind it) says that it needs the hub, the network, a Mac, a GPU or several machines. Its script, flags, settings
and paths are checked then, and also where the same script has run with these flags and others.
"""

import argparse
import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mlx_grpo

ROOT = Path(mlx_grpo.__file__).parents[1]
PAGES = sorted(p for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")] if ".venv" not in p.parts)
SCRIPTS = ["mlx-grpo.py", "convert_nanochat.py", *sorted(f"utils/{p.name}" for p in ROOT.glob("utils/*.py"))]
NEEDS = re.compile(r"\bneeds\b.*\b(hub|network|Mac|GPUs?|machines)\b")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- What is written --------------------------------------------------------------------------------------------


def blocks(text: str, language: str) -> list[tuple[str, str]]:
    """The fenced blocks of a language, each with the HTML comment on the line above it, or ""."""
    found = re.findall(rf"(?:<!-- ((?:(?!-->).)*) -->\n)?^ *```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [(comment, block) for comment, block in found]


def commands(page: Path) -> list[tuple[str, str]]:
    """The commands of a page, each with the remark on what it needs, or ""."""
    found = []
    for comment, block in blocks(page.read_text(encoding="utf-8"), "bash"):
        needs = comment if NEEDS.search(comment) else ""
        for line in filter(None, map(str.strip, block.splitlines())):
            command, _, remark = re.sub(r"(^|\s+)# ", "\0", line, count=1).partition("\0")
            own = remark if NEEDS.search(remark) else ""
            if command:
                found.append((command, needs or own))
            else:
                needs = needs or own  # a remark on a line of its own is for the rest of the block
    return found


def test_the_table_of_settings_is_fresh():
    assert subprocess.run([sys.executable, "utils/config_guide.py", "--check"], cwd=ROOT).returncode == 0


def anchors(page: Path) -> set[str]:
    """What #... can name in a page, as GitHub makes it from the headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"
    for path in re.findall(r"(?<![\w/-])((?:configs|utils|starter|tests)/[\w./-]+\.(?:toml|py|sh|md))", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_named_in_commands_are_settings(page):
    for setting in re.findall(r"--set '?(\w+=[^\s'`]*)", page.read_text(encoding="utf-8")):
        if re.fullmatch(r"\w+=[^A-Z$]*", setting) and not setting.startswith(("key=", "reward_funcs=", "report_to=", "reward_weights=")) and "..." not in setting:
            mlx_grpo.load_config(None, [setting])


def test_no_page_has_emoji_or_this_machines_paths():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search("[\U0001f300-\U0001faff✅❌⚠]", text) and not re.search("/(home|root|Users)/", text), page


def test_no_page_has_a_placeholder_left():
    for page in [*PAGES, *ROOT.glob("configs/*.toml")]:
        assert not re.search(r"@\w+@|TODO|FIXME", page.read_text(encoding="utf-8")), page


# --- Messages ---------------------------------------------------------------------------------------------------

ERRORS = {"UserError", "RunError", "ConversionError", "InferenceError", "ReportError"}
HAVE_MESSAGES = [ROOT / "mlx-grpo.py", *ROOT.glob("mlx_grpo/**/*.py"), *ROOT.glob("utils/**/*.py")]


def text_of(node: ast.AST) -> str:
    """The text of a message, with each value that is put into it as a NUL."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def messages(path: Path) -> set[str]:
    """What a script may say: its errors, what its config refuses, and the warnings it prints."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = getattr(getattr(node, "func", None), "id", getattr(getattr(node, "func", None), "attr", ""))
        if isinstance(node, ast.Call) and node.args and (name in ERRORS or (name == "end" and path.name == "distributed.py")):
            found.append(text_of(node.args[0]))
        if isinstance(node, ast.Call) and name == "print" and node.args and text_of(node.args[0]).startswith("Warning: "):
            found.append(text_of(node.args[0]).removeprefix("Warning: "))
        if isinstance(node, ast.FunctionDef) and node.name == "contradictions":
            found += [text_of(y.value.elts[1]) for y in ast.walk(node) if isinstance(y, ast.Yield)]
    return set(filter(None, found))


def first_words(message: str) -> str:
    """A pattern of what a message begins with: its flag, or the words up to the first mark after two, four at most."""
    if message.startswith("--"):
        return re.escape(re.split(r"[\s:]", message)[0])
    head = ""
    for part in re.split(r"(?<=[:;(,])", message):
        head += part
        if len(re.findall(r"[\w-]{2,}", head)) >= 2:
            break
    words = " ".join(head.rstrip(" :;(,\0").split()[:4]).rstrip(" :;(,\0")
    return r"\S+".join(map(re.escape, words.split("\0")))


def test_first_words_of_a_message():
    assert first_words("Config file not found: \0") == re.escape("Config file not found")
    assert re.fullmatch(first_words("\0, row \0: field \0 is empty"), "FILE, row N: field")
    assert re.fullmatch(first_words("Rank \0 hangs: nothing"), "Rank K hangs")


def test_troubleshooting_has_each_message():
    page = (ROOT / "docs" / "TROUBLESHOOTING.md").read_text(encoding="utf-8").replace("`", "")
    missing = {m.replace("\0", "{}") for path in HAVE_MESSAGES for m in messages(path) if not re.search(first_words(m), page)}
    assert missing == set()


# --- Help -------------------------------------------------------------------------------------------------------


def help_of(script: str) -> str:
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_help_fits_a_screen():
    shown = help_of("mlx-grpo.py").splitlines()
    assert len(shown) <= 24 and max(map(len, shown)) <= 80
    for name in re.findall(r"[a-z]+_[a-z_]+", " ".join(shown)):
        assert name in mlx_grpo.MLXGRPOConfig.__dataclass_fields__, name


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_help_shows_two_examples_that_parse(script):
    examples = [line.strip() for line in help_of(script).partition("examples:")[2].splitlines() if script in line]
    assert len(examples) >= 2
    for example in examples:
        check(re.sub(r"\s{2,}.*", "", example))


# --- Commands that cannot be run here ---------------------------------------------------------------------------


class Parsed(BaseException):
    """The arguments are well-formed."""


def check(command: str) -> None:
    """That a command's script exists and takes its flags and settings, and that uv's extras and groups exist."""
    if loop := re.search(r"; do (.*); done$", command):
        command = loop[1].replace("$n", "2").replace("$((32 * n))", "64")
    words = shlex.split(command.split(" > ")[0])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for flag, extra in zip(words, words[1:]):
        assert flag != "--extra" or extra in project["project"]["optional-dependencies"], extra
    if words[0] == "uv" and words[1] != "run":
        return
    if "mlx.launch" in words:
        words = words[words.index("--") + 1 :]
    place = next((i for i, word in enumerate(words) if re.search(r"\.(py|sh)$", word)), None)
    if place is None:
        assert words[0] in ("git", "pip", "python", "apt-get") or words[:2] == ["uv", "run"] and words[2] in ("hf", "mlx.distributed_config"), command
        return
    script, arguments = words[place].replace("evaluate_model.sh", "evaluate.py"), words[place + 1 :]
    assert script in SCRIPTS, script
    if script == "mlx-grpo.py":
        given = mlx_grpo.parse_arguments(arguments)
        mlx_grpo.load_config(ROOT / given.config if given.config else None, [s for s in given.set if not s.endswith("...")])
        return

    original = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        given = original(self, *args, **kwargs)
        mlx_grpo.load_config(None, [s for s in getattr(given, "set", [])])
        raise Parsed

    spec = importlib.util.spec_from_file_location("checked_script", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", [script, *arguments])
        patch.setitem(sys.modules, "checked_script", module)
        spec.loader.exec_module(module)
        with pytest.raises(Parsed):
            module.main()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_that_need_more_than_this_machine_are_well_formed(page):
    for command, needs in commands(page):
        if needs:
            check(command)


def test_a_wrong_flag_is_noticed():
    with pytest.raises(SystemExit):
        check("uv run python utils/report.py outputs/run --pgn")
    with pytest.raises(mlx_grpo.UserError):
        check("uv run mlx-grpo.py --set learning_rat=1")


# --- Commands that are run --------------------------------------------------------------------------------------

SMALL = "max_train_samples=4 batch_size=2 num_generations=2 max_completion_length=12 eval_samples=2 eval_steps=0 use_compile=false".split()
SETTINGS = [word for setting in SMALL for word in ("--set", setting)]
SHAPE = "--preset tiny --prompts 2 --completions 2 --prompt-tokens 24 --tokens 8 --repeats 1".split()
SCALED = {  # what makes a command short, by script: the last of a flag counts
    "mlx-grpo.py": SETTINGS,
    "utils/sweep.py": [*SETTINGS, "--set", "learning_rate=1e-4"],
    "utils/inference.py": ["--max-tokens", "8"],
    "utils/evaluate.py": ["--max-samples", "2", "--max-tokens", "8"],
    "utils/benchmark.py": SHAPE,
    "utils/scaling.py": SHAPE,
}
RAN = []  # (script, its flags) of this session
SHELL = ("head", "tail", "grep", "sed")


def scaled(command: str) -> list[str] | None:
    """The words to run for a command; None where other tests run it (the whole suite, the benchmark of objectives)."""
    words = shlex.split(command.split(" > ")[0])
    if words[0] in SHELL:
        return words
    assert words[:2] == ["uv", "run"], command
    words = words[2:]
    if words[0] == "pytest":
        return [sys.executable, "-m", *words, "--collect-only", "-q", *([] if "tests/" in command else ["tests/test_objective.py"])]
    if words[1:3] == ["utils/benchmark.py", "objectives"]:
        return None  # tests/test_benchmark.py
    launcher = words[: words.index("--") + 1] if words[0] == "mlx.launch" else []
    words = words[len(launcher) :]
    words = words[1:] if words[0] == "python" else words
    if words[0] == "utils/sweep.py":  # two points are a sweep
        words = [re.sub(r",.*", "", w) if "=" in w and i > 3 and words[i - 1] == "--grid" else w for i, w in enumerate(words)]
    if launcher:
        launcher[0] = str(Path(sys.executable).parent / "mlx.launch")
    if "report_to" in command and not importlib.util.find_spec("tensorboard"):
        return None
    return [*launcher, sys.executable, *words, *SCALED.get(words[0], [])]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository in which the quickstart has been run, and its run stands there a second time."""
    folder = tmp_path_factory.mktemp("documents") / "repository"

    def left_out(parent, names):  # of the folders only the repository's are taken: a reader's runs and models lie beside them
        at_the_top = Path(parent) == ROOT
        foreign = {n for n in names if at_the_top and (ROOT / n).is_dir() and n not in ("configs", "docs", "mlx_grpo", "starter", "utils")}
        return foreign | {n for n in names if n.startswith(".") or n in ("__pycache__", "uv.lock")}

    shutil.copytree(ROOT, folder, ignore=left_out)
    (folder / "tests").symlink_to(ROOT / "tests")
    run(scaled("uv run mlx-grpo.py"), folder)
    shutil.copytree(folder / "outputs/quickstart", folder / "outputs/quickstart-2")
    return folder


def run(words: list[str], folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}  # the work is tiny: threads only wait for each other
    done = subprocess.run(words, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted((p for p in PAGES if any(not n for _, n in commands(p))), key=lambda p: p.name != "EXAMPLES.md"), ids=name_of)
def test_the_other_commands_run(page, copy):
    for _, block in blocks(page.read_text(encoding="utf-8"), "python"):
        if file := re.match(r"# (\w+\.py)\n", block):
            (copy / file[1]).write_text(block)
    for command, needs in commands(page):
        if needs or command in ("uv run mlx-grpo.py", "uv run pytest"):  # the first made the copy, the last is this
            continue
        script = re.search(r"[\w/-]+\.py", command)
        flags = {word for word in shlex.split(command) if word.startswith("-")} | set(re.findall("mlx.launch", command))
        if script and page.name != "EXAMPLES.md" and any(script[0] == name and flags <= before for name, before in RAN):
            check(command)
        elif words := scaled(command):
            run(words, copy)
            RAN.append((script and script[0], flags))
