"""SwiGLU in mlx-lm's place: its values, its gradients, and less memory."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import activations, llama

import mlx_grpo
from mlx_grpo.update import swiglu


def written_out(gate, x):
    return gate * mx.sigmoid(gate) * x


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)])
def test_values_and_gradients_are_those_written_out(shape):
    gate, x, weight = (3 * mx.random.normal(shape) for _ in range(3))
    results = [mx.value_and_grad(lambda g, x: (weight * f(g, x)).sum(), (0, 1))(gate, x) for f in (swiglu.swiglu, written_out)]  # noqa: B023
    for ours, theirs in zip(*([value, *gradients] for value, gradients in results)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_far_values_give_no_nan():
    gate = mx.array([-1e30, -1000.0, -90.0, 0.0, 90.0, 1000.0])
    value, gradients = mx.value_and_grad(lambda g, x: swiglu.swiglu(g, x).sum(), (0, 1))(gate, mx.ones(6))
    assert value.item() == pytest.approx(1090)
    np.testing.assert_allclose(gradients[0], [0, 0, 0, 0.5, 1, 1], atol=1e-30)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_stays(dtype):
    gate, x = (mx.random.normal((64,)).astype(dtype) for _ in range(2))
    value, gradients = mx.value_and_grad(lambda g, x: swiglu.swiglu(g, x).sum(), (0, 1))(gate, x)
    exact = mx.grad(lambda g, x: written_out(g, x).sum(), (0, 1))(gate.astype(mx.float32), x.astype(mx.float32))
    assert value.dtype == gradients[0].dtype == gradients[1].dtype == dtype
    for ours, theirs in zip(gradients, exact):
        np.testing.assert_allclose(ours.astype(mx.float32), theirs, atol=3e-2)


def test_a_model_that_is_opened_uses_it(monkeypatch):
    model = mlx_grpo.open_model("starter/model")[0]
    assert llama.swiglu is swiglu.swiglu
    ids = mx.arange(40)[None]
    ours = model(ids)
    monkeypatch.setattr(llama, "swiglu", activations.swiglu)
    np.testing.assert_allclose(ours, model(ids), rtol=1e-4, atol=1e-4)


def peak(function):
    """Bytes that the compiled gradient of eight in a row takes."""

    def loss(gate, x):
        for _ in range(8):
            gate = function(gate, x)
        return gate.sum()

    gradient = mx.compile(mx.grad(loss, (0, 1)))
    arrays = mx.ones((256, 256)), mx.ones((256, 256))
    mx.eval(arrays)
    before = mx.get_active_memory()  # other tests' models too
    mx.reset_peak_memory()
    limit = mx.set_memory_limit(1)  # nothing is begun before what is under way has ended
    mx.eval(gradient(*arrays))
    mx.set_memory_limit(limit)
    return mx.get_peak_memory() - before


@pytest.mark.skipif(mx.default_device() == mx.gpu, reason="a GPU frees memory behind its work; utils/benchmark.py memory measures there")
def test_less_is_kept_for_the_backward_pass():
    assert peak(swiglu.swiglu) < 0.85 * peak(written_out)
