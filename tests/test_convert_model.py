"""utils/convert_model.py on tiny random models that transformers saves here: parity, every flag, every refusal. No network."""

import importlib.util
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

SCRIPT = Path(__file__).parents[1] / "utils" / "convert_model.py"
spec = importlib.util.spec_from_file_location("convert_model", SCRIPT)
convert_model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(convert_model)
flatten = convert_model.flatten_rope_parameters

VOCABULARY = ["<|endoftext|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"]
IDS = [[7 * i % 60 for i in range(40)]]
SIZES = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=128, bos_token_id=0, eos_token_id=0, pad_token_id=0)  # fmt: skip
GPT2 = dict(vocab_size=64, n_embd=64, n_layer=3, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0)
THETA = {"rope_type": "default", "rope_theta": 20000.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 50000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "rope_theta": 20000.0, "short_factor": [1.0 + i / 10 for i in range(8)],
            "long_factor": [2.0 + i / 5 for i in range(8)], "original_max_position_embeddings": 64}  # fmt: skip
LOCAL_AND_GLOBAL = {"sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500000.0}}  # fmt: skip
GEMMA = dict(SIZES, head_dim=16, query_pre_attn_scalar=16, sliding_window=8, rope_parameters=LOCAL_AND_GLOBAL)
MODELS = {
    "llama": ("Llama", dict(SIZES, rope_parameters=LLAMA3, tie_word_embeddings=False)),
    "qwen2": ("Qwen2", dict(SIZES, rope_parameters=THETA)),
    "qwen2_yarn": ("Qwen2", dict(SIZES, rope_parameters=dict(THETA, rope_type="yarn", factor=4.0, original_max_position_embeddings=32))),
    "qwen3": ("Qwen3", dict(SIZES, rope_parameters=THETA, head_dim=16)),
    "mistral": ("Mistral", dict(SIZES, rope_parameters=THETA)),
    "phi": ("Phi", dict(SIZES, rope_parameters=dict(THETA, partial_rotary_factor=0.25))),
    "phi3": ("Phi3", dict(SIZES, rope_parameters=dict(THETA, partial_rotary_factor=0.5))),
    "phi3_longrope": ("Phi3", dict(SIZES, rope_parameters=LONGROPE, original_max_position_embeddings=64)),
    "gemma3": ("Gemma3Text", dict(GEMMA, layer_types=["sliding_attention"] * 3 + ["full_attention"])),
    "smollm3": ("SmolLM3", dict(SIZES, rope_parameters=dict(THETA, rope_theta=3e6), tie_word_embeddings=True)),
    "gpt2": ("GPT2", GPT2),
    "gpt_bigcode": ("GPTBigCode", GPT2),
    "starcoder2": ("Starcoder2", dict(SIZES, rope_parameters=THETA)),
    "narrow": ("Llama", dict(SIZES, intermediate_size=64)),
}


def save_tokenizer(path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="a"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=VOCABULARY[0], additional_special_tokens=[VOCABULARY[1]])
    fast.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    fast.save_pretrained(path)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """name -> (directory saved by transformers, float32 logits of IDS); each model is made once."""
    torch = pytest.importorskip("torch", reason="torch is needed to save the tiny transformers models")
    import copy

    import transformers

    transformers.logging.set_verbosity_error()
    root, cache = tmp_path_factory.mktemp("models"), {}

    def make(name):
        if name not in cache:
            family, settings = MODELS[name]
            torch.manual_seed(0)
            config = getattr(transformers, f"{family}Config")(**copy.deepcopy(settings))
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            with torch.no_grad():
                # The default initialisation makes logits too small for a wrong rope to show.
                for parameter in model.parameters():
                    parameter.normal_(0, 0.15) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
                logits = model(torch.tensor(IDS)).logits.numpy()
            model.save_pretrained(root / name)
            save_tokenizer(root / name)
            cache[name] = root / name, logits
        return cache[name]

    return make


@pytest.fixture
def source(made):
    return lambda name="llama": made(name)[0]


@pytest.fixture
def altered(made, tmp_path):
    """A copy of a model directory with other settings in config.json; None removes one."""

    def make(name, **settings):
        path = tmp_path / f"{name}-altered"
        shutil.copytree(made(name)[0], path)
        config = json.loads((path / "config.json").read_text()) | settings
        (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
        return path

    return make


@pytest.fixture
def run(tmp_path, capsys):
    """run(source, *flags) -> (exit status, output directory, stdout, stderr)."""

    def convert(path, *flags, out="out"):
        capsys.readouterr()
        try:
            status = convert_model.main(["--hf-path", str(path), "--output-dir", str(tmp_path / out), *map(str, flags)])
        except SystemExit as leave:  # argparse
            status = leave.code
        said = capsys.readouterr()
        return status, tmp_path / out, said.out, said.err

    return convert


def logits_of(directory):
    from mlx_lm import load

    return np.array(load(str(directory))[0](mx.array(IDS)).astype(mx.float32))


def weights_of(directory):
    return {name: w for file in Path(directory).glob("model*.safetensors") for name, w in mx.load(str(file)).items()}


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def assert_refused(result, status, *words, tmp_path):
    code, output, _, error = result
    assert code == status and not output.exists()
    assert error.count("\n") == 1 and "Traceback" not in error
    for word in words:
        assert word in error
    assert not list(tmp_path.glob(".out*"))


# --- Parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen2_yarn", "qwen3", "mistral", "phi", "phi3", "gemma3", "smollm3", "gpt2"])
def test_logits_equal_transformers(name, made, run):
    path, expected = made(name)
    status, output, _, error = run(path, "--dtype", "float32")
    assert status == 0, error
    assert np.abs(logits_of(output) - expected).max() < 1e-4


def test_longrope_is_exact_for_the_factors_chosen(made, run, tmp_path):
    path, expected = made("phi3_longrope")  # 40 ids: within the 64 of the short factors
    assert_refused(run(path), 1, "short_factor", "--longrope short", "64", tmp_path=tmp_path)
    _, short, _, _ = run(path, "--longrope", "short")
    _, long, _, _ = run(path, "--longrope", "long", out="long")
    assert np.abs(logits_of(short) - expected).max() < 1e-4 < np.abs(logits_of(long) - expected).max()


def test_gemma3_with_vision_gives_its_text_model(run, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is needed to save the tiny transformers models")
    import transformers

    text = {**GEMMA, "num_hidden_layers": 6, "model_type": "gemma3_text"}
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    special = dict(mm_tokens_per_image=4, image_token_index=61, boi_token_index=62, eoi_token_index=63)
    model = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(text_config=text, vision_config=vision, **special)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15) if parameter.ndim > 1 else None
        expected = model(torch.tensor(IDS)).logits.numpy()
    model.save_pretrained(tmp_path / "in")
    save_tokenizer(tmp_path / "in")
    status, output, said, error = run(tmp_path / "in")
    assert status == 0, error
    assert "left out" in said
    assert np.abs(logits_of(output) - expected).max() < 1e-4


def test_untied_head_survives_a_config_that_does_not_say_so(made, altered, run):
    _, expected = made("llama")
    assert np.abs(logits_of(run(altered("llama", tie_word_embeddings=None))[1]) - expected).max() < 1e-4


# --- flatten_rope_parameters ------------------------------------------------------------------------------------------


def test_flatten_leaves_its_argument_and_its_own_result_alone():
    config = {"rope_parameters": dict(LLAMA3), "max_position_embeddings": 128}
    before = json.dumps(config)
    flat = flatten(config)
    assert json.dumps(config) == before
    assert flatten(flat) == flat
    assert flat["rope_parameters"] == LLAMA3 and flat["rope_theta"] == 50000.0
    assert flat["rope_scaling"]["type"] == "llama3" and flat["rope_scaling"]["factor"] == 8.0


def test_flatten_of_the_default_rope_has_no_scaling():
    flat = flatten({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}})
    assert (flat["rope_theta"], flat["partial_rotary_factor"]) == (1e6, 0.5)
    assert "rope_scaling" not in flat


def test_flatten_per_layer_type_and_inside_text_config():
    flat = flatten({"model_type": "gemma3", "text_config": {"rope_parameters": LOCAL_AND_GLOBAL}})["text_config"]
    assert (flat["rope_theta"], flat["rope_local_base_freq"], flat["rope_scaling"]["factor"]) == (500000.0, 5000.0, 8.0)
    differing = {"full_attention": {"rope_theta": 1.0, "partial_rotary_factor": 0.25}, "sliding_attention": {"rope_theta": 2.0}}
    assert "partial_rotary_factor" not in flatten({"rope_parameters": differing})


def test_flatten_keeps_a_flat_config_and_names_its_context():
    assert flatten({"rope_theta": 7.0}) == {"rope_theta": 7.0}
    flat = flatten({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 256})
    assert flat["rope_scaling"] == {"rope_type": "yarn", "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


# --- Nothing ignored, nothing random ----------------------------------------------------------------------------------

ROPE = {"rope_theta": 1e4, "rope_type": "default"}
SCALED_LOCALLY = {**LOCAL_AND_GLOBAL, "sliding_attention": dict(ROPE, rope_type="linear", factor=2.0)}


@pytest.mark.parametrize(
    "name, settings, named",
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"rope_parameters": dict(ROPE, partial_rotary_factor=0.5)}, "partial_rotary_factor"),
        ("llama", {"rope_parameters": dict(ROPE, rope_type="yarn", factor=2.0, attention_factor=0.5)}, "rope_scaling"),
        ("phi", {"rope_parameters": dict(ROPE, rope_type="linear", factor=4.0)}, "rope_scaling"),
        ("mistral", {"sliding_window": 8}, "sliding_window"),
        ("phi3", {"sliding_window": 8}, "sliding_window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 4}, "sliding_window"),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types"),
        ("gemma3", {"final_logit_softcapping": 5.0}, "final_logit_softcapping"),
        ("gemma3", {"rope_parameters": SCALED_LOCALLY}, "rope_parameters"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt_bigcode", {}, "activation_function"),
        ("starcoder2", {}, "hidden_act"),  # mlx-lm has the exact gelu where starcoder2 has the tanh one
    ],
)  # fmt: skip
def test_ignored_setting_is_refused_by_name(name, settings, named, altered, run, tmp_path):
    path = altered(name, **settings)
    assert_refused(run(path), 1, "ignored", named, f"--ignore-setting {named}", tmp_path=tmp_path)
    status, output, _, error = run(path, "--ignore-setting", named)
    assert status == 0 and output.exists(), error


def test_settings_without_effect_are_no_reason_to_refuse(altered, run):
    harmless = {"attention_dropout": 0.1, "initializer_range": 0.5, "use_cache": False, "sliding_window": 4096, "unheard_of": 3}
    status, _, _, error = run(altered("qwen2", **harmless, use_sliding_window=False, max_window_layers=2))
    assert status == 0, error


def test_mistral_window_of_the_published_models_is_said(altered, run):
    status, _, said, error = run(altered("mistral", max_position_embeddings=32768))
    assert status == 0, error
    assert "exact for texts up to 4096 tokens" in said


@pytest.mark.parametrize("change, named", [("missing", "model.layers.1.mlp.up_proj.weight"), ("extra", "model.layers.1.mlp.gate.weight")])
def test_weights_that_do_not_match_are_named(change, named, altered, run, tmp_path):
    path = altered("llama")
    weights = weights_of(path)
    weights.pop(named) if change == "missing" else weights.update({named: mx.zeros((2, 2))})
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    assert_refused(run(path), 1, named, "Models known to work: llama", tmp_path=tmp_path)


def test_unsupported_model_names_what_works(altered, run, tmp_path):
    assert_refused(run(altered("llama", model_type="bert")), 1, "bert", "not supported", "qwen2", tmp_path=tmp_path)
    shutil.rmtree(tmp_path / "llama-altered")
    assert_refused(run(altered("llama", model_type="olmo")), 1, "olmo needs a Python package that is not installed", tmp_path=tmp_path)
    shutil.rmtree(tmp_path / "llama-altered")
    assert_refused(run(altered("llama", model_type=None)), 2, "model_type", tmp_path=tmp_path)
    shutil.rmtree(tmp_path / "llama-altered")
    assert_refused(run(altered("llama", hidden_size=None)), 1, "lacks hidden_size", tmp_path=tmp_path)


# --- Quantising -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits, group_size", [(2, 32), (3, 64), (4, 64), (5, 64), (6, 32), (8, 64)])
def test_quantize_bits_and_group_size(bits, group_size, source, run):
    status, output, said, error = run(source(), "-q", "--bits", bits, "--group-size", group_size)
    assert status == 0, error
    assert config_of(output)["quantization"] == {"bits": bits, "group_size": group_size, "mode": "affine"}
    name = "model.layers.2.mlp.up_proj"
    packed, plain = weights_of(output), weights_of(source())[f"{name}.weight"]
    for part, expected in zip(("weight", "scales", "biases"), mx.quantize(plain, group_size, bits), strict=True):
        assert mx.array_equal(packed[f"{name}.{part}"], expected)
    assert np.isfinite(logits_of(output)).all()
    # A float32 scale and bias per group; the 9 norms of 64 stay at 32 bits. Attention 12,288, MLP 24,576 a layer, 2 x 4,096 outside.
    matrices, norms = 4 * (12288 + 24576) + 2 * 4096, 9 * 64
    expected = ((bits + 64 / group_size) * matrices + 32 * norms) / (matrices + norms)
    assert f"bits per weight  32.000 -> {expected:.3f}" in said


@pytest.mark.parametrize("mode, bits, group_size", [("affine", 4, 64), ("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)])
def test_quantize_modes(mode, bits, group_size, source, run):
    status, output, _, error = run(source(), "--quantize", "--q-mode", mode)
    assert status == 0, error
    assert config_of(output)["quantization"] == {"bits": bits, "group_size": group_size, "mode": mode}
    assert np.isfinite(logits_of(output)).all()


@pytest.mark.parametrize("recipe, low, high", [("mixed_2_6", 2, 6), ("mixed_3_4", 3, 4), ("mixed_3_6", 3, 6), ("mixed_4_6", 4, 6)])
def test_mixed_recipes(recipe, low, high, source, run):
    from mlx_lm import load

    status, output, _, error = run(source(), "-q", "--quant-predicate", recipe)
    assert status == 0, error
    layers = dict(load(str(output))[0].named_modules())
    assert layers["model.layers.0.mlp.up_proj"].bits == low
    assert layers["model.layers.3.mlp.down_proj"].bits == layers["lm_head"].bits == high


def test_recipe_for_a_model_without_its_layers(source, run, tmp_path):
    assert_refused(run(source("gpt2"), "-q", "--quant-predicate", "mixed_2_6"), 2, "down_proj", tmp_path=tmp_path)


def test_layers_that_the_group_size_does_not_divide_are_listed(source, run, tmp_path):
    status, output, said, _ = run(source(), "-q", "--group-size", "128")
    assert status == 0
    left = next(line for line in said.splitlines() if "not quantised" in line)
    assert "model.layers.0.self_attn.q_proj (width 64)" in left and "down_proj" not in left
    assert weights_of(output)["model.layers.0.mlp.down_proj.weight"].dtype == mx.uint32
    assert_refused(run(source("narrow"), "-q", "--group-size", "128", out="none"), 2, "--group-size 128", "[64]", tmp_path=tmp_path)


def test_a_long_list_of_layers_is_counted():
    layers = [(f"model.layers.{i}.mlp.up_proj", 96) for i in range(50)]
    assert convert_model.listed(layers, False) == "model.layers.*.mlp.up_proj (width 96, 50 layers) (--verbose lists all)"
    assert convert_model.listed(layers, True).count("width 96") == 50


def test_dequantize_undoes_quantize_to_the_rounding(source, run):
    _, packed, _, _ = run(source(), "-q", "--bits", 8, out="packed")
    status, output, _, error = run(packed, "--dequantize")
    assert status == 0, error
    assert not {"quantization", "quantization_config"} & set(config_of(output))
    assert np.abs(logits_of(output) - logits_of(packed)).max() < 1e-4


def test_quantize_and_dequantize_need_the_other_kind_of_model(source, run, tmp_path):
    assert_refused(run(source(), "--dequantize"), 2, "is not quantised", tmp_path=tmp_path)
    _, packed, _, _ = run(source(), "-q", out="packed")
    assert_refused(run(packed, "-q"), 2, "already quantised", "--dequantize", tmp_path=tmp_path)


# --- The other flags --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype(dtype, source, run):
    _, output, _, _ = run(source(), "--dtype", dtype)
    assert {w.dtype for w in weights_of(output).values()} == {getattr(mx, dtype)}
    assert config_of(output)["dtype"] == dtype
    _, packed, _, _ = run(source(), "-q", "--dtype", dtype, out="packed")
    assert {w.dtype for w in weights_of(packed).values()} == {getattr(mx, dtype), mx.uint32}


def test_dtype_is_the_models_own_without_the_flag(source, run):
    _, half, _, _ = run(source(), "--dtype", "bfloat16", out="half")
    _, output, said, _ = run(half)
    assert {w.dtype for w in weights_of(output).values()} == {mx.bfloat16}
    assert "bits per weight  16.000 -> 16.000" in said and "Cast" not in said


def test_dtype_of_config_is_followed_aloud(altered, run):
    _, output, said, _ = run(altered("llama", dtype="bfloat16"))
    assert {w.dtype for w in weights_of(output).values()} == {mx.bfloat16}
    assert "Cast float32 to bfloat16, as config.json says" in said


def test_eos_token_lasts_through_save_and_load(altered, run, tmp_path):
    from mlx_lm import load

    path = altered("llama")
    (path / "generation_config.json").write_text('{"eos_token_id": 0, "temperature": 0.5}')
    _, plain, _, _ = run(path, out="plain")
    assert load(str(plain))[1].eos_token_ids == {0}
    status, output, _, error = run(path, "--eos-token", "<|im_end|>")
    assert status == 0, error
    tokenizer = load(str(output))[1]
    assert (tokenizer.eos_token, tokenizer.eos_token_ids, len(tokenizer)) == ("<|im_end|>", {1}, len(VOCABULARY))
    assert json.loads((output / "generation_config.json").read_text()) == {"eos_token_id": 1, "temperature": 0.5}
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}]) == [2, 3, 1]
    unknown = run(path, "--eos-token", "<|im_ends|>", out="unknown")
    assert_refused(unknown, 2, "'<|im_ends|>' is not in the vocabulary", "did you mean '<|im_end|>'", tmp_path=tmp_path)


def test_verbose_lists_layers_and_shows_the_traceback(source, altered, run):
    _, _, quiet, _ = run(source(), out="quiet")
    _, _, said, _ = run(source(), "-q", "--verbose")
    assert "model.layers.0.mlp.up_proj: 4 bits, group 64, affine" in said and "rope_theta = 50000.0" in said
    assert "up_proj" not in quiet
    status, _, _, error = run(altered("llama", hidden_act="gelu"), "--verbose", out="failed")
    assert status == 1 and "Traceback" in error


def test_trust_remote_code(altered, run, tmp_path):
    path = altered("llama", model_file="own.py")
    (path / "own.py").write_text("from mlx_lm.models.llama import Model, ModelArgs\n")
    assert_refused(run(path), 1 + 1, "own.py", "--trust-remote-code", tmp_path=tmp_path)
    status, output, _, error = run(path, "--trust-remote-code")
    assert status == 0 and (output / "own.py").exists(), error


def test_summary_and_the_next_two_commands(source, run):
    status, output, said, _ = run(source(), "-q")
    assert status == 0
    for part in ("Loading", "Quantising", "Saving to", "size             0.6 MB -> 0.1 MB"):
        assert part in said
    assert said.splitlines()[-2:] == [
        f"  uv run python utils/inference.py --model {output} --chat",
        f"  uv run mlx-grpo.py --set model_name={output} --set fine_tune_type=lora",
    ]
    assert "model-00001" not in said and sorted(file.name for file in output.glob("*.safetensors")) == ["model.safetensors"]


def test_model_without_a_tokenizer_says_so(altered, run):
    path = altered("llama")
    for file in path.glob("*token*"):
        file.unlink()
    status, _, said, error = run(path)
    assert status == 0 and "no tokenizer" in said, error


def test_nanochat_directory_keeps_its_tokenizer(run, tmp_path):
    import tiktoken
    from mlx_lm.models import nanochat
    from mlx_lm.utils import load_model, save_config, save_model

    path = tmp_path / "nanochat"
    config = dict(model_type="nanochat", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
                  vocab_size=258, max_position_embeddings=64, intermediate_size=256)  # fmt: skip
    save_model(path, nanochat.Model(nanochat.ModelArgs(**config)))
    save_config(dict(config), path / "config.json")
    special = {"<|bos|>": 256, "<|assistant_end|>": 257}
    encoding = tiktoken.Encoding("tiny", pat_str=r"[\s\S]", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens=special)
    (path / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    status, output, said, error = run(path, "-q", "--eos-token", "<|assistant_end|>")
    assert status == 0 and "no tokenizer" not in said, error
    assert (output / "tokenizer.pkl").read_bytes() == (path / "tokenizer.pkl").read_bytes()
    assert config_of(output)["eos_token_id"] == 257
    model, _ = load_model(output)
    assert np.isfinite(np.array(model(mx.array(IDS)))).all()
    assert_refused(run(path, "--eos-token", "<|end|>", out="no"), 2, "'<|end|>' is not in the vocabulary", tmp_path=tmp_path)


def test_a_tokenizer_pickle_is_read_and_not_run(altered, run, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    path = altered("llama")
    for file in path.glob("*token*"):
        file.unlink()
    (path / "tokenizer.pkl").write_bytes(pickle.dumps(Evil()))
    assert_refused(run(path, "--eos-token", "<|bos|>"), 1, "Failed to load tiktoken tokenizer", tmp_path=tmp_path)
    assert not (tmp_path / "canary").exists()


# --- Adapters ---------------------------------------------------------------------------------------------------------


def save_adapter(base, path, kind):
    """A random adapter for `base`, as mlx-lm saves it; returns the logits of base and adapter together."""
    from mlx_lm import load
    from mlx_lm.tuner.utils import linear_to_lora_layers

    mx.random.seed(1)
    model = load(str(base))[0]
    settings = {"rank": 4, "scale": 8.0, "dropout": 0.0}
    linear_to_lora_layers(model, 2, settings, use_dora=kind == "dora")
    leaves = {name: w for name, w in tree_flatten(model.parameters()) if name.rsplit(".", 1)[-1] in ("lora_a", "lora_b", "m")}
    leaves = {name: mx.random.normal(w.shape) * 0.03 if name.endswith("lora_b") else w for name, w in leaves.items()}
    model.load_weights(list(leaves.items()), strict=False)
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"fine_tune_type": kind, "num_layers": 2, "lora_parameters": settings}))
    mx.save_safetensors(str(path / "adapters.safetensors"), leaves)
    return np.array(model(mx.array(IDS)).astype(mx.float32))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("flags", [[], ["-q", "--bits", "4"]], ids=["plain", "4-bit"])
def test_fused_adapter_equals_the_adapted_model(kind, flags, source, run, tmp_path):
    _, base, _, _ = run(source(), *flags, out="base")
    expected = save_adapter(base, tmp_path / "adapter", kind)
    assert np.abs(expected - logits_of(base)).max() > 0.1
    status, output, said, error = run(base, "--adapter-path", tmp_path / "adapter", *(["--dequantize"] if flags else []))
    assert status == 0, error
    assert np.abs(logits_of(output) - expected).max() < 1e-4
    assert "into 14 layers" in said and "re-quantised" not in said


def test_float32_fuses_a_half_precision_model_in_float32(source, run, tmp_path):
    _, base, _, _ = run(source(), "--dtype", "bfloat16", out="base")
    save_adapter(base, tmp_path / "adapter", "lora")
    _, output, _, _ = run(base, "--adapter-path", tmp_path / "adapter", "--dtype", "float32")
    name, adapter = "model.layers.3.mlp.up_proj", mx.load(str(tmp_path / "adapter" / "adapters.safetensors"))
    change = 8.0 * (adapter[f"{name}.lora_a"] @ adapter[f"{name}.lora_b"]).T
    expected = weights_of(base)[f"{name}.weight"].astype(mx.float32) + change
    assert mx.abs(weights_of(output)[f"{name}.weight"] - expected).max().item() < 1e-6


def test_fusing_into_a_quantised_model_says_its_error(source, run, tmp_path):
    _, base, _, _ = run(source(), "-q", out="base")
    save_adapter(base, tmp_path / "adapter", "lora")
    status, output, said, _ = run(base, "--adapter-path", tmp_path / "adapter")
    quantization = config_of(output)["quantization"]
    assert status == 0 and quantization["bits"] == 4 and "--dequantize fuses exactly" in said
    before, after, adapter = weights_of(base), weights_of(output), mx.load(str(tmp_path / "adapter" / "adapters.safetensors"))

    def dequantized(weights, name):
        parts = (weights[f"{name}.{part}"] for part in ("weight", "scales", "biases"))
        return mx.dequantize(*parts, quantization["group_size"], quantization["bits"])

    errors = []
    for name in {key.rpartition(".")[0] for key in adapter}:
        exact = dequantized(before, name) + 8.0 * (adapter[f"{name}.lora_a"] @ adapter[f"{name}.lora_b"]).T
        errors.append(mx.abs(exact - dequantized(after, name)).max().item())
    told = float(re.search(r"re-quantised: a fused weight is off by up to ([0-9.e-]+);", said)[1])
    assert told == pytest.approx(max(errors), rel=0.01) and told > 0


def test_dora_on_three_bits_fuses_after_dequantising(source, run, tmp_path):
    """mlx-lm's DoRA cannot be put on a 3-bit layer, but the adapter trained on the dequantised model fits."""
    _, packed, _, _ = run(source(), "-q", "--bits", 3, out="packed")
    _, plain, _, _ = run(packed, "-d", out="plain")
    expected = save_adapter(plain, tmp_path / "adapter", "dora")
    assert_refused(run(packed, "--adapter-path", tmp_path / "adapter"), 1, "does not fit", "--dequantize", tmp_path=tmp_path)
    status, output, _, error = run(packed, "--adapter-path", tmp_path / "adapter", "--dequantize")
    assert status == 0, error
    assert np.abs(logits_of(output) - expected).max() < 1e-4


def test_full_weights_as_an_adapter(source, run, tmp_path):
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text('{"fine_tune_type": "full"}')
    mx.save_safetensors(str(path / "adapters.safetensors"), {"model.norm.weight": mx.full((64,), 2.0)})
    status, output, said, error = run(source(), "--adapter-path", path)
    assert status == 0 and "replaced 1 weights" in said, error
    assert weights_of(output)["model.norm.weight"].tolist() == [2.0] * 64


def test_fuse_then_quantize(source, run, tmp_path):
    save_adapter(source(), tmp_path / "adapter", "lora")
    _, fused, _, _ = run(source(), "--adapter-path", tmp_path / "adapter", out="fused")
    _, packed, _, _ = run(fused, "-q", out="packed")
    _, output, said, _ = run(source(), "--adapter-path", tmp_path / "adapter", "-q")
    assert "re-quantised" not in said
    assert np.array_equal(logits_of(output), logits_of(packed))


def test_adapters_that_do_not_fit(source, run, tmp_path):
    assert_refused(run(source(), "--adapter-path", tmp_path), 2, "adapter_config.json", tmp_path=tmp_path)
    save_adapter(source(), tmp_path / "adapter", "lora")
    assert_refused(run(source("narrow"), "--adapter-path", tmp_path / "adapter"), 1, "does not fit", "up_proj", tmp_path=tmp_path)
    file = tmp_path / "adapter" / "adapters.safetensors"
    weights = dict(mx.load(str(file)))
    lost = next(name for name in weights if name.endswith("lora_a"))
    mx.save_safetensors(str(file), {name: w for name, w in weights.items() if name != lost})
    assert_refused(run(source(), "--adapter-path", tmp_path / "adapter"), 1, "lacks weights", lost, tmp_path=tmp_path)


# --- Complete or absent -----------------------------------------------------------------------------------------------


def test_existing_output_is_refused_unless_overwritten(source, run, tmp_path):
    run(source(), "-q")
    kept = config_of(tmp_path / "out")
    status, output, _, error = run(source())
    assert status == 2 and "Output directory exists" in error and "--overwrite" in error and config_of(output) == kept
    (output / "stale.txt").write_text("old")
    status, output, _, error = run(source(), "--overwrite")
    assert status == 0 and "quantization" not in config_of(output) and not (output / "stale.txt").exists(), error
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_that_cannot_be_made_is_one_line(source, run, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, _, error = run(source(), out="file/out")
    assert status == 1 and error.startswith(f"Cannot write {tmp_path}/file/out") and error.count("\n") == 1


def test_a_reader_that_leaves_sees_no_traceback(child, source, tmp_path):
    command = [sys.executable, str(SCRIPT), "--hf-path", str(source()), "--output-dir", str(tmp_path / "out")]
    process = child(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    error = process.stderr.read()
    assert "Traceback" not in error and "Broken" not in error and process.wait() == 1


def test_overwrite_spares_what_is_no_model(source, altered, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    status, output, _, error = run(source(), "--overwrite")
    assert status == 2 and "model directories only" in error and (output / "thesis.tex").read_text() == "years of work"
    path = altered("llama")
    for target in (path, path.parent):
        status, _, _, error = run(path, "--overwrite", "--output-dir", target)
        assert status == 2 and "is or holds --hf-path" in error and weights_of(path)


@pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_failed_conversion_leaves_the_old_directory_and_nothing_else(failure, source, run, tmp_path, monkeypatch):
    from mlx_lm import utils

    run(source(), "-q")
    kept = config_of(tmp_path / "out")

    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(utils, "save_config", fail)
    status, output, _, error = run(source(), "--overwrite")
    assert (status, "No space left" in error) == ((1, True) if isinstance(failure, OSError) else (130, False))
    assert config_of(output) == kept and [path.name for path in tmp_path.iterdir()] == ["out"]
    status, output, _, _ = run(source(), out="new")
    assert status in (1, 130) and not output.exists()


# --- Wrong usage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        (["-q", "--bits", "7"], ["--bits", "7", "2, 3, 4, 5, 6, 8"]),
        (["-q", "--group-size", "48"], ["--group-size", "48", "32, 64, 128"]),
        (["-q", "--group-size", "16"], ["--group-size 16", "nvfp4"]),
        (["--bits", "4"], ["--bits has no effect without --quantize"]),
        (["--q-mode", "affine"], ["--q-mode has no effect without --quantize"]),
        (["-q", "-d"], ["--quantize and --dequantize exclude each other"]),
        (["-q", "--q-mode", "mxfp4", "--bits", "8"], ["--q-mode mxfp4 is always 4 bits with group size 32"]),
        (["-q", "--quant-predicate", "mixed_2_6", "--bits", "4"], ["--quant-predicate sets the bits itself"]),
        (["-q", "--quant-predicate", "mixed_9_9"], ["--quant-predicate", "mixed_2_6"]),
        (["--dtype", "int8"], ["--dtype", "bfloat16"]),
        (["--upload-repo", "no-owner"], ["--upload-repo no-owner", "owner/name"]),
        (["--no-such-flag"], ["--no-such-flag"]),
    ],
)
def test_wrong_flags(flags, words, run, tmp_path):
    assert_refused(run(tmp_path, *flags), 2, *words, tmp_path=tmp_path)


def test_directories_that_are_no_model(altered, run, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    assert_refused(run(tmp_path / "missing"), 2, "Model not found", tmp_path=tmp_path)
    assert_refused(run(tmp_path / "file"), 2, "is a file", tmp_path=tmp_path)
    assert_refused(run(tmp_path / "empty"), 2, "no config.json", tmp_path=tmp_path)
    (tmp_path / "empty" / "config.json").write_text("{}")
    (tmp_path / "empty" / "pytorch_model.bin").write_text("")
    assert_refused(run(tmp_path / "empty"), 2, "no model*.safetensors", "pytorch_model.bin", tmp_path=tmp_path)
    path = altered("llama")
    (path / "config.json").write_text("{")
    assert_refused(run(path), 2, "config.json is not JSON", tmp_path=tmp_path)
    assert_refused(run(path, "--revision", "main"), 2, "--revision", "local directory", tmp_path=tmp_path)


@pytest.mark.parametrize("lost", ["a byte", "half", "the data", "the data and a byte", "all", "all but a pointer"])
def test_truncated_weights(lost, altered, run, tmp_path):
    file = altered("llama") / "model.safetensors"
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    keep = {"a byte": len(data) - 1, "half": len(data) // 2, "the data": header, "the data and a byte": header - 1}.get(lost, 0)
    file.write_bytes(b"version https://git-lfs" if lost == "all but a pointer" else data[:keep])
    assert_refused(run(file.parent), 1, "Damaged weights", "model.safetensors", tmp_path=tmp_path)


def test_missing_shard(altered, run, tmp_path):
    path = altered("llama")
    names = {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert_refused(run(path), 1, "Incomplete weights", "model-00002-of-00002.safetensors", tmp_path=tmp_path)


# --- The hub, faked ---------------------------------------------------------------------------------------------------


def test_hub_name_and_revision(source, run, monkeypatch):
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision))
        return str(source())

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    status, output, _, error = run("owner/tiny", "--revision", "v2")
    assert status == 0 and asked == [("owner/tiny", "v2")], error
    assert "base_model: owner/tiny" in (output / "README.md").read_text()


def test_hub_out_of_reach_is_one_line(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, SCRIPT, "--hf-path", "owner/tiny", "--output-dir", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("Model not found: owner/tiny") and "HF_HUB_OFFLINE is set" in done.stderr


def test_upload(source, run, monkeypatch):
    calls = []

    class FakeApi:
        def create_repo(self, repo_id, exist_ok):
            calls.append(("create", repo_id, exist_ok))

        def upload_folder(self, repo_id, folder_path):
            calls.append(("upload", repo_id, sorted(os.listdir(folder_path))))

    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    status, output, said, _ = run(source(), "--upload-repo", "me/tiny")
    assert status == 0 and "Uploaded to me/tiny" in said
    assert calls == [("create", "me/tiny", True), ("upload", "me/tiny", sorted(os.listdir(output)))]

    def refuse(self, repo_id, exist_ok):
        raise OSError("401 Unauthorized")

    monkeypatch.setattr(FakeApi, "create_repo", refuse)
    status, output, _, error = run(source(), "--upload-repo", "me/tiny", out="kept")
    assert status == 1 and output.exists() and error.startswith("Upload to me/tiny failed: 401") and str(output) in error


# --- Documents --------------------------------------------------------------------------------------------------------


def test_the_readme_knows_every_flag(capsys):
    with pytest.raises(SystemExit):
        convert_model.parse_args(["--help"])
    readme = (SCRIPT.parent / "README.md").read_text()
    flags = {word.strip("[],") for word in capsys.readouterr().out.split() if word.strip("[],").startswith("--")}
    assert {"--hf-path", "--quantize", "--dtype"} <= flags
    for flag in flags:
        assert flag in ("--help", "--model", "--mlx-path", "--q-bits", "--q-group-size", "--recipe") or flag in readme, flag


def test_commands_in_the_documents_parse():
    lines = [*(SCRIPT.parent / "README.md").read_text().splitlines(), *convert_model.EXAMPLES.splitlines()]
    commands = [shlex.split(line.split("convert_model.py", 1)[1]) for line in lines if "utils/convert_model.py --" in line]
    assert len(commands) >= 4
    for words in commands:
        convert_model.parse_args(words)


def test_quantised_layers_are_told_from_plain_ones():
    plain = nn.Sequential(nn.Linear(64, 8), nn.Linear(48, 8))
    assert not convert_model.is_quantized(plain)
    nn.quantize(plain, 64, 4, class_predicate=lambda _, layer: hasattr(layer, "to_quantized") and layer.weight.shape[-1] == 64)
    assert convert_model.is_quantized(plain)
    assert convert_model.unquantized_layers(plain) == [("layers.1", 48)]
