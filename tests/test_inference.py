"""utils/inference.py: exact streaming, the chat's KV cache, every way to ask, every refusal. No network."""

import importlib.util
import json
import os
import pickle
import pty
import random
import re
import select
import shutil
import signal
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx_grpo
import numpy as np
import pytest
from mlx_grpo.export import save_model
from mlx.utils import tree_flatten
from nanochat_tokenizer import SPECIAL, make_encoding
from tiny import ids_of, LetterTokenizer, texts_of, tiny_model
from tokenizers import Tokenizer, decoders, models
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
SCRIPT, STARTER = ROOT / "utils" / "inference.py", str(ROOT / "starter" / "model")
spec = importlib.util.spec_from_file_location("inference", SCRIPT)
inference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(inference)

QUESTION = "Ana gave Hugo 4 bags with 2 eggs each. Hugo already had 23 eggs. How many does he have now?"
WILD = ["--temperature", "20", "--max-tokens", "120"]  # broken characters, leading spaces, everything


@pytest.fixture(scope="module")
def starter():
    return mlx_grpo.open_model(STARTER)[:2]


@pytest.fixture
def ask(capsys):
    """Run the script in this process: (exit status, stdout, stderr)."""

    def run(*arguments):
        try:
            status = inference.main([str(a) for a in arguments])
        except SystemExit as stop:  # argparse
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


# Streaming


def sentencepiece_like():
    """Llama 2's way: a leading space that decoding strips, and bytes that stand for what has no token of its own."""
    tokens = ["</s>", "▁", "▁the", "▁a", "x", "yz", ".", "\n", "ü", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")), len(tokens)


def with_clean_up():
    """A tokenizer that takes spaces before punctuation away when it decodes."""
    tokens = ["</s>", "it", " ", " n", "'", "t", " '", "ve", ".", " .", "s", "d n't", " ,"]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="it"))
    tokenizer.decoder = decoders.Fuse()
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=True)), len(tokens)


def nanochat(folder):
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(make_encoding()))
    tokenizer = mlx_grpo.TiktokenTokenizerWrapper(folder)
    return tokenizer, len(tokenizer)


@pytest.mark.parametrize("kind", ["starter", "sentencepiece", "clean_up", "nanochat"])
def test_streamed_pieces_join_to_the_text(kind, starter, tmp_path):
    make = {"starter": lambda: (starter[1], 640), "sentencepiece": sentencepiece_like, "clean_up": with_clean_up}
    tokenizer, size = nanochat(tmp_path) if kind == "nanochat" else make[kind]()
    rng = random.Random(0)
    emoji = [264 - 255 + byte for byte in "🦙é".encode()] if kind == "sentencepiece" else []
    for length in [*range(1, 12), 300, 300, 500]:
        for _ in range(8):
            ids = rng.choices(range(size), k=length)
            if emoji:  # valid runs of byte tokens between others
                ids = [i for token in ids for i in ([token % 9] if token % 3 else emoji)]
            stream = inference.TextStream(tokenizer)
            pieces = [stream.add(i) for i in ids] + [stream.rest()]
            assert "".join(pieces) == mlx_grpo.completion_text(tokenizer, ids)


def test_stream_holds_back_no_more_than_it_must(starter):
    tokenizer = starter[1]
    stream, written = inference.TextStream(tokenizer), ""
    for i, token in enumerate(ids := tokenizer.encode(" Zoé has 7 🦙 eggs.\n" * 30)):
        written += stream.add(token)
        assert written == tokenizer.decode(ids[: i + 1]).rstrip("\ufffd")
        assert len(stream.ids) <= stream.WINDOW + 8  # the cost of a step does not grow with the text


@pytest.mark.parametrize("seed", range(4))
def test_streamed_output_is_unstreamed_output(ask, seed):
    arguments = ["--model", STARTER, "--prompt", QUESTION, "--seed", seed, *WILD]
    status, plain, _ = ask(*arguments)
    assert status == 0 and len(plain.encode()) > len(plain)  # there are multi-byte characters in it
    assert ask(*arguments, "--stream")[1] == plain


def test_seeds_differ_and_repeat(ask):
    texts = [ask("--model", STARTER, "--prompt", QUESTION, "--seed", seed, *WILD)[1] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


# One generation path: what the rollout would write


@pytest.mark.parametrize(
    "sampling",
    [
        mlx_grpo.Sampling(temperature=0.0),
        mlx_grpo.Sampling(temperature=1.5, top_k=40, top_p=0.95, min_p=0.01),
        mlx_grpo.Sampling(temperature=2.0, repetition_penalty=1.3),
    ],
)
def test_an_answer_is_what_generate_writes(starter, sampling):
    prompt, key = mlx_grpo.build_prompt(starter[1], QUESTION), mlx_grpo.random_key("test", 3)
    rollout = mlx_grpo.generate(*starter, [prompt], sampling=sampling, max_new_tokens=60, keys=[key])
    answer = inference.Session(*starter, sampling, 60).answer(prompt, key, lambda piece: None)
    assert (answer.ids, answer.text) == (ids_of(rollout)[0], texts_of(rollout)[0])


# The KV cache between turns


class Letters(LetterTokenizer):
    def convert_ids_to_tokens(self, token):
        return chr(33 + token)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mamba2"])
def test_turns_answer_as_if_nothing_were_cached(name):
    model, rng = tiny_model(name), random.Random(0)
    make = lambda: inference.Session(model, Letters(), mlx_grpo.Sampling(temperature=1.0), 12)  # noqa: E731
    session, prompt, reused = make(), rng.choices(range(90), k=9), []
    for turn in range(5):
        key = mlx_grpo.random_key("turn", turn)
        answer, fresh = session.answer(prompt, key, lambda piece: None), make().answer(prompt, key, lambda piece: None)
        assert answer.ids == fresh.ids
        reused.append(answer.reused)
        # The next prompt: mostly what came before, with a shorter last answer, or (turn 2) cut back to its start.
        prompt = (prompt + answer.ids[: -2 if turn % 2 else None] + rng.choices(range(90), k=4)) if turn != 2 else prompt[:6] + [1, 2]
    assert reused[0] == 0 and reused[1] > 9  # recurrent state can be continued, only not cut back
    if name == "llama":
        assert min(reused[1:]) >= 6


def test_interrupted_answers_leave_a_usable_cache():
    model, written = tiny_model("llama"), []
    make = lambda: inference.Session(model, Letters(), mlx_grpo.Sampling(temperature=1.0), 50)  # noqa: E731
    session, key = make(), mlx_grpo.random_key("x")
    answer = session.answer([1, 2, 3], key, written.append, lambda: len(written) >= 5)
    assert len(answer.ids) == 5 and session.held == [1, 2, 3, *answer.ids]
    assert session.answer([1, 2, 3, 9, 9, 9], key, written.append, lambda: True).ids == []  # in the prefill: nothing is written
    after = session.answer([1, 2, 3, *answer.ids, 7, 8], key, written.append)
    assert after.ids == make().answer([1, 2, 3, *answer.ids, 7, 8], key, written.append).ids


# The command line


def test_chat_template_system_prompt_and_raw(ask, starter, monkeypatch):
    seen = []
    real = inference.Session.answer
    monkeypatch.setattr(inference.Session, "answer", lambda self, prompt, *a: seen.append(prompt) or real(self, prompt, *a))
    common = ("--model", STARTER, "--max-tokens", "3", "--prompt")
    for extra in ([QUESTION], [QUESTION, "--system", "Be brief."], [QUESTION, "--raw"]):
        assert ask(*common, *extra)[0] == 0
    build = mlx_grpo.build_prompt
    assert seen == [build(starter[1], QUESTION), build(starter[1], QUESTION, "Be brief."), starter[1].encode(QUESTION)]


def test_a_run_s_model_is_asked_with_its_system_prompt(ask, starter, tmp_path, monkeypatch):
    folder = tmp_path / "run" / "final"
    shutil.copytree(STARTER, folder)
    (tmp_path / "run" / "config.resolved.toml").write_text('system_prompt = "Be brief."  # --set; default ""\n')
    asked = []
    build = mlx_grpo.build_prompt
    monkeypatch.setattr(mlx_grpo.script, "build_prompt", lambda tokenizer, prompt, system: asked.append(system) or build(tokenizer, prompt, system))
    said = [ask("--model", str(folder), "--prompt", QUESTION, "--max-tokens", "2", *more)[2] for more in ([], ["--system", ""], ["--raw"])]
    assert asked == ["Be brief.", ""] and "(--system '' for none): Be brief." in said[0] and not said[1] + said[2]


def test_verbose_speaks_on_stderr(ask):
    status, out, err = ask("--model", STARTER, "--prompt", QUESTION, "--verbose")
    assert status == 0 and out == ask("--model", STARTER, "--prompt", QUESTION)[1] != "\n"
    assert re.fullmatch(
        r"prompt \d+ tokens \(0 from the cache\), [\d.]+ tokens/s; generation \d+ tokens, [\d.]+ tokens/s; "
        r"first token after [\d.]+ s; peak memory [\d.]+ GB\n", err,
    )  # fmt: skip


def test_prompts_file_answers_in_order(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "FILE_BATCH", 3)  # several batches
    rows = [json.loads(line) for line in (ROOT / "starter/data/test.jsonl").read_text().splitlines()[:7]]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"question": r["question"], "id": i}) for i, r in enumerate(rows)) + "\n\n")
    (tmp_path / "a.txt").write_text("\n\n".join(r["question"] for r in rows))
    sampled = ["--model", STARTER, "--temperature", "1", "--seed", "5", "--max-tokens", "80"]
    status, out, err = ask(*sampled, "--prompts-file", tmp_path / "a.jsonl", "--verbose")
    answers = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [a["id"] for a in answers] == list(range(7)) and "7 prompts of" in err
    assert [a["prompt"] for a in answers] == [r["question"] for r in rows]
    assert ask(*sampled, "--prompt", rows[0]["question"])[1] == answers[0]["completion"] + "\n"  # the same seed, the same text
    lines = [json.loads(line) for line in ask(*sampled, "--prompts-file", tmp_path / "a.txt")[1].splitlines()]
    assert [a["completion"] for a in lines] == [a["completion"] for a in answers]
    assert all(a["finish_reason"] in ("eos", "length") and a["tokens"] > 1 for a in lines)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--prompt", "x", "--chat"], "not allowed with"),
        ([], "--prompt --chat --prompts-file is required"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature: -1 is not in [0, inf]"),
        (["--prompt", "x", "--top-p", "2"], "--top-p: 2 is not in [0, 1]"),
        (["--prompt", "x", "--max-tokens", "many"], "--max-tokens: invalid int value: 'many'"),
        (["--prompt", "x", "--min-p", "nan"], "--min-p"),
        (["--chat", "--raw"], "--raw"),
        (["--prompts-file", "x", "--stream"], "--stream has no effect"),
        (["--prompt", "x", "--raw", "--system", "y"], "--system needs the chat template"),
        (["--prompt", "x"], "no directory mlx_model here"),
        (["--prompt", "x", "--model", "./absent/"], "Model not found: ./absent/"),
        (["--prompt", "x", "--model", "."], "has no config.json"),
        (["--prompt", "x", "--model", STARTER, "--adapter-path", "absent"], "absent"),
        (["--prompt", "", "--model", STARTER, "--raw"], "The prompt is empty"),
        (["--prompts-file", "absent.txt", "--model", STARTER], "Failed to read prompts: absent.txt: No such file or directory"),
        (["--prompts-file", "empty.txt", "--model", STARTER], "No prompts in empty.txt"),
        (["--prompts-file", "broken.jsonl", "--model", STARTER], "broken.jsonl, line 2: Expecting"),
        (["--prompts-file", "other.jsonl", "--model", STARTER], 'other.jsonl, line 1: no text under "prompt"'),
        (["--prompts-file", "latin.txt", "--model", STARTER], "Failed to read prompts: latin.txt: 'utf-8' codec"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(ask, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "x"}\n{"prompt": \n')
    (tmp_path / "other.jsonl").write_text('["x"]\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    status, out, err = ask(*arguments)
    assert (status, out) == (2, "") and said in err and err.count("\n") == 1


def test_a_base_model_is_asked_raw(ask, tmp_path):
    shutil.copytree(STARTER, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    status, _, err = ask("--model", tmp_path, "--prompt", "x")
    assert status == 2 and err.endswith("or use --raw\n")
    assert ask("--model", tmp_path, "--prompt", "x", "--raw", "--max-tokens", "4")[0] == 0



def test_a_filter_as_wide_as_the_vocabulary_keeps_everything(ask):
    common = ["--model", STARTER, "--prompt", QUESTION, *WILD, "--top-k"]
    assert ask(*common, "640") == ask(*common, "0")


# Whatever was written by the trainer, the converters and mlx-lm


def randomise_adapters(model):
    """Adapters that change the answers: as made, they add nothing."""
    rng = np.random.default_rng(0)
    changed = [(k, mx.array(rng.normal(size=v.shape, scale=0.3), dtype=v.dtype)) for k, v in tree_flatten(model.trainable_parameters())]
    model.load_weights(changed, strict=False)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_and_the_merged_model(ask, tmp_path, kind):
    config = mlx_grpo.MLXGRPOConfig(model_name=STARTER, fine_tune_type=kind, lora_parameters={"rank": 4, "scale": 2.0})
    model, tokenizer = mlx_grpo.load_model(config)
    randomise_adapters(model)
    (tmp_path / "final").mkdir()
    save_model(tmp_path / "final", model, tokenizer, mlx_grpo.open_model(STARTER)[2], Path(STARTER), config)
    question = ["--prompt", QUESTION, "--max-tokens", "40"]
    plain = ask("--model", STARTER, *question)[1]
    merged = ask("--model", tmp_path / "final", *question)
    assert merged[0] == 0 and merged[1] != plain
    assert ask("--model", STARTER, "--adapter-path", tmp_path / "final", *question)[1] == merged[1]


def test_a_quantised_model(ask, tmp_path):
    from mlx_lm import convert

    convert(STARTER, str(tmp_path / "q"), quantize=True, q_bits=8, q_group_size=32)
    status, out, _ = ask("--model", tmp_path / "q", "--prompt", QUESTION)
    assert status == 0 and len(out) > 1


def test_a_tokenizer_pickle_directory(ask, tmp_path):
    from mlx_lm.utils import save_config, save_model

    tokenizer, size = nanochat(tmp_path)
    config = dict(model_type="llama", hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4,
                  num_key_value_heads=2, rms_norm_eps=1e-6, vocab_size=size, rope_theta=10000.0)  # fmt: skip
    save_model(tmp_path, tiny_model("llama", vocab_size=size))
    save_config(config, tmp_path / "config.json")
    arguments = ["--model", tmp_path, "--prompt", "the é 🌍", *WILD]
    status, plain, _ = ask(*arguments)
    assert status == 0 and len(plain) > 10 and not any(token in plain for token in SPECIAL)
    assert ask(*arguments, "--stream")[1] == plain


# The chat, in a terminal


class Terminal:
    """The script in a pseudo-terminal of its own, so that Ctrl-C and Ctrl-D are what they are for a person."""

    def __init__(self, *arguments):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the tests may run with it ignored
            os.environ["TERM"] = "dumb"
            os.execv(sys.executable, [sys.executable, str(SCRIPT), *map(str, arguments)])

    def until(self, pattern: str, seconds: float = 120) -> str:
        """What is printed up to a match of the pattern."""
        seen, end = "", time.time() + seconds
        while not re.search(pattern, seen):
            assert select.select([self.fd], [], [], max(0, end - time.time()))[0], f"no {pattern!r} in {seen!r}"
            try:
                seen += os.read(self.fd, 1).decode("latin-1")
            except OSError:  # the program has ended
                raise AssertionError(f"ended without {pattern!r}: {seen!r}") from None
        return seen

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def status(self) -> int:
        """Of the program that has ended, or ends."""
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self.status()
        os.close(self.fd)


@pytest.fixture
def in_terminal():
    """Start the script in a terminal; the test's end kills what still runs."""
    terminals = []

    def start(*arguments):
        terminals.append(Terminal(*arguments))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


@pytest.fixture(scope="module")
def babbler(tmp_path_factory):
    """A random model with the starter's tokenizer: it goes on for ever."""
    from mlx_lm.utils import save_config, save_model

    folder = tmp_path_factory.mktemp("babbler")
    model_config = {**mlx_grpo.open_model(STARTER)[2], "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    model_config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    save_model(folder, tiny_model("llama", **{k: v for k, v in model_config.items() if k != "model_type"}))
    save_config(model_config, folder / "config.json")
    mlx_grpo.open_model(STARTER)[1].save_pretrained(folder)
    return folder


def test_chat_in_a_terminal(babbler, in_terminal):
    terminal = in_terminal("--model", babbler, "--chat", "--max-tokens", "100000", "--verbose")
    ended = r"prompt (\d+) tokens \((\d+) from the cache\).*generation (\d+) tokens.*GB\r\n"

    def stopped_answer(question):
        terminal.send(question + "\n")
        terminal.until(re.escape(question) + r"\r?\n(.|\n){20}")  # the echo, then some of the answer
        terminal.send("\x03")
        return [int(n) for n in re.search(ended, terminal.until(ended)).groups()]

    terminal.until(">>> ")
    first = stopped_answer("hello there")
    assert first[1] == 0 and 0 < first[2] < 100000
    terminal.until(">>> ")
    second = stopped_answer("and now?")
    assert second[0] > first[0] + first[2]  # the history is in the prompt, the part of an answer too
    assert second[1] >= first[0]  # and its positions in the KV cache
    terminal.until(">>> ")
    time.sleep(0.5)  # on a busy machine the prompt is seen before its reader is ready
    terminal.send("half a line\x03")  # at the prompt: the line goes, the session stays
    terminal.until(r"\r\n.*>>> ")
    terminal.send("clear\n")
    terminal.until(">>> ")
    assert stopped_answer("hello there")[0] == first[0]
    terminal.until(">>> ")
    terminal.send("\x04")  # Ctrl-D
    assert terminal.status() == 0


def test_chat_reads_lines_from_a_pipe(ask, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n\nclear\n{QUESTION}\nq\nnever asked\n"))
    status, out, err = ask("--model", STARTER, "--chat", "--verbose")
    answer = ask("--model", STARTER, "--prompt", QUESTION)[1]
    assert status == 0 and out == answer * 2
    first, second = (line.split(" tokens")[0] for line in err.splitlines())
    assert first == second  # no history after clear


def test_ctrl_c_without_chat_is_130(ask, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(inference.Session, "answer", interrupted)
    assert ask("--model", STARTER, "--prompt", "x")[0] == 130


# Base models, and templates with settings


PLAIN = "Question: {prompt}\nAnswer:"


@pytest.fixture
def base(tmp_path):
    """The starter without its chat template, as a base model is, in a run's folder."""
    shutil.copytree(STARTER, tmp_path / "run" / "final")
    path = tmp_path / "run" / "final" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["chat_template"]
    path.write_text(json.dumps(settings))
    return tmp_path / "run" / "final"


def test_a_base_model_is_asked_by_a_prompt_template(ask, base, starter, monkeypatch):
    seen = []
    real = inference.Session.answer
    monkeypatch.setattr(inference.Session, "answer", lambda self, prompt, *a: seen.append((prompt, self.stops)) or real(self, prompt, *a))
    common = ["--model", str(base), "--prompt", QUESTION, "--max-tokens", "2"]
    status, _, err = ask(*common)
    assert status == 2 and "set prompt_template" in err
    assert ask(*common, "--prompt-template", PLAIN)[0] == 0
    (base.parent / "config.resolved.toml").write_text(f"prompt_template = {json.dumps(PLAIN)}\nsystem_prompt = ''\nstop_strings = ['</answer>']\n")
    assert ask(*common)[0] == 0  # the run that trained it says how
    assert seen == [(starter[1].encode(PLAIN.replace("{prompt}", QUESTION)), ["</answer>", "\nQuestion:"])] * 2


def test_an_answer_ends_where_a_base_model_writes_the_next_question():
    text = "It is 12.\nQuestion: What"
    ids = [ord(c) for c in text]

    class Characters:
        eos_token_ids = {0}
        decode = staticmethod(lambda ids, **_: "".join(map(chr, ids)))
        convert_ids_to_tokens = staticmethod(chr)

    session = inference.Session(tiny_model("llama"), Characters(), mlx_grpo.Sampling(), 100, ["\nQuestion:"])
    session.reuse, session.tokens = lambda prompt: 0, lambda prompt, key, stopped: iter(ids)
    assert session.answer([1], None, lambda piece: None).text == "It is 12.\nQuestion:"


def test_chat_template_kwargs_are_a_json_object(ask):
    status, _, err = ask("--model", STARTER, "--prompt", QUESTION, "--chat-template-kwargs", "true")
    assert status == 2 and "true is no JSON object" in err
    status, _, err = ask("--model", STARTER, "--prompt", QUESTION, "--max-tokens", "2", "--chat-template-kwargs", '{"enable_thinking": false}')
    assert status == 0 and err == "Warning: the model's chat template does not read enable_thinking of chat_template_kwargs\n"
