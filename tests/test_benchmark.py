"""The benchmark: its arguments, its tables' arithmetic, its ceilings, and one small run of each kind. Nothing is timed."""

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "utils"))
benchmark = importlib.import_module("benchmark")
drivers, learning = importlib.import_module("peers.drivers"), importlib.import_module("peers.learning")


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
        (["memory", "--lengths", "natural"], "unrecognized arguments: --lengths natural"),
        (["step", "--model", "here", "--preset", "tiny"], "--preset: not allowed with argument --model"),
        (["step", "--median", "64", "--tokens", "64"], "--median must be below --tokens"),
        (["step", "--cut", "0.5"], "--cut between 0 and 0.5"),
        (["train", "--completions", "1"], "--completions must be at least 2"),
        (["learn", "--peer", "mlx-lm"], "invalid choice: 'mlx-lm'"),
        (["learn", "--target", "high"], "--target: invalid float value: 'high'"),
    ],
)
def test_argument_errors_are_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.parse_arguments(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1



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
    """The first turn stands alone; speed and ratio are of all the others, so that a shape compiled among them counts."""
    args = argparse.Namespace(peer="trl")
    own = [{"rollout": x, "other": 0.5} for x in (30.0, 1.0, 2.0, 9.0)]
    theirs = [{"rollout": x} for x in (5.0, 3.0, 3.0, 6.0)]
    table = benchmark.speed_table(args, own, theirs, 600, {"rollout": (240.0, 180.0)}, (100.0, 60.0))
    assert table[1] == ["rollout", "30.000", "2.000", "4.000", "50", "20.0%", "25.0%", "5.000", "3.000", "4.000", "1.00"]
    assert table[2] == ["other", "0.500", "0.500", "0.500", "-", "-", "-", "-", "-", "-", "-"]
    crashed = benchmark.speed_table(args, own, None, 600, {}, (100.0, 60.0))
    assert [len(row) for row in crashed] == [11] * 3 and crashed[1][-4:] == ["crashed", "-", "-", "-"]


def test_costs_by_hand():
    from mlx_lm.models import llama

    shape = dict(hidden_size=8, num_hidden_layers=1, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1, vocab_size=8)
    model = llama.Model(llama.ModelArgs(model_type="llama", rms_norm_eps=1e-6, tie_word_embeddings=True, **shape))
    count = 8 * 8 + 2 * 64 + 2 * 32 + 3 * 64 + 3 * 8  # embedding, queries and output, keys and values, feed-forward, norms
    work = benchmark.costs(model, [([3], [4, 2]), ([5], [1, 1])])
    positions = 3 + 4 + 2 + 5 + 1 + 1
    kv = 2 * 1 * 4 * 4  # keys and values, heads, their width, bytes
    read = 4 * (3 + 4 / 2) + 2 * (3 + 2 / 2) + 2 * 1 * (5 + 1 / 2)
    assert work["rollout"] == (2 * count * positions, (4 + 1) * 4 * count + read * kv)
    assert work["train"][0] == 6 * count * positions


def speed_arguments(*more):
    return benchmark.parse_arguments(["step", "--preset", "tiny", *more])


def test_lengths_are_log_normal_and_cut():
    args = speed_arguments("--prompts", "100", "--completions", "100", "--tokens", "300", "--median", "100", "--cut", "0.1")
    lengths = np.array(benchmark.completion_lengths(args, 0))
    sigma = math.log(3) / 1.2815516  # the normal distribution's 90% quantile
    assert benchmark.completion_sigma(args) == pytest.approx(sigma)
    assert lengths.min() >= 1 and lengths.max() == 300 and abs((lengths == 300).mean() - 0.1) < 0.01
    assert abs(np.median(lengths) - 100) < 3 and abs(np.quantile(lengths, 0.25) - 100 * math.exp(-0.6745 * sigma)) < 3


def test_lengths_depend_on_seed_turn_prompt_and_row_alone():
    args = speed_arguments("--prompts", "3", "--completions", "2")
    drawn = benchmark.completion_lengths(args, 4)
    assert drawn == benchmark.completion_lengths(args, 4) != benchmark.completion_lengths(args, 5)
    assert drawn[:4] == benchmark.completion_lengths(speed_arguments("--prompts", "2", "--completions", "2"), 4)
    assert drawn != benchmark.completion_lengths(speed_arguments("--prompts", "3", "--completions", "2", "--seed", "1"), 4)
    assert benchmark.completion_lengths(speed_arguments("--prompts", "3", "--tokens", "9", "--lengths", "fixed"), 4) == [9] * 24


def test_prompts_have_from_two_thirds_of_their_length():
    lengths = benchmark.prompt_lengths(speed_arguments("--prompt-tokens", "60"), 500)
    assert (min(lengths), max(lengths)) == (40, 60) and benchmark.prompt_lengths(speed_arguments("--lengths", "fixed"), 2) == [125, 125]


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


SMALL = ["--prompt-tokens", "30", "--tokens", "6", "--repeats", "1", "--completions", "2", "--prompts", "2", "--preset", "tiny"]
QUICK = [*SMALL, "--set", "use_compile=false"]


def table_of(out: str) -> list[list[str]]:
    """The cells of the table's rows, without its head."""
    lines = [line for line in out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


PHASES = {"rollout": ["rollout"], "train": ["train"], "step": ["rollout", "train", "other", "step"]}


@pytest.mark.parametrize("command", PHASES)
def test_each_speed_on_little_work(command, capsys):
    assert benchmark.main([command, *QUICK]) == 0
    out = capsys.readouterr().out
    assert "4.0M parameters, float32; 2 prompts of 20 to 30 tokens, new ones each turn, x 2 completions of at most 6 tokens" in out
    assert "(log-normal, median 2, sigma 0.67, 5% cut at the limit, seed 0; mean " in out
    rows = table_of(out)
    assert [row[0] for row in rows] == PHASES[command]
    assert all(row[2] == row[3] for row in rows)  # one turn after the first: its seconds are the median and the mean
    if command == "step":
        first, later = np.array([row[1:3] for row in rows], float).T
        assert [first[:3].sum(), later[:3].sum()] == pytest.approx([first[3], later[3]], abs=0.002)


def test_fixed_lengths(capsys):
    assert benchmark.main(["rollout", *QUICK, "--lengths", "fixed"]) == 0
    assert "2 prompts of 30 tokens x 2 completions of 6 tokens; the first turn and 1 more" in capsys.readouterr().out


def test_rows_end_where_they_are_to_and_prompts_are_new_each_turn(tmp_path):
    args = benchmark.parse_arguments(["rollout", *QUICK])
    trainer = benchmark.prepare(args, tmp_path, args.set, turns=2)
    asked = [[3, 6, 1, 2], [6, 5, 4, 3]]
    groups = []
    for lengths in asked:
        with benchmark.rows_ending_at(lengths):
            groups.append(trainer.rollout(2, benchmark.mlx_grpo.Stopwatch()))
    assert [[len(one.ids) for group in turn for one in group.completions] for turn in groups] == asked
    assert [one.finish_reason for group in groups[0] for one in group.completions] == ["eos", "length", "eos", "eos"]
    prompts = [group.row["prompt"] for turn in groups for group in turn]
    assert len(set(prompts)) == 4


def test_a_program_that_did_other_work_is_found_out():
    with pytest.raises(benchmark.mlx_grpo.RunError, match="trl sampled 7 tokens where 8 were asked for"):
        benchmark.check_tokens("trl", 7, [3, 5])


def test_a_real_model_in_place_of_a_shape(capsys):
    model = str(ROOT / "starter" / "model")
    assert benchmark.main(["step", *QUICK[:-4], "--model", model, *QUICK[-2:]]) == 0
    assert f"{model}: 0.7M parameters" in capsys.readouterr().out


def test_memory_on_little_work():  # in a process of its own: gradient checkpointing patches the model's class
    done = subprocess.run([sys.executable, "utils/benchmark.py", "memory", *SMALL], cwd=ROOT, capture_output=True, text=True, check=True)
    cases = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")][2:]
    assert cases == ["as configured", "all logits at once", "grad_checkpoint", "lora, grad_checkpoint"]


def test_prompts_have_their_lengths():
    tokenizer = benchmark.mlx_grpo.open_model(str(ROOT / "starter" / "model"))[1]
    lengths = [30, 23, 26]
    assert [len(benchmark.mlx_grpo.build_prompt(tokenizer, q)) for q in benchmark.questions(tokenizer, lengths)] == lengths


def test_prompts_shorter_than_the_template_are_refused(capsys):
    model = benchmark.mlx_grpo.open_model(str(ROOT / "starter" / "model"))[1]
    with pytest.raises(benchmark.mlx_grpo.UserError, match=r"No 1 prompts of 2 to 2 tokens .* \(the chat template alone takes \d+\)"):
        benchmark.questions(model, [2])


# --- Learning beside a peer -------------------------------------------------------------------------------------


def course(seconds, scores, crashed=False):
    return learning.Course(seconds=seconds, scores=scores, crashed=crashed)


def test_table_of_learning():
    """Both come to 0.6 (the peer's best): ours at the evaluation after two turns, theirs after three."""
    own = course([9.0, 1.0, 1.0], {0: 0.1, 2: 0.7, 3: 0.8})
    peer = course([6.0, 2.0, 4.0], {0: 0.1, 2: 0.4, 3: 0.6})
    header, *rows = benchmark.learn_table([(own, peer)], "trl", 1, None)
    assert header == ["", "this trainer", "trl", "ratio"] and rows == [
        ["held-out reward before", "0.100", "0.100", "-"],
        ["held-out reward after", "0.800", "0.600", "-"],
        ["seconds to 0.600", "10.0", "12.0", "1.20"],
        ["seconds of all updates", "11.0", "12.0", "1.09"],
        ["seconds an update, median", "1.000", "3.000", "3.00"],
        ["seconds of the first update", "9.0", "6.0", "0.67"],
    ]
    assert benchmark.learn_table([(own, peer)], "trl", 2, 0.75)[3] == ["seconds to 0.750", "11.0", "not reached", "-"]
    assert benchmark.learn_table([(own, peer)], "trl", 2, None)[5][1] == "0.500"  # two updates a turn
    assert benchmark.curve_table([(own, peer)], "trl", 2)[1:] == [
        ["0", "0.0", "0.100", "0.0", "0.100"], ["4", "10.0", "0.700", "8.0", "0.400"], ["6", "11.0", "0.800", "12.0", "0.600"],
    ]  # fmt: skip


def test_a_peer_that_crashed_has_not_lost():
    """Its level is nobody's, and the table says how many seeds it crashed in."""
    own, peer = course([9.0, 1.0], {0: 0.1, 2: 0.8}), course([6.0, 2.0], {0: 0.1, 2: 0.6})
    dead = course([6.0], {0: 0.1}, crashed=True)
    table = benchmark.learn_table([(own, peer), (own, dead)], "trl", 1, None)
    assert table[2][2] == "0.600, 1 of 2 crashed" and table[3] == ["seconds to 0.700 (0.600-0.800)", "10.0", "8.0, 1 of 2 crashed", "0.80"]
    alone = benchmark.learn_table([(own, dead)], "trl", 1, None)
    assert alone[3] == ["seconds to 0.800", "10.0", "crashed", "-"] and alone[6][2] == "6.0"
    assert benchmark.curve_table([(own, dead)], "trl", 1)[2] == ["2", "10.0", "0.800", "crashed", "crashed"]


@pytest.mark.parametrize(("eval_steps", "mu", "turns"), [(2, 1, [2, 4, 5]), (0, 1, [5]), (3, 2, [2, 4, 5]), (50, 1, [5])])
def test_weights_are_kept_every_so_many_updates_and_at_the_end(eval_steps, mu, turns):
    config = argparse.Namespace(eval_steps=eval_steps, num_iterations=mu)
    assert learning.evaluation_turns(config, 5) == turns


def test_settings_in_the_peers_words():
    config = benchmark.mlx_grpo.load_config(None, [
        "clip_eps=0.3", "kl_coeff=0.1", "warmup_ratio=0.25", "num_generations=4", "batch_size=2", "dynamic_sampling_max_batches=2",
        "learning_rate=1e-4", "seed=3", "gradient_accumulation_steps=2",
    ])  # fmt: skip
    settings = learning.peer_settings(config, 10)
    expected = {"epsilon": 0.3, "beta": 0.1, "warmup_steps": 3, "max_steps": 10, "min_p": None, "learning_rate": 1e-4, "seed": 3}
    expected |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "loss_type": "grpo", "num_generations": 4}
    assert expected.items() <= settings.items() and settings["generation_kwargs"] == {"stop_strings": ["</answer>"]}
    assert learning.not_in_peer(config) == ["dynamic_sampling_max_batches"]


def test_every_named_setting_is_the_trainers():
    assert {*learning.BOTH_HAVE, *learning.HANDLED} <= set(benchmark.mlx_grpo.MLXGRPOConfig.__dataclass_fields__)


def test_adapters_are_refused(tmp_path, capsys):
    assert benchmark.main(["learn", "--seeds", "0", "--set", "fine_tune_type=lora"]) == 2
    assert "learn trains every weight" in capsys.readouterr().err


def starter_ids(text: str) -> list[int]:
    return benchmark.mlx_grpo.open_model(str(ROOT / "starter" / "model"))[1].encode(text, add_special_tokens=False)


FAKE_PEER = """#!{python}
import json, os, shutil, sys
work = json.loads(sys.stdin.readline())
json.dump(work, open(sys.argv[0] + ".work", "w"))
say = lambda message: print(json.dumps(message), flush=True)
rows = work["prompts"] * work["completions"]
turn = 0
while json.loads(sys.stdin.readline()) == "go":
    if turn == {crash}:
        sys.exit("Traceback\\nRuntimeError: device-side assert")
    say({{"rows": [turn * work["prompts"] + i // work["completions"] for i in range(rows)], "ids": [{ids}] * rows}})
    rewards = json.loads(sys.stdin.readline())
    assert rewards == [[1.0] * rows], rewards
    say({{"step": 3.0}})
    turn += 1
    if turn in work["save_at"]:
        file = os.path.join(work["folder"], "peer-%d.safetensors" % turn)
        shutil.copy(os.path.join(work["model"], "model.safetensors"), file)
        say({{"saved": file}})
"""
OWN_REWARD = """
def says_seven(completions, question_number, answer, **columns):
    assert len(question_number) == len(completions) == len(answer)
    return [float("7" in chat[0]["content"]) for chat in completions]
"""


@pytest.fixture
def own_task(tmp_path):
    """A configuration with data, columns and a reward function of its own."""
    rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1), "question_number": i} for i in range(6)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text(OWN_REWARD)
    (tmp_path / "task.toml").write_text(
        f'model_name = "{ROOT}/starter/model"\ndataset = "{tmp_path}"\nreward_funcs = ["{tmp_path}/mine.py:says_seven"]\n'
        "batch_size = 2\nnum_generations = 2\nmax_completion_length = 8\nnum_epochs = 2\neval_steps = 2\nuse_compile = false\nsystem_prompt = ''\n"
    )
    return tmp_path


def learn_beside(fake: str, folder: Path, *more) -> int:
    python = folder / "python"
    python.write_text(fake)
    python.chmod(0o755)
    return benchmark.main(["learn", "--config", str(folder / "task.toml"), "--seeds", "3", "--peer-python", str(python), *more])


def test_learning_gives_the_peer_the_same_work(own_task, capsys):
    fake = FAKE_PEER.format(python=sys.executable, crash=-1, ids=starter_ids("7"))
    assert learn_beside(fake, own_task, "--updates", "3", "--set", "clip_eps=0.3") == 0
    out = capsys.readouterr().out
    assert "task.toml, " in out and "3 updates of 2 prompts x 2 completions" in out and "trl 9.0 s" in out
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    assert table[2][0] == "held-out reward before" and table[2][2] == table[3][2]  # its weights are those of the start
    assert [row[0] for row in table[-3:]] == ["0", "2", "3"]

    work = json.loads((own_task / "python.work").read_text())
    args = benchmark.parse_arguments(["learn", "--config", str(own_task / "task.toml")])
    trainer, rows = learning.learner(args, 3, own_task)
    assert trainer.updates == 6 and work["ids"] == [row["prompt_ids"] for row in rows][:6]
    assert [group.row for group in trainer.rollout(12, benchmark.mlx_grpo.Stopwatch())] == rows
    assert Path(work["model"]).resolve() == ROOT / "starter" / "model" and work["rewards"] == 1 and work["save_at"] == [2, 3]
    assert work["settings"]["epsilon"] == 0.3 and work["settings"]["max_steps"] == 3 and work["settings"]["reward_weights"] == [1.0]


def test_a_peer_that_crashes_while_it_learns(own_task, capsys):
    fake = FAKE_PEER.format(python=sys.executable, crash=2, ids=starter_ids("7"))
    assert learn_beside(fake, own_task, "--updates", "3") == 1
    out, err = capsys.readouterr()
    assert "seed 3: this trainer" in out and "trl crashed\n" in out and "| crashed |" in out
    assert "Traceback\nRuntimeError: device-side assert\ntrl crashed with status 1: RuntimeError: device-side assert\n" in err
    assert err.endswith("trl crashed in 1 of 1 runs; the last lines of its log are above\n")


def test_a_peer_that_crashes_in_a_speed_run_leaves_our_figures(tmp_path, capsys):
    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable}\nimport sys\nsys.stdin.readline()\nsys.exit('no memory')\n")
    fake.chmod(0o755)
    assert benchmark.main(["rollout", *QUICK, "--peer", "trl", "--peer-python", str(fake)]) == 1
    out, err = capsys.readouterr()
    assert "crashed | " in out and "trl crashed with status 1: no memory" in err


def test_a_peer_that_cannot_start_is_one_line(capsys):
    assert benchmark.main(["step", *QUICK, "--peer", "trl", "--peer-python", "/no/python"]) == 2
    assert "Cannot run /no/python" in capsys.readouterr().err


def test_the_peer_mlx_lm_does_the_same_work(capsys):
    assert benchmark.main(["rollout", *QUICK, "--peer", "mlx-lm", "--peer-python", sys.executable]) == 0
    out = capsys.readouterr().out
    assert "| mlx-lm: first, s | median, s | mean, s | ratio |" in out
    ((phase, *cells),) = table_of(out)
    own, theirs, ratio = (float(cells[column]) for column in (2, -2, -1))
    assert phase == "rollout" and ratio == pytest.approx(theirs / own, rel=0.1)


def test_trl_ends_rows_where_they_are_to():
    """Two prompt positions, lengths 1, 3 and the limit 4; the end ids 5 and 6 come nowhere else."""
    ending = drivers.EndingAt(2, [1, 3, 4], [5, 6], limit=4)
    for drawn in range(4):
        scores = ending(np.zeros((3, 2 + drawn)), np.ones((3, 8)))
        ends = [row for row in range(3) if np.isfinite(scores[row]).sum() == 1]
        assert ends == {0: [0], 2: [1]}.get(drawn, []) and all(scores[row].argmax() == 5 for row in ends)
        assert np.isinf(scores[[row for row in range(3) if row not in ends]][:, [5, 6]]).all()


@pytest.mark.parametrize(
    ("ids", "pad", "kept"),
    [
        ([1, 2, 9], 9, [1, 2, 9]),  # the model's end id, which is the pad id
        ([1, 7, 9], 9, [1, 7]),  # a stop string (7) ended it: TRL took the padding for an end id
        ([1, 7, 0, 0], 0, [1, 7]),  # the same with a pad id of its own
        ([0, 0, 0], 0, [0, 0, 0]),  # an id that the model drew
    ],
)
def test_only_padding_after_a_stop_string_goes(ids, pad, kept):
    assert drivers.without_padding(ids, pad, ["7"], lambda ids: " ".join(map(str, ids))) == kept


@pytest.mark.slow
@pytest.mark.skipif("MLX_GRPO_TRL_PYTHON" not in os.environ, reason="MLX_GRPO_TRL_PYTHON names no interpreter that has trl")
@pytest.mark.parametrize("command", ["step", "learn"])
def test_trl_itself(command, own_task, capsys):
    python = ["--peer", "trl", "--peer-python", os.environ["MLX_GRPO_TRL_PYTHON"]]
    work = QUICK if command == "step" else ["--config", str(own_task / "task.toml"), "--seeds", "0", "--updates", "2"]
    assert benchmark.main([command, *work, *python]) == 0
    assert "crashed" not in capsys.readouterr().out


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
