"""The two vision scripts on tiny random models that transformers saves here: parity, every flag, every refusal. No network.

The line of the missing extra and the argument errors run everywhere; the rest needs mlx-vlm and torch.
"""

import contextlib
import functools
import http.server
import io
import json
import logging
import os
import shutil
import signal
import sys
import threading
from argparse import Namespace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

UTILS = Path(__file__).parents[1] / "utils"
sys.path.insert(0, str(UTILS))
import convert_vision_model  # noqa: E402
import inference_vision  # noqa: E402

LETTERS = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .:?"]
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TILES = [f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5)]
SMOL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<fake_token_around_image>", "<global-img>", *TILES]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = dict(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=512, bos_token_id=0, eos_token_id=2, pad_token_id=0)  # fmt: skip
# Not the classes' own theta, so that one which is lost in a nested config shows.
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
QWEN_PIXELS = dict(image_processor_type="Qwen2VLImageProcessor", patch_size=14, temporal_patch_size=2, merge_size=2,
                   image_mean=[0.5] * 3, image_std=[0.5] * 3, size=dict(shortest_edge=28 * 28, longest_edge=16 * 28 * 28))  # fmt: skip
SMOL_PIXELS = dict(image_processor_type="SmolVLMImageProcessor", do_convert_rgb=True, do_image_splitting=True, do_normalize=True,
                   do_pad=True, do_rescale=True, do_resize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=1,
                   rescale_factor=1 / 255, size=dict(longest_edge=112), max_image_size=dict(longest_edge=56))  # fmt: skip
NAMES = ["qwen2_vl", "smolvlm"]


@pytest.fixture(autouse=True)
def logging_as_it_was():
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def mlx_vlm():
    return pytest.importorskip("mlx_vlm", reason="the vision extra is absent: uv sync --extra vision")


def save_tokenizer(path, special, image):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*special, *LETTERS])}, unk_token="a"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[2], pad_token=special[0], additional_special_tokens=special
    )
    fast.chat_template = TEMPLATE.replace("IMAGE", image)
    fast.save_pretrained(path)


def make_qwen2_vl(path):
    import transformers

    save_tokenizer(path, QWEN, "<|vision_start|><|image_pad|><|vision_end|>")
    vision = dict(depth=2, embed_dim=32, hidden_size=64, num_heads=2, mlp_ratio=2, patch_size=14)
    config = transformers.Qwen2VLConfig(
        text_config=dict(TEXT, rope_parameters=dict(ROPE, mrope_section=[2, 3, 3])), vision_config=vision,
        image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4,
    )  # fmt: skip
    (path / "preprocessor_config.json").write_text(json.dumps(QWEN_PIXELS))
    return transformers.Qwen2VLForConditionalGeneration(config)


def make_smolvlm(path, hidden_size=32, intermediate_size=128):
    import transformers

    save_tokenizer(path, SMOL, "<image>")
    config = transformers.SmolVLMConfig(
        text_config=dict(TEXT, model_type="llama", rope_parameters=ROPE, intermediate_size=intermediate_size),
        vision_config=dict(hidden_size=hidden_size, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=14,
                           image_size=56),
        image_token_id=3, scale_factor=2,
    )  # fmt: skip
    (path / "preprocessor_config.json").write_text(json.dumps(SMOL_PIXELS))
    (path / "processor_config.json").write_text(json.dumps(dict(processor_class="SmolVLMProcessor", image_seq_len=4)))
    return transformers.SmolVLMForConditionalGeneration(config)


def make_narrow(path):
    return make_smolvlm(path, hidden_size=16, intermediate_size=64)


MAKERS = {"qwen2_vl": make_qwen2_vl, "smolvlm": make_smolvlm, "narrow": make_narrow}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """name -> (directory saved by transformers, the float32 torch model in it); each is made once."""
    pytest.importorskip("mlx_vlm", reason="the vision extra is absent: uv sync --extra vision")
    torch = pytest.importorskip("torch", reason="torch is needed to save the tiny transformers models")
    import transformers

    transformers.logging.set_verbosity_error()
    root = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(name):
        (root / name).mkdir()
        torch.manual_seed(0)
        model = MAKERS[name](root / name).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.15) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(root / name)
        return root / name, model

    return make


@pytest.fixture(scope="session")
def converted(made, tmp_path_factory):
    """name -> the directory as converted without flags."""
    root = tmp_path_factory.mktemp("converted")

    @functools.cache
    def convert(name):
        with contextlib.redirect_stdout(io.StringIO()):
            assert convert_vision_model.main(["--hf-path", str(made(name)[0]), "--output-dir", str(root / name)]) == 0
        return root / name

    return convert


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A directory with a.png (60 x 90) and "b c.jpg" (40 x 40), and broken ones."""
    image = pytest.importorskip("PIL.Image", reason="Pillow comes with the vision extra")
    root, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    image.fromarray(random.integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(root / "a.png")
    image.fromarray(random.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(root / "b c.jpg")
    (root / "cut.png").write_bytes((root / "a.png").read_bytes()[:2000])
    (root / "cut.jpg").write_bytes((root / "b c.jpg").read_bytes()[:700])
    (root / "words.png").write_text("no image")
    return root


@pytest.fixture(scope="session")
def server(pictures):
    """The address under which http.server shows `pictures`."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(pictures))) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


@pytest.fixture
def run(capsys, monkeypatch):
    """run(script, *flags, stdin="") -> (exit status, stdout, stderr)."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def call(script, *flags, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        try:
            status = script.main([str(flag) for flag in flags])
        except SystemExit as leave:  # argparse
            status = leave.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def convert(run, tmp_path):
    """convert(source, *flags) -> (exit status, output directory, stdout, stderr)."""

    def call(source, *flags, out="out"):
        status, said, errors = run(convert_vision_model, "--hf-path", source, "--output-dir", tmp_path / out, *flags)
        return status, tmp_path / out, said, errors

    return call


@pytest.fixture
def ask(run):
    """ask(directory, *flags) -> (exit status, stdout, stderr) of inference_vision.py."""
    return lambda directory, *flags, stdin="": run(inference_vision, "--model", directory, *flags, stdin=stdin)


def open_directory(directory):
    return inference_vision.load(Namespace(model=str(directory), revision=None, trust_remote_code=False))


def inputs_of(model, processor, pictures):
    """What the model is given for a chat with an image in either of two questions."""
    from mlx_vlm.prompt_utils import apply_chat_template
    from mlx_vlm.utils import prepare_inputs

    def question(text):
        return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}

    messages = [{"role": "system", "content": "You see."}, question("What?"), {"role": "assistant", "content": "cat"}, question("And?")]
    images = [inference_vision.read_image(str(pictures / name)) for name in ("a.png", "b c.jpg")]
    return dict(prepare_inputs(processor, images=images, prompts=apply_chat_template(processor, model.config, messages)))


def logits_of(directory, pictures):
    model, processor = open_directory(directory)
    inputs = inputs_of(model, processor, pictures)
    # A mask of ones in two dimensions is right for the processor and takes the place of SmolVLM's causal mask.
    inputs.pop("attention_mask")
    return np.array(model(inputs.pop("input_ids"), inputs.pop("pixel_values"), **inputs).logits.astype(mx.float32))


def as_torch(inputs, model):
    import torch

    tensors = {name: torch.tensor(np.array(value)) for name, value in inputs.items() if isinstance(value, mx.array)}
    tensors["input_ids"] = tensors["input_ids"].long()
    if "image_grid_thw" in tensors:
        tensors["image_grid_thw"] = tensors["image_grid_thw"].long()
        tensors["mm_token_type_ids"] = (tensors["input_ids"] == model.config.image_token_id).int()
    if "pixel_attention_mask" in tensors:
        tensors["pixel_attention_mask"] = tensors["pixel_attention_mask"].bool()
    return tensors


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def altered(source, path, **settings):
    """A copy of a model directory with other settings in config.json."""
    shutil.copytree(source, path)
    (path / "config.json").write_text(json.dumps(config_of(source) | settings))
    return path


def one_line(text):
    return text.count("\n") == 1 and text.endswith("\n") and "Traceback" not in text


# --- Without the extra ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, flags", [
    (convert_vision_model, ["--hf-path", "anything"]),
    (inference_vision, ["--model", "anything", "--prompt", "What?", "--image", "a.png"]),
])  # fmt: skip
def test_missing_extra_is_one_line(run, monkeypatch, script, flags):
    monkeypatch.setitem(sys.modules, "mlx_vlm", None)
    status, out, err = run(script, *flags)
    assert status == 1 and out == "" and one_line(err) and "uv sync --extra vision" in err


@pytest.mark.parametrize("script, flags, words", [
    (convert_vision_model, [], "--hf-path"),
    (convert_vision_model, ["--hf-path", "x", "--bits", "4"], "--bits has no effect without --quantize"),
    (convert_vision_model, ["--hf-path", "x", "--q-mode", "mxfp4"], "--q-mode has no effect without --quantize"),
    (convert_vision_model, ["--hf-path", "x", "-q", "--bits", "7"], "--bits"),
    (convert_vision_model, ["--hf-path", "x", "-q", "-d"], "exclude each other"),
    (convert_vision_model, ["--hf-path", "x", "-q", "--q-mode", "nvfp4", "--group-size", "64"], "always 4 bits with group size 16"),
    (convert_vision_model, ["--hf-path", "x", "--upload-repo", "mine"], "owner/name"),
    (convert_vision_model, ["--hf-path", "x", "--adapter-path", "y"], "--adapter-path"),
    (inference_vision, ["--model", "x"], "--prompt --chat"),
    (inference_vision, ["--model", "x", "--prompt", "a", "--chat"], "not allowed with"),
    (inference_vision, ["--prompt", "a"], "no directory mlx_model"),
    (inference_vision, ["--model", "x", "--chat", "--max-tokens", "0"], "--max-tokens"),
    (inference_vision, ["--model", "x", "--chat", "--temperature", "-1"], "--temperature"),
    (inference_vision, ["--model", "x", "--chat", "--top-p", "2"], "--top-p"),
    (inference_vision, ["--model", "x", "--chat", "--seed", "one"], "--seed"),
])  # fmt: skip
def test_argument_errors_are_one_line(run, monkeypatch, tmp_path, script, flags, words):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(script, *flags)
    assert status == 2 and out == "" and one_line(err) and words in err



def test_flags_are_the_text_scripts(run):
    status, out, _ = run(convert_vision_model, "--help")
    for flag in ("--hf-path", "--quantize", "--bits", "--group-size", "--q-mode", "--dtype", "--output-dir", "--upload-repo",
                 "--revision", "--trust-remote-code", "--dequantize", "--verbose", "--overwrite"):  # fmt: skip
        assert flag in out
    args = convert_vision_model.parse_args(["--hf-path", "x"])
    assert args.output_dir == "mlx_model" and args.trust_remote_code is False


def test_adapted_config_stays_as_it_is():
    nested = dict(model_type="qwen2_vl", tie_word_embeddings=True, vision_config={"model_type": "qwen2_vl_vision"},
                  text_config=dict(TEXT, rope_parameters=dict(ROPE, mrope_section=[2, 3, 3])))  # fmt: skip
    config = convert_vision_model.adapt_config(nested)
    assert config["model_type"] == config["vision_config"]["model_type"] == "qwen2_vl"
    assert config["rope_theta"] == 5000.0 and config["rope_scaling"]["type"] == "mrope" and config["hidden_size"] == 64
    assert config["tie_word_embeddings"] is True
    assert convert_vision_model.adapt_config(config) == config


# --- Converting -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers(made, converted, pictures, name):
    import torch

    source, reference = made(name)
    model, processor = open_directory(source)
    with torch.no_grad():
        expected = reference(**as_torch(inputs_of(model, processor, pictures), reference)).logits.numpy()
    assert np.abs(expected).max() > 1
    # Converted, and read as transformers saved it.
    for directory in (converted(name), source):
        np.testing.assert_allclose(logits_of(directory, pictures), expected, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_plain_conversion(made, converted, name):
    source, out = made(name)[0], converted(name)
    assert {file.name for file in source.iterdir()} <= {file.name for file in out.iterdir()}
    for file in source.glob("*process*"):
        assert (out / file.name).read_bytes() == file.read_bytes()
    assert "quantization" not in config_of(out) and "base_model" not in (out / "README.md").read_text()
    assert not list(out.parent.glob(".*"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flags, bits, group_size", [
    (["--group-size", "32"], 4, 32),
    (["--bits", "8"], 8, 64),
    (["--q-mode", "mxfp4"], 4, 32),
    (["--q-mode", "nvfp4"], 4, 16),
])  # fmt: skip
def test_quantize(convert, made, converted, ask, pictures, name, flags, bits, group_size):
    status, out, said, err = convert(made(name)[0], "-q", *flags)
    assert (status, err) == (0, "") and "bits per weight  32.000 -> " in said
    assert config_of(out)["quantization"].items() >= {"bits": bits, "group_size": group_size}.items()
    model, _ = open_directory(out)
    quantized = {path for path, layer in model.named_modules() if hasattr(layer, "bits")}
    assert any("q_proj" in path for path in quantized) and not any("vision" in path for path in quantized)
    if bits == 8:
        np.testing.assert_allclose(logits_of(out, pictures), logits_of(converted(name), pictures), atol=0.7)
    assert ask(out, "--image", pictures / "a.png", "--prompt", "What?", "--max-tokens", 5)[0] == 0


@pytest.mark.parametrize("name", NAMES)
def test_dequantize(convert, made, pictures, name):
    _, small, _, _ = convert(made(name)[0], "-q", "--bits", "8", out="small")
    status, plain, _, _ = convert(small, "--dequantize", "--dtype", "float32", out="plain")
    assert status == 0 and "quantization" not in config_of(plain) and "quantization_config" not in config_of(plain)
    assert not any(hasattr(layer, "bits") for _, layer in open_directory(plain)[0].named_modules())
    np.testing.assert_allclose(logits_of(plain, pictures), logits_of(small, pictures), atol=1e-2)
    assert convert(small, "-q", out="again")[0] == 2
    assert convert(made(name)[0], "-d", out="again")[0] == 2


def test_dtype(convert, made):
    status, out, _, _ = convert(made("smolvlm")[0], "--dtype", "bfloat16")
    assert status == 0 and config_of(out)["dtype"] == "bfloat16"
    assert {w.dtype for w in mx.load(str(out / "model.safetensors")).values()} == {mx.bfloat16}


def test_verbose_lists_the_layers(convert, made):
    status, _, said, _ = convert(made("smolvlm")[0], "-q", "--verbose")
    assert status == 0 and "language_model.lm_head: 4 bits" in said


def test_existing_output_is_refused_or_replaced(convert, made, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    status, out, _, err = convert(made("smolvlm")[0])
    assert status == 2 and one_line(err) and err.startswith("Output directory exists: ")
    assert (out / "config.json").read_text() == "{}"
    assert convert(made("smolvlm")[0], "--overwrite")[0] == 0
    assert config_of(out)["model_type"] == "smolvlm"


@pytest.mark.parametrize("error, status", [(OSError(28, "No space left on device"), 1), (KeyboardInterrupt(), 130)])
def test_nothing_half_converted_is_left(convert, made, monkeypatch, tmp_path, error, status):
    def fail(*args):
        raise error

    monkeypatch.setattr("mlx_vlm.utils.save_config", fail)
    got, out, _, err = convert(made("smolvlm")[0])
    assert got == status and one_line(err)
    assert not out.exists() and list(tmp_path.iterdir()) == []


def test_missing_weights_are_named(convert, made, tmp_path):
    broken = altered(made("qwen2_vl")[0], tmp_path / "broken")
    weights = mx.load(str(broken / "model.safetensors"))
    del weights["model.norm.weight"]
    mx.save_safetensors(str(broken / "model.safetensors"), weights)
    status, out, _, err = convert(broken)
    assert status == 1 and one_line(err) and "language_model.model.norm.weight" in err and not out.exists()
    # mlx-vlm would go on without eyes.
    weights = {name: weight for name, weight in mx.load(str(made("qwen2_vl")[0] / "model.safetensors")).items() if "visual" not in name}
    mx.save_safetensors(str(broken / "model.safetensors"), weights)
    status, out, _, err = convert(broken)
    assert status == 1 and one_line(err) and "Incomplete weights" in err and "vision_tower" in err


def test_a_lost_rope_setting_is_refused(convert, made, monkeypatch):
    adapt = convert_vision_model.adapt_config
    # What becomes of a class that reads the text model's settings at the top, where its config has them nested.
    monkeypatch.setattr(convert_vision_model, "adapt_config", lambda c: {k: v for k, v in adapt(c).items() if k != "rope_theta"})
    status, out, _, err = convert(made("qwen2_vl")[0])
    assert status == 1 and one_line(err) and "rope_theta=5000.0" in err and not out.exists()


def test_what_is_no_vision_model(convert, mlx_vlm, tmp_path):
    from mlx_lm.models import llama

    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, rms_norm_eps=1e-5, vocab_size=64)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text(json.dumps(dict(sizes, model_type="llama", num_key_value_heads=4)))
    from mlx.utils import tree_flatten

    model = llama.Model(llama.ModelArgs(model_type="llama", **sizes))
    mx.save_safetensors(str(tmp_path / "text" / "model.safetensors"), dict(tree_flatten(model.parameters())))
    status, _, _, err = convert(tmp_path / "text")
    assert status == 2 and one_line(err) and "Not a vision model" in err and "convert_model.py" in err


@pytest.mark.parametrize("content, words", [("[]", "no model's configuration"), ("{", "no model's configuration"), (None, "config.json")])
def test_broken_config(convert, made, tmp_path, content, words):
    broken = altered(made("smolvlm")[0], tmp_path / "broken")
    (broken / "config.json").unlink() if content is None else (broken / "config.json").write_text(content)
    status, _, _, err = convert(broken)
    assert status == 2 and one_line(err) and words in err


def test_foreign_quantisation_needs_dequantize(convert, made, tmp_path):
    foreign = altered(made("smolvlm")[0], tmp_path / "foreign", quantization_config={"quant_method": "gptq", "bits": 4})
    status, _, _, err = convert(foreign)
    assert status == 2 and one_line(err) and "gptq" in err and "--dequantize" in err


def test_group_size_that_does_not_divide(convert, made):
    status, _, said, err = convert(made("smolvlm")[0], "-q", "--group-size", "128")
    assert (status, err) == (0, "") and "language_model.layers.0.self_attn.q_proj (width 64)" in said
    assert "down_proj" not in said and "vision" not in said.split("not quantised")[1].split("Next:")[0]
    status, out, _, err = convert(made("narrow")[0], "-q", "--group-size", "128", out="none")
    assert status == 2 and one_line(err) and "--group-size 128" in err and not out.exists()


def test_hub_name_offline_is_one_line(run, mlx_vlm, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for script, flags in ((convert_vision_model, ["--hf-path"]), (inference_vision, ["--prompt", "a", "--model"])):
        status, _, err = run(script, *flags, "nobody/no-such-model")
        assert status == 1 and one_line(err) and "nobody/no-such-model" in err and "HF_HUB_OFFLINE" in err


def test_code_in_a_model_runs_only_when_allowed(convert, ask, made, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code"))
    sly = altered(made("qwen2_vl")[0], tmp_path / "sly")
    tokenizer = json.loads((sly / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Sly", "auto_map": {"AutoTokenizer": ["sly.Sly", None]}}
    (sly / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (sly / "sly.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast\n"
        "class Sly(PreTrainedTokenizerFast):\n    pass\n"
    )
    assert convert(sly)[0] == ask(sly, "--prompt", "a", "--max-tokens", 1)[0] == 0
    assert not (tmp_path / "ran").exists()
    assert ask(sly, "--prompt", "a", "--max-tokens", 1, "--trust-remote-code")[0] == 0
    assert (tmp_path / "ran").exists()
    own = altered(made("qwen2_vl")[0], tmp_path / "own", model_file="model.py")
    (own / "model.py").write_text("raise SystemExit('ran')")
    status, _, _, err = convert(own, out="other")
    assert status == 2 and one_line(err) and "--trust-remote-code" in err


def test_upload(convert, made, monkeypatch):
    uploaded = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, repo_id, exist_ok: uploaded.append(repo_id))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, repo_id, folder_path: uploaded.append(folder_path))
    status, out, said, _ = convert(made("smolvlm")[0], "--upload-repo", "me/mine")
    assert status == 0 and uploaded == ["me/mine", str(out)] and "Uploaded to me/mine" in said


# --- Asking -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_answer_equals_transformers(made, converted, ask, pictures, server, name):
    import torch

    source, reference = made(name)
    model, processor = open_directory(source)
    conversation = inference_vision.Conversation(model, processor, Namespace(system="You see.", max_tokens=16, temperature=0.0, top_p=1.0))
    conversation.waiting = [inference_vision.read_image(str(pictures / file)) for file in ("a.png", "b c.jpg")]
    from mlx_vlm.prompt_utils import apply_chat_template
    from mlx_vlm.utils import prepare_inputs

    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]
    prompt = apply_chat_template(processor, model.config, [*conversation.messages, {"role": "user", "content": content}])
    inputs = as_torch(prepare_inputs(processor, images=conversation.waiting, prompts=prompt), reference)
    with torch.no_grad():
        ids = reference.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    expected = processor.tokenizer.decode(ids, skip_special_tokens=True)
    asked = ["--system", "You see.", "--prompt", "What?", "--max-tokens", 16]
    for images in ([pictures / "a.png", f"{server}/b%20c.jpg"], [f"{server}/a.png", "--image", (pictures / "b c.jpg").as_uri()]):
        assert ask(converted(name), "--image", *images, *asked) == (0, expected + "\n", "")
    assert conversation.ask("What?", lambda piece: None) == expected
    # The order of the images is the order of the flags.
    assert ask(converted(name), "--image", pictures / "b c.jpg", pictures / "a.png", *asked)[1] != expected + "\n"


def test_text_alone_stream_and_stdin(converted, ask):
    status, out, err = ask(converted("qwen2_vl"), "--prompt", "hello", "--max-tokens", 8)
    assert status == 0 and err == "" and len(out) > 1
    assert ask(converted("qwen2_vl"), "--prompt", "hello", "--max-tokens", 8, "--stream") == (0, out, "")
    assert ask(converted("qwen2_vl"), "--prompt", "-", "--max-tokens", 8, stdin="hello\n") == (0, out, "")


def test_verbose_says_what_it_took(converted, ask, pictures):
    status, _, err = ask(converted("smolvlm"), "--image", pictures / "a.png", "--prompt", "a", "--max-tokens", 4, "--verbose")
    assert status == 0 and "generation 4 tokens" in err and "peak memory" in err


def test_sampling(converted, ask, tmp_path):
    model = altered(converted("qwen2_vl"), tmp_path / "model")
    # Qwen2-VL's own: greedy at any temperature. The flags have the last word.
    (model / "generation_config.json").write_text(json.dumps({"top_k": 1, "temperature": 0.01, "top_p": 0.001}))

    def sample(*flags):
        return ask(model, "--prompt", "hello", "--max-tokens", 12, *flags)[1]

    hot = sample("--temperature", 1.5, "--seed", 1)
    assert hot == sample("--temperature", 1.5, "--seed", 1)
    assert len({hot, sample("--temperature", 1.5, "--seed", 2), sample()}) == 3
    assert sample("--temperature", 1.5, "--top-p", 1e-5) == sample()


@pytest.mark.parametrize("name, status, words", [
    ("absent.png", 2, "No such file or directory"), ("words.png", 2, "not an image"), ("cut.png", 2, "cut.png"),
    ("cut.jpg", 2, "truncated"), (".", 2, "directory"),
])  # fmt: skip
def test_broken_image_file_is_one_line(mlx_vlm, ask, pictures, name, status, words):
    got, out, err = ask("no/model", "--image", pictures / "a.png", pictures / name, "--prompt", "What?")
    assert (got, out) == (status, "") and one_line(err) and err.startswith("Cannot read image ") and words in err


@pytest.mark.parametrize("url, status, words", [
    ("{server}/absent.png", 1, "404"), ("{server}/words.png", 2, "not an image"), ("{server}/cut.jpg", 2, "truncated"),
    ("http://127.0.0.1:1/a.png", 1, "no answer from the server"), ("http://", 1, "http://"),
])  # fmt: skip
def test_broken_url_is_one_line(mlx_vlm, ask, server, url, status, words):
    got, out, err = ask("no/model", "--image", url.format(server=server), "--prompt", "What?")
    assert (got, out) == (status, "") and one_line(err) and err.startswith("Cannot read image ") and words in err


def test_image_that_the_model_does_not_take(converted, ask, tmp_path):
    from PIL import Image

    Image.new("RGB", (900, 2)).save(tmp_path / "thin.png")
    status, out, err = ask(converted("qwen2_vl"), "--image", tmp_path / "thin.png", "--prompt", "What?")
    assert (status, out) == (1, "") and one_line(err) and err.startswith("No answer: ")


def test_image_is_turned_as_the_camera_was(mlx_vlm, tmp_path):
    from PIL import Image

    image = Image.new("RGBA", (30, 10))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    image = inference_vision.read_image(str(tmp_path / "turned.png"))
    assert image.size == (10, 30) and image.mode == "RGB"


# --- Chat -------------------------------------------------------------------------------------------------------------------------


def answers(out):
    return out.splitlines()


@pytest.mark.parametrize("name", NAMES)
def test_chat_equals_the_conversation_asked_at_once(converted, ask, pictures, server, name, monkeypatch):
    lines = [f"image {pictures / 'a.png'}", "What?", "Why?", f"image {pictures / 'b c.jpg'}", f"image {server}/a.png", "And?", "So?"]
    flags = ["--chat", "--max-tokens", 12, "--system", "You see."]
    from mlx_vlm.generate import PromptCacheState

    cached, find = [], PromptCacheState.find_prefix_length
    monkeypatch.setattr(PromptCacheState, "find_prefix_length", lambda self, ids: cached.append(find(self, ids)) or cached[-1])
    status, out, err = ask(converted(name), *flags, stdin="\n".join([*lines, "clear", "hello", "quit", "never"]))
    assert len(cached) == 3 and min(cached) > 30
    assert status == 0 and err.count("Images for the next question: ") == 3 and len(answers(out)) == 5 and all(answers(out))
    # With nothing from the cache, it is the same answers; and after clear those of a new session.
    monkeypatch.setattr(PromptCacheState, "find_prefix_length", lambda self, ids: 0)
    assert ask(converted(name), *flags, stdin="\n".join([*lines, "clear", "hello", "q"]))[1] == out
    assert answers(ask(converted(name), *flags, stdin="hello")[1])[0] == answers(out)[4]


def test_chat_forgets_an_image_of_the_same_size(converted, ask, pictures, tmp_path):
    from PIL import Image

    Image.new("RGB", (90, 60), "red").save(tmp_path / "red.png")
    # The same ids up to another question: what the cache holds of the first image would pass for the second's.
    red = [f"image {tmp_path / 'red.png'}", "What? Why?"]
    flags = ["--chat", "--max-tokens", 8]
    _, second = answers(ask(converted("qwen2_vl"), *flags, stdin="\n".join([f"image {pictures / 'a.png'}", "What?", "clear", *red, "q"]))[1])
    assert [second] == answers(ask(converted("qwen2_vl"), *flags, stdin="\n".join([*red, "q"]))[1])


def test_chat_goes_on_after_mistakes(converted, ask, pictures):
    lines = ["image", "image nowhere.png", f"image {pictures / 'words.png'}", "image 'half", "", "hello", "exit", "never"]
    status, out, err = ask(converted("smolvlm"), "--chat", "--max-tokens", 4, stdin="\n".join(lines))
    assert status == 0 and len(answers(out)) == 1
    assert [line.split(":")[0] for line in err.splitlines()] == [
        "Which image? Write", *["Cannot read image nowhere.png", f"Cannot read image {pictures / 'words.png'}", "Cannot read image 'half"],
    ]  # fmt: skip


def test_chat_goes_on_after_an_image_the_model_does_not_take(converted, ask, tmp_path):
    from PIL import Image

    Image.new("RGB", (900, 2)).save(tmp_path / "thin.png")
    status, out, err = ask(converted("qwen2_vl"), "--chat", "--max-tokens", 4, stdin=f"image {tmp_path / 'thin.png'}\nWhat?\nhello\n")
    assert status == 0 and "No answer: " in err and len(answers(out)) >= 1


def test_chat_reads_several_images_from_one_line(converted, ask, pictures):
    line = f"image {pictures / 'a.png'} '{pictures / 'b c.jpg'}'"
    assert "question: 2" in ask(converted("smolvlm"), "--chat", stdin=line)[2]


def test_ctrl_c_ends_an_answer_and_not_the_session(converted, ask, monkeypatch, ctrl_c_interrupts):
    pieces = []

    def write(piece):
        pieces.append(piece)
        if len(pieces) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(inference_vision, "write_out", write)
    status, _, err = ask(converted("qwen2_vl"), "--chat", "--max-tokens", 40, stdin="hello\nhello\n")
    assert (status, err) == (0, "")
    ends = [i for i, piece in enumerate(pieces) if piece == "\n"]
    assert ends[0] == 3 and len(ends) >= 2 and len(pieces) > 6


def test_ctrl_c_ends_a_single_question(converted, ask, monkeypatch, ctrl_c_interrupts):
    monkeypatch.setattr(inference_vision, "write_out", lambda piece: os.kill(os.getpid(), signal.SIGINT))
    status, _, err = ask(converted("qwen2_vl"), "--prompt", "hello", "--stream")
    assert status == 130 and one_line(err)
