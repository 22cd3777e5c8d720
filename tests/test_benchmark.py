"""The benchmark: its arguments, its tables' arithmetic, its ceilings, and one small run of each kind. Nothing is timed."""

import argparse
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "utils"))
benchmark = importlib.import_module("benchmark")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["objectives", "--updates", "0"], "--updates: invalid positive integer value: '0'"),
        (["objectives", "--seeds", "0,x"], "--seeds: invalid comma-separated integers value: '0,x'"),
        (["objectives", "--variants", "ppo"], "invalid choice: 'ppo'"),
        (["step", "--preset", "7b"], "invalid choice: '7b'"),
        (["step", "--peer", "mlx-lm"], "invalid choice: 'mlx-lm'"),
        (["memory", "--peer", "trl"], "unrecognized arguments: --peer trl"),
        (["memory", "--ragged"], "--ragged is for rollout, train and step"),
        (["train", "--completions", "1"], "--completions must be at least 2"),
        (["learn", "--peer", "mlx-lm"], "invalid choice: 'mlx-lm'"),
        (["learn", "--set", "num_iterations=2"], "--set: num_iterations: learn takes what leaves both the same work: temperature"),
    ],
)
def test_argument_errors_are_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.parse_arguments(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_help_shows_two_examples(capsys):
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(["--help"])
    assert capsys.readouterr().out.count("uv run python utils/benchmark.py") == 2


def test_a_wrong_setting_is_the_users_mistake(tmp_path, capsys):
    assert benchmark.main(["objectives", "--output", str(tmp_path), "--set", "learning_rat=1"]) == 2
    assert capsys.readouterr().err == "Unknown config key: learning_rat (did you mean learning_rate?)\n"


def write_run(folder, scores, rewards, seconds, repeats=1):
    """A run's log: evaluations at equal distances, and `repeats` updates a rollout."""
    records = [{"event": "eval", "split": "test", "em_strict": score} for score in scores]
    for reward, one in zip(rewards, seconds):
        records += [{"reward_mean": reward, "seconds/rollout": one, "seconds/reward": 0.0, "seconds/train": 1.0}] * repeats
    folder.mkdir()
    (folder / "training_log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_table_of_objectives(tmp_path):
    write_run(tmp_path / "a", [0.25, 0.5, 0.75], [9, 1, 2, 3, 4, 5], [2, 3, 4, 5, 6, 60])
    write_run(tmp_path / "b", [0.25, 0.6, 1.0], [9, 1, 1, 1, 1, 1], [2, 3, 4, 5, 6, 7])
    runs = [benchmark.read_run(tmp_path / name) for name in "ab"]
    assert [run["seconds"] for run in runs] == [5.5, 5.5]  # the median: one slow update changes nothing
    header, row = benchmark.objectives_table({"grpo": runs})
    assert len(header) == len(row)
    assert row == ["grpo", "25.0", "55.0 (50.0-60.0)", "87.5 (75.0-100.0)", "2.00 (1.00-3.00)", "5.50"]


def test_a_rollout_used_twice_is_timed_once(tmp_path):
    write_run(tmp_path / "a", [0.5, 0.5], [1, 1, 1], [2, 3, 4], repeats=2)
    run = benchmark.read_run(tmp_path / "a")
    assert run["seconds"] == 2.0  # (3 + 1) s a rollout, two updates
    assert math.isnan(run["half"]) and benchmark.spread([run["half"]], 1) == "-"


def test_speed_table():
    args = argparse.Namespace(prompts=2, completions=5, tokens=10, peer="trl")
    own = [{"rollout": x, "other": 0.5} for x in (1.0, 2.0, 9.0)]
    table = benchmark.speed_table(args, own, [{"rollout": 3.0}], {"rollout": (40.0, 30.0)}, (100.0, 60.0))
    assert table[1] == ["rollout", "2.000", "50", "20.0%", "25.0%", "3.000", "1.50"]
    assert table[2] == ["other", "0.500", "-", "-", "-", "-", "-"]


def test_costs_by_hand():
    model, args = benchmark.nn.Linear(10, 10, bias=False), argparse.Namespace(preset="tiny", prompts=1, completions=2, tokens=4, prompt_tokens=3)
    width = 2 * 4 * 2 * 64  # keys and values, layers, heads, their size
    work = benchmark.costs(args, model)
    assert work["rollout"] == (2 * 100 * (2 * 4 + 3), 4 * (400 + width * 4 * 2 * (3 + 2)))
    assert work["train"][0] == 6 * 100 * 11


def test_ceilings_are_positive():
    assert all(0 < limit < math.inf for limit in benchmark.ceilings(side=64, megabytes=1))


def test_markdown_table(capsys):
    benchmark.print_table([["name", "x"], ["a", "10"]])
    assert capsys.readouterr().out == "| name |  x |\n| ---- | -: |\n| a    | 10 |\n"


@pytest.mark.parametrize("variant", benchmark.VARIANTS)
def test_variants_are_settings_of_the_trainer(variant, tmp_path):
    folder, command = benchmark.objective_command(variant, 3, 8, tmp_path, [])
    settings = [value for flag, value in zip(command, command[1:]) if flag == "--set"]
    config = benchmark.mlx_grpo.load_config(ROOT / command[2], settings)
    rollouts = int(config.num_epochs * config.max_train_samples / config.batch_size)  # as the trainer counts
    assert rollouts * config.num_iterations == 8 and config.seed == 3 and folder == tmp_path / f"{variant}-seed3"


def test_more_updates_than_rows_become_epochs(tmp_path):
    _, command = benchmark.objective_command("2-grpo", 0, 200, tmp_path, [])
    config = benchmark.mlx_grpo.load_config(None, [v for f, v in zip(command, command[1:]) if f == "--set"])
    assert config.max_train_samples == 4000 and int(config.num_epochs * 4000 / 32) == 200


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "choose another --output" in benchmark.train_variant(tmp_path, ["mlx-grpo.py"], 1)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_failed_run_is_named_and_the_exit_status_is_1(tmp_path, capsys):
    argv = ["objectives", "--updates", "1", "--seeds", "0", "--variants", "on-policy", "--output", str(tmp_path)]
    assert benchmark.main([*argv, "--set", "model_name=no-such-folder/x/y"]) == 1
    error = capsys.readouterr().err
    assert "failed: on-policy, seed 0: Model not found: no-such-folder/x/y" in error and "1 of 1 runs failed" in error


SMALL = ["--prompt-tokens", "24", "--tokens", "4", "--repeats", "1", "--completions", "2", "--prompts", "2", "--preset", "tiny"]


@pytest.mark.parametrize("command", ["rollout", "train", "step"])
def test_each_speed_on_little_work(command, capsys):
    assert benchmark.main([command, *SMALL]) == 0
    out = capsys.readouterr().out
    assert "4.0M parameters" in out and f"| {command} " in out


def test_memory_on_little_work():  # in a process of its own: gradient checkpointing patches the model's class
    done = subprocess.run([sys.executable, "utils/benchmark.py", "memory", *SMALL], cwd=ROOT, capture_output=True, text=True, check=True)
    cases = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")][2:]
    assert cases == ["as configured", "all logits at once", "grad_checkpoint", "lora, grad_checkpoint"]


def test_ragged_prompts_have_their_lengths():
    tokenizer = benchmark.mlx_grpo.open_model(str(ROOT / "starter" / "model"))[1]
    lengths = [len(benchmark.mlx_grpo.build_prompt(tokenizer, q)) for q in benchmark.questions(tokenizer, 3, 30, True)]
    assert lengths == [30, 23, 26]  # 30 less 0, 7 and 14 modulo 10


def test_table_of_learning():
    """20 updates, so means of two: the level to reach is 90% of the highest that both come to, which is the peer's 3.0."""
    own = [(min(4.0, 0.5 * i), 1.0) for i in range(20)]
    peer = [(min(3.0, 0.25 * i), 2.0) for i in range(20)]
    header, first, second, *_, total, until = benchmark.learn_table([(own, peer)], "trl")
    assert header == ["", "this trainer", "trl", "ratio"]
    assert first == ["reward, updates 1-2", "0.25", "0.12", "-"] and second == ["reward, updates 3-4", "1.25", "0.62", "-"]
    assert total == ["seconds, all updates", "20.0", "40.0", "2.00"]
    # 2.5 and 3.0 are updates 6 and 7 of the one, 2.75 and 2.75 + 0.25 updates 12 and 13 of the other.
    assert until == ["seconds until the reward is 2.70", "7.0", "26.0", "3.71"]


def test_table_of_learning_has_the_seeds_ranges():
    flat = lambda reward, seconds: [(reward, seconds)] * 4  # noqa: E731
    table = benchmark.learn_table([(flat(1.0, 1.0), flat(2.0, 3.0)), (flat(3.0, 2.0), flat(2.0, 2.0))], "trl")
    assert [row[0] for row in table[1:5]] == [f"reward, updates {i}-{i}" for i in range(1, 5)]  # too few for tenths
    assert table[1][1:] == ["2.00 (1.00-3.00)", "2.00", "-"]
    assert table[5][1:] == ["6.0 (4.0-8.0)", "10.0 (8.0-12.0)", "2.00 (1.00-3.00)"]
    assert table[6][0] == "seconds until the reward is 1.35 (0.90-1.80)" and table[6][1] == "1.5 (1.0-2.0)"


TEXT = "<reasoning>\n1\n</reasoning>\n<answer>\n0\n</answer>"  # all but the right answer: 2.0
FAKE_PEER = f"""#!{sys.executable}
import json, sys
work = json.loads(sys.stdin.readline())
json.dump(work, open(sys.argv[0] + ".work", "w"))
while sys.stdin.readline() == "go\\n":
    print(json.dumps([{TEXT!r}] * work["prompts"] * work["completions"]), flush=True)
    rewards = json.loads(sys.stdin.readline())
    assert rewards == [2.0] * work["prompts"] * work["completions"]
    print(json.dumps({{"step": 3.0}}), flush=True)
"""


def test_learning_gives_the_peer_the_same_work(tmp_path, capsys):
    fake = tmp_path / "python"
    fake.write_text(FAKE_PEER)
    fake.chmod(0o755)
    argv = ["learn", "--updates", "2", "--seeds", "3", "--peer-python", str(fake), "--set", "batch_size=2", "--set", "num_generations=2"]
    assert benchmark.main([*argv, "--set", "max_completion_length=8", "--set", "clip_eps=0.3"]) == 0
    out = capsys.readouterr().out
    assert "2 updates of 2 prompts x 2 completions" in out and "trl 6.0 s" in out and out.count("| 2.00 |") == 2

    work = json.loads((tmp_path / "python.work").read_text())
    assert Path(work["model"]).resolve() == ROOT / "starter" / "model" and len(work["chats"]) == 4
    system, user = work["chats"][0]["prompt"]
    assert system == {"role": "system", "content": benchmark.mlx_grpo.SYSTEM_PROMPT} and user["content"] in benchmark.starter_problems()[:4]
    settings = work["settings"]
    assert settings["learning_rate"] == 1e-4 and settings["lr_scheduler_type"] == "constant" and settings["max_steps"] == 2
    assert settings["epsilon"] == 0.3 and settings["beta"] == 0.0 and settings["seed"] == 3 and settings["loss_type"] == "grpo"
    assert settings["generation_kwargs"] == {"stop_strings": ["</answer>"]}


def test_the_peer_has_the_problems_in_the_order_they_are_drawn(tmp_path):
    args = benchmark.parse_arguments(["learn", "--updates", "3", "--set", "batch_size=2"])
    trainer, rows = benchmark.learner(args, 1, tmp_path)
    assert trainer.updates == 3 and [row for _, row in trainer.next_rows(6)] == rows


def test_settings_of_learning_are_settings_of_the_trainer():
    assert set(benchmark.LEARN_SETTINGS) <= set(benchmark.mlx_grpo.MLXGRPOConfig.__dataclass_fields__)


def test_a_peer_that_cannot_start_is_one_line(capsys):
    assert benchmark.main(["step", *SMALL, "--peer", "trl", "--peer-python", "/no/python"]) == 2
    assert "Cannot run /no/python" in capsys.readouterr().err


def test_the_peer_mlx_lm_does_the_same_work(capsys):
    assert benchmark.main(["rollout", *SMALL, "--peer", "mlx-lm", "--peer-python", sys.executable]) == 0
    assert "| mlx-lm | ratio |" in capsys.readouterr().out


@pytest.mark.slow
def test_one_variant_for_one_update_and_again(tmp_path):
    command = [sys.executable, "utils/benchmark.py", "objectives", "--updates", "1", "--seeds", "0", "--variants", "on-policy",
               "--output", str(tmp_path), "--set", "max_completion_length=16"]  # fmt: skip
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    written = (tmp_path / "on-policy-seed0" / "training_log.jsonl").stat().st_mtime_ns
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "| on-policy |" in first.stdout and "1 runs, 0 done already" in first.stdout
    assert "1 runs, 1 done already" in second.stdout and first.stdout.splitlines()[-1] == second.stdout.splitlines()[-1]
    assert (tmp_path / "on-policy-seed0" / "training_log.jsonl").stat().st_mtime_ns == written
