"""The starter: its files open wherever they should, its problems are right, and the generator makes the same ones again."""

import importlib.util
import json
import re
from pathlib import Path

import mlx.core as mx
import mlx_grpo
import numpy as np
import pytest
from mlx_lm import load

ROOT = Path(__file__).resolve().parent.parent
MODEL, DATA = ROOT / "starter" / "model", ROOT / "starter" / "data"

spec = importlib.util.spec_from_file_location("make_starter", ROOT / "utils" / "make_starter.py")
make_starter = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_starter)


def rows(split):
    return [json.loads(line) for line in (DATA / f"{split}.jsonl").read_text().splitlines()]


def messages(question):
    return [{"role": "system", "content": mlx_grpo.SYSTEM_PROMPT}, {"role": "user", "content": question}]


@pytest.fixture(scope="module")
def starter():
    return load(str(MODEL))


def test_size():
    assert (MODEL / "model.safetensors").stat().st_size <= 4_000_000


def test_logits_equal_transformers(starter):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model, tokenizer = starter
    ids = tokenizer.apply_chat_template(messages(rows("test")[0]["question"]), add_generation_prompt=True, return_dict=False)
    ids += tokenizer.encode("<reasoning>\nTom has 3+4=7 apples.\n")
    theirs_model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with torch.no_grad():
        theirs = theirs_model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(np.array(model(mx.array([ids]))[0]) - theirs).max() < 1e-4


def test_tokenizers_agree_with_transformers_and_on_the_end(starter):
    transformers = pytest.importorskip("transformers")
    ours, theirs = starter[1], transformers.AutoTokenizer.from_pretrained(MODEL)
    text = rows("test")[0]["question"]
    assert ours.encode(text) == theirs.encode(text)
    assert ours.eos_token_ids == {theirs.eos_token_id} == {theirs.convert_tokens_to_ids("<|end|>")}
    assert theirs.pad_token_id not in ours.eos_token_ids


def test_chat_template_renders_what_the_model_read(starter):
    assert make_starter.SYSTEM_PROMPT == mlx_grpo.SYSTEM_PROMPT
    question = rows("test")[0]["question"]
    text = starter[1].apply_chat_template(messages(question), add_generation_prompt=True, tokenize=False)
    assert text == make_starter.render_prompt(question)


@pytest.mark.parametrize("text", [
    "Natalia paid $1,080.50 (48/2 = <<48/2=24>>24) \u2014 and then?",
    " leading, double  spaces\t\ttabs\r\n\n\n trailing ",
    "\u65e5\u672c\u8a9e \u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \U0001f9ee\U0001f469\u200d\U0001f52c e\u0301 \u00e9 \u00bd \u0663 \x00\x7f",
    "<reasoning>\n1 + 2\n</reasoning>\n<answer>\n3\n</answer>",
])
def test_any_text_makes_the_round_trip(starter, text):
    ids = starter[1].encode(text)
    assert starter[1].decode(ids) == text


def test_digits_are_single_tokens(starter):
    tokens = starter[1].convert_ids_to_tokens(starter[1].encode("12345"))
    assert tokens == list("12345")


def test_splits_are_disjoint_and_have_gsm8ks_fields():
    train, test = rows("train"), rows("test")
    assert (len(train), len(test)) == (4000, 400)
    questions = [row["question"] for row in train + test]
    assert len(set(questions)) == len(questions)
    assert all(set(row) == {"question", "answer"} for row in train + test)


def test_every_written_sum_is_right_and_ends_in_the_answer():
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
    for row in rows("train") + rows("test"):
        *steps, last = row["answer"].split("\n")
        known = set(re.findall(r"\d+", row["question"]))
        assert 1 <= len(steps) <= 3
        for step in steps:
            ((left, operation, right, result),) = re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", step)
            assert {left, right} <= known, row  # nothing is computed from a number that the problem does not give
            assert operations[operation](int(left), int(right)) == int(result), row
            assert operation != "/" or int(left) % int(right) == 0, row
            known.add(result)
        assert last == f"#### {result}"


def test_the_seed_makes_the_data_again():
    assert make_starter.make_datasets(0, 4000, 400) == (rows("train"), rows("test"))
    assert make_starter.make_datasets(1, 50, 5) != make_starter.make_datasets(0, 50, 5)


def test_the_reading_is_deterministic_and_holds_no_problem_of_the_data():
    held_out = {row["question"] for row in rows("train") + rows("test")}
    reading = make_starter.make_reading(0, 5000, held_out)
    assert reading == make_starter.make_reading(0, 5000, held_out)
    questions = {re.search(r"<\|user\|>(.*?)<\|end\|>", document)[1] for document in reading}
    assert not questions & held_out
    # Without the exclusion some would be there: the test above is not empty.
    unfiltered = make_starter.make_reading(0, 20_000, set())
    assert any(re.search(r"<\|user\|>(.*?)<\|end\|>", document)[1] in held_out for document in unfiltered)


def test_the_starter_is_capable_but_undisciplined():
    """It does the sums (lenient, primed) and seldom answers in the form (strict): what the quickstart has to mend."""
    figures = make_starter.measure(MODEL, rows("test")[:60])
    assert 0.05 < figures["greedy strict"] < 0.40
    assert figures["greedy lenient"] > 0.95 and figures["primed greedy strict"] > 0.95
    assert 0.05 < figures["sampled strict"] < 0.40


def test_making_a_starter_from_end_to_end(tmp_path, monkeypatch, capsys):
    arguments = f"make_starter.py --output {tmp_path} --steps 2 --batch-size 4 --documents 300 --train-size 20 --test-size 4"
    monkeypatch.setattr("sys.argv", arguments.split())
    monkeypatch.setattr(make_starter, "measure", lambda *_: {})  # tested above; an untrained model rambles to its limit
    make_starter.main()
    assert "parameters" in capsys.readouterr().out
    model, tokenizer = load(str(tmp_path / "model"))
    assert model(mx.array([tokenizer.encode("3+4=")])).shape[-1] == model.args.vocab_size
    assert len((tmp_path / "data" / "train.jsonl").read_text().splitlines()) == 20
