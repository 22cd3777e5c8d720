"""utils/evaluate.py: its statistics against worked numbers and brute force, its scores against the trainer's. No network."""

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
from pathlib import Path

import mlx_grpo
import pytest
from mlx_grpo.export import save_model

ROOT = Path(__file__).parents[1]
STARTER, DATA = str(ROOT / "starter" / "model"), str(ROOT / "starter" / "data")
spec = importlib.util.spec_from_file_location("evaluate", ROOT / "utils" / "evaluate.py")
evaluate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(evaluate)


@pytest.fixture
def score(capsys):
    """Run the script in this process: (exit status, stdout, stderr)."""

    def run(*arguments):
        try:
            status = evaluate.main([str(a) for a in arguments])
        except SystemExit as stop:  # argparse
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


# Statistics


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    for n, right in [(5, 0), (5, 2), (6, 1), (4, 4)]:
        answers = [True] * right + [False] * (n - right)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(answers, k))
            assert evaluate.pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(
    "answers, k, share",
    [
        (["3", "4", "4"], 3, 1.0),
        (["3", "4", "$4.00"], 3, 1.0),  # equal numbers are one answer
        (["3", "", "", "", "4", "4"], 6, 1.0),  # no answer, no vote
        (["", ""], 2, 0.0),
        (["3", "4"], 2, 0.0),  # a tie: the first
        (["4", "3"], 2, 1.0),
        (["4", "3", "3", "3", "4"], 2, 0.5),  # two groups, one answer left over
        (["1e3", "1,000", "4"], 3, 0.0),
    ],
)
def test_maj_at_k(answers, k, share):
    assert evaluate.maj_at_k(answers, "4", k) == share


def test_maj_at_k_of_words_and_large_numbers():
    assert evaluate.maj_at_k(["Paris", "paris", "Rome"], "PARIS", 3) == 1.0
    assert evaluate.maj_at_k(["1000000", "1,000,000", "7"], "1000000.0", 3) == 1.0


def test_mcnemar():
    hits = lambda b, c: ([True] * b + [False] * c + [True], [False] * b + [True] * c + [True])  # noqa: E731
    assert evaluate.mcnemar(*hits(1, 9)) == (1, 9, pytest.approx(22 / 1024))  # 2 (C(10,0) + C(10,1)) / 2^10
    assert evaluate.mcnemar(*hits(9, 1))[2] == pytest.approx(22 / 1024)
    assert evaluate.mcnemar(*hits(0, 0)) == (0, 0, 1.0) and evaluate.mcnemar(*hits(3, 3))[2] == 1.0
    assert 0 < evaluate.mcnemar(*hits(400, 900))[2] < 1e-40  # exact, and no overflow


def test_rate_is_wilson():
    assert evaluate.rate([True] * 8 + [False] * 2) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert evaluate.rate([0.5, 1.0, 0.0])[0] == 0.5


# Scores


def test_greedy_scores_are_the_trainers(score):
    config = mlx_grpo.MLXGRPOConfig(dataset=DATA, max_completion_length=80)
    rows = mlx_grpo.load_dataset_split(config, "test")[:25]
    model, tokenizer, _ = mlx_grpo.open_model(STARTER)
    expected = mlx_grpo.evaluate(model, tokenizer, rows, config)
    status, out, _ = score("--model", STARTER, "--dataset", DATA, "--max-samples", "25", "--max-tokens", "80", "--json")
    result = json.loads(out)["models"][0]
    assert status == 0 and result["n"] == 25 and expected["em_lenient"] > 0
    for kind in ("em_strict", "em_lenient"):
        assert result[kind] == pytest.approx([expected[kind], *expected[f"{kind}_ci"]])


def test_an_evaluation_decodes_no_more_rows_at_a_time_than_a_rollout(monkeypatch):
    seen, real = [], mlx_grpo.decode
    monkeypatch.setattr(mlx_grpo.script, "decode", lambda *given: (seen.append(len(given[3])), real(*given))[1])
    config = mlx_grpo.MLXGRPOConfig(dataset=DATA, max_completion_length=8, batch_size=3, num_generations=12)
    rows = mlx_grpo.load_dataset_split(config, "test")[:40]
    mlx_grpo.evaluate(*mlx_grpo.open_model(STARTER)[:2], rows, config)
    assert sum(seen[:-1]) <= 36 and sum(seen) == 40  # in lanes


def test_samples_answers_file_and_comparison(score, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH", 8)  # several batches
    output = tmp_path / "answers.jsonl"
    arguments = ["--dataset", DATA, "--max-samples", "20", "--max-tokens", "80", "--samples", "4"]
    prefix = "<reasoning>\n"
    config = tmp_path / "c.toml"
    config.write_text(f"completion_prefix = {json.dumps(prefix)}\nseed = 3\n")
    one = json.loads(score("--model", STARTER, *arguments, "--json")[1])["models"][0]
    status, out, err = score("--model", STARTER, STARTER, *arguments, "--config", config, "--output", output, "--json")
    both = json.loads(out)
    assert (status, err) == (0, "")
    assert {"pass@1_strict", "pass@2_lenient", "pass@4_strict", "maj@2_strict", "maj@4_lenient"} <= set(one)
    assert "maj@1_strict" not in one and "pass@3_strict" not in one
    assert one["pass@1_strict"][0] <= one["pass@2_strict"][0] <= one["pass@4_strict"][0]

    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(records) == 2 * 20 * (1 + 4) and all(r["text"].startswith(prefix) for r in records)
    first = records[:100]
    assert [(r["index"], r["sample"]) for r in first] == [(i, None) for i in range(20)] + [(i, s) for i in range(20) for s in range(4)]
    assert all((r["strict"], r["lenient"]) == mlx_grpo.grade(r["text"], r["gold"]) for r in records)
    greedy, sampled = first[:20], first[20:]
    scores = both["models"][0]
    assert scores["em_strict"][0] == pytest.approx(sum(r["strict"] for r in greedy) / 20)
    assert scores["pass@1_strict"][0] == pytest.approx(sum(r["strict"] for r in sampled) / 80)
    assert len({r["text"] for r in sampled if r["index"] == 0}) > 1 and scores["tokens_per_second"] > 0
    assert [(p["kind"], p["only_first"], p["only_second"], p["p"]) for p in both["pairs"]] == [("strict", 0, 0, 1.0), ("lenient", 0, 0, 1.0)]


def test_models_are_scored_by_any_reward(score, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def length(completions, answer, **columns):\n"
        "    assert all(answer) and 'prompts' in columns\n"
        "    return [None if i == 0 else len(c[0]['content']) / 100 for i, c in enumerate(completions)]\n"
    )
    output = tmp_path / "answers.jsonl"
    arguments = ["--dataset", DATA, "--max-samples", "6", "--max-tokens", "20", "--reward", f"{file}:length", "last_number_reward_func"]
    status, out, err = score("--model", STARTER, STARTER, *arguments, "--samples", "2", "--output", output, "--json")
    assert (status, err) == (0, "")
    both, records = json.loads(out), [json.loads(line) for line in output.read_text().splitlines()][:18]
    greedy = [r["rewards"]["length"] for r in records if r["sample"] is None]
    assert greedy[0] is None and greedy[1] == len(records[1]["text"]) / 100
    assert both["models"][0]["rewards/length"][0] == pytest.approx(sum(greedy[1:]) / 5)
    hits = [r["rewards"]["last_number_reward_func"] for r in records if r["sample"] is None]
    assert both["models"][0]["rewards/last_number_reward_func"] == pytest.approx(evaluate.rate(hits))
    assert "rewards/length, sampled" in both["models"][0]
    assert [(p["kind"], p["only_first"], p["gain"]) for p in both["pairs"][:1]] == [("rewards/length", 0, 0.0)]
    status, out, _ = score("--model", STARTER, *arguments)
    assert status == 0 and "length" in out and "exact match" not in out and "6 questions" in out
    assert score("--model", STARTER, "--dataset", DATA, "--reward", "corectness")[2].startswith("Unknown reward function: corectness")


def test_rewards_are_compared_by_the_sign_test():
    answers = [[{"sample": None, "rewards": {"r": value}} for value in values] for values in ([0.1, 0.5, None, 1.0], [0.2, 0.7, 1.0, 1.0])]
    pair = evaluate.compare_rewards([{"model": "a"}, {"model": "b"}], answers, 0, 1, "r")
    assert (pair["only_first"], pair["only_second"], pair["p"]) == (0, 2, 0.5)
    assert pair["gain"] == pytest.approx(0.1)


def test_tables_and_adapters(score, tmp_path):
    config = mlx_grpo.MLXGRPOConfig(model_name=STARTER, fine_tune_type="lora", lora_parameters={"rank": 2, "scale": 50.0})
    model, tokenizer = mlx_grpo.load_model(config)
    for _, layer in mlx_grpo.adapter_layers(model):
        layer.lora_b = layer.lora_b + 0.3  # enough to write nonsense
    save_model(tmp_path, model, tokenizer, mlx_grpo.open_model(STARTER)[2], Path(STARTER), config)
    arguments = ["--dataset", DATA, "--max-samples", "12", "--max-tokens", "60", "--adapter-path", "none", tmp_path]
    result = json.loads(score("--model", STARTER, STARTER, *arguments, "--json")[1])
    plain, adapted = result["models"]
    lenient = result["pairs"][1]
    hits = round(12 * plain["em_lenient"][0])
    assert hits > 5 and adapted["em_lenient"][0] == 0.0 and adapted["model"] == f"{STARTER} + {tmp_path}"
    assert (lenient["only_first"], lenient["only_second"], lenient["gain"]) == (hits, 0, -hits / 12)
    assert lenient["p"] == pytest.approx(2 / 2**hits)
    status, out, _ = score("--model", STARTER, STARTER, *arguments)
    assert status == 0 and "12 graded questions" in out and "McNemar" in out and "A and B" in out
    assert evaluate.percent(*plain["em_lenient"]) in out and evaluate.percent(*adapted["em_lenient"]) in out
    assert f"{lenient['p']:.4f}" in out and f"{100 * lenient['gain']:.1f} points" in out


def test_files_of_questions_and_local_data(score, tmp_path):
    questions, rows = tmp_path / "test_questions.txt", tmp_path / "rows.jsonl"
    lines = [json.loads(line) for line in Path(DATA, "test.jsonl").read_text().splitlines()[:3]]
    gold = [row["answer"].split("####")[1].strip() for row in lines]
    questions.write_text("\n\n".join(row["question"] for row in lines))
    status, out, _ = score("--model", STARTER, "--dataset", questions)
    assert status == 0 and "0 graded questions" in out and all(row["question"] in out for row in lines)
    questions.write_text(f"{lines[0]['question']} #### {gold[0]}\n{lines[1]['question']}\n")  # one of two has an answer
    output = tmp_path / "a.jsonl"
    result = json.loads(score("--model", STARTER, "--dataset", questions, "--json", "--output", output)[1])["models"][0]
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert (result["n"], result["em_lenient"][0]) == (1, float(records[0]["lenient"]))
    assert [r["gold"] for r in records] == [gold[0], None] and records[1]["lenient"] is None
    rows.write_text("\n".join(json.dumps({"q": row["question"], "a": row["answer"]}) for row in lines))
    local = ("--dataset", rows, "--prompt-field", "q", "--answer-field", "a", "--json")
    assert json.loads(score("--model", STARTER, *local)[1])["models"][0]["n"] == 3  # all rows: none is set aside


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "--model"),
        (["--model", STARTER, "--k", "2"], "--k must be from 1 to --samples (0)"),
        (["--model", STARTER, "--samples", "-1"], "must be at least 0"),
        (["--model", STARTER, "--samples", "two"], "invalid int value: 'two'"),
        (["--model", STARTER, STARTER, "--adapter-path", "x"], "give one for each"),
        (["--model", STARTER, "--temperature", "0"], "Invalid temperature: 0.0"),
        (["--model", STARTER, "--config", "absent.toml"], "Config file not found: absent.toml"),
        (["--model", STARTER, "--dataset", "absent.txt"], "Failed to read questions: absent.txt: No such file or directory"),
        (["--model", STARTER, "--dataset", DATA, "--prompt-field", "x"], "no field 'x'"),
        (["--model", STARTER, "./absent/", "--dataset", DATA], "Model not found: ./absent/"),
        (["--model", STARTER, "--dataset", DATA, "--output", "absent/a.jsonl"], "Cannot write absent/a.jsonl: No such file or directory"),
        (["--model", STARTER, STARTER, "--dataset", DATA, "--adapter-path", "none", "absent"], "absent has no adapter_config.json"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(score, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    status, out, err = score(*arguments)
    assert (status, out) == (2, "") and said in err and err.count("\n") == 1



def test_every_flag_names_a_setting():
    assert {setting for _, setting, _, _ in evaluate.FLAGS} <= {f.name for f in dataclasses.fields(mlx_grpo.MLXGRPOConfig)}


def test_the_shell_script_passes_its_arguments_on(tmp_path):
    fake = tmp_path / "bin" / "uv"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nfor argument in "$@"; do printf "%s\\n" "[$argument]"; done\nexit 7\n')
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"}
    script = ROOT / "utils" / "evaluate_model.sh"
    wild = ["--model", "a b", "", "$(touch canary)", "*", "'\"; exit 3"]
    done = subprocess.run([script, *wild], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 7 and not (tmp_path / "canary").exists()
    given = done.stdout.splitlines()
    assert given[:3] == ["[run]", "[--project]", f"[{ROOT}/utils/..]"]
    assert given[3:5] == ["[python]", f"[{ROOT}/utils/evaluate.py]"] and given[5:] == [f"[{a}]" for a in wild]
