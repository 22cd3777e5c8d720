"""A run's memory by arithmetic, the settings that fit smaller machines, and the plan that is printed.

The peak is what stays (weights, optimizer, reference) plus the larger of what rollout and update add to it.
"""

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_grpo.update.adapters import adapter_layers
from mlx_grpo.update.micro_batches import grid
from mlx_grpo.update.compiled_shapes import HOST_BYTES_A_LAYER
from mlx_grpo.rollout.kv_cache import kv_bytes_per_token
from mlx_grpo.backends.device import memory_bytes, on_cpu, on_cuda, queued_bytes
from mlx_grpo.backends.streams import stream_count
from mlx_grpo.errors import UserError
from mlx_grpo.export import merged_bytes
from mlx_grpo.settings import doubts

GB = 2**30
LESS_MEMORY = (
    "Lower micro_batch_tokens, memory_limit_gb or kv_budget_gb, or set grad_checkpoint to true; "
    "with --resume too, by --set"
)


@dataclass(frozen=True)
class Work:
    """What decides the memory of a run. Sizes in bytes, lengths in tokens."""

    weights: int  # of the model as it is loaded
    trained: int  # parameters that are trained: numbers, not bytes
    item: int  # bytes of one weight or activation
    hidden: int
    wide: int  # width of the feed-forward layer
    scores: int  # numbers a position and key that attention keeps for its backward pass; 0 where it is fused
    layers: int
    vocabulary: int
    kv_per_token: int  # KV cache of one position of one row, over all layers
    rows: int  # completions an update
    generations: int  # of them a prompt
    shares_prompts: bool  # a group's prompt is computed once
    shares_padded: bool  # and counted once when an update is split into micro-batches
    prompt: int  # the longest prompt
    completion: int  # the longest completion
    has_reference: bool  # a frozen copy beside the policy
    micro_batch_tokens: int
    grad_checkpoint: bool
    head_chunk: int  # logits alive at once in a stream's head
    streams: int  # parts of an update that are worked on side by side, within micro_batch_tokens together
    kv_budget: int
    ahead: int  # buffers that queued GPU work may keep alive
    memory_limit: int  # above this, MLX waits for queued work
    compiled: int = 0  # shapes that are compiled at once, at most
    merging: int = 0  # what the final save merges adapters in


def plan(work: Work) -> dict[str, int]:
    """Bytes by purpose, and their "peak".

    A layer keeps for its backward pass, of each position, about 8 numbers of the hidden width, 3 of the
    feed-forward width (a SwiGLU layer: its two inputs and its product), and unfused attention its scores
    twice. With gradient checkpointing it keeps its input alone, and one layer at a time is computed again. A
    shared prompt's KV is kept once a row. The peak of an update is where the head has all of that before it
    and no gradient but its own, or where the last layer's gradients are computed, or in the optimizer's step.
    """
    length = work.prompt + work.completion
    groups = work.rows // work.generations
    answered = work.generations * work.completion  # positions of a group
    group = answered + work.prompt * (1 if work.shares_prompts else work.generations)
    counted = answered + work.prompt * (1 if work.shares_padded else work.generations)
    rounds = math.ceil(groups * counted / work.micro_batch_tokens)
    together = min(math.ceil(groups / rounds), work.micro_batch_tokens // counted)  # groups; 0: not even one
    positions = together * group or max(work.micro_batch_tokens, length)
    answers = positions * answered // group
    layer = positions * work.item * (8 * work.hidden + 3 * work.wide + work.scores * length)
    kept = work.layers * (positions * work.item * work.hidden if work.grad_checkpoint else layer)
    prefixes = work.kv_per_token * work.prompt * (answers // work.completion) if work.shares_prompts else 0
    masters = work.trained * 4 if work.item < 4 else 0
    parts = {
        "weights": work.weights,
        "optimizer": work.trained * 8 + masters,
        "reference": work.trained * work.item if work.has_reference else 0,
        "KV cache": min(work.rows * length * work.kv_per_token, work.kv_budget),
        "gradients": work.trained * work.item * work.streams,
        "their sum": work.trained * 4 if rounds > 1 else 0,
        "activations": kept + prefixes,
        "head": 5 * 4 * min(work.head_chunk * work.streams, answers * work.vocabulary),
    }
    stays = parts["weights"] + parts["optimizer"] + parts["reference"]
    rollout = parts["KV cache"] * 3 // 2  # a cache that grows is copied
    head_gradient = min(parts["gradients"], work.vocabulary * work.hidden * work.item * work.streams)
    at_head = parts["activations"] + parts["head"] + head_gradient
    # Activations are freed as gradients come. The factors of a layer's gradients, and of what is computed
    # again for them, are measured.
    at_layers = max(parts["activations"], parts["gradients"]) + layer * (3 if work.grad_checkpoint else 1)
    update = parts["their sum"] + max(at_head, at_layers)
    passing = work.layers * layer * 3 // 5  # what a forward computes and does not keep, as measured
    parts["in flight"] = max(0, min(work.ahead, passing, work.memory_limit - stays - update))
    step = work.trained * (work.item + 7)  # AdamW's numbers in float32 on their way, as measured
    parts["final save"] = work.merging
    return {**parts, "peak": stays + max(rollout, update + parts["in flight"], step, work.merging)}


def suggestions(work: Work, sizes=(8, 16, 32, 64), share: float = 0.7) -> list[str]:
    """For each machine size in GB, the mildest change of settings whose peak fits `share` of its memory."""
    # Adapters of rank 8 have about a hundredth of the parameters.
    adapters = replace(work, trained=max(1, work.trained // 100), has_reference=False)
    ladder = [
        replace(
            base, grad_checkpoint=checkpoint, micro_batch_tokens=max(1, work.micro_batch_tokens // divisor)
        )
        for base, checkpoint, divisor in itertools.product(
            (work, adapters), sorted({work.grad_checkpoint, True}), (1, 2, 4, 8)
        )
    ]
    lines = []
    for size in sizes:
        fits = {
            "kv_budget": min(work.kv_budget, size * GB // 4),
            "memory_limit": min(work.memory_limit, size * GB // 2),
        }
        peaks = [plan(replace(step, **fits))["peak"] + host_bytes(step) for step in ladder]
        step, peak = next(
            ((step, peak) for step, peak in zip(ladder, peaks) if peak <= share * size * GB), (None, 0)
        )
        if step is None:
            lines.append(
                f"{size} GB: too small for this model; quantise it (utils/convert_model.py --quantize), or "
                "take a smaller one"
            )
            continue
        changes = {
            "fine_tune_type=lora": step.trained != work.trained,
            "grad_checkpoint=true": step.grad_checkpoint != work.grad_checkpoint,
            f"micro_batch_tokens={step.micro_batch_tokens}": step.micro_batch_tokens
            != work.micro_batch_tokens,
        }
        settings = " ".join(f"--set {change}" for change, made in changes.items() if made) or "as it is"
        lines.append(f"{size} GB: {settings} (about {peak / GB:.1f} GB)")
    return lines


def host_bytes(work: Work) -> int:
    """What compiled shapes take of the host's memory: not MLX's, and so not in its peak."""
    return work.compiled * work.layers * HOST_BYTES_A_LAYER


def work_of(learner, lengths: set[int], rows: int, compiled: int = 0) -> Work:
    """What the memory plan counts with.

    lengths: of all prompts, in tokens; rows: completions an update on this rank; compiled: most shapes at
    once.
    """
    config, model, log_probs = learner.config, learner.model, learner.log_probs
    args = model.args
    arrays = [p for _, p in tree_flatten(model.parameters())]
    hidden = getattr(args, "hidden_size", 1024)
    item = 2 if any(p.dtype in (mx.bfloat16, mx.float16) for p in arrays) else 4
    times_kept = 0 if on_cuda() else 1.5 if on_cpu() else 2  # on CPUs as measured
    return Work(
        weights=sum(p.nbytes for p in arrays),
        trained=sum(p.size for _, p in tree_flatten(model.trainable_parameters())),
        item=item,
        hidden=hidden,
        wide=getattr(args, "intermediate_size", 4 * hidden),
        scores=int(times_kept * getattr(args, "num_attention_heads", 16)),
        layers=len(model.layers),
        vocabulary=getattr(args, "vocab_size", 1),
        kv_per_token=kv_bytes_per_token(model),
        rows=rows,
        generations=config.num_generations,
        shares_prompts=log_probs.shares_padded or log_probs.share_prompts and len(lengths) == 1,
        shares_padded=log_probs.shares_padded,
        prompt=grid(max(lengths)),
        completion=grid(config.rollout_tokens),
        has_reference=learner.ref_log_probs is not None and not adapter_layers(model),
        micro_batch_tokens=config.micro_batch_tokens,
        grad_checkpoint=config.grad_checkpoint,
        head_chunk=learner.head_chunk,
        streams=stream_count(),
        kv_budget=int(config.kv_budget_gb * GB) or memory_bytes() // 4,
        ahead=queued_bytes(),
        memory_limit=learner.memory_limit,
        compiled=compiled,
        merging=merged_bytes(model),
    )


def print_plan(
    work: Work, config, training: int, held_out: int, updates: int, ranks: int, ways: Sequence[str] = ()
) -> None:
    """What the run will do, and hold. ways: lines that say how (ways.py).

    Raises UserError where several ranks cannot hold it.
    """
    prompts = config.prompts_per_update
    rows = prompts * config.num_generations
    print(
        f"model      {config.model_name}: {work.trained / 1e6:.2f}M trainable parameters, on "
        f"{mx.default_device()}"
    )
    for line in ways:
        print(line)
    print(f"data       {training} training prompts, {held_out} held-out")
    print(f"updates    {updates} of {prompts} prompts x {config.num_generations} completions")
    print(f"tokens     at most {rows * config.rollout_tokens * updates // config.num_iterations:,} sampled")
    if ranks > 1:
        print(
            f"ranks      {ranks}, each with the whole model and its share of the prompts: the memory below "
            "is one rank's"
        )
    held = {name: size / GB for name, size in plan(work).items()}
    if held["peak"] * GB + (0 if on_cuda() else host_bytes(work)) > memory_bytes():
        print(
            f"Warning: memory may not suffice: about {held['peak']:.1f} GB at the peak of "
            f"{memory_bytes() / GB:.1f} GB. {LESS_MEMORY}",
            file=sys.stderr,
        )
    if ranks > 1 and held["weights"] + held["optimizer"] > memory_bytes() / GB:
        raise UserError(
            "The model does not fit one rank: weights and optimizer take "
            f"{held['weights'] + held['optimizer']:.1f} GB of "
            f"{memory_bytes() / GB:.1f} GB, and ranks hold the whole model. Train adapters, quantise it, or "
            "take a smaller one"
        )
    for doubt in doubts(config):
        print(f"Warning: {doubt}", file=sys.stderr)
    print(
        f"memory     about {held.pop('peak'):.2f} GB at the peak: "
        + ", ".join(f"{n} {v:.2f}" for n, v in held.items() if v > 0.005)
    )
    if work.compiled:
        print(
            f"host       about {host_bytes(work) / GB:.2f} GB more, of the host's, for at most "
            f"{work.compiled} compiled shapes"
        )
