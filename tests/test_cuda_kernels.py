"""What stands in the place of nn.Linear and of mx.fast's attention on CUDA gives their results; without a GPU, what is in whose place."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.tuner.utils import linear_to_lora_layers
from test_rollout import PROMPTS, full_logps, roll
from tiny import ARCHITECTURES, ids_of, logps_of, tiny_model

from mlx_grpo.backends import cuda_decoding, cuda_kernels
from mlx_grpo.backends.cuda_kernels import Linears, attention_covers, fast_kernels, launches

on_cuda = pytest.mark.skipif(not cuda_kernels.has_tensor_cores(), reason="needs a CUDA GPU")
IDS = mx.array([[5], [6], [7]])


@pytest.fixture
def plain(monkeypatch):
    """Have layers found and asked as on CUDA, and computed as MLX does; the launches of a call, as numbers of layers."""
    launched = []

    def compute(self, x):
        launched.append(len(self.layers))
        return [cuda_kernels.MLX_LINEAR(layer, x) for layer in self.layers]

    monkeypatch.setattr(cuda_kernels, "has_tensor_cores", lambda: True)
    monkeypatch.setattr(Linears, "compute", compute)
    return launched


def half_model(name="qwen2", **changes):
    model = tiny_model(name, **changes)
    model.set_dtype(mx.bfloat16)
    return model


def asked(model, ids=IDS):
    with fast_kernels(launches(model), mx.fast.scaled_dot_product_attention):
        return model(ids)


def same(a, b, **tolerance):
    np.testing.assert_allclose(*(np.array(x.astype(mx.float32)) for x in (a, b)), **tolerance)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_gives_the_same(name, plain):
    model = half_model(name)
    expected = model(IDS)
    same(asked(model), expected, atol=0)
    assert bool(plain) == (name != "mamba2" or bool(launches(model)))


def test_layers_of_one_input_are_one_launch(plain):
    model = half_model()
    asked(model)
    assert plain == [3, 1, 2, 1] * len(model.layers)  # q, k and v; o; gate and up; down


def test_layers_of_another_kind_precision_or_width_are_left_to_mlx(plain):
    assert not launches(tiny_model("qwen2"))  # float32
    assert not launches(half_model(hidden_size=40, intermediate_size=40, head_dim=10))
    model = half_model()
    nn.quantize(model, 32, 4, class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0)
    assert not launches(model)


def test_a_layer_with_an_adapter_has_its_base_alone(plain):
    model = half_model()
    linear_to_lora_layers(model, 1, {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]})
    expected = model(IDS)
    same(asked(model), expected, atol=0)
    assert plain == [3, 1, 2, 1, 1, 1, 1, 1, 2, 1]


def test_layers_with_and_without_a_bias_are_not_one(plain):
    model = half_model()
    model.layers[0].self_attn.k_proj.pop("bias")
    asked(model)
    assert plain == [1, 1, 1, 1, 2, 1, 3, 1, 2, 1]


def test_layers_may_be_asked_in_any_order_with_any_input(plain):
    layers = [nn.Linear(8, width) for width in (4, 6, 2)]
    launch, (x, y) = Linears(layers), mx.random.normal((2, 3, 8))
    for number, given in ((2, x), (0, x), (1, y), (1, y), (0, x), (1, x), (2, x), (2, x)):
        same(launch(number, given), layers[number](given), atol=0)
    assert launch.input is x  # of the last: two parts are still to be taken


def test_all_is_as_before_when_the_graph_is_built_or_has_failed(plain):
    before = nn.Linear.__call__, mx.fast.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError), fast_kernels({}):
        assert nn.Linear.__call__ is not before[0] and mx.fast.scaled_dot_product_attention is cuda_kernels.attention
        1 / 0
    assert before == (nn.Linear.__call__, mx.fast.scaled_dot_product_attention)


@pytest.mark.parametrize("prompts", [PROMPTS, [[5, 6, 7], [8, 9, 10]]])
def test_a_rollouts_positions_are_covered_and_the_same(plain, monkeypatch, prompts):
    model = half_model("qwen3", head_dim=32)
    with monkeypatch.context() as without:
        without.setattr(cuda_kernels, "has_tensor_cores", lambda: False)
        expected = roll(model, prompts, decoder=cuda_decoding.CompiledDecoder(model))
    asked = []

    def attention(*args, **kwargs):
        asked.append(cuda_kernels.covers(*args, **kwargs))
        return cuda_kernels.MLX_ATTENTION(*args, **kwargs)

    monkeypatch.setattr(cuda_kernels, "attention", attention)
    monkeypatch.setattr(cuda_kernels, "rope", cuda_kernels.MLX_ROPE)
    decoder = cuda_decoding.fast_decoder(model)
    assert type(decoder) is cuda_decoding.CompiledDecoder
    rollout = roll(model, prompts, decoder=decoder)
    assert ids_of(rollout) == ids_of(expected) and logps_of(rollout) == logps_of(expected)
    assert asked and all(asked) and plain


@pytest.mark.parametrize("name", ["gemma3_text", "lfm2", "gemma2"])
def test_models_that_are_not_compiled_have_the_linear_layers(plain, monkeypatch, name):
    monkeypatch.setattr(cuda_kernels, "rope", cuda_kernels.MLX_ROPE)
    model = half_model(name)
    decoder = cuda_decoding.fast_decoder(model)
    assert type(decoder) is cuda_decoding.KernelDecoder
    assert ids_of(roll(model, decoder=decoder)) == ids_of(roll(model)) and plain


@pytest.mark.parametrize("changes,covered", [
    ({"head_dim": 64}, True), ({"head_dim": 80}, False),
    ({"num_key_value_heads": 1, "num_attention_heads": 16, "head_dim": 64}, False),
])  # fmt: skip
def test_whether_a_models_attention_is_covered(plain, changes, covered):
    assert attention_covers(tiny_model("qwen3", **changes)) == covered


@pytest.mark.skipif(mx.default_device() == mx.gpu, reason="for machines without one")
def test_nothing_changes_without_a_gpu():
    model, before = half_model(), nn.Linear.__call__
    assert not launches(model) and not attention_covers(model)
    with fast_kernels({}):
        assert nn.Linear.__call__ is before


@on_cuda
@pytest.mark.parametrize("rows", [(1, 1), (27, 1), (2, 16), (64,), (65,)])
@pytest.mark.parametrize("dtype,biased,width,outputs", [
    (mx.bfloat16, True, 896, (896, 128, 128)), (mx.bfloat16, False, 4864, (896,)),
    (mx.bfloat16, False, 896, (4864, 4864)), (mx.float16, True, 32, (16, 48)),
])  # fmt: skip
def test_linear_layers_are_mlxs(rows, dtype, biased, width, outputs):
    layers = [nn.Linear(width, n, bias=biased) for n in outputs]
    x = mx.random.normal((*rows, width)).astype(dtype)
    for layer, ours in zip(layers, Linears([cast(layer, dtype) for layer in layers]).compute(x)):
        assert ours.dtype == dtype
        layer.update({name: value.astype(dtype).astype(mx.float32) for name, value in layer.parameters().items()})
        same(ours, layer(x.astype(mx.float32)), rtol=0.01, atol=0.01)


def cast(layer, dtype):
    half = nn.Linear(1, 1, bias="bias" in layer)
    half.update({name: value.astype(dtype) for name, value in layer.parameters().items()})
    return half


@on_cuda
@pytest.mark.parametrize("dtype,heads,keys,dim", [
    (mx.bfloat16, 14, 2, 64), (mx.float16, 8, 8, 128), (mx.float32, 4, 1, 256), (mx.float32, 8, 2, 32), (mx.bfloat16, 8, 1, 128),
])  # fmt: skip
@pytest.mark.parametrize("size", [1, 7, 64, 300, 1000])
@pytest.mark.parametrize("masked", ["no", "all rows", "each row"])
def test_attention_is_mlxs(dtype, heads, keys, dim, size, masked):
    q, k, v = (mx.random.normal((3, h, n, dim)).astype(dtype) for h, n in ((heads, 1), (keys, 1024), (keys, 1024)))
    k, v = k[:, :, :size], v[:, :, :size]
    places = mx.arange(size).reshape(1, 1, 1, -1)
    some = (mx.random.uniform(shape=(3, 1, 1, size)) > 0.4) | (places == size - 1)
    mask = {"no": None, "all rows": places <= size // 2, "each row": some}[masked]
    assert cuda_kernels.covers(q, k, v, scale=0.1, mask=mask)
    expected = cuda_kernels.MLX_ATTENTION(*(x.astype(mx.float32) for x in (q, k, v)), scale=0.1, mask=mask)
    same(cuda_kernels.attention(q, k, v, scale=0.1, mask=mask), expected, atol=1e-5 if dtype == mx.float32 else 0.01)


@on_cuda
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
@pytest.mark.parametrize("offset", [mx.array(3), mx.array([2, 700, 5])])
def test_rope_is_mlxs(dtype, offset):
    form = {"traditional": False, "base": 1e6, "scale": 0.5, "offset": offset}
    x = mx.random.normal((3, 1, 14, 64)).astype(dtype).swapaxes(1, 2)
    expected = cuda_kernels.MLX_ROPE(x.astype(mx.float32), 64, **form)
    same(cuda_kernels.rope(x, 64, **form), expected, atol=1e-4 if dtype == mx.float32 else 0.02)


@on_cuda
@pytest.mark.parametrize("dtype,tolerance", [(mx.float32, 2e-4), (mx.bfloat16, 0.15)])
def test_a_rollout_has_the_log_probs_of_a_full_forward(dtype, tolerance):
    model = tiny_model("qwen3", head_dim=32, hidden_size=64)
    model.set_dtype(dtype)
    decoder = cuda_decoding.fast_decoder(model)
    assert type(decoder) is cuda_decoding.CompiledDecoder
    rollout = roll(model, g=5, tokens=80, decoder=decoder)
    for n, (ids, logps) in enumerate(zip(ids_of(rollout), logps_of(rollout))):
        np.testing.assert_allclose(logps, full_logps(model, PROMPTS[n // 5], ids), atol=tolerance)
