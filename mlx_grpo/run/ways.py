"""Which code path a run's rollouts and updates take, and why: the plan's lines that name a slow path."""

from mlx_grpo.backends.cuda_decoding import FAST_AFTER, CompiledDecoder
from mlx_grpo.rollout.kv_cache import reason_not_to_pad
from mlx_grpo.update.compiled_shapes import MOST_SHAPES, compiling_pays, updates_to_earn_it
from mlx_grpo.update.shared_prompts import reason_not_to_share


def precision_way(model) -> str:
    """What is computed and saved in another precision than the model's own; empty where all is the same."""
    own = getattr(model, "own_precision", None)
    return (
        f"{own.half}; computed in float32, which is faster on this CPU, and saved in {own.half}"
        if own
        else ""
    )


def rollout_way(model, compiled: bool) -> str:
    """How prompts share a rollout's batches. compiled: whether a position is."""
    reason = reason_not_to_pad(model)
    together = (
        f"prompts of one length at a time, which is slow: {reason}"
        if reason
        else "prompts of different length together"
    )
    when = f"compiled once the run has decoded {FAST_AFTER:,} of them" if compiled else "not compiled"
    return f"{together}; a position is {when}"


def update_way(model, shares_padded: bool, use_compile: bool) -> str:
    """How an update computes prompts, and whether it is compiled.

    shares_padded: whether padded prompts are shared too.
    """
    if reason := reason_not_to_share(model):
        prompts = f"whole sequences, prompts computed once a row: {reason}"
    elif shares_padded:
        prompts = "a group's prompt computed once"
    else:
        prompts = (
            "a group's prompt computed once where those of a batch are equally long, else once a row "
            "(padding needs a mask, which is slow on CUDA)"
        )
    if not use_compile:
        return f"{prompts}; not compiled"
    if not compiling_pays():
        return f"{prompts}; not compiled, which earns too little on CPUs"
    return (
        f"{prompts}; a shape is compiled once it has come in {updates_to_earn_it()} updates, "
        f"{MOST_SHAPES} shapes at most"
    )


def plan_lines(learner, sampler, decoder) -> list[str]:
    """The plan's lines about a run's two halves. sampler: the model that samples."""
    rollout = rollout_way(sampler, isinstance(decoder, CompiledDecoder))
    update = update_way(learner.model, learner.log_probs.shares_padded, learner.config.use_compile)
    precision = precision_way(learner.model)
    return [
        *([f"precision  {precision}"] if precision else []),
        f"rollout    {rollout}",
        f"update     {update}",
    ]


def compiled_shapes(decoder, use_compile: bool, updates: int) -> int:
    """How many compiled shapes of rollouts and updates there may be at once in a run of so many updates."""
    update = use_compile and compiling_pays() and updates >= updates_to_earn_it()
    return MOST_SHAPES * (isinstance(decoder, CompiledDecoder) + update)
