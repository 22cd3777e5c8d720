"""SwiGLU with its own backward pass, used instead of mlx-lm's by the models that call that."""

import sys
from functools import partial

import mlx.core as mx

from mlx_grpo.update.fused_head import sigmoid


@mx.custom_function
@partial(mx.compile, shapeless=True)
def swiglu(gate, x):
    """silu(gate) * x (arXiv 2002.05202, eq. 5), of any shape.

    For its backward pass it keeps its two inputs, and nothing computed from them.
    """
    return gate * sigmoid(gate) * x


@partial(mx.compile, shapeless=True)
def gradients(gate, x, cotangent):
    share = sigmoid(gate)
    scaled = cotangent * share
    return scaled * x * (1 + gate * (1 - share)), scaled * gate


@swiglu.vjp
def swiglu_vjp(primals, cotangent, output):
    # Wait for the cotangent: else compilation would share the forward pass's sigmoid, and keep it alive.
    return gradients(*mx.depends(list(primals), [cotangent]), cotangent)


def use_swiglu(model) -> None:
    """Have the code of the model's layers, where it calls mlx-lm's swiglu, call this one."""
    from mlx_lm.models import activations

    for name in {type(module).__module__ for module in model.modules()}:
        code = sys.modules.get(name)
        if getattr(code, "swiglu", None) is activations.swiglu:
            code.swiglu = swiglu
