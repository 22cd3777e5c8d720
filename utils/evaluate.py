#!/usr/bin/env python3
"""Score models on questions with checkable answers (exact match, pass@k, maj@k, rewards) and compare them.

Prompts, generation and grading are those of mlx-grpo.py, so that a score here and one in a training log mean
the same. The data is GSM8K, another hub dataset, a local file or folder, or a .txt file with one question a
line; a line may end in "#### answer", and lines without are answered and not graded.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import fmean

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from mlx_grpo.backends import use_fast_backend  # noqa: E402

if __name__ == "__main__":
    use_fast_backend()  # ahead of MLX: the first BLAS that is loaded is the one that it uses

from inference import Parser, exit_status, json_object  # noqa: E402
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
import mlx_grpo  # noqa: E402
from mlx_grpo.answers import cut_while_thinking, last_number, same_answer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

EXAMPLES = """examples:
  uv run python utils/evaluate.py --model starter/model outputs/quickstart/final --dataset starter/data
  uv run python utils/evaluate.py --model outputs/run/final --config configs/prod.toml \
--samples 8 --output answers.jsonl"""
BATCH = 256  # questions between two writes of --output
KINDS = ("strict", "lenient")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of the models, in the tables


# --- Statistics ---------------------------------------------------------------------------------------------


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that k of n answers, without replacement, hold a right one (Chen et al., 2107.03374, eq. 1)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def maj_at_k(answers: list[str], gold: str, k: int) -> float:
    """Share of disjoint groups of k answers whose commonest answer is right (self-consistency, 2203.11171).

    Equal numbers are one answer; an empty answer does not vote; of equally common ones the first counts.
    """
    wins = []
    for start in range(0, len(answers) - k + 1, k):
        votes = [(mlx_grpo.parse_number(a), a) for a in answers[start : start + k] if a]
        common = Counter(
            a.lower() if number is None else str(number.normalize()) for number, a in votes
        ).most_common(1)
        wins.append(bool(common) and same_answer(common[0][0], gold))
    return fmean(wins)


def mcnemar(first: list[bool], second: list[bool]) -> tuple[int, int, float]:
    """(only first right, only second right, two-sided exact p) of two models' hits on the same questions.

    Under the null hypothesis each question that tells the two apart is a coin toss.
    """
    b, c = (sum(x and not y for x, y in zip(*pair)) for pair in ((first, second), (second, first)))
    return b, c, min(1.0, 2 * sum(math.comb(b + c, i) for i in range(min(b, c) + 1)) / 2 ** (b + c))


def rate(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high): the mean of values in [0, 1] with the 95% Wilson interval.

    Exact match is a proportion. pass@k and maj@k are means of fractions, whose spread is smaller: there it is
    cautious.
    """
    mean = fmean(values)
    return mean, *mlx_grpo.wilson_interval(mean * len(values), len(values))


# --- Answers ------------------------------------------------------------------------------------------------


def read_questions(path: Path) -> list[dict]:
    """Rows of a .txt file: a question a line, then "#### answer"; without that the row's answer is None."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise mlx_grpo.UserError(
            f"Failed to read questions: {path}: {getattr(error, 'strerror', None) or error}"
        ) from None
    if not lines:
        raise mlx_grpo.UserError(f"No questions in {path}")
    return [
        {"prompt": line.split("####")[0].strip(), "answer": mlx_grpo.extract_hash_answer(line)}
        for line in lines
    ]


def read_rows(config, split: str) -> list[dict]:
    """The questions as {"prompt", "answer"}: all rows of a local file, else the split that training takes."""
    path = Path(config.dataset).expanduser()
    if path.suffix == ".txt":
        return read_questions(path)
    if path.is_file():  # the trainer would set some of its rows aside; here all are wanted
        config = dataclasses.replace(config, eval_dataset=config.dataset)
        split = "test"
    return mlx_grpo.load_dataset_split(config, split)


def answer_rows(model, tokenizer, rows: list[dict], config, samples: int, progress, rewards: dict):
    """Yield a record for each greedy answer (samples = 0) or for `samples` sampled ones a question, in order.

    rewards: functions by name, whose scores the records have too.
    """
    sampling = config.sampling if samples else mlx_grpo.Sampling(temperature=0.0)
    prompts = [mlx_grpo.build_prompt(tokenizer, row["prompt"], *config.prompting) for row in rows]
    each = samples or 1
    limit = config.eval_max_new_tokens or config.max_completion_length
    for start in range(0, len(rows), BATCH):
        part = range(start, min(start + BATCH, len(rows)))
        completions = mlx_grpo.generate(
            model, tokenizer, [prompts[i] for i in part], num_generations=each, stop_strings=config.stops,
            sampling=sampling, prefix=config.completion_prefix, max_new_tokens=limit,
            keys=[mlx_grpo.random_key("evaluate", config.seed, i) for i in part],
            kv_budget=int(config.kv_budget_gb * 2**30), progress=progress,
        )  # fmt: skip
        groups = [
            mlx_grpo.Group(rows[i], prompts[i], completions[n * each : (n + 1) * each])
            for n, i in enumerate(part)
        ]
        if rewards:
            mlx_grpo.score_groups(groups, list(rewards.values()), config.reward_timeout, limit)
        for n, completion in enumerate(completions):
            row = rows[part[n // each]]
            text = completion.text
            answer = mlx_grpo.after_thinking(text)
            gold = row["answer"]
            tagged = mlx_grpo.extract_xml_answer(answer)
            strict, lenient = (None, None) if gold is None else mlx_grpo.grade(text, gold)
            record = {
                "index": part[n // each], "sample": n % each if samples else None,
                "question": row["prompt"], "gold": gold,
                "text": text, "answer_strict": tagged, "answer_lenient": tagged or last_number(answer),
                "strict": strict, "lenient": lenient,
                "tokens": len(completion.ids), "finish_reason": completion.finish_reason,
            }  # fmt: skip
            if rewards:
                scores = zip(rewards, completion.rewards)
                record["rewards"] = {name: None if math.isnan(r) else r for name, r in scores}
            yield record


def reward_means(records: list[dict]) -> dict:
    """Scores {"rewards/NAME", "rewards/NAME, sampled": (mean, low, high)} of one model's records.

    None where nothing was scored.
    """
    scores = {}
    for name, sampled in itertools.product(records[0].get("rewards", ()), (False, True)):
        values = [r["rewards"][name] for r in records if (r["sample"] is not None) == sampled]
        known = np.array([v for v in values if v is not None])
        if values:
            interval = (
                mlx_grpo.mean_interval(known, mlx_grpo.ALL_OR_NOTHING.get(name)) if known.size else None
            )
            scores[f"rewards/{name}{', sampled' * sampled}"] = (
                (float(known.mean()), *interval) if known.size else None
            )
    return scores


def summarise(records: list[dict], ks: list[int]) -> dict:
    """Scores {"em_strict", "pass@4_lenient", ..: (mean, low, high)} of one model's graded records."""
    graded = [r for r in records if r["gold"] is not None]
    greedy = [r for r in graded if r["sample"] is None]
    sampled = [
        list(g)
        for _, g in itertools.groupby(
            (r for r in graded if r["sample"] is not None), key=lambda r: r["index"]
        )
    ]
    scores = {f"em_{kind}": rate([r[kind] for r in greedy]) for kind in KINDS if greedy}
    for kind, k in itertools.product(KINDS, ks if sampled else ()):
        scores[f"pass@{k}_{kind}"] = rate([pass_at_k(len(g), sum(r[kind] for r in g), k) for g in sampled])
    for kind, k in itertools.product(KINDS, ks if sampled else ()):
        if k > 1:  # one answer is its own majority
            scores[f"maj@{k}_{kind}"] = rate(
                [maj_at_k([r[f"answer_{kind}"] for r in g], g[0]["gold"], k) for g in sampled]
            )
    return scores


def evaluate_model(
    label: str, name: str, adapter: str | None, rows: list[dict], config, args, output, rewards: dict
) -> tuple[dict, list[dict]]:
    """One model's result and its records, which go to `output` as they come."""
    model, tokenizer, _ = mlx_grpo.open_model(name, adapter, args.trust_remote_code)
    mlx_grpo.set_template(tokenizer, config)
    records = []
    start = time.perf_counter()
    for samples in (0, args.samples) if args.samples else (0,):
        with progress_bar(f"{label}, {'samples' if samples else 'greedy'}", len(rows)) as progress:
            for record in answer_rows(model, tokenizer, rows, config, samples, progress, rewards):
                records.append(record)
                if output:
                    print(json.dumps({"model": label, **record}, ensure_ascii=False), file=output, flush=True)
    seconds = time.perf_counter() - start
    tokens = sum(r["tokens"] for r in records)
    cut = cut_while_thinking([r["text"] for r in records])
    return {
        "model": label, "n": sum(row["answer"] is not None for row in rows), "questions": len(rows),
        **reward_means(records), **summarise(records, args.k),
        "tokens_per_answer": tokens / len(records),
        "cut": fmean(r["finish_reason"] == "length" for r in records),
        **({} if cut is None else {"cut_thinking": cut}),
        "tokens_per_second": tokens / seconds, "seconds": seconds,
    }, records  # fmt: skip


def compare_rewards(results: list[dict], answers: list[list[dict]], i: int, j: int, name: str) -> dict:
    """Models i and j on the same questions by one reward.

    Where one's greedy answer earns more, and the sign test's exact p.
    """
    scores = [[r["rewards"][name] for r in answers[m] if r["sample"] is None] for m in (i, j)]
    both = [(a, b) for a, b in zip(*scores) if a is not None and b is not None]
    only_first, only_second, p = mcnemar([a > b for a, b in both], [b > a for a, b in both])
    gain = fmean(b - a for a, b in both) if both else 0.0
    names = {
        "first": results[i]["model"],
        "second": results[j]["model"],
        "places": (i, j),
        "kind": f"rewards/{name}",
    }
    return {**names, "only_first": only_first, "only_second": only_second, "gain": gain, "p": p}


def compare(results: list[dict], answers: list[list[dict]]) -> list[dict]:
    """Every pair of models on the same questions.

    Greedy hits of one and not the other, and McNemar's exact p; then the same by each reward.
    """
    pairs = []
    for (i, j), name in itertools.product(
        itertools.combinations(range(len(results)), 2), answers[0][0].get("rewards", ())
    ):
        pairs.append(compare_rewards(results, answers, i, j, name))
    if not results[0]["n"]:
        return pairs
    for (i, j), kind in itertools.product(itertools.combinations(range(len(results)), 2), KINDS):
        hits = [
            [r[kind] for r in answers[m] if r["sample"] is None and r["gold"] is not None] for m in (i, j)
        ]
        only_first, only_second, p = mcnemar(*hits)
        names = {"first": results[i]["model"], "second": results[j]["model"], "places": (i, j), "kind": kind}
        gain = (only_second - only_first) / len(hits[0])
        pairs.append({**names, "only_first": only_first, "only_second": only_second, "gain": gain, "p": p})
    return pairs


# --- Output -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def progress_bar(title: str, total: int):
    """A function to call with the number of questions done; it draws only where stderr is a terminal."""
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, advance=done)


def percent(mean: float, low: float, high: float) -> str:
    return f"{100 * mean:.1f}% ({100 * low:.1f}-{100 * high:.1f})"


def shows_exact_match(result: dict) -> bool:
    """Whether exact match is of interest: no other reward was asked for, or the correctness reward too."""
    asked = [name for name in result if name.startswith("rewards/")]
    return not asked or "rewards/correctness_reward_func" in asked


def score_text(metric: str, score: tuple | None) -> str:
    if score is None:
        return "none"
    mean, low, high = score
    return (
        f"{mean:.3f} ({low:.3f} to {high:.3f})" if metric.startswith("rewards/") else percent(mean, low, high)
    )


def print_scores(results: list[dict], console: Console) -> None:
    """Metrics down, models across, 95% intervals in brackets."""
    exact = shows_exact_match(results[0])
    count = f"{results[0]['n']} graded questions" if exact else f"{results[0]['questions']} questions"
    table = Table(title=f"{count}, 95% intervals")
    table.add_column("")
    for letter, result in zip(LETTERS, results):
        table.add_column(f"{letter}: {result['model']}", justify="right", overflow="fold")
    for metric in (
        m for m in results[0] if m.startswith("rewards/") or exact and m.startswith(("em_", "pass@", "maj@"))
    ):
        reward = metric.startswith("rewards/")
        label = (
            metric.removeprefix("rewards/")
            if reward
            else metric.replace("em_", "exact match_").replace("_", ", ")
        )
        table.add_row(label, *(score_text(metric, r[metric]) for r in results))
    table.add_row("tokens an answer", *(f"{r['tokens_per_answer']:.1f}" for r in results))
    table.add_row("cut at the limit", *(f"{100 * r['cut']:.1f}%" for r in results))
    if any("cut_thinking" in r for r in results):
        table.add_row("cut while thinking", *(f"{100 * r.get('cut_thinking', 0.0):.1f}%" for r in results))
    table.add_row("tokens/s", *(f"{r['tokens_per_second']:.1f}" for r in results))
    console.print(table)


def print_pairs(pairs: list[dict], console: Console) -> None:
    by_reward = any(pair["kind"].startswith("rewards/") for pair in pairs)
    what, columns = (
        ("score", ("first higher", "second higher"))
        if by_reward
        else ("exact match", ("only first right", "only second"))
    )
    table = Table(
        title=f"Greedy answers to the same questions ({'sign test' if by_reward else 'McNemar'}, exact)"
    )
    for column in ("pair", what, *columns, "second - first", "p"):
        table.add_column(column, justify="left" if column in ("pair", what) else "right", overflow="fold")
    for pair in pairs:
        gain = (
            f"{pair['gain']:+.3f}"
            if pair["kind"].startswith("rewards/")
            else f"{100 * pair['gain']:+.1f} points"
        )
        p = f"{pair['p']:.4f}" if pair["p"] >= 0.0001 else f"{pair['p']:.1e}"
        numbers = (str(pair["only_first"]), str(pair["only_second"]), gain, p)
        table.add_row(
            " and ".join(LETTERS[i] for i in pair["places"]), pair["kind"].removeprefix("rewards/"), *numbers
        )
    console.print(table)


# --- Command line -------------------------------------------------------------------------------------------


FLAGS = (  # flag, the setting of mlx-grpo.py that it replaces, its type, help
    (
        "--dataset",
        "dataset",
        str,
        "hub name, local file or folder, or .txt file of questions (default: openai/gsm8k)",
    ),
    ("--dataset-config", "dataset_config", str, "configuration of a hub dataset (default: main)"),
    ("--prompt-field", "prompt_field", str, "column with the question (default: question)"),
    ("--answer-field", "answer_field", str, "column with the gold answer (default: answer)"),
    (
        "--system",
        "system_prompt",
        str,
        "system prompt (default: the trainer's, which asks for the answer tags)",
    ),
    (
        "--completion-prefix",
        "completion_prefix",
        str,
        "text that starts every answer, part of what is graded (default: none)",
    ),
    (
        "--prompt-template",
        "prompt_template",
        str,
        "plain text with {prompt}, in the place of the chat template, for base models (default: none)",
    ),
    (
        "--chat-template-kwargs",
        "chat_template_kwargs",
        json_object,
        "values for the chat template, as a JSON object (default: none)",
    ),
    ("--max-tokens", "eval_max_new_tokens", int, "longest answer (default: 512)"),
    ("--temperature", "temperature", float, "of --samples; exact match is always greedy (default: 1)"),
    ("--top-p", "top_p", float, "of --samples (default: 1)"),
    ("--top-k", "top_k", int, "of --samples (default: 0, all)"),
    ("--min-p", "min_p", float, "of --samples (default: 0)"),
    ("--seed", "seed", int, "of --samples (default: 0)"),
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        description=__doc__.split("\n\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", nargs="+", required=True, help="local directories or hub names; several are compared")
    add(
        "--adapter-path",
        nargs="+",
        metavar="DIR",
        help="an mlx-lm adapter directory for each model, none for no adapter",
    )
    add(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model; only for authors you trust",
    )
    add(
        "--config",
        metavar="FILE",
        help="the trainer's TOML file, such as a run's config.resolved.toml; the flags below go over it",
    )
    for flag, setting, kind, text in FLAGS:
        add(flag, dest=setting, type=kind, metavar=kind.__name__.upper(), help=text)
    add(
        "--split",
        choices=("test", "train"),
        default="test",
        help="of a hub dataset or a folder (default: test)",
    )
    add(
        "--max-samples",
        type=int,
        default=0,
        metavar="INT",
        help="only the first so many questions (default: 0, all)",
    )
    add(
        "--reward",
        nargs="+",
        default=[],
        metavar="NAME",
        help="reward functions to score by: built-in names, or file.py:function",
    )
    add(
        "--samples",
        type=int,
        default=0,
        metavar="INT",
        help="sampled answers a question, for pass@k and maj@k (default: 0)",
    )
    add(
        "--k",
        type=int,
        nargs="+",
        metavar="INT",
        help="the k of pass@k and maj@k (default: 1, 2, 4, .. and --samples)",
    )
    add("--output", metavar="FILE", help="write every answer, one JSON object a line")
    add("--json", action="store_true", help="print the scores as JSON")
    args = parser.parse_args(argv)
    if args.samples < 0 or args.max_samples < 0:
        parser.error("--samples and --max-samples must be at least 0")
    powers = {2**i for i in range(args.samples.bit_length())}
    args.k = sorted(set(args.k or (powers | {args.samples}) - {0}))
    if args.k and not 1 <= args.k[0] <= args.k[-1] <= args.samples:
        parser.error(f"--k must be from 1 to --samples ({args.samples})")
    if len(args.model) > len(LETTERS):
        parser.error(f"--model takes at most {len(LETTERS)} models")
    if args.adapter_path and len(args.adapter_path) != len(args.model):
        parser.error(
            f"--adapter-path has {len(args.adapter_path)} entries for {len(args.model)} models: "
            "give one for each, or none"
        )
    return args


def settings(args: argparse.Namespace):
    """The trainer's configuration with the flags over it. Raises UserError."""
    given = {
        setting: getattr(args, setting) for _, setting, _, _ in FLAGS if getattr(args, setting) is not None
    }
    if "dataset" in given:
        given["eval_dataset"] = ""
    return dataclasses.replace(mlx_grpo.load_config(args.config), **given)


def read_rewards(config, names: list[str]) -> dict:
    """The reward functions of these names or FILE:FUNCTION, by name. Raises UserError."""
    if not names:
        return {}
    config = dataclasses.replace(config, reward_funcs=names, reward_weights=[], metric_for_best_model="")
    functions, _ = mlx_grpo.load_rewards(config, mlx_grpo.BUILT_IN_REWARDS)
    return dict(zip(mlx_grpo.names_of(functions), functions))


def run(args: argparse.Namespace) -> None:
    config = settings(args)
    rows = read_rows(config, args.split)[: args.max_samples or None]
    adapters = [
        None if adapter == "none" else adapter for adapter in args.adapter_path or ["none"] * len(args.model)
    ]
    for name, adapter in zip(
        args.model, adapters
    ):  # a misspelt second model is found before the first one's hours of work
        mlx_grpo.resolve_model(name)
        if adapter and not (Path(adapter) / "adapter_config.json").is_file():
            raise mlx_grpo.UserError(f"Not an adapter directory: {adapter} has no adapter_config.json")
    rewards = read_rewards(config, args.reward)
    results = []
    answers = []
    with open_output(args.output) as output:
        for name, adapter in zip(args.model, adapters):
            label = f"{name} + {adapter}" if adapter else name
            result, records = evaluate_model(label, name, adapter, rows, config, args, output, rewards)
            results.append(result)
            answers.append(records)
            mx.clear_cache()
    pairs = compare(results, answers)
    if args.json:
        print(json.dumps({"models": results, "pairs": pairs}))
        return
    if not (
        args.output or results[0]["n"] or rewards
    ):  # nothing to grade and no file: the answers are what was asked for
        for record in itertools.chain(*answers):
            print(f"{record['question']}\n{record['text']}\n")
    print_scores(results, Console())
    shown = [pair for pair in pairs if pair["kind"].startswith("rewards/") or shows_exact_match(results[0])]
    if shown:
        print_pairs(shown, Console())


def open_output(path: str | None):
    try:
        return open(path, "w", encoding="utf-8") if path else contextlib.nullcontext()
    except OSError as error:
        raise mlx_grpo.UserError(f"Cannot write {path}: {error.strerror}") from None


def main(argv: list[str] | None = None) -> int:
    return exit_status(lambda: run(parse_arguments(argv)))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the program quietly
    sys.exit(main())
