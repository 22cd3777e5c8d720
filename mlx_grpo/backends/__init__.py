"""What differs by hardware.

A program calls `use_fast_backend` before it imports MLX; importing this changes nothing.
"""

import os

from mlx_grpo.backends.blas import load_blas


def use_fast_backend() -> None:
    """Make MLX fast on this machine, for the whole process. To be called before `import mlx.core`.

    On Linux CPUs a fast BLAS is loaded; environment variables tell MLX how much to queue.
    """
    load_blas()
    import mlx.core as mx

    if mx.default_device() == mx.cpu:
        # One evaluation takes turns among the operations of all streams, within this width. The default of 20
        # is narrower than one stream's.
        os.environ.setdefault("MLX_BFS_MAX_WIDTH", "100000")
    else:  # only CUDA reads it: MB of arrays a command buffer may use; ten such buffers are queued
        os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "400")
