"""Linear layers, attention and rotary embeddings of one position of each row, for CUDA.

The few rows of a decoded position take the GPU less time than the host needs to launch MLX's kernels, so
fewer launches are faster. A decoder uses these instead of nn.Linear and mx.fast; what they do not cover goes
to MLX. They have no gradient. Results equal MLX's up to rounding: both sum in float32.
"""

import functools
import math
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from mlx_grpo.backends.device import on_cuda

MLX_ATTENTION, MLX_ROPE, MLX_LINEAR = mx.fast.scaled_dot_product_attention, mx.fast.rope, nn.Linear.__call__
# Layers that read the same input, by the names that models give them.
ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
HALVES = {mx.bfloat16: "bf16", mx.float16: "f16"}  # PTX's names
# Numbers that the blocks of a launch read, at most. More take the GPU longer than the host needs to launch
# MLX's own kernels, and then these gain nothing.
MOST_READS = 2**26

# A block has 32 rows and 16 columns of the result of one LAYER, and each of its W warps every W-th 32 of the
# K inputs. A thread reads 16 bytes of a row or column at once, two products' worth: the order of the inputs
# within 32 is free, if it is one for both.
LINEAR = """
  constexpr int R = 32, C = 16;
  __shared__ float sums[W][R][C];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, part = lane % 4;
  const int K = weight0_shape[1], row = blockIdx.y * R;
  int M = 1, column = blockIdx.x * C;
  for (int i = 0; i < x_ndim - 1; i++) M *= x_shape[i];
  LAYER
  const uint4 *rows[R / 8], *columns[C / 8];
  #pragma unroll
  for (int i = 0; i < R / 8; i++)
    rows[i] = (const uint4*)(x + (size_t)min(row + i * 8 + group, M - 1) * K) + part;
  #pragma unroll
  for (int j = 0; j < C / 8; j++)
    columns[j] = (const uint4*)(weight + (size_t)(column + j * 8 + group) * K) + part;
  float c[R / 16][C / 8][4] = {};
  #pragma unroll (32 / W)
  for (int k = warp; k < K / 32; k += W) {
    uint4 a[R / 8], b[C / 8];
    #pragma unroll
    for (int j = 0; j < C / 8; j++) b[j] = columns[j][k * 4];
    #pragma unroll
    for (int i = 0; i < R / 8; i++) a[i] = rows[i][k * 4];
    #pragma unroll
    for (int i = 0; i < R / 16; i++)
      #pragma unroll
      for (int j = 0; j < C / 8; j++) {
        multiply(c[i][j], a[2 * i].x, a[2 * i + 1].x, a[2 * i].y, a[2 * i + 1].y, b[j].x, b[j].y);
        multiply(c[i][j], a[2 * i].z, a[2 * i + 1].z, a[2 * i].w, a[2 * i + 1].w, b[j].z, b[j].w);
      }
  }
  #pragma unroll
  for (int i = 0; i < R / 16; i++)
    #pragma unroll
    for (int j = 0; j < C / 8; j++)
      #pragma unroll
      for (int e = 0; e < 4; e++)
        sums[warp][i * 16 + e / 2 * 8 + group][j * 8 + part * 2 + e % 2] = c[i][j][e];
  __syncthreads();
  for (int i = threadIdx.x; i < R * C && row + i / C < M; i += W * 32) {
    float sum = bias ? (float)bias[column + i % C] : 0;
    #pragma unroll
    for (int w = 0; w < W; w++) sum += sums[w][i / C][i % C];
    out[(size_t)(row + i / C) * N + column + i % C] = sum;
  }
"""
MULTIPLY = """
__device__ inline void multiply(
    float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.HALF.HALF.f32 "
    "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
"""

# A block has the G queries of one key head of one row. D / 8 threads have a position, 8 of its D numbers
# each, and keep running sums over the positions they have had (online softmax, arXiv 1805.02867), which are
# merged at the end.
ATTENTION = """
  constexpr int L = D / 8, P = 32 / L, W = 8;
  __shared__ float sums[W][G][D], tops[W][G], totals[W][G];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = lane % L, position = lane / L;
  const int S = keys_shape[2], heads = keys_shape[1], n = blockIdx.x / heads, h = blockIdx.x % heads;
  float query[G][8], sum[G][8] = {}, top[G], total[G] = {};
  #pragma unroll
  for (int g = 0; g < G; g++) {
    unpack(query[g], queries + n * queries_strides[0] + (h * G + g) * queries_strides[1] + part * 8);
    #pragma unroll
    for (int d = 0; d < 8; d++) query[g][d] *= SCALE;
    top[g] = -INFINITY;
  }
  const auto* key_at = keys + n * keys_strides[0] + h * keys_strides[1] + part * 8;
  const auto* value_at = values + n * values_strides[0] + h * values_strides[1] + part * 8;
  #pragma unroll 2
  for (int first = warp * P; first < S; first += W * P) {
    const int s = min(first + position, S - 1);
    const bool seen = first + position < S && SEEN;
    if (!__any_sync(~0u, seen)) continue;  // padding, or a buffer's end that is not filled yet
    float key[8], value[8];
    unpack(key, key_at + s * keys_strides[2]);
    unpack(value, value_at + s * values_strides[2]);
    #pragma unroll
    for (int g = 0; g < G; g++) {
      float score = 0;
      #pragma unroll
      for (int d = 0; d < 8; d++) score += query[g][d] * key[d];
      #pragma unroll
      for (int step = 1; step < L; step *= 2) score += __shfl_xor_sync(~0u, score, step);
      const float now = fmaxf(top[g], seen ? score : -1e30f), fade = exp2f(top[g] - now);
      const float weight = seen ? exp2f(score - now) : 0;
      top[g] = now;
      total[g] = total[g] * fade + weight;
      #pragma unroll
      for (int d = 0; d < 8; d++) sum[g][d] = sum[g][d] * fade + weight * value[d];
    }
  }
  #pragma unroll
  for (int g = 0; g < G; g++) {
    float now = fmaxf(top[g], -1e30f);  // of threads that had no position too
    #pragma unroll
    for (int step = L; step < 32; step *= 2) now = fmaxf(now, __shfl_xor_sync(~0u, now, step));
    const float fade = exp2f(top[g] - now);
    total[g] *= fade;
    #pragma unroll
    for (int step = L; step < 32; step *= 2) total[g] += __shfl_xor_sync(~0u, total[g], step);
    if (lane == 0) tops[warp][g] = now, totals[warp][g] = total[g];
    #pragma unroll
    for (int d = 0; d < 8; d++) {
      sum[g][d] *= fade;
      #pragma unroll
      for (int step = L; step < 32; step *= 2) sum[g][d] += __shfl_xor_sync(~0u, sum[g][d], step);
      if (position == 0) sums[warp][g][part * 8 + d] = sum[g][d];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < G * D; i += W * 32) {
    const int g = i / D, d = i % D;
    float now = tops[0][g], whole = 0, mean = 0;
    for (int w = 1; w < W; w++) now = fmaxf(now, tops[w][g]);
    for (int w = 0; w < W; w++) {
      const float fade = exp2f(tops[w][g] - now);
      whole += totals[w][g] * fade;
      mean += sums[w][g][d] * fade;
    }
    out[(size_t)blockIdx.x * G * D + i] = mean / whole;
  }
"""
UNPACK = """
template <typename T> __device__ inline void unpack(float* to, const T* from) {
  uint4 packed[sizeof(T) / 2];  // 8 numbers; buffers of a cache, and their slices, are aligned
  #pragma unroll
  for (int i = 0; i < sizeof(T) / 2; i++) packed[i] = ((const uint4*)from)[i];
  #pragma unroll
  for (int i = 0; i < 8; i++) to[i] = (float)((const T*)packed)[i];
}
"""

# A thread has a pair of numbers.
ROPE = """
  const int at = blockIdx.x * blockDim.x + threadIdx.x, heads = x_shape[1];
  if (at >= x_shape[0] * heads * D / 2) return;
  const int pair = at % (D / 2), h = at / (D / 2) % heads, n = at / (D / 2) / heads;
  float sine, cosine;
  sincosf(OFFSET * SCALE * exp2f(-BASE * pair / (D / 2)), &sine, &cosine);
  const auto* from = x + n * x_strides[0] + h * x_strides[1];
  const float first = from[pair * x_strides[3]], second = from[(pair + D / 2) * x_strides[3]];
  const size_t to = (size_t)(n * heads + h) * D + pair;
  out[to] = first * cosine - second * sine;
  out[to + D / 2] = first * sine + second * cosine;
"""


@functools.cache
def has_tensor_cores() -> bool:
    """Whether this is a GPU that multiplies both half precisions: Ampere or later."""
    return on_cuda() and mx.device_info()["compute_capability_major"] >= 8


def cuda_kernel(name, inputs, outputs, source, constants, **options):
    """MLX's kernel of this source, with its constants as macros.

    MLX searches the source for the shapes and strides that it uses.
    """
    defined = "".join(f"#define {constant} {value}\n" for constant, value in constants.items())
    return mx.fast.cuda_kernel(name, inputs, outputs, defined + source, **options)


# --- Linear layers ------------------------------------------------------------------------------------------


@functools.cache
def linear_kernel(dtype, count: int, biased: bool, warps: int):
    numbers = range(count)
    biases = [f"bias{i}" if biased else "(decltype(weight0))nullptr" for i in numbers]
    layer = (
        f"int N = weight0_shape[0]; auto weight = weight0, bias = {biases[0]}; auto out = out0;"
        + "".join(
            f"if (column >= N) column -= N, N = weight{i}_shape[0], weight = weight{i}, "
            f"bias = {biases[i]}, out = out{i};"
            for i in numbers[1:]
        )
    )
    inputs = ["x", *(f"weight{i}" for i in numbers), *(f"bias{i}" for i in numbers if biased)]
    header = MULTIPLY.replace("HALF", HALVES[dtype])
    source = LINEAR.replace("LAYER", layer)
    return cuda_kernel(
        "few_rows_linear", inputs, [f"out{i}" for i in numbers], source, {"W": warps}, header=header
    )


class Linears:
    """What each of some linear layers gives for an input, from one launch for all of them.

    The first that is asked computes it. A model may ask in any order, leave one out, or give one another
    input.
    """

    def __init__(self, layers: list[nn.Linear]):
        self.layers = layers
        self.input = None  # the last one, while a layer has not taken its part of the result
        self.parts = {}  # the results of the layers that have not been asked yet, by number

    def __call__(self, number: int, x):
        if x is not self.input or number not in self.parts:
            self.input, self.parts = x, dict(enumerate(self.compute(x)))
        part = self.parts.pop(number)
        if not self.parts:
            self.input = None
        return part

    def compute(self, x) -> list:
        weights = [layer.weight for layer in self.layers]
        biases = [layer.bias for layer in self.layers if "bias" in layer]
        inputs = x.shape[-1]
        widths = [weight.shape[0] for weight in weights]
        across, down = sum(widths) // 16, -(-x.size // (32 * inputs))  # blocks
        if x.dtype != weights[0].dtype or across * down * (32 + 16) * inputs > MOST_READS:
            return [MLX_LINEAR(layer, x) for layer in self.layers]
        warps = 16 if across <= 128 else 8  # a processor has one block, or several
        return linear_kernel(x.dtype, len(weights), bool(biases), warps)(
            inputs=[x, *weights, *biases],
            output_shapes=[(*x.shape[:-1], width) for width in widths],
            output_dtypes=[x.dtype] * len(widths),
            grid=(across * warps * 32, down, 1),
            threadgroup=(warps * 32, 1, 1),
        )


def form(layer) -> tuple:
    """What linear layers of one launch have in common."""
    return layer.weight.shape[1], layer.weight.dtype, "bias" in layer


def fits(layer) -> bool:
    if type(layer) is not nn.Linear or layer.weight.dtype not in HALVES:
        return False
    width, inputs = layer.weight.shape
    return width % 16 == inputs % 32 == 0


def launches(model) -> dict[int, tuple[Linears, int]]:
    """The launch that computes each linear layer of a model, and its number there, by the layer's id."""
    found = {}
    for module in model.modules() if has_tensor_cores() else []:
        children = {name: layer for name, layer in module.children().items() if fits(layer)}
        alone = [(name,) for name in children]
        for names in (*alone, *ONE_INPUT):  # a shared launch, coming later, replaces a layer's own
            layers = [children.get(name) for name in names]
            if None not in layers and len(set(map(form, layers))) == 1:
                launch = Linears(layers)
                found.update({id(layer): (launch, number) for number, layer in enumerate(layers)})
    return found


# --- Attention ----------------------------------------------------------------------------------------------


@functools.cache
def attention_kernel(dim: int, group: int, scale: float, masked: bool):
    constants = {
        "D": dim,
        "G": group,
        "SCALE": f"{scale * math.log2(math.e)!r}f",
        "SEEN": "mask[(mask_shape[0] > 1 ? n * mask_strides[0] : 0) + s * mask_strides[3]]"
        if masked
        else "true",
    }
    inputs = ["queries", "keys", "values"] + ["mask"] * masked
    return cuda_kernel(
        "few_rows_attention",
        inputs,
        ["out"],
        ATTENTION,
        constants,
        header=UNPACK,
        ensure_row_contiguous=False,
    )


def covers(queries, keys, values, *, scale, mask=None, sinks=None, **kwargs) -> bool:
    """Whether this is one position a row, in a shape that fits the kernel's registers and shared memory."""
    (rows, heads, length, dim), (_, key_heads, size, _) = queries.shape, keys.shape
    group = heads // key_heads
    if isinstance(mask, mx.array):
        mask_fits = mask.dtype == mx.bool_ and mask.shape in ((1, 1, 1, size), (rows, 1, 1, size))
    else:
        mask_fits = mask is None
    return (
        length == 1
        and dim in (32, 64, 128, 256)
        and group <= 8
        and group * dim <= 1024
        and values.shape == keys.shape
        and queries.dtype == keys.dtype == values.dtype
        and mask_fits
        and sinks is None
        and not kwargs
    )


def attention(queries, keys, values, *, scale, mask=None, **kwargs):
    """softmax(q k^T * scale) v -> (N, H, 1, D).

    queries: (N, H, 1, D); keys, values: (N, K, S, D); mask: booleans (N or 1, 1, 1, S).
    """
    if not covers(queries, keys, values, scale=scale, mask=mask, **kwargs):
        return MLX_ATTENTION(queries, keys, values, scale=scale, mask=mask, **kwargs)
    (rows, heads, _, dim), key_heads = queries.shape, keys.shape[1]
    return attention_kernel(dim, heads // key_heads, scale, mask is not None)(
        inputs=[queries, keys, values] if mask is None else [queries, keys, values, mask],
        output_shapes=[queries.shape],
        output_dtypes=[queries.dtype],
        grid=(rows * key_heads * 256, 1, 1),
        threadgroup=(256, 1, 1),
    )[0]


# --- Rotary embeddings --------------------------------------------------------------------------------------


@functools.cache
def rope_kernel(dim: int, base: float, scale: float, by_row: bool):
    constants = {
        "D": dim,
        "BASE": f"{math.log2(base)!r}f",
        "SCALE": f"{scale!r}f",
        "OFFSET": "offset[n]" if by_row else "offset[0]",
    }
    return cuda_kernel(
        "few_rows_rope", ["x", "offset"], ["out"], ROPE, constants, ensure_row_contiguous=False
    )


def rope(x, dims, *, traditional, base, scale, offset, freqs=None, **kwargs):
    """Rotary embedding of one position of each row, x (N, H, 1, D), the position an array: () or (N,)."""
    one = (
        x.ndim == 4
        and x.shape[2:] == (1, dims)
        and isinstance(offset, mx.array)
        and offset.shape in ((), x.shape[:1])
    )
    if traditional or freqs is not None or kwargs or not one:
        return MLX_ROPE(
            x, dims, traditional=traditional, base=base, scale=scale, offset=offset, freqs=freqs, **kwargs
        )
    return rope_kernel(dims, base, scale, offset.ndim == 1)(
        inputs=[x, offset],
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
        grid=(x.size // 2, 1, 1),
        threadgroup=(128, 1, 1),
    )[0]


# --- Using them ---------------------------------------------------------------------------------------------


@contextmanager
def fast_kernels(launches: dict, attention=attention):
    """Use these kernels while the graph of one position is built on CUDA.

    launches: the model's, by `launches`. attention: pass MLX's own for a model whose keys and values are not
    slices of a cache's buffers.
    """

    def linear(layer, x):
        launch, number = launches.get(id(layer), (None, 0))
        return launch(number, x) if launch else MLX_LINEAR(layer, x)

    before = mx.fast.scaled_dot_product_attention, mx.fast.rope, nn.Linear.__call__
    if has_tensor_cores():
        mx.fast.scaled_dot_product_attention, mx.fast.rope, nn.Linear.__call__ = attention, rope, linear
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention, mx.fast.rope, nn.Linear.__call__ = before


def attention_covers(model) -> bool:
    """Whether a position of the model asks for no attention but this one."""
    from mlx_lm.models.cache import make_prompt_cache

    covered = []

    def asked(*args, **kwargs):
        covered.append(covers(*args, **kwargs))
        return MLX_ATTENTION(*args, **kwargs)

    if not has_tensor_cores():
        return False
    with fast_kernels({}, asked):
        model(mx.zeros((1, 1), mx.int32), cache=make_prompt_cache(model))  # a graph that nothing evaluates
    return all(covered)
