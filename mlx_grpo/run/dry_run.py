"""A run tried before its first update: --dry-run, and the probe of its largest batch."""

import dataclasses
import math
from types import SimpleNamespace

import mlx.core as mx

from mlx_grpo.update.micro_batches import bucket
from mlx_grpo.run.memory_plan import suggestions, work_of
from mlx_grpo.errors import RunError


def dry_run(trainer) -> None:
    """One tiny rollout, its rewards, and one backward pass; nothing is written and no weight changes."""
    whole = trainer.config
    trainer.config = dataclasses.replace(whole, max_completion_length=min(16, whole.rollout_tokens), max_new_tokens=0)
    trainer.build_step()
    groups = trainer.sample_groups(trainer.ranks.size, dict.fromkeys(("rollout", "reward"), 0.0))
    norm = trainer.trial_gradient(groups)
    if not math.isfinite(norm):
        raise RunError("NaN gradient encountered: in the first backward pass; load the model in float32, or check its weights")
    trainer.config = whole
    print("to fit     " + "\n           ".join(suggestions(work_of(trainer))))
    print(f"dry run    {sum(map(len, groups[0].completions))} tokens sampled, one backward pass (gradient norm {norm:.3g}): all well")


def probe_memory(trainer) -> None:
    """One gradient at the largest micro-batch there can be: memory that will not suffice fails here, not in the night."""
    g, length = trainer.config.num_generations, trainer.config.rollout_tokens
    longest = max((row["prompt_ids"] for row in trainer.rows), key=len)
    prompt = [0] * (bucket(len(longest)) - len(longest)) + longest  # as padded ones are
    group = SimpleNamespace(prompt=prompt, completions=[[0] * length] * g, sampler_logps=[[0.0] * length] * g, finish_reasons=["eos"] * g)
    mx.eval(trainer.optimizer.state)
    # Said first: where memory is short, Linux ends the process without another word.
    print(f"probe      the longest batch, {len(longest)} + {length} tokens a row: ", end="", flush=True)
    trainer.trial_gradient([group] * trainer.prompts_per_update)
    print(f"{mx.get_peak_memory() / 2**30:.2f} GB at the peak", flush=True)
