"""What a completion's text is, where it ends, and what of it is graded: tags that are special tokens, stop strings, thinking."""

import json
import shutil
from pathlib import Path

import pytest
from tiny import LetterTokenizer, tiny_model

import mlx_grpo
from mlx_grpo.answers import after_thinking, is_thinking
from mlx_grpo.rollout.decoding import Row
from mlx_grpo import MLXGRPOConfig, UserError, build_prompt, completion_text, generate, primed_text
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LETTERS = LetterTokenizer()
TAGS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
THINKING = CHATML.removesuffix("{% endif %}") + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"


def letters(text):
    return tuple(ord(character) - 33 for character in text)


def byte_tokenizer(special=(), template=CHATML, begins=False):
    """A tokenizer of bytes, wrapped as mlx-lm wraps it, with chat tokens and these special tokens; one that begins a text with <s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *special]})
    tokenizer.chat_template = template
    if begins:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    return TokenizerWrapper(tokenizer, eos_token_ids=[tokenizer.eos_token_id])


# What is scored


def test_tags_that_are_special_tokens_are_scored_and_only_end_and_padding_are_left_out():
    tokenizer = byte_tokenizer(TAGS)
    text = "<reasoning>\nso\n</reasoning>\n<answer>\n18\n</answer>"
    ids = tokenizer.encode(text)
    assert len(ids) < len(text)  # the tags are single ids
    assert completion_text(tokenizer, [*ids, tokenizer.eos_token_id]) == text
    assert completion_text(tokenizer, [*ids, tokenizer.pad_token_id, tokenizer.eos_token_id]) == text
    assert mlx_grpo.correctness_reward_func([[{"content": completion_text(tokenizer, ids)}]], answer=["18"]) == [2.0]


def test_special_tokens_reach_the_texts_of_a_rollout():
    model, tokenizer = tiny_model("llama", vocab_size=272), byte_tokenizer(TAGS)
    rollout = generate(model, tokenizer, [[1, 2, 3]], max_new_tokens=200, num_generations=4, keys=[mlx_grpo.random_key(0)])
    tags = {tokenizer.convert_tokens_to_ids(tag): tag for tag in TAGS}
    assert any(set(ids) & set(tags) for ids in (c.ids for c in rollout))
    for ids, text in ((c.ids, c.text) for c in rollout):
        assert [text.count(tag) for tag in tags.values()] == [ids.count(i) for i in tags]


# Where it ends


@pytest.mark.parametrize("length", [1, 7, 17, 40, 100])
@pytest.mark.parametrize("block", [1, 3, 8])
def test_a_stop_string_of_any_length_ends_a_row_at_any_alignment(length, block):
    stop = ("END" + "x" * 200)[:length]
    for start in range(10):
        row, text = Row(LETTERS, [stop], 500), "y" * start + stop + "z" * 20
        for first in range(0, len(text), block):
            if not row.finish_reason:
                row.take(letters(text[first : first + block]), (0.5,) * len(text[first : first + block]))
        assert row.finish_reason == "stop" and LETTERS.decode(row.ids) == "y" * start + stop and len(row.logps) == len(row.ids)


def write(text, primed="", stops=("</answer>",), block=8):
    """The text that a row keeps of what a model would write, its primed beginning included."""
    row = Row(LETTERS, list(stops), 500, primed)
    for first in range(0, len(text), block):
        if not row.finish_reason:
            row.take(letters(text[first : first + block]), (0.5,) * len(text[first : first + block]))
    assert len(row.logps) == len(row.ids)
    return primed + LETTERS.decode(row.ids)


@pytest.mark.parametrize("block", [1, 8, 64])
def test_stop_strings_sleep_while_the_model_thinks(block):
    thought, said = "maybe<answer>1</answer>,no.", "<answer>2</answer>"
    assert write(f"<think>{thought}</think>{said}xyz", block=block) == f"<think>{thought}</think>{said}"
    assert write(f"{thought}</think>{said}xyz", "<think>\n", block=block) == f"<think>\n{thought}</think>{said}"
    assert write(f"<think>{thought}xyz", block=block) == f"<think>{thought}xyz"
    # Without a <think> at the beginning, or with one that the prompt has closed, they are awake.
    assert write(f"{thought}xyz", block=block) == "maybe<answer>1</answer>"
    assert write(f"so<think>{thought}xyz", block=block) == "so<think>maybe<answer>1</answer>"
    assert write(f"{thought}xyz", "<think>\n</think>\n", block=block) == "<think>\n</think>\nmaybe<answer>1</answer>"
    assert write("<thin</answer>xyz", block=block) == "<thin</answer>"


# What is graded


@pytest.mark.parametrize(
    "text, graded, thinks",
    [
        ("<think>\na\n</think>\n\nb", "b", False), ("<think>a", "", True), ("\n<think>a", "", True), ("a</think>b", "b", False), ("b", "b", False),
        ("b <think> c", "b <think> c", False), ("<think>a</think>b</think>c", "b</think>c", False), ("", "", False),
    ],
)  # fmt: skip
def test_what_follows_the_thinking_is_graded(text, graded, thinks):
    assert after_thinking(text) == graded and is_thinking(text) is thinks


def test_a_thinking_model_can_meet_every_built_in_reward():
    thought = "<think>\nPerhaps <answer>7</answer>, <reasoning> or so.\n</think>\n\n"
    form = "<reasoning>\nr\n</reasoning>\n<answer>\n18\n</answer>"
    for name in ("correctness", "int", "strict_format", "soft_format", "xmlcount"):
        reward = getattr(mlx_grpo, f"{name}_reward_func")
        score = lambda text: reward([[{"content": text}]], answer=["18"])[0]  # noqa: E731
        assert score(thought + form) == score(form) > 0, name
        assert score(thought.removesuffix("</think>\n\n") + form) == 0, name  # never stopped thinking
    assert mlx_grpo.grade("<think>18", "18") == (False, False)
    assert mlx_grpo.grade("<think>7</think>It is 18.", "18") == (False, True)


def test_a_think_that_the_template_opens_is_part_of_what_is_scored():
    opening = byte_tokenizer(template=CHATML.removesuffix("{% endif %}") + "<think>\n{% endif %}")
    for prefix in ("", "Well, "):
        ids = build_prompt(opening, "1+1?", completion_prefix=prefix)
        assert primed_text(opening, ids, prefix) == "<think>\n" + prefix
        rollout = generate(tiny_model("llama", vocab_size=272), opening, [ids], max_new_tokens=3, keys=[mlx_grpo.random_key(0)], prefix=prefix)
        assert rollout[0].text.startswith("<think>\n" + prefix)
    plain = byte_tokenizer()
    assert primed_text(plain, build_prompt(plain, "Write <think>")) == ""  # the user's words are not the model's
    assert primed_text(plain, build_prompt(plain, "1+1?", completion_prefix="<think>"), "<think>") == "<think>"


def test_chat_template_kwargs_reach_the_template():
    tokenizer = byte_tokenizer(template=THINKING)
    text = lambda **options: tokenizer.decode(build_prompt(tokenizer, "1+1?", **options))  # noqa: E731
    assert text(chat_template_kwargs={"enable_thinking": False}).endswith("assistant\n<think>\n\n</think>\n\n")
    assert text(chat_template_kwargs={"enable_thinking": True}).endswith("assistant\n")


# Base models


PLAIN = "Question: {prompt}\nAnswer:"


@pytest.mark.parametrize("begins", [False, True])
def test_a_prompt_template_is_plain_text_that_begins_as_the_tokenizer_begins_one(begins):
    tokenizer = byte_tokenizer(template=None, begins=begins)
    mlx_grpo.set_template(tokenizer, MLXGRPOConfig(prompt_template=PLAIN))
    assert build_prompt(tokenizer, "1+1?") == tokenizer.encode("Question: 1+1?\nAnswer:")
    assert (build_prompt(tokenizer, "1+1?")[0] == tokenizer.bos_token_id) is begins
    text = lambda *given: tokenizer.decode(build_prompt(tokenizer, *given), skip_special_tokens=True)  # noqa: E731
    assert text("1+1?", "Be brief.", " So") == "Be brief.\n\nQuestion: 1+1?\nAnswer: So"
    chat = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "2+2?"}]
    assert text(chat) == "Question: 1+1?\nAnswer: 2\n\nQuestion: 2+2?\nAnswer:"


@pytest.mark.parametrize("template", ['Say "{prompt}" in \\boxed{}\n{{ x }} {% if %} \U0001f999é\\n:', "{prompt}", "{prompt}\n", "A\n\nB: {prompt}"])
def test_a_prompt_template_may_hold_any_characters(template):
    tokenizer = byte_tokenizer(template=None)
    mlx_grpo.set_template(tokenizer, MLXGRPOConfig(prompt_template=template))
    assert tokenizer.decode(build_prompt(tokenizer, "{prompt} é")) == template.replace("{prompt}", "{prompt} é", 1)


def test_a_saved_model_prompts_as_it_was_trained(tmp_path):
    tokenizer = byte_tokenizer(template=None, begins=True)
    mlx_grpo.set_template(tokenizer, MLXGRPOConfig(prompt_template=PLAIN))
    tokenizer.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ids = again.apply_chat_template([{"role": "user", "content": "1+1?"}], add_generation_prompt=True, return_dict=False)
    assert ids == build_prompt(tokenizer, "1+1?")


@pytest.mark.parametrize(
    "template, stop",
    [
        (PLAIN, "\nQuestion:"), ("{prompt}\nAnswer:", None), ("A talk of two.\n\n### Instruction:\n{prompt}\n### Response:\n", "\n### Instruction:"),
        ("A conversation between User and Assistant, long and patient. User: {prompt}\nAssistant: <think>", "\nUser:"), ("", None),
    ],
)  # fmt: skip
def test_a_base_model_stops_where_it_writes_the_next_question(template, stop):
    assert MLXGRPOConfig(prompt_template=template).stops == ["</answer>"] + [stop] * bool(stop)
    assert MLXGRPOConfig(prompt_template=template, stop_strings=["X"]).stops == ["X"]  # the user's own stay alone
    assert MLXGRPOConfig(prompt_template=template, stop_strings=[]).stops == []


def test_a_model_without_any_template_is_refused_with_the_setting_that_helps():
    with pytest.raises(UserError, match="^The model's tokenizer has no chat template; set prompt_template, such as "):
        build_prompt(byte_tokenizer(template=None), "1+1?")


@pytest.mark.parametrize("template", ["Question:", "{prompt} and {prompt}"])
def test_a_prompt_template_holds_the_prompt_once(template):
    with pytest.raises(UserError, match="^prompt_template must hold {prompt} once"):
        MLXGRPOConfig(prompt_template=template)


def test_chat_template_kwargs_that_the_template_does_not_read_are_said(capsys):
    tokenizer = byte_tokenizer(template=THINKING)
    mlx_grpo.set_template(tokenizer, MLXGRPOConfig(chat_template_kwargs={"enable_thinking": False}))
    assert not capsys.readouterr().err
    mlx_grpo.set_template(tokenizer, MLXGRPOConfig(chat_template_kwargs={"enable_thinking": False, "colour": "red"}))
    assert capsys.readouterr().err == "Warning: the model's chat template does not read colour of chat_template_kwargs\n"


def test_chat_template_kwargs_are_settings(tmp_path):
    config = mlx_grpo.load_config(None, ["chat_template_kwargs={enable_thinking = false, nested = {a = 1}}"])
    assert config.chat_template_kwargs == {"enable_thinking": False, "nested": {"a": 1}}
    from mlx_grpo.settings import config_as_toml

    (tmp_path / "c.toml").write_text(config_as_toml(config, {"chat_template_kwargs": "--set"}))
    assert mlx_grpo.load_config(tmp_path / "c.toml") == config


def test_a_base_model_trains_and_its_final_model_prompts_alike(tmp_path, capsys):
    root = Path(mlx_grpo.script.__file__).parent
    shutil.copytree(root / "starter" / "model", tmp_path / "base")
    path = tmp_path / "base" / "tokenizer_config.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "chat_template"}))
    settings = [
        f"model_name={tmp_path / 'base'}", "dataset=starter/data", f"output_dir={tmp_path}", "run_name=run", "max_train_samples=2", "batch_size=2", "num_generations=2",
        "max_completion_length=6", "eval_samples=2", "use_compile=false", "system_prompt=", "reward_funcs=['repetition_reward_func']",
    ]  # fmt: skip
    train = lambda *more: mlx_grpo.main([part for s in [*settings, *more] for part in ("--set", s)])  # noqa: E731
    assert train() == 2 and "set prompt_template, such as" in capsys.readouterr().err
    assert train(f"prompt_template={PLAIN}") == 0
    tokenizer = mlx_grpo.open_model(str(tmp_path / "run" / "final"))[1]
    assert tokenizer.decode(build_prompt(tokenizer, "1+1?")) == "Question: 1+1?\nAnswer:"
