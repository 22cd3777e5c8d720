"""convert_nanochat.py: the converted model computes what the checkpoint computes, or the conversion is refused."""

import json
import os
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="reading .pt files needs torch: uv run --extra torch pytest")

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx_lm  # noqa: E402
import nanochat_reference  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache, trim_prompt_cache  # noqa: E402
from nanochat_reference import random_checkpoint  # noqa: E402
from nanochat_tokenizer import REFERENCES, ROOT, SPECIAL, make_encoding  # noqa: E402

sys.path[:0] = [str(ROOT), str(ROOT / "utils")]
import convert_nanochat  # noqa: E402

Wrapper = convert_nanochat.TiktokenTokenizerWrapper
needs_references = pytest.mark.skipif(not REFERENCES.is_dir(), reason=f"no nanochat references at {REFERENCES}")
FILES = {
    "config.json",
    "model.safetensors",
    "tokenizer.pkl",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
}


class Converted:
    """A random checkpoint, its conversion, and both opened."""

    def __init__(self, folder, new, **shape):
        self.source, self.output, self.new = folder / "source", folder / "mlx", new
        self.weights, self.meta, self.encoding = random_checkpoint(self.source, new=new, **shape)
        convert_nanochat.convert(str(self.source), str(self.output))
        self.model, self.tokenizer = self.load()

    def load(self, path=None):
        # October's needs nothing of the user; 2026's brings its own model file.
        return mlx_lm.load(str(path or self.output), **({"trust_remote_code": True} if self.new else {}))

    def reference(self, ids):
        return nanochat_reference.logits(self.weights, self.meta, ids).detach().numpy()

    def greedy(self, prompt, n):
        cache, x, out = make_prompt_cache(self.model), mx.array([prompt]), []
        for _ in range(n):
            x = mx.argmax(self.model(x, cache=cache)[:, -1:], axis=-1)
            out.append(x.item())
        return out


@pytest.fixture(scope="module", params=["october", "2026"])
def converted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "october":
        return Converted(folder, False)
    # sequence_len 512: short windows of 128, so that 300 ids reach beyond them
    return Converted(folder, True, n_layer=4, sequence_len=512, n_embd=128)


@pytest.fixture
def ids(converted):
    return np.random.default_rng(0).integers(0, converted.encoding.n_vocab, 300).tolist()


def random_chat(rng):
    pieces = [
        "a",
        "the",
        " ",
        "\n",
        "'s",
        "12",
        "!",
        "<",
        "|",
        ">",
        "<|",
        "|>",
        "é",
        "🌍",
        "\ufdd0",
        *SPECIAL,
        "bos|>",
        "user_start",
    ]
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 8))) for _ in range(rng.randint(1, 4))]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


# ---- the same model -------------------------------------------------------------------------------------------------


def test_files_and_config(converted):
    assert {f.name for f in converted.output.iterdir()} == FILES | ({"nanochat_2026.py"} if converted.new else set())
    config = json.loads((converted.output / "config.json").read_text())
    special = converted.encoding._special_tokens
    assert config["vocab_size"] == converted.encoding.n_vocab == 278  # no multiple of anything
    assert config["eos_token_id"] == [special["<|assistant_end|>"], special["<|bos|>"]]
    assert (
        json.loads((converted.output / "generation_config.json").read_text())["eos_token_id"] == config["eos_token_id"]
    )
    assert (converted.output / "tokenizer.pkl").read_bytes() == (converted.source / "tokenizer.pkl").read_bytes()
    assert {str(v.dtype) for _, v in tree_flatten(converted.model.parameters())} == {"mlx.core.float32"}


def test_logits(converted, ids):
    got = np.array(converted.model(mx.array([ids]))[0])
    assert np.abs(got - converted.reference(ids)).max() < 2e-4


def test_logits_through_the_cache(converted, ids):
    cache = make_prompt_cache(converted.model)
    cuts = [0, 1, 100, 101, 260, *range(261, 301)]
    parts = [converted.model(mx.array([ids[a:b]]), cache=cache) for a, b in zip(cuts, cuts[1:])]
    assert np.abs(np.array(mx.concatenate(parts, axis=1)[0]) - converted.reference(ids)).max() < 2e-4
    trim_prompt_cache(cache, 20)
    again = converted.model(mx.array([ids[280:]]), cache=cache)
    assert mx.allclose(again, mx.concatenate(parts, axis=1)[:, 280:], atol=2e-4)


def test_batches_with_padding(converted, ids):
    prompts = [ids[:5], ids[:170], ids[7:8], ids[40:73]]
    single = [converted.greedy(p, 6) for p in prompts]
    pads = [170 - len(p) for p in prompts]
    cache = [BatchKVCache(pads) for _ in make_prompt_cache(converted.model)]
    x = mx.array([[0] * pad + p for pad, p in zip(pads, prompts)])
    converted.model(x[:, :100], cache=cache)
    x, out = x[:, 100:], []
    for _ in range(6):
        x = mx.argmax(converted.model(x, cache=cache)[:, -1:], axis=-1)
        out.append(x[:, 0].tolist())
    assert [list(row) for row in zip(*out)] == single

    from mlx_lm.generate import BatchGenerator

    generator = BatchGenerator(converted.model, max_tokens=6)
    uids = generator.insert(prompts, [6] * 4)
    rows = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            rows[response.uid].append(response.token)
    assert [rows[uid] for uid in uids] == single


def test_gradients(converted, ids):
    x = mx.array([ids[:64]])

    def loss(model):
        return nn.losses.cross_entropy(model(x[:, :-1]), x[:, 1:]).mean()

    value, grads = nn.value_and_grad(converted.model, loss)(converted.model)
    grads = dict(tree_flatten(grads))
    assert all(mx.abs(g).max().item() > 0 for g in grads.values())
    expected = nanochat_loss_gradient(converted, ids[:64])
    for name, gradient in expected.items():
        got = np.array(grads[convert_nanochat.mlx_name(name)])
        assert np.abs(got - gradient[: len(got)]).max() < 1e-5 + 1e-3 * np.abs(gradient).max(), name


def nanochat_loss_gradient(converted, ids):
    """torch's gradient of the same loss, by the checkpoint's keys."""
    weights = {
        key.removeprefix("_orig_mod."): value.float().requires_grad_() for key, value in converted.weights.items()
    }
    out = nanochat_reference.logits(weights, converted.meta, ids)
    torch.nn.functional.cross_entropy(out[:-1], torch.tensor(ids[1:])).backward()
    return {key: value.grad.numpy() for key, value in weights.items()}


def test_lora(converted, tmp_path):
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, _ = converted.load()
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 2, "scale": 2.0, "dropout": 0.0})
    assert tree_flatten(model.trainable_parameters())
    _, grads = nn.value_and_grad(model, lambda m: m(mx.array([[1, 2, 3]])).square().mean())(model)
    assert any(mx.abs(g).max().item() > 0 for _, g in tree_flatten(grads))


def test_mlx_lm_converts_it_further(converted, ids, tmp_path):
    trust = {"trust_remote_code": True} if converted.new else {}
    whole = converted.model(mx.array([ids]))
    mlx_lm.convert(str(converted.output), str(tmp_path / "q"), quantize=True, q_bits=8, **trust)
    model, tokenizer = converted.load(tmp_path / "q")
    assert mx.abs(model(mx.array([ids])) - whole).max().item() < 0.2
    assert tokenizer.eos_token_ids == converted.tokenizer.eos_token_ids
    assert tokenizer.encode("<|bos|> the") == converted.encoding.encode_ordinary("<|bos|> the")
    chat = [{"role": "user", "content": "<|user_end|>"}]
    assert tokenizer.apply_chat_template(chat) == converted.tokenizer.apply_chat_template(chat)
    mlx_lm.convert(str(converted.output), str(tmp_path / "half"), dtype="bfloat16", **trust)
    model, _ = converted.load(tmp_path / "half")
    assert mx.abs(model(mx.array([ids])).astype(mx.float32) - whole).max().item() < 0.2


def test_convert_model_converts_it_further(converted, ids, tmp_path, capsys):
    import convert_model

    trust = ["--trust-remote-code"] if converted.new else []
    flags = ["--hf-path", str(converted.output), "--output-dir", str(tmp_path / "o"), "-q", "--bits", "8", "--group-size", "32", *trust]
    assert convert_model.main(flags) == 0
    said = capsys.readouterr().out
    assert "left out" not in said and ("smear_gate (width 24)" in said) == converted.new
    model, tokenizer = converted.load(tmp_path / "o")
    assert mx.abs(model(mx.array([ids])) - converted.model(mx.array([ids]))).max().item() < 0.2
    assert tokenizer.eos_token_ids == converted.tokenizer.eos_token_ids
    assert tokenizer.encode("<|bos|> the") == converted.encoding.encode_ordinary("<|bos|> the")
    assert (tmp_path / "o" / "tokenizer.pkl").read_bytes() == (converted.output / "tokenizer.pkl").read_bytes()


def test_dtype_and_quantize(converted, ids, tmp_path, capsys):
    whole = converted.model(mx.array([ids]))
    for arguments, dtype, limit in ((["--dtype", "bfloat16"], mx.bfloat16, 0.2), (["-q"], mx.uint32, 2.5)):
        output = tmp_path / "-".join(arguments)
        assert (
            convert_nanochat.main(["--cache-dir", str(converted.source), "--output-dir", str(output), *arguments]) == 0
        )
        model, _ = converted.load(output)
        assert model.lm_head.weight.dtype == model.layers[0].mlp.c_fc.weight.dtype == dtype
        assert mx.abs(model(mx.array([ids])).astype(mx.float32) - whole).max().item() < limit


def test_generation_with_a_stop(converted):
    prompt = converted.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    responses = list(mlx_lm.stream_generate(converted.model, converted.tokenizer, prompt, max_tokens=8))
    assert [r.token for r in responses] == converted.greedy(prompt, 8)[: len(responses)]


# ---- the same tokenizer ---------------------------------------------------------------------------------------------


def test_tokenizer_equals_tiktoken(converted, tmp_path):
    from tokenizers import Tokenizer

    tokenizer, reference = converted.tokenizer, Wrapper(converted.source)
    plain = Tokenizer.from_file(str(converted.output / "tokenizer.json"))
    assert len(tokenizer) == tokenizer.vocab_size == converted.encoding.n_vocab
    assert tokenizer.eos_token_ids == reference.eos_token_ids
    assert sorted(tokenizer.all_special_ids) == sorted(reference.all_special_ids)
    tokenizer.save_pretrained(tmp_path)  # as a trained model's checkpoint has it
    from mlx_lm.tokenizer_utils import load

    saved, rng = load(tmp_path), random.Random(0)
    for _ in range(300):
        chat = random_chat(rng)
        text = "".join(message["content"] for message in chat).replace("\ufdd0", "")
        if not text.startswith("<|bos|><|user_start|>"):
            expected = converted.encoding.encode_ordinary(text)
            assert tokenizer.encode(text) == plain.encode(text).ids == saved.encode(text) == expected, text
            assert tokenizer.decode(expected) == reference.decode(expected)
        chat = [message | {"content": message["content"].replace("\ufdd0", "")} for message in chat]
        for prompted in {False, len(chat) % 2 == 1}:
            expected = reference.apply_chat_template(chat, add_generation_prompt=prompted)
            assert tokenizer.apply_chat_template(chat, add_generation_prompt=prompted) == expected, chat
            assert saved.apply_chat_template(chat, add_generation_prompt=prompted) == expected, chat
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=prompted, tokenize=False)
            assert tokenizer.encode(text, add_special_tokens=False) == expected  # what mlx_lm.generate does


def test_content_cannot_make_special_tokens_by_any_marks(converted):
    rng, special = random.Random(1), set(converted.tokenizer.all_special_ids)
    for _ in range(300):
        chat = random_chat(rng)  # with the template's own mark thrown in
        rendered = converted.tokenizer.apply_chat_template(chat)
        assert sum(token in special for token in rendered) == 1 + 2 * len(chat), chat


def test_merges_are_those_of_training():
    ranks = make_encoding()._mergeable_ranks
    assert convert_nanochat.merges_into(b"aaaa", ranks) == [(b"aa", b"aa")]  # never aaa + a
    assert convert_nanochat.merges_into(b"aaa", ranks) == [(b"aa", b"a")]
    assert convert_nanochat.merges_into(b" the", ranks) == [(b" ", b"the")]
    assert convert_nanochat.merges_into(b"ing", ranks) == [(b"in", b"g")]
    odd = ranks | {b"xy": 900, b"xyzw": 901, b"zw": 902}  # xyzw comes before one of its halves
    assert convert_nanochat.merges_into(b"xyzw", odd) == [(b"xy", b"zw")]
    assert convert_nanochat.merges_into(b"qqq", odd | {b"qqq": 903}) == []  # only ever a whole piece


# ---- refusals -------------------------------------------------------------------------------------------------------


def run(capsys, source, output, *more):
    """main() -> (exit status, the one line on stderr)."""
    try:
        status = convert_nanochat.main(["--cache-dir", str(source), "--output-dir", str(output), *more])
    except SystemExit as stop:  # argparse
        status = stop.code
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return status, error


@pytest.fixture
def checkpoint(tmp_path):
    weights, meta, _ = random_checkpoint(tmp_path / "c", n_layer=1, prefix="")
    return tmp_path / "c", weights, meta


def rewrite(folder, weights=None, meta=None, step=123):
    if weights is not None:
        torch.save(weights, folder / f"model_{step:06d}.pt")
    if meta is not None:
        (folder / f"meta_{step:06d}.json").write_text(json.dumps({"model_config": meta}))


def test_steps(checkpoint, tmp_path, capsys):
    folder, weights, meta = checkpoint
    rewrite(folder, weights | {"lm_head.weight": weights["lm_head.weight"] * 2}, meta, step=1000)
    (folder / "model_final.pt").write_text("not a step")
    for arguments, scale in (([], 2), (["--step", "123"], 1)):
        assert run(capsys, folder, tmp_path / f"o{scale}", *arguments)[0] == 0
        model, _ = mlx_lm.load(str(tmp_path / f"o{scale}"))
        assert np.allclose(np.array(model.lm_head.weight), scale * weights["lm_head.weight"].numpy())
    status, error = run(capsys, folder, tmp_path / "o", "--step", "7")
    assert status == 2 and error.startswith("Checkpoint not found: step 7") and "123, 1000" in error


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda w, m: w.update(extra=torch.zeros(3)), "the checkpoint has extra"),
        (lambda w, m: w.pop("lm_head.weight"), "the checkpoint lacks lm_head.weight"),
        (lambda w, m: w.update({"lm_head.weight": torch.zeros(3, 64)}), "lm_head.weight is torch.float32 (3, 64)"),
        (lambda w, m: w.update({"lm_head.weight": w["lm_head.weight"].int()}), "torch.int32"),
        (lambda w, m: w["lm_head.weight"].fill_(float("nan")), "not finite"),
        (lambda w, m: w.update({"_orig_mod.lm_head.weight": w["lm_head.weight"]}), "with and without"),
        (lambda w, m: w.update(step=3), "named tensors"),
        (lambda w, m: w.update({"transformer.h.1.mlp.c_fc.weight": torch.zeros(256, 64)}), "h.1.mlp.c_fc"),
        # what nanochat became after October 2025, in part: never loaded with the rest dropped
        (lambda w, m: m.update(window_pattern="SSSL"), "unlike nanochat's layout of 2026"),
        (lambda w, m: w.update(resid_lambdas=torch.ones(1)), "no window_pattern"),
        (
            lambda w, m: (
                m.update(window_pattern="L"),
                w.update(resid_lambdas=torch.ones(1), x0_lambdas=torch.ones(1)),
            ),
            "layout of 2026",
        ),
        (lambda w, m: m.update(window_pattern="SXL"), "window_pattern"),
        (lambda w, m: m.update(mtp_n=2), "Unsupported architecture: model_config"),
        (lambda w, m: m.pop("n_kv_head"), "lacks n_kv_head"),
        (lambda w, m: m.update(n_layer=10**9), "n_layer"),
        (lambda w, m: m.update(n_head="4"), "n_head"),
        (lambda w, m: m.update(n_head=5), "do not divide"),
        (lambda w, m: m.update(vocab_size=400), "has 278 tokens and the model 400"),
        (lambda w, m: m.update(vocab_size=277), "has 278 tokens and the model 277"),
        (lambda w, m: m.update(vocab_size=300), "(278, 64); meta's model_config asks for (300, 64)"),
    ],
)
def test_what_does_not_fit_is_refused(checkpoint, tmp_path, capsys, change, reason):
    folder, weights, meta = checkpoint
    change(weights, meta)
    rewrite(folder, weights, meta)
    status, error = run(capsys, folder, tmp_path / "out")
    assert status == 1 and reason in error
    assert [f.name for f in tmp_path.iterdir()] == ["c"]  # nothing half-written


def test_a_vocabulary_padded_beyond_the_tokenizer(checkpoint, tmp_path, capsys):
    folder, weights, meta = checkpoint
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], weights[name][:9] * 2])
    rewrite(folder, weights, meta | {"vocab_size": 287})
    assert convert_nanochat.main(["--cache-dir", str(folder), "--output-dir", str(tmp_path / "out")]) == 0
    assert "9 more ids" in capsys.readouterr().out
    model, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    got = np.array(model(mx.array([[1, 286, 3]]))[0])
    assert np.abs(got - nanochat_reference.logits(weights, meta | {"vocab_size": 287}, [1, 286, 3]).numpy()).max() < 2e-4
    assert tokenizer.decode([65, 286, 66]) == Wrapper(folder).decode([65, 286, 66]) == "AB"


def test_pickles_in_the_checkpoint_are_not_run(checkpoint, tmp_path, capsys, monkeypatch):
    folder, _, _ = checkpoint
    monkeypatch.chdir(tmp_path)

    class Evil:
        def __reduce__(self):
            return os.system, ("touch canary",)

    good = (folder / "tokenizer.pkl").read_bytes()
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(Evil()))
    status, error = run(capsys, folder, tmp_path / "out")
    assert status == 1 and error.startswith("Failed to load tiktoken tokenizer: ")
    (folder / "tokenizer.pkl").write_bytes(good)
    for data in ({"lm_head.weight": Evil()}, Evil()):
        torch.save(data, folder / "model_000123.pt")
        status, error = run(capsys, folder, tmp_path / "out")
        assert status == 1 and error.startswith("Checkpoint not readable: ")
    (folder / "model_000123.pt").write_bytes(pickle.dumps(Evil()))
    assert run(capsys, folder, tmp_path / "out")[0] == 1
    (folder / "model_000123.pt").write_bytes(b"")
    assert run(capsys, folder, tmp_path / "out")[0] == 1
    assert [f.name for f in tmp_path.iterdir()] == ["c"]


def test_tokenizers_that_cannot_be_exact_are_refused(checkpoint, tmp_path, capsys):
    import tiktoken

    folder, _, _ = checkpoint
    good = make_encoding()
    for pattern, special, reason in (
        (r"\S+|\s+", good._special_tokens, "in one piece"),
        (r"\w+", good._special_tokens, "tokenizer.json would differ"),  # tiktoken drops what no piece covers
        (good._pat_str, {"<|bos|>": 269}, "lacks <|user_start|>"),
        (good._pat_str, {token: i + (i == 277) for token, i in good._special_tokens.items()}, "has 279 tokens"),
    ):
        encoding = tiktoken.Encoding(
            "t", pat_str=pattern, mergeable_ranks=good._mergeable_ranks, special_tokens=special
        )
        (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
        meta = json.loads((folder / "meta_000123.json").read_text())["model_config"]
        rewrite(folder, meta=meta | {"vocab_size": 270 if len(special) == 1 else 278})
        status, error = run(capsys, folder, tmp_path / "out")
        assert status == 1 and reason in error


def test_wrong_arguments(checkpoint, tmp_path, capsys):
    folder, _, _ = checkpoint
    (tmp_path / "empty").mkdir()
    for source, more, reason in (
        (tmp_path / "absent", [], "Checkpoint not found: "),
        (folder / "tokenizer.pkl", [], "Checkpoint not found: "),
        (tmp_path / "empty", [], "has no model_NNNNNN.pt"),
        (folder, ["--dtype", "int8"], "Argument --dtype"),
        (folder, ["--step", "x"], "Argument --step"),
        (folder, ["--nonsense"], "Unrecognized arguments"),
    ):
        status, error = run(capsys, source, tmp_path / "out", *more)
        assert status == 2 and reason in error
    weights = (folder / "model_000123.pt").read_bytes()
    for output in (folder, tmp_path):
        status, error = run(capsys, folder, output, "--overwrite")
        assert status == 2 and "holds the checkpoint itself" in error
    assert (folder / "model_000123.pt").read_bytes() == weights
    (folder / "tokenizer.pkl").unlink()
    status, error = run(capsys, folder, tmp_path / "out")
    assert status == 1 and error.startswith("Tokenizer not found: ")
    (folder / "meta_000123.json").unlink()
    status, error = run(capsys, folder, tmp_path / "out")
    assert status == 1 and error.startswith("Metadata not found: ")


def test_overwrite(checkpoint, tmp_path, capsys):
    folder, weights, _ = checkpoint
    output = tmp_path / "out"
    output.mkdir()
    assert run(capsys, folder, output)[0] == 0  # empty: fine
    (output / "mine.txt").write_text("kept")
    status, error = run(capsys, folder, output)
    assert status == 2 and error.startswith("Output exists: ") and "--overwrite" in error
    rewrite(folder, weights | {"extra": torch.zeros(1)})
    assert run(capsys, folder, output, "--overwrite")[0] == 1
    assert (output / "mine.txt").is_file()  # a failed conversion leaves the old one
    rewrite(folder, weights)
    assert run(capsys, folder, output, "--overwrite")[0] == 0
    assert {f.name for f in output.iterdir()} == FILES
    assert {f.name for f in tmp_path.iterdir()} == {"c", "out"}


def test_overwrite_spares_what_is_no_model(checkpoint, tmp_path, capsys):
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("years of work")
    for output in (tmp_path / "papers", tmp_path / "papers" / "thesis.tex"):
        status, error = run(capsys, checkpoint[0], output, "--overwrite")
        assert status == 2 and "model directories only" in error
    assert (tmp_path / "papers" / "thesis.tex").read_text() == "years of work"


def test_tokenizer_in_nanochats_own_cache(checkpoint, tmp_path, capsys):
    folder, _, _ = checkpoint
    deep = tmp_path / "base" / "chatsft_checkpoints" / "d1"
    deep.parent.mkdir(parents=True)
    folder.rename(deep)
    (tmp_path / "base" / "tokenizer").mkdir()
    (deep / "tokenizer.pkl").rename(tmp_path / "base" / "tokenizer" / "tokenizer.pkl")
    assert run(capsys, deep, tmp_path / "out")[0] == 0


def test_without_torch(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    status, error = run(capsys, checkpoint[0], tmp_path / "out")
    assert status == 1 and "--extra torch" in error


def test_the_command_line(tmp_path):
    result = subprocess.run(
        [
            sys.executable,
            str(ROOT / "convert_nanochat.py"),
            "--cache-dir",
            str(tmp_path / "absent"),
            "--output-dir",
            "x",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("Checkpoint not found: ") and result.stderr.count("\n") == 1


def test_2026_models_say_that_they_bring_code(tmp_path):
    converted = Converted(tmp_path, True, n_layer=2)
    with pytest.raises(ValueError, match="nanochat_2026.py"):
        mlx_lm.load(str(converted.output))


# ---- nanochat's own numbers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    if not REFERENCES.is_dir():
        pytest.skip(f"no nanochat references at {REFERENCES}")
    output = tmp_path_factory.mktemp("published") / "mlx"
    convert_nanochat.convert(str(REFERENCES), str(output))
    return mlx_lm.load(str(output))


@pytest.mark.parametrize("name, tolerance", [("reference_f32rope", 2e-4), ("reference_native", 2e-2)])
def test_published_logits(published, name, tolerance):
    model, _ = published
    with np.load(REFERENCES / f"{name}.npz") as reference:
        for i in range(3):
            ids = reference[f"prompt{i}_ids"].tolist()
            got = np.array(model(mx.array([ids]))[0])[reference[f"prompt{i}_positions"]]
            assert np.abs(got - reference[f"prompt{i}_logits"]).max() < tolerance
            cache, x, out = make_prompt_cache(model), mx.array([ids]), []
            for _ in range(24):
                x = mx.argmax(model(x, cache=cache)[:, -1:], axis=-1)
                out.append(x.item())
            assert out == reference[f"prompt{i}_greedy_ids"].tolist()


@needs_references
def test_published_tokenizer(published):
    _, tokenizer = published
    cases = json.loads((REFERENCES / "tokenizer_cases.json").read_text())
    for case in cases["encode"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
    for case in cases["decode_random_ids"]:
        assert tokenizer.decode(case["ids"]) == case["text"]
    renderings = json.loads((REFERENCES / "renderings.json").read_text())
    assert tokenizer.eos_token_ids == set(renderings["stop_token_ids"])
    for case in renderings["conversations"]:
        messages = case["messages"]
        assert tokenizer.apply_chat_template(messages) == case["render_conversation"]["ids"], case["name"]
        assert (
            tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True) == case["render_for_completion"]
        ), case["name"]
        assert tokenizer.decode(case["render_conversation"]["ids"]) == case["decoded_conversation"]
        if case["name"] != "literal_special_tokens":  # there the text has marks, or it could not mean these ids
            assert tokenizer.apply_chat_template(messages, tokenize=False) == case["decoded_conversation"]
    for case in renderings["rejected_by_nanochat"]:
        with pytest.raises(Exception, match="should be from|must be followed"):
            tokenizer.apply_chat_template(case["messages"])
