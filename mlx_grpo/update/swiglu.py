"""SwiGLU with a backward pass of its own, in the place of mlx-lm's in the models that call it."""

import sys
from functools import partial

import mlx.core as mx

from mlx_grpo.update.fused_head import sigmoid


@mx.custom_function
@partial(mx.compile, shapeless=True)
def swiglu(gate, x):
    """silu(gate) * x (arXiv 2002.05202, eq. 5), of any shape; for its backward pass it keeps these two, and
    nothing computed from them.
    """
    return gate * sigmoid(gate) * x


@partial(mx.compile, shapeless=True)
def gradients(gate, x, cotangent):
    share = sigmoid(gate)
    scaled = cotangent * share
    return scaled * x * (1 + gate * (1 - share)), scaled * gate


@swiglu.vjp
def swiglu_vjp(primals, cotangent, output):
    # They wait for the cotangent: else compilation takes the sigmoid from the forward pass, and keeps it for
    # that.
    return gradients(*mx.depends(list(primals), [cotangent]), cotangent)


def use_swiglu(model) -> None:
    """Have the code of the model's layers, where it calls mlx-lm's swiglu, call this one."""
    from mlx_lm.models import activations

    for name in {type(module).__module__ for module in model.modules()}:
        code = sys.modules.get(name)
        if getattr(code, "swiglu", None) is activations.swiglu:
            code.swiglu = swiglu
