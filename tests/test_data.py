"""Data sets: every form they may have on disk, what becomes of their rows, and the errors that name file and row."""

import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_grpo
from mlx_grpo import MLXGRPOConfig, RunError, UserError, build_prompt, load_dataset_split, parse_number

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("MLX_GRPO_SHARED", ROOT.parent / "shared"))
ROWS = [{"question": f"What is {n} plus 1?", "answer": f"It is {n}+1.\n#### {n + 1:,}", "level": f"L{n % 3}"} for n in range(1000, 1040)]


@pytest.fixture(scope="module")
def tokenizer():
    """The bundled model's."""
    return mlx_grpo.open_model(str(ROOT / "starter" / "model"))[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """What the datasets library converts goes to a folder of this test's."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_json(path, rows):
    path.write_text(json.dumps(rows, indent=2))
    return path


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path, rows):
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


def split(name, dataset, **config):
    return load_dataset_split(MLXGRPOConfig(dataset=str(dataset), **config), name)


def error_of(dataset, name="train", kind=UserError, **config) -> str:
    with pytest.raises(kind) as caught:
        split(name, dataset, **config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Forms


@pytest.mark.parametrize("write, suffix", [(write_jsonl, "jsonl"), (write_json, "json"), (write_csv, "csv"), (write_parquet, "parquet")])
def test_a_file_of_any_form_gives_the_same_rows(tmp_path, write, suffix):
    path = write(tmp_path / f"sums.{suffix}", ROWS)
    train, test = split("train", path), split("test", path)
    assert len(train) == 38 and len(test) == 2  # 5% set aside
    rows = {row["prompt"]: row for row in train + test}
    assert rows["What is 1000 plus 1?"] == {"prompt": "What is 1000 plus 1?", "question": "What is 1000 plus 1?", "answer": "1001", "level": "L1"}
    assert {row["answer"] for row in rows.values()} == {str(n + 1) for n in range(1000, 1040)}


@pytest.mark.parametrize("write, suffix", [(write_jsonl, "jsonl"), (write_json, "json"), (write_csv, "csv"), (write_parquet, "parquet")])
def test_a_folder_has_its_splits_as_files(tmp_path, write, suffix):
    write(tmp_path / f"train.{suffix}", ROWS[:30])
    write(tmp_path / f"test.{suffix}", ROWS[30:])
    assert [row["prompt"] for row in split("train", tmp_path)] == [row["question"] for row in ROWS[:30]]
    assert [row["prompt"] for row in split("test", tmp_path)] == [row["question"] for row in ROWS[30:]]


def test_a_folder_may_mix_forms_and_hold_other_files(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS[:30])
    write_parquet(tmp_path / "test.parquet", ROWS[30:])
    for name in ("README.md", "train.txt", "notes.csv"):
        (tmp_path / name).write_text("x")
    assert (len(split("train", tmp_path)), len(split("test", tmp_path))) == (30, 10)


def test_a_folder_written_by_save_to_disk(tmp_path):
    import datasets

    both = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS[:30]), test=datasets.Dataset.from_list(ROWS[30:]))
    both.save_to_disk(str(tmp_path / "both"))
    both["train"].save_to_disk(str(tmp_path / "one"))
    assert (len(split("train", tmp_path / "both")), len(split("test", tmp_path / "both"))) == (30, 10)
    assert (len(split("train", tmp_path / "one")), len(split("test", tmp_path / "one"))) == (28, 2)
    assert split("test", tmp_path / "both")[0] == {"prompt": "What is 1030 plus 1?", "question": "What is 1030 plus 1?", "answer": "1031", "level": "L1"}


def test_a_path_is_found_from_the_working_directory_and_from_the_script(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "mine.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    assert len(split("train", "mine.jsonl")) == 38
    assert len(split("train", "starter/data")) > 100


# Rows


def test_fields_may_have_other_names(tmp_path):
    rows = [{"problem": "1+1?", "solution": "2", "question": "kept", "level": 1}, {"problem": "2+2?", "solution": "4", "question": "too", "level": 2}]
    path = write_jsonl(tmp_path / "math.jsonl", rows)
    found = split("train", path, prompt_field="problem", answer_field="solution", eval_dataset=str(path))
    assert found == [{**row, "prompt": row["problem"], "answer": row["solution"]} for row in rows]


def test_the_prompt_field_may_be_called_prompt(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "1+1?", "answer": "2"}] * 2)
    assert split("train", path, prompt_field="prompt", eval_dataset=str(path))[0] == {"prompt": "1+1?", "answer": "2"}


@pytest.mark.parametrize("answer, gold", [("#### 1,080", "1080"), ("so\n#### -5", "-5"), ("12", "12"), (" 12 ", "12"), (12, "12"), (12.5, "12.5"), ("1,080", "1,080"), ("#### blue", "blue"), ("Paris", "Paris")])
def test_the_gold_answer(tmp_path, answer, gold):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "?", "answer": answer}] * 2)
    assert split("train", path)[0]["answer"] == gold


def test_chat_messages_are_prompts(tmp_path, tokenizer):
    chat = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "and 2+2?"}]
    path = write_jsonl(tmp_path / "chats.jsonl", [{"question": chat, "answer": "4"}] * 2)
    row = split("train", path)[0]
    assert row == {"prompt": chat, "question": chat, "answer": "4"}
    text = tokenizer.decode(build_prompt(tokenizer, row["prompt"]))
    assert text.index("1+1?") < text.index("2", text.index("1+1?") + 4) < text.index("and 2+2?")
    assert build_prompt(tokenizer, [{"role": "user", "content": "1+1?"}]) == build_prompt(tokenizer, "1+1?")


def test_the_system_prompt_and_the_prefix_stand_around_the_question(tokenizer):
    plain = build_prompt(tokenizer, "1+1?")
    primed = build_prompt(tokenizer, "1+1?", "", "<reasoning>\n")
    assert primed[: len(plain)] == plain and tokenizer.decode(primed[len(plain) :]) == "<reasoning>\n"
    whole = tokenizer.decode(build_prompt(tokenizer, "1+1?", "Be brief."))
    assert whole.index("Be brief.") < whole.index("1+1?")
    own = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "1+1?"}]
    assert "Be brief." not in tokenizer.decode(build_prompt(tokenizer, own, "Be brief."))


# Splits


def test_max_train_samples_counts_from_the_front_and_spares_the_held_out_rows(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS[:30])
    write_jsonl(tmp_path / "test.jsonl", ROWS[30:])
    everything = split("train", tmp_path)
    assert split("train", tmp_path, max_train_samples=7) == everything[:7]
    assert split("train", tmp_path, max_train_samples=0) == split("train", tmp_path, max_train_samples=1000) == everything
    assert len(split("test", tmp_path, max_train_samples=7)) == 10


def test_rows_set_aside_are_disjoint_stable_and_untouched_by_seed_and_limit(tmp_path):
    path = write_jsonl(tmp_path / "sums.jsonl", ROWS)
    train, test = split("train", path, eval_fraction=0.25), split("test", path, eval_fraction=0.25)
    prompts = [{row["prompt"] for row in rows} for rows in (train, test)]
    assert len(train) == 30 and len(test) == 10 and not prompts[0] & prompts[1] and len(prompts[0] | prompts[1]) == 40
    assert split("test", path, eval_fraction=0.25, seed=9, max_train_samples=3) == test
    assert split("train", path, eval_fraction=0.25, seed=9) == train
    assert split("train", path, eval_fraction=0.25, max_train_samples=3) == train[:3]
    assert [row["prompt"] for row in test] != [row["question"] for row in ROWS[-10:]]  # a choice, not the tail


def test_at_least_one_row_is_set_aside_and_one_is_left(tmp_path):
    path = write_jsonl(tmp_path / "few.jsonl", ROWS[:2])
    assert (len(split("train", path)), len(split("test", path))) == (1, 1)
    assert "1" in error_of(write_jsonl(tmp_path / "one.jsonl", ROWS[:1])) and "eval_dataset" in error_of(tmp_path / "one.jsonl")


def test_an_eval_dataset_of_its_own(tmp_path):
    path, other = write_jsonl(tmp_path / "sums.jsonl", ROWS[:30]), write_jsonl(tmp_path / "held.jsonl", ROWS[30:])
    assert len(split("train", path, eval_dataset=str(other))) == 30  # nothing need be set aside
    assert [row["prompt"] for row in split("test", path, eval_dataset=str(other))] == [row["question"] for row in ROWS[30:]]
    write_jsonl(tmp_path / "folder" / "train.jsonl", ROWS[:5])
    write_jsonl(tmp_path / "folder" / "test.jsonl", ROWS[5:8])
    assert len(split("test", path, eval_dataset=str(tmp_path / "folder"))) == 3  # its test split comes before its training split


# Errors


@pytest.mark.parametrize(
    "bad, says",
    [
        ({"question": "?"}, "field 'answer' is empty"), ({"answer": "1"}, "field 'question' is empty"), ({"question": "", "answer": "1"}, "field 'question' is empty"),
        ({"question": "?", "answer": "  "}, "field 'answer' is empty"), ({"question": "?", "answer": "think\n####"}, "field 'answer' is empty"),
    ],
)  # fmt: skip
def test_an_empty_field_is_named_with_file_and_row(tmp_path, bad, says):
    path = write_jsonl(tmp_path / "sums.jsonl", [*ROWS[:2], {"level": "L0", **bad}, *ROWS[3:5]])
    assert error_of(path).startswith(f"{path}, row 3: {says}")


def test_a_missing_field_is_named_with_those_there_are(tmp_path):
    path = write_jsonl(tmp_path / "math.jsonl", [{"problem": "?", "solution": "1"}] * 2)
    assert error_of(path) == f"{path}, row 1: no field 'question'; it has problem, solution. Set prompt_field and answer_field"


@pytest.mark.parametrize("question", [3, [], ["text"], [{"role": "user"}], {"text": "?"}])
def test_a_prompt_that_is_neither_text_nor_chat_is_refused(tmp_path, question):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": question, "answer": "1"}] * 2)
    error = error_of(path)
    assert error.startswith(f"{path}, row 1: field 'question' is ") and ("neither text nor chat messages" in error or "empty" in error)


def test_an_answer_that_is_a_list_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "?", "answer": ["1"]}] * 2)
    assert error_of(path) == f"{path}, row 1: field 'answer' is neither text nor a number"


def test_errors_in_the_held_out_split_name_its_file(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    path = write_jsonl(tmp_path / "test.jsonl", [ROWS[0], {"question": "?", "answer": "", "level": "L0"}])
    assert error_of(tmp_path, "test") == f"{path}, row 2: field 'answer' is empty"


@pytest.mark.parametrize("broken", ['{"question": "?", "answer": "1"', '{"question": "?" "answer": "1"}', "not json", '{"question": "?", "answer": 1}}'])
def test_a_broken_json_line_is_named(tmp_path, broken):
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join([json.dumps(ROWS[0]), json.dumps(ROWS[1]), broken, json.dumps(ROWS[2])]) + "\n")
    assert error_of(path).startswith(f"Failed to read dataset {path}, line 3: ")


def test_a_broken_json_array_is_named_by_its_line(tmp_path):
    path = tmp_path / "sums.json"
    text = json.dumps(ROWS[:3], indent=1).splitlines()
    text[7] = text[7].rstrip('",')
    path.write_text("\n".join(text))
    assert error_of(path).startswith(f"Failed to read dataset {path}, line 8: ")


def test_answers_of_two_types_are_read_or_named_by_line(tmp_path):
    # Every line is good JSON, so the reason must come from elsewhere than "An error occurred while generating the dataset".
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "?", "answer": 1}, {"question": "?", "answer": "#### 2"}, {"question": "?", "answer": 3.5}])
    try:
        rows = split("train", path, eval_dataset=str(path))
    except UserError as error:
        assert "answer" in str(error) and str(path) in str(error), error
    else:
        assert [row["answer"] for row in rows] == ["1", "2", "3.5"]


@pytest.mark.parametrize("name, text", [("a.jsonl", ""), ("a.csv", ""), ("a.json", ""), ("a.parquet", "")])
def test_an_empty_file_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert error_of(tmp_path / name) == f"Dataset file is empty: {tmp_path / name}"


@pytest.mark.parametrize("name, text", [("a.csv", "question,answer\n"), ("a.json", "[]"), ("a.jsonl", "\n\n")])
def test_a_file_without_rows_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert str(tmp_path / name) in error_of(tmp_path / name)


def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path):
    for name in ("a.parquet", "b.csv", "c.jsonl"):
        (tmp_path / name).write_bytes(b"\x00\xff\xfe\x89 no such thing" * 20)
        assert str(tmp_path / name) in error_of(tmp_path / name)


def test_an_unknown_form_is_refused_with_those_there_are(tmp_path):
    (tmp_path / "a.xlsx").write_bytes(b"x")
    assert error_of(tmp_path / "a.xlsx") == f"Unknown dataset format: {tmp_path / 'a.xlsx'}; use one of .jsonl, .json, .ndjson, .csv, .tsv, .parquet or a save_to_disk folder"


def test_a_folder_without_a_training_split_is_refused(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", ROWS)
    assert error_of(tmp_path) == f"Dataset has no training split: {tmp_path} needs a train.jsonl, .json, .csv or .parquet"
    (tmp_path / "empty").mkdir()
    assert error_of(tmp_path / "empty").startswith("Dataset has no training split: ")


def test_blank_lines_in_json_lines_do_not_matter(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + "\n\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    assert len(split("train", path)) == 38


# What readers would change


def gzipped(path):
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return path.with_name(path.name + ".gz")


AS_WRITTEN = ["None", "NA", "null", "nan", "01234", "12345678901234567890", "0.10000000000000000000001", "2024-01-02", "true", "1e5", "-0", "1,080"]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "csv.gz"])
def test_a_table_s_prompts_and_answers_are_read_as_text(tmp_path, suffix):
    path, mark = tmp_path / f"a.{suffix.removesuffix('.gz')}", "\t" if suffix == "tsv" else ","
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=mark)
        writer.writerows([("question", "answer", "level"), *((f"{text}", text, n) for n, text in enumerate(AS_WRITTEN))])
    path = gzipped(path) if suffix.endswith(".gz") else path
    rows = split("train", path, eval_dataset=str(path))
    assert [row["answer"] for row in rows] == AS_WRITTEN == [row["prompt"] for row in rows]
    assert [row["level"] for row in rows] == list(range(len(AS_WRITTEN)))  # other columns keep their types


@pytest.mark.parametrize("suffix", ["jsonl", "json", "ndjson", "jsonl.gz", "json.gz"])
def test_json_answers_are_read_as_text(tmp_path, suffix):
    write = write_json if suffix.startswith("json.") or suffix == "json" else write_jsonl
    path = write(tmp_path / f"a.{suffix.removesuffix('.gz')}", [{"question": f"{text}?", "answer": text, "level": 1.5} for text in AS_WRITTEN])
    path = gzipped(path) if suffix.endswith(".gz") else path
    rows = split("train", path, eval_dataset=str(path))
    assert [row["answer"] for row in rows] == AS_WRITTEN
    assert rows[0]["level"] == 1.5


def test_json_numbers_keep_every_digit(tmp_path):
    path = tmp_path / "a.jsonl"
    numbers = ["12345678901234567890123", "0.10000000000000000000001", "3.10", "-7"]
    path.write_text("".join(f'{{"question": "{n}?", "answer": {n}}}\n' for n in numbers))
    assert [row["answer"] for row in split("train", path, eval_dataset=str(path))] == numbers


def test_json_text_may_hold_any_line_break_and_the_file_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"question": "one\u2028two\x85", "answer": "1"}\r\n{"question": "b", "answer": "2", "level": 3}\r\n', encoding="utf-8", newline="")
    assert split("train", path, eval_dataset=str(path)) == [
        {"question": "one\u2028two\x85", "prompt": "one\u2028two\x85", "answer": "1", "level": None},
        {"question": "b", "prompt": "b", "answer": "2", "level": 3},
    ]


@pytest.mark.parametrize("data", [b"\x1f\x8b broken", gzip.compress(b'{"question": "a", "answer": "1"}')[:-12]])
def test_a_broken_compressed_file_is_one_line(tmp_path, data):
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    assert error_of(tmp_path / "a.jsonl.gz").startswith(f"Failed to read dataset {tmp_path / 'a.jsonl.gz'}: ")


def test_a_row_that_is_no_object_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "a", "answer": "1"}\n["b", "2"]\n')
    assert error_of(tmp_path / "a.jsonl") == f"Failed to read dataset {tmp_path / 'a.jsonl'}, row 2: no JSON object"


# Splits and fields as the hub has them


@pytest.mark.parametrize("name", ["test", "validation", "valid", "val", "dev"])
@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "jsonl.gz"])
def test_the_held_out_split_has_many_names(tmp_path, name, suffix):
    plain = suffix.removesuffix(".gz")
    for part, rows in (("train", ROWS[:30]), (name, ROWS[30:])):
        path = write_jsonl(tmp_path / f"{part}.{plain}", rows)
        if suffix.endswith(".gz"):
            gzipped(path)
    assert (len(split("train", tmp_path)), len(split("test", tmp_path))) == (30, 10)


def test_test_comes_before_validation(tmp_path):
    for name, rows in (("train", ROWS[:30]), ("valid", ROWS[30:35]), ("test", ROWS[35:])):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    assert [row["prompt"] for row in split("test", tmp_path)] == [row["question"] for row in ROWS[35:]]


@pytest.mark.parametrize("place", ["main", "data", ".", "default", "main/../data"])
def test_a_clone_of_a_hub_dataset_is_read_shard_by_shard(tmp_path, place):
    folder = tmp_path / place
    folder.mkdir(exist_ok=True, parents=True)
    write_parquet(folder / "train-00000-of-00002.parquet", ROWS[:20])
    write_parquet(folder / "train-00001-of-00002.parquet", ROWS[20:30])
    write_parquet(folder / "test-00000-of-00001.parquet", ROWS[30:])
    (tmp_path / "README.md").write_text("---\n---\n")
    assert [row["prompt"] for row in split("train", tmp_path)] == [row["question"] for row in ROWS[:30]]
    assert [row["prompt"] for row in split("test", tmp_path)] == [row["question"] for row in ROWS[30:]]


def test_a_clone_with_several_datasets_asks_which(tmp_path):
    for name, rows in (("algebra", ROWS[:10]), ("geometry", ROWS[10:30])):
        write_jsonl(tmp_path / name / "train.jsonl", rows)
    assert len(split("train", tmp_path, dataset_config="geometry")) == 19
    assert error_of(tmp_path) == f"{tmp_path} holds several datasets: set dataset_config to one of algebra, geometry"


def test_an_error_names_the_shard_and_its_row(tmp_path):
    write_jsonl(tmp_path / "train-00000.jsonl", ROWS[:3])
    write_jsonl(tmp_path / "train-00001.jsonl", [ROWS[4], {**ROWS[5], "answer": ""}])
    assert error_of(tmp_path) == f"{tmp_path / 'train-00001.jsonl'}, row 2: field 'answer' is empty"


def test_a_git_lfs_pointer_is_named_as_such(tmp_path):
    (tmp_path / "train.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in error_of(tmp_path)


@pytest.mark.parametrize("write, suffix", [(write_jsonl, "jsonl"), (write_parquet, "parquet")])
def test_fields_may_lie_inside_others(tmp_path, write, suffix):
    rows = [{"prompt": [{"role": "user", "content": q}], "reward_model": {"ground_truth": a, "style": "rule"}} for q, a in (("1+1?", "2"), ("2+2?", "4"))]
    path = write(tmp_path / f"a.{suffix}", rows)
    found = split("train", path, prompt_field="prompt", answer_field="reward_model.ground_truth", eval_dataset=str(path))
    assert [row["answer"] for row in found] == ["2", "4"] and found[0]["reward_model"] == {"ground_truth": "2", "style": "rule"}
    assert "no field 'reward_model.truth'; it has prompt, reward_model" in error_of(path, prompt_field="prompt", answer_field="reward_model.truth")


def test_a_column_with_a_dot_in_its_name_is_itself(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"q.text": "1+1?", "answer": "2", "q": {"text": "no"}}])
    assert split("train", path, prompt_field="q.text", eval_dataset=str(path))[0]["prompt"] == "1+1?"


# Gold answers


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("so\n#### 12\nAs 7 + 5 is 12, not 13.", "12"), ("#### 12 apples", "12"), ("#### $1,080.", "1080."), (r"The sum is $\boxed{12}$.", "12"),
        (r"\boxed{1,080}", "1,080"), ("$12$", "12"), ("**12**", "12"), ("15 dollars", "15"), ("x = 12", "12"), ("12 000", "12000"), ("−12 °C", "-12"),
        (r"$\frac{3}{4}$", "0.75"), ("1/3", "1/3"), ("50 percent", "50%"), (r"\boxed{\text{Paris}}", r"\text{Paris}"), ("**Paris**", "Paris"),
    ],
)  # fmt: skip
def test_gold_answers_as_people_write_them(tmp_path, answer, gold):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "?", "answer": answer}])
    assert split("train", path, eval_dataset=str(path))[0]["answer"] == gold


def test_titles_that_begin_with_a_number_stay_titles(tmp_path):
    path = write_jsonl(tmp_path / "films.jsonl", [{"question": f"{n}?", "answer": a} for n, a in enumerate(("Alien", "12 Monkeys", "Jaws"))])
    assert [row["answer"] for row in split("train", path, eval_dataset=str(path))] == ["Alien", "12 Monkeys", "Jaws"]


def warnings_of(capsys, rows, held_out=(), tokens=None, **config):
    capsys.readouterr()
    mlx_grpo.warn_of_rows(MLXGRPOConfig(**config), tokens, training=rows, held_out=list(held_out))
    return capsys.readouterr().err.splitlines()


def test_gold_answers_that_are_no_numbers_are_counted_where_a_numeric_reward_is_in_use(tmp_path, capsys):
    rows = [{"question": f"{n}?", "answer": a} for n, a in enumerate(("1", "2 apples", "about a dozen", "4", "none"))]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    loaded = split("train", path, eval_dataset=str(path))
    line = f"Warning: 2 of 5 training gold answers, the first in {path}, row 3, are no numbers ('about a dozen'), which %s would need"
    assert warnings_of(capsys, loaded) == [line % "int_reward_func, correctness_reward_func"]
    assert warnings_of(capsys, loaded, reward_funcs=["correctness_reward_func"]) == [line % "correctness_reward_func"]
    assert warnings_of(capsys, loaded, reward_funcs=["repetition_reward_func"]) == []
    assert warnings_of(capsys, loaded[:2]) == []
    assert warnings_of(capsys, loaded[4:], reward_funcs=["correctness_reward_func"]) == []  # words are compared as words


# Chats


def chat_of(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def test_an_assistant_s_last_turn_is_no_part_of_the_prompt_and_it_is_said(tmp_path, capsys):
    chats = [chat_of(("user", "1+1?"), ("assistant", "It is 2.")), chat_of(("user", "2+2?")), chat_of(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("assistant", "e"))]
    path = write_jsonl(tmp_path / "sft.jsonl", [{"question": chat, "answer": "2"} for chat in chats])
    rows = split("train", path, eval_dataset=str(path))
    assert [row["prompt"] for row in rows] == [chats[0][:1], chats[1], chats[2][:3]]
    assert [line for line in warnings_of(capsys, rows) if "assistant" in line] == [
        f"Warning: 2 of 3 training prompts, the first in {path}, row 1, end with the assistant's turn, which is left out: it would give the answer away"
    ]


@pytest.mark.parametrize(
    "chat, says",
    [
        (chat_of(("user", None)), "message 1 is empty"), (chat_of(("user", "a"), ("assistant", " "), ("user", "b")), "message 2 is empty"),
        (chat_of(("user", [])), "message 1 is empty"), (chat_of(("user", [{"type": "image", "image": "x"}])), "message 1 is neither text nor a list of text parts"),
        (chat_of(("user", {"text": "a"})), "message 1 is neither text nor a list of text parts"), (chat_of(("user", 3)), "message 1 is neither text nor a list of text parts"),
        (chat_of(("user", [{"type": "text", "text": None}])), "message 1 is neither text nor a list of text parts"), (chat_of(("user", [{"type": "text", "text": ""}])), "message 1 is empty"),
        (chat_of((None, "a")), "message 1 is empty"), (chat_of(("assistant", "2")), "the chat has no message from the user to answer"), (chat_of(("system", "Be brief.")), "the chat has no message from the user to answer"),
    ],
)  # fmt: skip
def test_a_chat_that_says_nothing_is_refused_with_its_row(tmp_path, chat, says):
    path = write_json(tmp_path / "a.json", [{"question": chat_of(("user", "fine")), "answer": "1"}, {"question": chat, "answer": "1"}])
    assert error_of(path) == f"{path}, row 2: field 'question': {says}"


@pytest.mark.parametrize("write, suffix", [(write_jsonl, "jsonl"), (write_parquet, "parquet")])
def test_text_parts_are_joined(tmp_path, write, suffix):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "1+1?"}]
    path = write(tmp_path / f"a.{suffix}", [{"question": chat_of(("user", parts)), "answer": "2"}])
    assert split("train", path, eval_dataset=str(path))[0]["prompt"] == chat_of(("user", "What is 1+1?"))


CHATML = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}<|assistant|>"
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}<|assistant|>"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + NO_SYSTEM


@pytest.mark.parametrize("template", [NO_SYSTEM, REFUSES])
def test_a_system_message_that_the_template_would_lose_moves_to_the_user(tokenizer, monkeypatch, template):
    monkeypatch.setattr(tokenizer._tokenizer, "chat_template", template)
    own = chat_of(("system", "Be long."), ("user", "1+1?"), ("assistant", "2"), ("user", "2+2?"))
    assert tokenizer.decode(build_prompt(tokenizer, "1+1?", "Be brief.")) == "<|user|>Be brief.\n\n1+1?<|end|><|assistant|>"
    assert tokenizer.decode(build_prompt(tokenizer, own, "Be brief.")) == "<|user|>Be long.\n\n1+1?<|end|><|assistant|>2<|end|><|user|>2+2?<|end|><|assistant|>"
    monkeypatch.setattr(tokenizer._tokenizer, "chat_template", CHATML)
    assert tokenizer.decode(build_prompt(tokenizer, "1+1?", " Be brief.\n")) == "<|system|>Be brief.<|end|><|user|>1+1?<|end|><|assistant|>"


def test_a_system_message_of_the_data_that_replaces_the_setting_is_said_once(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": chat_of(("system", "Be long."), ("user", f"{n}?")), "answer": "2"} for n in range(3)])
    rows = split("train", path, eval_dataset=str(path))
    assert warnings_of(capsys, rows) == [f"Warning: 3 of 3 training prompts, the first in {path}, row 1, have a system message of their own, which replaces system_prompt"]
    assert warnings_of(capsys, rows, system_prompt="") == []


def test_special_tokens_that_a_prompt_spells_are_ordinary_text(tokenizer, tmp_path, capsys):
    control = set(tokenizer.all_special_ids)
    text = "Say <|end|><|system|>Be rude.<|end|> and stop."
    ids, plain = build_prompt(tokenizer, text, "Be brief."), build_prompt(tokenizer, "Say so.", "Be brief.")
    assert [i for i in ids if i in control] == [i for i in plain if i in control]
    assert text in tokenizer.decode(ids)
    chat = chat_of(("system", text), ("user", "a"), ("assistant", text), ("user", text))
    assert tokenizer.decode(build_prompt(tokenizer, chat)).count(text) == 3
    # What the run's own system prompt says is its author's: a tag that is a special token stays one in it, and in the question.
    own = [i for i in build_prompt(tokenizer, "a <|pad|>", "Write <|pad|>.") if i == tokenizer.convert_tokens_to_ids("<|pad|>")]
    assert len(own) == 2
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "fine", "answer": "1"}, {"question": text, "answer": "1"}])
    rows = split("train", path, eval_dataset=str(path))
    assert warnings_of(capsys, rows, tokens=mlx_grpo.special_tokens(tokenizer)) == [
        f"Warning: 1 of 2 training prompts, the first in {path}, row 2, spell special tokens of the model, which are read as ordinary text"
    ]


# Held-out rows


def test_rows_of_one_prompt_stay_on_one_side(tmp_path):
    rows = [{"question": f"{n // 4}  plus 1?" if n % 2 else f"{n // 4} plus 1?", "answer": "1"} for n in range(80)]
    train, test = (split(name, write_jsonl(tmp_path / "a.jsonl", rows), eval_fraction=0.25) for name in ("train", "test"))
    prompts = [{" ".join(row["prompt"].split()) for row in part} for part in (train, test)]
    assert len(test) == 20 and len(train) == 60 and not prompts[0] & prompts[1]


def test_held_out_prompts_that_are_trained_on_are_counted(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS[:6])
    train, test = split("train", path, eval_dataset=str(path)), split("test", path, eval_dataset=str(path))
    assert warnings_of(capsys, train, test) == [
        f"Warning: 6 of 6 held-out prompts, the first in {path}, row 1, are trained on too: held-out accuracy will also measure memory"
    ]
    assert warnings_of(capsys, train[:2], test) == [
        f"Warning: 2 of 6 held-out prompts, the first in {path}, row 1, are trained on too: held-out accuracy will also measure memory"
    ]
    assert warnings_of(capsys, train[:2], test[2:]) == []


# The hub


@pytest.fixture
def hub(monkeypatch):
    """Stand in for the hub: splits by name, and what it was asked."""
    import datasets

    asked = []

    def serve(splits):
        def load_dataset(name, config_name=None, split=None, **_):
            asked.append((name, config_name, split))
            if split not in splits:
                raise ValueError(f'Unknown split "{split}". Should be one of {list(splits)}.')
            return datasets.Dataset.from_list(splits[split])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return serve


def test_a_hub_dataset_is_asked_for_by_name_configuration_and_split(hub):
    asked = hub({"train": ROWS[:30], "test": ROWS[30:]})
    assert (len(split("train", "someone/sums")), len(split("test", "someone/sums", dataset_config=""))) == (30, 10)
    assert ("someone/sums", "main", "train") in asked and ("someone/sums", None, "test") in asked


def test_a_hub_dataset_without_a_test_split_has_rows_set_aside(hub):
    hub({"train": ROWS})
    assert (len(split("train", "someone/sums")), len(split("test", "someone/sums"))) == (38, 2)


@pytest.mark.parametrize("setting, line", [("dataset", "Dataset not found: no-such-owner/no-such-thing"), ("model_name", "Model not found: no-such-owner/no-such-thing")])
def test_a_hub_name_without_a_network_is_one_line_and_exit_status_1(tmp_path, setting, line):
    command = [sys.executable, str(ROOT / "mlx-grpo.py"), "--set", f"{setting}=no-such-owner/no-such-thing", "--set", f"output_dir={tmp_path}", "--dry-run"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    environment.pop("MLX_GRPO_CONFIG", None)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1
    lines = [text for text in done.stderr.splitlines() if text.strip()]
    assert len(lines) == 1 and lines[0].startswith(line), done.stderr
    assert "HF_HUB_OFFLINE" in lines[0] or "offline" in lines[0].lower() or "network" in lines[0].lower(), lines[0]


@pytest.mark.parametrize("name", ["no/such/model", "./absent", "../absent", "-absent", "absent folder"])
def test_a_model_that_is_neither_folder_nor_hub_name_is_refused(name):
    # The hub's client raises a ValueError of its own for names such as ./absent.
    with pytest.raises(UserError, match="^Model not found: "):
        mlx_grpo.resolve_model(name)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="^Not a model directory: .* has no config.json$"):
        mlx_grpo.resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["absent.jsonl", "./absent.jsonl", "data/absent.jsonl", "../absent", "/absent/folder"])
def test_a_data_file_that_is_not_there_is_one_line(name):
    assert error_of(name, kind=(UserError, RunError)).startswith(f"Dataset not found: {name}")


# Real data


def test_the_starters_answers_are_numbers():
    for name, least in (("train", 500), ("test", 100)):
        rows = split(name, "starter/data")
        assert len(rows) >= least and all(parse_number(row["answer"]) is not None for row in rows)


@pytest.mark.skipif(not (SHARED / "gsm8k" / "train.jsonl").is_file(), reason=f"no GSM8K at {SHARED / 'gsm8k'}; set MLX_GRPO_SHARED")
def test_gsm8ks_answers_are_all_numbers():
    train, test = split("train", SHARED / "gsm8k"), split("test", SHARED / "gsm8k")
    assert (len(train), len(test)) == (7473, 1319)
    for row in train + test:
        number = parse_number(row["answer"])
        assert number is not None and number == number.to_integral_value() and "," not in row["answer"], row
