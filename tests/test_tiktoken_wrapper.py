"""TiktokenTokenizerWrapper: what it encodes and renders, and that a hostile tokenizer.pkl runs nothing."""

import copyreg
import json
import pickle
import random
import struct
import sys

import pytest
from nanochat_tokenizer import PATTERN, REFERENCES, SPECIAL, make_encoding

from mlx_grpo import TiktokenTokenizerWrapper as Wrapper

needs_references = pytest.mark.skipif(not REFERENCES.is_dir(), reason=f"no nanochat references at {REFERENCES}")

ALPHABET = [
    "a",
    "the",
    " ",
    "  ",
    "\n",
    "\r",
    "'s",
    "12",
    "3",
    "!",
    "<",
    "|",
    ">",
    "<|",
    "|>",
    "é",
    "\u0301",
    "日",
    "🌍",
    "\u200b",
    "\x00",
    "\t",
    "_",
    "<|bos|>",
    "<|user_start|>",
    "<|assistant_end|>",
    "bos",
    "\u00a0",
    "İ",
    "ſ",
]


def random_texts(n, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices(ALPHABET, k=rng.randint(0, 25))) for _ in range(n)]


@pytest.fixture
def wrapper(tmp_path):
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(make_encoding()))
    return Wrapper(tmp_path)


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Load these bytes as a tokenizer.pkl: it must be refused, with no network and without running anything in it."""
    canary = tmp_path / "canary"
    monkeypatch.chdir(tmp_path)

    def no_network(*args, **kwargs):
        raise AssertionError("a tokenizer.pkl made tiktoken look an encoding up")

    monkeypatch.setattr("tiktoken.registry.get_encoding", no_network)
    monkeypatch.setattr("tiktoken.load.read_file", no_network)

    def check(data, reason=""):
        path = tmp_path / "tokenizer.pkl"
        path.write_bytes(data)
        before = set(sys.modules)
        with pytest.raises(ValueError, match="^Failed to load tiktoken tokenizer: .") as error:
            Wrapper(path)
        assert reason in str(error.value)
        assert "\n" not in str(error.value)
        assert not canary.exists()
        assert not {name for name in set(sys.modules) - before if not name.startswith(("tiktoken", "regex"))}

    return check


# ---- hostile pickles ------------------------------------------------------------------------------------------------


class Call:
    """Pickles as the call of `function`."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def short(text):
    return b"\x8c" + bytes([len(text)]) + text.encode()


def global_(module, name):
    return short(module) + short(name) + b"\x93"


ENCODING = global_("tiktoken.core", "Encoding")
TOUCH = b"cposix\nsystem\n(S'touch canary'\ntR"


def encoding_pickle(state):
    """A pickle of an Encoding with any state at all."""
    body = pickle.dumps(state, protocol=4)[11:-1]  # without PROTO, FRAME and STOP
    return b"\x80\x04" + ENCODING + b")\x81" + body + b"b."


def good_state(**changes):
    encoding = make_encoding()
    state = {
        "name": "rustbpe",
        "pat_str": PATTERN,
        "mergeable_ranks": encoding._mergeable_ranks,
        "special_tokens": encoding._special_tokens,
    }
    return {key: value for key, value in (state | changes).items() if value is not ...}


def test_the_handmade_pickle_itself_is_good(tmp_path):
    (tmp_path / "tokenizer.pkl").write_bytes(encoding_pickle(good_state()))
    assert Wrapper(tmp_path).encode("the") == make_encoding().encode_ordinary("the")


def test_calls_are_refused(refused):
    import os

    evil = Call(os.system, "touch canary")
    refused(pickle.dumps(evil))
    for protocol in range(6):
        refused(pickle.dumps({"a": [evil]}, protocol=protocol))
    refused(pickle.dumps(Call(eval, "open('canary', 'w')")))
    refused(b"\x80\x04" + global_("tiktoken.registry", "get_encoding") + short("gpt2") + b"\x85R.")
    refused(TOUCH + b".")


@pytest.mark.parametrize("field", ["name", "pat_str", "mergeable_ranks", "special_tokens"])
def test_calls_nested_in_the_state_are_refused(refused, field):
    import os

    evil = Call(os.system, "touch canary")
    refused(encoding_pickle(good_state(**{field: evil})))
    refused(encoding_pickle(good_state(**{field: {b"x": evil}})))
    refused(encoding_pickle(good_state() | {"more": [evil]}))
    refused(pickle.dumps([good_state(), evil]))


@pytest.mark.parametrize(
    "module, name",
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("tiktoken", "Encoding"),
        ("tiktoken", "core.Encoding"),
        ("tiktoken.core", "Encoding.__init__"),
        ("tiktoken.core", "Encoding.__reduce__"),
        ("tiktoken.core", "Encoding.decode.__globals__"),
        ("tiktoken.core", "functools"),
        ("tiktoken.core", "Encoding "),
        ("tiktoken.core ", "Encoding"),
        ("Tiktoken.core", "Encoding"),
        ("tiktoken.registry", "get_encoding"),
        ("tiktoken.load", "read_file"),
        ("copyreg", "_reconstructor"),
        ("importlib", "import_module"),
        ("", ""),
    ],
)
def test_every_other_name_is_refused(refused, module, name):
    for get in (global_(module, name), f"c{module}\n{name}\n".encode()):
        refused(b"\x80\x04" + get + b".")
        refused(b"\x80\x04" + get + b")\x81.")
        refused(b"\x80\x04" + get + short("touch canary") + b"\x85R.")
        refused(b"\x80\x04" + ENCODING + b")\x81" + get + b"b.")
    refused(f"(S'touch canary'\ni{module}\n{name}\n.".encode())


def test_nothing_is_imported(refused, tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text("open('canary', 'w').close()\nclass Encoding: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("Encoding", "tiktoken.core"):
        refused(b"\x80\x04" + global_("evil_module", name) + b")\x81.", "evil_module")
    refused(b"cevil_module\nEncoding\n.", "evil_module")
    assert "evil_module" not in sys.modules


def test_a_name_instead_of_data_is_refused(refused):
    for name in ("gpt2", "cl100k_base", "o200k_base", ""):
        refused(encoding_pickle(name), "registered")
    for name in ("gpt2", "cl100k_base"):
        refused(encoding_pickle(good_state(name=name)), "tiktoken downloads")
    refused(b"\x80\x04" + ENCODING + short("gpt2") + b"\x85R.")


def test_other_ways_in_are_refused(refused):
    state = pickle.dumps(good_state(), protocol=4)[11:-1]
    refused(b"\x80\x04" + ENCODING + b")\x81" + state + b"}\x86b.", "TUPLE2")  # (state, slots)
    refused(b"\x80\x04" + ENCODING + b")}\x92" + state + b"b.", "NEWOBJ_EX")
    refused(b"\x80\x04" + ENCODING + state + b"b.")  # BUILD on the class
    refused(b"\x80\x04" + ENCODING + b".")
    refused(b"\x80\x04" + ENCODING + b")\x81.")
    refused(b"\x80\x04}" + state + b"b.")  # BUILD on a dict
    refused(b"\x80\x04" + state + b".")  # no Encoding
    refused(b"\x80\x04Ptouch canary\n.", "PERSID")
    refused(b"\x80\x04K\x01Q.", "BINPERSID")
    refused(b"\x80\x05\x97.", "NEXT_BUFFER")
    refused(b"(o.")
    refused(b"\x80\x04" + ENCODING + b")\x81" + ENCODING + b")\x81b.")  # an Encoding as state
    refused(encoding_pickle(list(good_state().items())))


def test_the_extension_registry_is_not_reached(refused):
    copyreg.add_extension("posix", "system", 250)
    try:
        refused(b"\x80\x04\x82\xfa" + short("touch canary") + b"\x85R.", "EXT1")
    finally:
        copyreg.remove_extension("posix", "system", 250)


def test_oversized_and_broken_files_are_refused(refused, tmp_path):
    refused(b"\x80\x04K\x01r" + struct.pack("<I", 2**31 - 1) + b".", "memo")  # asks for 16 GB
    refused(b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".")
    refused(b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".")
    good = encoding_pickle(good_state())
    for data in (
        b"",
        b".",
        b"\x80",
        b"not a pickle",
        b"\x80\x63.",
        good[: len(good) // 2],
        good[:-1],
        b"\x80\x04" + b"(" * 1000 + b".",
    ):
        refused(data)
    with pytest.raises(ValueError, match="Failed to load tiktoken tokenizer: .*absent"):
        Wrapper(tmp_path / "absent.pkl")
    big = tmp_path / "big.pkl"
    with open(big, "wb") as file:
        file.truncate(2**26 + 1)  # sparse
    with pytest.raises(ValueError, match="larger than 64 MiB"):
        Wrapper(big)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"pat_str": b"x"}, "pat_str"),
        ({"pat_str": ""}, "pat_str"),
        ({"pat_str": "x" * 10_000}, "pat_str"),
        ({"pat_str": "("}, ""),
        ({"pat_str": 7}, "pat_str"),
        ({"pat_str": {}}, "pat_str"),
        ({"name": 3}, "name"),
        ({"name": "x" * 300}, "name"),
        ({"mergeable_ranks": {}}, "256"),
        ({"mergeable_ranks": "x"}, "mergeable_ranks"),
        ({"special_tokens": {"<|bos|>": 0}}, "share"),
        ({"special_tokens": {b"<|bos|>": 999}}, "special_tokens"),
        ({"special_tokens": {"": 999}}, "special_tokens"),
        ({"special_tokens": {"<|bos|>": "999"}}, "special_tokens"),
        ({"special_tokens": {"<|bos|>": 2**30}}, "special_tokens"),
        ({"special_tokens": {"<|bos|>": -1}}, "special_tokens"),
        ({"special_tokens": {"x" * 2000: 999}}, "special_tokens"),
        ({"special_tokens": {"<|bos|>": 2.0}}, ""),
        ({"special_tokens": {"<|bos|>": True}}, ""),
        ({"special_tokens": ...}, "fields"),
        ({"explicit_n_vocab": 5}, "fields"),
    ],
)
def test_wrong_data_is_refused(refused, changes, reason):
    refused(encoding_pickle(good_state(**changes)), reason)


def test_wrong_ranks_are_refused(refused):
    ranks = good_state()["mergeable_ranks"]
    for changed in (
        ranks | {"the": 900},
        ranks | {b"": 900},
        ranks | {b"zz": 0},
        ranks | {b"zz": 2**21},
        ranks | {b"z" * 2000: 900},
    ):
        refused(encoding_pickle(good_state(mergeable_ranks=changed)))
    refused(
        encoding_pickle(good_state(mergeable_ranks={t: i for t, i in ranks.items() if t != b"\xff"})),
        "256 single bytes",
    )


# ---- what it does ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_reads_what_pickle_writes(tmp_path, protocol):
    encoding = make_encoding()
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(encoding, protocol=protocol))
    wrapper = Wrapper(tmp_path / "tokenizer.pkl")
    for text in random_texts(200):
        assert wrapper.encode(text) == encoding.encode_ordinary(text) == wrapper.encode(text, add_special_tokens=False)
        assert wrapper.decode(wrapper.encode(text)) == text
    assert (wrapper.vocab_size, len(wrapper)) == (encoding.n_vocab, encoding.n_vocab)


def test_tokens_and_ids(wrapper):
    vocab = wrapper.get_vocab()
    assert len(vocab) == wrapper.vocab_size
    ids = list(range(wrapper.vocab_size))
    assert wrapper.convert_tokens_to_ids(wrapper.convert_ids_to_tokens(ids)) == ids
    assert wrapper.convert_tokens_to_ids("<|bos|>") == vocab["<|bos|>"] == wrapper.bos_token_id
    assert wrapper.convert_tokens_to_ids("no such token") is None
    assert wrapper.eos_token_id == vocab["<|assistant_end|>"]
    assert wrapper.eos_token_ids == {vocab["<|assistant_end|>"], vocab["<|bos|>"]}
    assert wrapper.all_special_tokens == SPECIAL
    ids = wrapper.apply_chat_template([{"role": "user", "content": "hi"}])
    assert wrapper.decode(ids, skip_special_tokens=True) == "hi"
    assert wrapper.decode([5_000]) == ""  # a padding row of the model's vocabulary
    assert wrapper.decode(wrapper.bos_token_id) == "<|bos|>"


def test_save_pretrained(wrapper, tmp_path):
    wrapper.save_pretrained(tmp_path / "copy")
    assert Wrapper(tmp_path / "copy").get_vocab() == wrapper.get_vocab()
    wrapper.save_pretrained(tmp_path)  # onto itself
    assert Wrapper(tmp_path).get_vocab() == wrapper.get_vocab()


def test_chat_format(wrapper):
    t = wrapper.special_tokens
    ids = wrapper.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}], add_generation_prompt=True
    )
    assert ids == [
        t["<|bos|>"],
        t["<|user_start|>"],
        *wrapper.encode("S\n\nU"),
        t["<|user_end|>"],
        t["<|assistant_start|>"],
    ]
    talk = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    assert (
        wrapper.apply_chat_template(talk, tokenize=False)
        == "<|bos|><|user_start|>U<|user_end|><|assistant_start|>A<|assistant_end|>"
    )
    assert wrapper.apply_chat_template(talk, tokenize=False, continue_final_message=True).endswith(
        "<|assistant_start|>A"
    )
    assert wrapper.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=False).endswith("U<|user_end|>")
    assert talk == [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]  # untouched
    for wrong in (talk[1:], [talk[0], talk[0]], [{"role": "system", "content": "S"}, talk[1]]):
        with pytest.raises(ValueError, match="should be from"):
            wrapper.apply_chat_template(wrong)
    for wrong in (talk, []):
        with pytest.raises(ValueError, match="end with a message from user"):
            wrapper.apply_chat_template(wrong, add_generation_prompt=True)


def test_content_never_makes_a_special_token(wrapper):
    for text in [*SPECIAL, *random_texts(100, seed=1)]:
        ids = wrapper.apply_chat_template([{"role": "user", "content": text}])
        assert [i for i in ids if i in wrapper.all_special_ids] == [ids[0], ids[1], *ids[-2:]]
        assert ids[2:-2] == wrapper.encode(text)


def test_plain_format_without_the_chat_tokens(tmp_path):
    encoding = make_encoding()
    special = {"<|endoftext|>": encoding.n_vocab - len(SPECIAL)}
    (tmp_path / "tokenizer.pkl").write_bytes(encoding_pickle(good_state(special_tokens=special)))
    wrapper = Wrapper(tmp_path)
    assert (wrapper.eos_token, wrapper.eos_token_ids, wrapper.bos_token) == (
        "<|endoftext|>",
        set(special.values()),
        None,
    )
    text = wrapper.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}], tokenize=False
    )
    assert text == "User: S\n\nU\nAssistant: "
    assert wrapper.apply_chat_template([{"role": "user", "content": "U"}]) == wrapper.encode("User: U\nAssistant: ")


def test_mlx_lm_generates_with_it(wrapper):
    import mlx.core as mx
    from mlx_lm import stream_generate
    from mlx_lm.models.nanochat import Model, ModelArgs
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    mx.random.seed(0)
    model = Model(
        ModelArgs(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=320,
            intermediate_size=64,
        )
    )
    prompt = wrapper.apply_chat_template([{"role": "user", "content": "hi"}])
    wrapped = TokenizerWrapper(wrapper, eos_token_ids=wrapper.eos_token_ids)
    assert wrapped.eos_token_ids == wrapper.eos_token_ids and wrapped.has_chat_template
    assert wrapped.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True) == prompt
    for tokenizer in (wrapper, wrapped):  # mlx-lm wraps the bare one itself
        out = list(stream_generate(model, tokenizer, prompt, max_tokens=12))
        tokens = [r.token for r in out if r.token not in wrapper.eos_token_ids]
        assert tokens
    assert list(stream_generate(model, wrapper, "plain text", max_tokens=2))


@needs_references
def test_references():
    wrapper = Wrapper(REFERENCES)
    cases = json.loads((REFERENCES / "tokenizer_cases.json").read_text())
    renderings = json.loads((REFERENCES / "renderings.json").read_text())
    for case in cases["encode"]:
        assert wrapper.encode(case["text"]) == case["ids"]
    for case in cases["decode_random_ids"]:
        assert wrapper.decode(case["ids"]) == case["text"]
    assert wrapper.special_tokens == renderings["special_tokens"]
    assert wrapper.eos_token_ids == set(renderings["stop_token_ids"])
    for case in renderings["conversations"]:
        messages = case["messages"]
        assert (
            wrapper.apply_chat_template(messages, add_generation_prompt=False) == case["render_conversation"]["ids"]
        ), case["name"]
        assert (
            wrapper.apply_chat_template(messages[:-1], add_generation_prompt=True) == case["render_for_completion"]
        ), case["name"]
        assert wrapper.apply_chat_template(messages, tokenize=False) == case["decoded_conversation"], case["name"]
    for case in renderings["rejected_by_nanochat"]:
        with pytest.raises(ValueError):
            wrapper.apply_chat_template(case["messages"])
