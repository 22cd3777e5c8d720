#!/usr/bin/env python3
"""Measure how rollout and training speed grow with the ranks: one row of a table, for the ranks started.

The model has random weights and no completion ends early, so that every number of ranks does the same work.
--prompts are those of all ranks together: keep it for strong scaling, multiply it by the ranks for weak.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import fmean, median

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from mlx_grpo.backends import use_fast_backend  # noqa: E402

if __name__ == "__main__":
    use_fast_backend()  # ahead of MLX: the first BLAS that is loaded is the one that it uses

from benchmark import (
    PRESETS,
    add_sizes,
    cache_folder,
    machine,
    model_folder,
    on_gpu,
    print_table,
    questions,
    write_work,
)  # noqa: E402
from inference import exit_status  # noqa: E402
import mlx.core as mx  # noqa: E402
import mlx_grpo  # noqa: E402
from mlx_grpo.run.distributed import Ranks, start_ranks  # noqa: E402
from mlx_grpo.run.directory import complete_or_absent  # noqa: E402

EXAMPLES = """examples:
  uv run python utils/scaling.py
  uv run mlx.launch -n 2 -- python utils/scaling.py
  uv run mlx.launch -n 4 --backend nccl -- python utils/scaling.py --preset 1.5b --set fine_tune_type=lora"""


def work_folder(args: argparse.Namespace) -> Path:
    """The prompts and the reward of this work, made once a machine and kept in the cache."""
    from mlx_lm.utils import load_tokenizer

    model = model_folder(args.preset)
    folder = cache_folder() / f"scaling-{args.preset}-{args.prompts}x{args.prompt_tokens}"
    if not folder.is_dir():
        texts = questions(load_tokenizer(model), [args.prompt_tokens] * args.prompts)
        with complete_or_absent(folder) as aside:
            write_work(aside, texts)
    return folder


def speeds(found: list[dict]) -> list[str]:
    """Medians over the updates: tokens/s of rollout and training; seconds of an update and of these two."""
    rates = [median(r[name] for r in found) for name in ("rollout_tokens_per_s", "train_tokens_per_s")]
    seconds = [median(r[name] for r in found) for name in ("wall", "seconds/rollout", "seconds/train")]
    return [*(f"{rate:,.0f}" for rate in rates), *(f"{value:.3f}" for value in seconds)]


def shares(found: list[dict]) -> list[str]:
    """Medians over the updates: the shares of communication, the ranks' mean wait and the longest wait."""
    parts = []  # fractions, an update each
    for record in found:
        waits = record.get("wait_by_rank", [0.0])
        seconds = (record.get("communication_time", 0.0), fmean(waits), max(waits))
        parts.append([second / record["wall"] for second in seconds])
    return [f"{100 * median(part):.1f}%" for part in zip(*parts)]


def measure(args: argparse.Namespace, ranks: Ranks) -> None:
    for turn in range(ranks.size):  # one after the other: ranks of one machine share its cache
        if turn == ranks.rank:
            folder = work_folder(args)
        ranks.gather(None)
    config = mlx_grpo.load_config(None, [
        f"model_name={model_folder(args.preset)}", f"dataset={folder}",
        f"reward_funcs=['{folder}/rewards.py:alternate']", "system_prompt=",
        f"batch_size={args.prompts}", f"num_generations={args.completions}",
        f"max_completion_length={args.tokens}", f"max_prompt_length={args.prompt_tokens}",
        "stop_strings=[]", "num_epochs=1000", "lr_scheduler_type=constant",
        "log_completions_steps=0", "log_jsonl=false", "check_weights_steps=0", *args.set,
    ])  # fmt: skip
    trainer = mlx_grpo.MLXGRPOTrainer(config, folder, ranks)
    trainer.tokenizer.eos_token_ids = set()
    found = []
    for _ in range(args.repeats + 1):  # the first compiles
        ranks.gather(None)
        start = time.perf_counter()
        record = trainer.train_step()[-1]
        ranks.gather(None)
        found.append({**record, "wall": time.perf_counter() - start})
    found = found[1:]
    trainer.files.check_weights(trainer.state)
    peaks = ranks.gather(mx.get_peak_memory() / 2**30)

    trained = sum(p.size for p in mlx_grpo.trainable_arrays(trainer.model).values())
    print(
        f"{args.preset}, {trained / 1e6:.1f}M trained; {args.prompts} prompts of {args.prompt_tokens} tokens "
        f"x {args.completions} completions of {args.tokens}, over all ranks; median of {args.repeats}\n"
        f"{machine()}\n"
    )
    print_table([
        ["ranks", "rollout, tokens/s", "training, tokens/s", "update, s", "rollout, s", "training, s",
         "communication", "wait, mean", "wait, most", "peak, GB"],
        [str(ranks.size), *speeds(found), *shares(found), f"{max(peaks):.2f}"],
    ])  # fmt: skip


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    gpu = on_gpu()
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="0.5b" if gpu else "tiny",
        help="the model's shape (default: 0.5b on a GPU, else tiny)",
    )
    add_sizes(
        parser,
        ("--prompts", 32 if gpu else 4, "prompts an update, over all ranks"),
        ("--completions", 8, "completions a prompt"),
        ("--prompt-tokens", 125, "tokens a prompt"),
        ("--tokens", 256 if gpu else 64, "tokens a completion"),
        ("--repeats", 5, "measurements; the median counts"),
    )
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="a setting of mlx-grpo.py; repeatable"
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    with start_ranks(mlx_grpo.load_config(None, args.set).distributed_timeout) as ranks:
        measure(args, ranks)


def main(argv: list[str] | None = None) -> int:
    return exit_status(lambda: run(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
