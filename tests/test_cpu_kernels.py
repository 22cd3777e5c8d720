"""What stands in the place of mx.fast on a CPU gives its results, and its gradients."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_grpo.backends import cpu_kernels
import mlx_grpo  # noqa: F401  puts them there

pytestmark = pytest.mark.skipif(mx.default_device() == mx.gpu, reason="a GPU has its own")


def same(ours, theirs, *arrays):
    """Values and gradients of the two functions of `arrays`."""
    results = [mx.value_and_grad(lambda *a: (f(*a) ** 3).sum(), tuple(range(len(arrays))))(*arrays) for f in (ours, theirs)]  # noqa: B023
    for a, b in zip(*([np.array(x) for x in (value, *gradients)] for value, gradients in results)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["none", "causal", "boolean", "rows", "added"])
@pytest.mark.parametrize("heads,keys,length,size", [(4, 2, 5, 9), (4, 4, 1, 7), (8, 2, 6, 6)])
def test_attention_is_mlxs(kind, heads, keys, length, size):
    q, k, v = (mx.random.normal((2, h, n, 8)) for h, n in ((heads, length), (keys, size), (keys, size)))
    seen = (mx.random.uniform(shape=(2, 1, length, size)) > 0.3) | (mx.arange(size) == 0)
    mask = {"none": None, "causal": "causal", "boolean": seen[0, 0], "rows": seen, "added": mx.random.normal((length, size))}[kind]
    ours, theirs = (lambda *a, f=f: f(*a, scale=0.3, mask=mask) for f in (cpu_kernels.attention, cpu_kernels.MLX_ATTENTION))
    same(ours, theirs, q, k, v)


@pytest.mark.parametrize("offset", [0, 3, mx.array(5), mx.array([4]), mx.array([2, 7])])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_rope_is_mlxs(offset, scale):
    form = {"traditional": False, "base": 10000.0, "scale": scale, "offset": offset}
    for length in (1, 6):
        x = mx.random.normal((2, 3, length, 16))
        same(lambda x: cpu_kernels.rope(x, 16, **form), lambda x: cpu_kernels.MLX_ROPE(x, 16, **form), x)


def test_other_forms_go_to_mlx():
    x = mx.random.normal((1, 2, 3, 16))
    for form in ({"dims": 8}, {"traditional": True}, {"base": None, "freqs": mx.arange(1.0, 9.0)}):
        form = {"dims": 16, "traditional": False, "base": 100.0, "scale": 1.0, "offset": 2, **form}
        assert mx.array_equal(cpu_kernels.rope(x, **form), cpu_kernels.MLX_ROPE(x, **form))
    half = x.astype(mx.float16)
    assert cpu_kernels.attention(half, half, half, scale=1.0).dtype == mx.float16


def test_models_use_them():
    assert mx.fast.rope is cpu_kernels.rope and mx.fast.scaled_dot_product_attention is cpu_kernels.attention
