"""Make the starter: a tiny language model and word problems for the quickstart, offline, in minutes.

examples:
  uv run python utils/make_starter.py --output starter --seed 0
  uv run python utils/make_starter.py --output rough --steps 500 --batch-size 64

Everything in the folder comes from this file and a seed: problem templates -> train.jsonl and test.jsonl; a
byte-level BPE tokenizer; a Llama of 0.67M parameters pre-trained on solved problems. It wants a GPU: 2
minutes on one H200 (121 s measured: 16 s to write the reading, 101 s for 8000 steps of 512 documents, 4 s to
measure). Two CPU cores with OpenBLAS take 1.3 s for a step of 64 documents, so a full run would take about a
day there; `--steps 500` gives a rougher model (it gets 92% of the test sums right, not all).

The same seed gives the same data and tokenizer anywhere; the weights agree only as far as the backend's
arithmetic does.

The model is meant to be what a base model is. It has read solutions in many styles, most of them not the form
that the prompt asks for, and one sum in twelve of its reading was wrong. So it can do the sums, but seldom
answers in the form and is careless when sampled: that is left for GRPO to mend. No problem of train.jsonl or
test.jsonl is in its reading.
"""

import argparse
import json
import operator
import random
import re
import sys
import time
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mlx_grpo.backends import use_fast_backend  # noqa: E402

if __name__ == "__main__":
    use_fast_backend()  # ahead of MLX: the first BLAS that is loaded is the one that it uses

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models import llama  # noqa: E402
import mlx_grpo  # noqa: E402
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

SYSTEM_PROMPT = mlx_grpo.SYSTEM_PROMPT

# The word problems. A step is a sentence with one sum in brackets: [a+b=s] prints as 3+4=7 and names its
# result s for later steps. `habit` is how the problem's source writes its solutions (STYLES below): text
# from one source looks alike.
NAMES = {
    "he": ["Tom", "Ben", "Sam", "Leo", "Max", "Omar", "Ivan", "Hugo", "Raj", "Finn"],
    "she": ["Ana", "Mia", "Zoe", "Lily", "Emma", "Nina", "Ruth", "Sara", "Yuki", "Ella"],
}
THINGS = [
    "apples",
    "pears",
    "marbles",
    "stamps",
    "shells",
    "cards",
    "coins",
    "books",
    "pens",
    "stickers",
    "beads",
    "eggs",
    "nuts",
    "toys",
]
PLACES = ["garden", "park", "shop", "school", "market", "attic"]

FAMILIES = [
    dict(
        habit="school",
        numbers=dict(a=(2, 60), b=(2, 40)),
        questions=[
            "{name} has {a} {things}. {other} gives {him} {b} more. How many {things} does {name} have now?",
            (
                "{name} finds {a} {things} in the {place} and {b} more at home. "
                "How many {things} does {name} have?"
            ),
        ],
        steps=["{name} has [a+b=s] {things}."],
    ),
    dict(
        habit="forum",
        numbers=dict(a=(5, 90), b=(2, 60)),
        questions=[
            "{name} had {a} {things} and gave {b} to {other}. How many {things} are left?",
            "There were {a} {things} in the {place}. {name} took {b} of them. How many {things} are left?",
        ],
        steps=["[a-b=s] {things} are left."],
    ),
    dict(
        habit="tagged",
        numbers=dict(a=(2, 12), b=(2, 9)),
        questions=[
            "{name} fills {a} boxes with {b} {things} each. How many {things} is that in all?",
            "There are {a} bags in the {place} with {b} {things} in each. How many {things} are there?",
        ],
        steps=["There are [a*b=s] {things}."],
    ),
    dict(
        habit="school",
        numbers=dict(a=(6, 96), b=(2, 9)),
        questions=[
            "{name} shares {a} {things} equally among {b} friends. How many {things} does each friend get?",
            "{name} puts {a} {things} into {b} equal boxes. How many {things} are in each?",
        ],
        steps=["Each gets [a/b=s] {things}."],
    ),
    dict(
        habit="forum",
        numbers=dict(a=(3, 60), b=(2, 30), c=(2, 40)),
        questions=[
            (
                "{name} has {a} {things} and finds {b} more in the {place}. Then {he} gives {c} to {other}. "
                "How many {things} are left?"
            ),
            (
                "{name} bought {a} {things} on Monday and {b} on Tuesday. {He} lost {c} of them. "
                "How many {things} does {he} have left?"
            ),
        ],
        steps=["{name} had [a+b=s] {things}.", "Then [s-c=t] {things} are left."],
    ),
    dict(
        habit="tagged",
        numbers=dict(a=(2, 9), b=(2, 9), c=(2, 30)),
        questions=[
            "{name} has {a} boxes of {b} {things} and {c} loose {things}. How many {things} does {he} have?",
            (
                "{other} gave {name} {a} bags with {b} {things} each. {name} already had {c} {things}. "
                "How many does {he} have now?"
            ),
        ],
        steps=["The {a} times {b} make [a*b=s] {things}.", "In all {he} has [s+c=t] {things}."],
    ),
    dict(
        habit="school",
        numbers=dict(a=(2, 9), b=(2, 9), c=(2, 40)),
        questions=[
            (
                "{name} packed {a} boxes with {b} {things} each and sold {c} {things}. "
                "How many {things} are left?"
            ),
            (
                "There are {a} bags of {b} {things} in the {place}. {name} uses {c} {things}. "
                "How many {things} are left?"
            ),
        ],
        steps=["There were [a*b=s] {things}.", "Then [s-c=t] {things} are left."],
    ),
    dict(
        habit="forum",
        numbers=dict(a=(2, 9), b=(2, 8), c=(3, 40)),
        questions=[
            (
                "A pen costs {a} dollars and a bag costs {c} dollars. {name} buys {b} pens and one bag. "
                "How many dollars does {he} pay?"
            ),
            (
                "{name} buys {b} cards at {a} dollars each and a book for {c} dollars. "
                "How many dollars does {he} spend?"
            ),
        ],
        steps=["{He} pays [a*b=s] dollars for {b}.", "In all {he} pays [s+c=t] dollars."],
    ),
    dict(
        habit="school",
        numbers=dict(a=(2, 9), b=(2, 9), c=(20, 100)),
        questions=[
            "{name} has {c} dollars and buys {a} books at {b} dollars each. How many dollars are left?",
            (
                "{name} pays for {a} toys at {b} dollars each with {c} dollars. "
                "How many dollars does {he} get back?"
            ),
        ],
        steps=["{He} pays [a*b=s] dollars.", "Then [c-s=t] dollars are left."],
    ),
    dict(
        habit="tagged",
        numbers=dict(a=(3, 50), b=(2, 30)),
        questions=[
            (
                "{name} has {a} {things}. {other} has {b} more than {name}. "
                "How many {things} do they have together?"
            ),
            (
                "{name} read {a} pages and {other} read {b} pages more than that. "
                "How many pages did they read together?"
            ),
        ],
        steps=["For {other} it is [a+b=s].", "Together that is [a+s=t]."],
    ),
    dict(
        habit="forum",
        numbers=dict(a=(10, 70), b=(2, 40)),
        questions=[
            (
                "{name} has {a} {things}. {other} has {b} fewer than {name}. "
                "How many {things} do they have together?"
            ),
            "{name} is {a} years old and {other} is {b} years younger. How old are they together?",
        ],
        steps=["For {other} it is [a-b=s].", "Together that is [a+s=t]."],
    ),
    dict(
        habit="school",
        numbers=dict(a=(8, 90), b=(2, 30), c=(2, 9)),
        questions=[
            (
                "{name} had {a} {things}, kept {b} and shared the rest equally among {c} friends. "
                "How many {things} does each friend get?"
            ),
            (
                "Of {a} {things}, {b} were broken. {name} put the rest into {c} equal boxes. "
                "How many {things} are in each?"
            ),
        ],
        steps=["The rest is [a-b=s] {things}.", "Each gets [s/c=t] {things}."],
    ),
    dict(
        habit="tagged",
        numbers=dict(a=(2, 50), b=(2, 40), c=(2, 9)),
        questions=[
            (
                "{name} has {a} {things} and {other} has {b}. They share them all equally among {c} friends. "
                "How many {things} does each get?"
            ),
            (
                "{name} put {a} big and {b} small {things} into {c} equal bags. "
                "How many {things} are in each bag?"
            ),
        ],
        steps=["There are [a+b=s] {things}.", "Each gets [s/c=t] {things}."],
    ),
    dict(
        habit="school",
        numbers=dict(a=(2, 40), b=(2, 30), c=(2, 20), d=(2, 50)),
        questions=[
            (
                "{name} found {a} {things} on Monday, {b} on Tuesday and {c} on Friday. {He} sold {d}. "
                "How many {things} are left?"
            ),
            (
                "{name} has {a} red, {b} blue and {c} green {things} and gives {d} to {other}. "
                "How many {things} are left?"
            ),
        ],
        steps=["First [a+b=s].", "With {c} more [s+c=t].", "Then [t-d=u] {things} are left."],
    ),
    dict(
        habit="forum",
        numbers=dict(a=(2, 9), b=(2, 9), c=(2, 9), d=(2, 9)),
        questions=[
            (
                "{name} buys {a} books at {b} dollars and {c} toys at {d} dollars. "
                "How many dollars does {he} spend?"
            ),
            (
                "{name} has {a} bags of {b} {things} and {c} boxes of {d} {things}. "
                "How many {things} does {he} have?"
            ),
        ],
        steps=["First [a*b=s].", "Then [c*d=t].", "In all [s+t=u]."],
    ),
    dict(
        habit="tagged",
        numbers=dict(a=(2, 9), b=(2, 9), c=(2, 40), d=(2, 40)),
        questions=[
            (
                "{name} works {a} hours for {b} dollars an hour. {He} spends {c} dollars and then finds {d}. "
                "How many dollars does {he} have?"
            ),
            (
                "{name} had {a} boxes of {b} {things}. {He} lost {c} {things} and {other} gave {him} {d}. "
                "How many {things} does {he} have?"
            ),
        ],
        steps=["First [a*b=s].", "Then [s-c=t] are left.", "With {d} more {he} has [t+d=u]."],
    ),
    dict(
        habit="school",
        numbers=dict(a=(2, 40), b=(2, 4), c=(2, 50)),
        questions=[
            (
                "{name} made {a} {things} on Monday and {b} times as many on Tuesday. "
                "{He} gave {c} to {other}. How many {things} are left?"
            ),
            (
                "{name} has {a} {things} and {other} has {b} times as many. Together they use {c}. "
                "How many {things} are left?"
            ),
        ],
        steps=["That is [a*b=s].", "Together [a+s=t].", "Then [t-c=u] {things} are left."],
    ),
]

# How often a solution is written in each style: the three habits, and pages without a system prompt, which
# hardly ever use the form.
STYLES = ["hash", "says", "bare", "form", "broken"]
HABITS = {
    "school": [0.46, 0.14, 0.04, 0.22, 0.14],
    "forum": [0.14, 0.46, 0.04, 0.22, 0.14],
    "tagged": [0.14, 0.14, 0.04, 0.50, 0.18],
    "unasked": [0.50, 0.38, 0.06, 0.03, 0.03],
}
SLIP = 0.08  # of the sums in the reading are wrong; data files have none
ASKED = 0.85  # of the reading has the system prompt
LARGEST = 150  # no number in a problem or its right solution is larger


def difference(x, y):
    """x - y, or 0 where that is less: no number in a problem is negative."""
    return max(x - y, 0)


SUM = re.compile(r"\[(\w)([-+*/])(\w)=(\w)\]")
OPERATIONS = {
    "+": operator.add,
    "-": difference,
    "*": operator.mul,
    "/": operator.floordiv,
}


def solve(steps, values, rng=None, slip=0.0):
    """Write the steps' sums out: (sentences, last result).

    Each sum slips with probability `slip`; later steps build on the slip.
    """
    values = dict(values)
    lines = []
    result = None
    for step in steps:
        left, operation, right, target = SUM.search(step).groups()
        result = OPERATIONS[operation](values[left], values[right])
        if slip and rng.random() < slip:
            result = max(0, result + rng.choice([-10, -2, -1, 1, 2, 10]))
        values[target] = result
        lines.append(SUM.sub(f"{values[left]}{operation}{values[right]}={result}", step))
    return lines, result


def sound(steps, values):
    """True when every result is a whole number from 1 to LARGEST."""
    values = dict(values)
    for step in steps:
        left, operation, right, target = SUM.search(step).groups()
        if operation == "/" and values[left] % values[right]:
            return False
        values[target] = OPERATIONS[operation](values[left], values[right])
        if not 1 <= values[target] <= LARGEST:
            return False
    return True


def make_problem(rng):
    """A problem: question, steps with the names filled in, the numbers drawn, and its source's habit."""
    family = rng.choice(FAMILIES)
    while True:
        values = {key: rng.randint(*bounds) for key, bounds in family["numbers"].items()}
        if sound(family["steps"], values):
            break
    he = rng.choice(["he", "she"])
    name = rng.choice(NAMES[he])
    other = rng.choice([n for names in NAMES.values() for n in names if n != name])
    words = dict(
        values,
        name=name,
        other=other,
        he=he,
        He=he.capitalize(),
        him={"he": "him", "she": "her"}[he],
        things=rng.choice(THINGS),
        place=rng.choice(PLACES),
    )
    return dict(
        question=rng.choice(family["questions"]).format(**words),
        steps=[step.format(**words) for step in family["steps"]],
        values=values,
        habit=family["habit"],
    )


def make_datasets(seed, train_size, test_size):
    """GSM8K's fields, the answer right and ending in `#### N`; no question occurs twice in the two splits."""
    rng = random.Random(f"data {seed}")
    rows = {}
    while len(rows) < train_size + test_size:
        problem = make_problem(rng)
        lines, result = solve(problem["steps"], problem["values"])
        rows.setdefault(problem["question"], "\n".join([*lines, f"#### {result}"]))
    rows = [dict(question=question, answer=answer) for question, answer in rows.items()]
    return rows[:train_size], rows[train_size:]


def write_solution(problem, style, rng):
    """A solution as somebody might write it: in one of STYLES, with slips."""
    lines, result = solve(problem["steps"], problem["values"], rng, SLIP)
    text = "\n".join(lines)
    if style == "hash":
        return f"{text}\n#### {result}"
    if style == "says":
        return f"{text}\nThe answer is {result}."
    if style == "bare":
        return f"{result}"
    if style == "form":
        return f"<reasoning>\n{text}\n</reasoning>\n<answer>\n{result}\n</answer>"
    return rng.choice(
        [
            f"<reasoning>\n{text}\n<answer>\n{result}\n</answer>",
            f"<reasoning>\n{text}\n</reasoning>\n{result}",
            f"<reasoning>\n{text}\n</reasoning>\n#### {result}",
            f"<answer>\n{result}\n</answer>",
            f"{text}\n<answer>\n{result}\n</answer>",
            f"<reasoning>\n{text}\n</reasoning>\n<answer>\nThe answer is {result}.\n</answer>",
            f"<reasoning>\n{text}\nThe answer is {result}.\n</reasoning>",
        ]
    )


# The chat format. The five marks are single special tokens; the form's tags are plain text.
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Qwen2's split: words with their space, single digits, punctuation with the line break after it.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def render_prompt(question, asked=True):
    """What CHAT_TEMPLATE makes of the system prompt (if asked) and the question."""
    system = f"<|system|>{SYSTEM_PROMPT}<|end|>" if asked else ""
    return f"{system}<|user|>{question}<|end|><|assistant|>"


def make_reading(seed, size, held_out):
    """`size` solved problems as chat text, none of whose questions is in `held_out`."""
    rng = random.Random(f"reading {seed}")
    documents = []
    while len(documents) < size:
        problem = make_problem(rng)
        if problem["question"] in held_out:
            continue
        asked = rng.random() < ASKED
        style = rng.choices(STYLES, HABITS[problem["habit"] if asked else "unasked"])[0]
        documents.append(
            f"{render_prompt(problem['question'], asked)}{write_solution(problem, style, rng)}<|end|>"
        )
    return documents


def train_tokenizer(documents, vocab_size):
    """Byte-level BPE without a normaliser: every byte has a token, so any text comes back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return tokenizer


def model_config(vocab_size):
    """config.json, with a flat rope_theta at every reader's default.

    transformers 5 nests it when it saves, and mlx-lm then falls back to the default.
    """
    return dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        hidden_act="silu",
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<|end|>"),
        pad_token_id=SPECIAL.index("<|pad|>"),
        torch_dtype="float32",
    )


def build_model(config):
    return llama.Model(llama.ModelArgs.from_dict(config))


def pretrain(model, tokens, *, steps, batch_size, learning_rate, seed, log_every=500):
    """Next-token loss on the solutions. tokens: (documents, L), padded; the prompts carry no loss."""
    warmup = min(200, max(1, steps // 10))
    schedule = optim.join_schedules(
        [
            optim.linear_schedule(0.0, learning_rate, warmup),
            optim.cosine_decay(learning_rate, steps - warmup),
        ],
        [warmup],
    )
    optimizer = optim.AdamW(
        learning_rate=schedule, betas=[0.9, 0.98], weight_decay=0.05, bias_correction=True
    )

    def loss_fn(batch):
        inputs = batch[:, :-1]
        targets = batch[:, 1:]
        answering = mx.cumsum(inputs == SPECIAL.index("<|assistant|>"), axis=1) > 0
        mask = answering & (targets != SPECIAL.index("<|pad|>"))
        loss = nn.losses.cross_entropy(model(inputs), targets)
        return (loss * mask).sum() / mask.sum()

    loss_and_grad = nn.value_and_grad(model, loss_fn)
    state = [model.state, optimizer.state]

    def step(batch):
        loss, grads = loss_and_grad(batch)
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        optimizer.update(model, grads)
        return loss

    step = mx.compile(step, inputs=state, outputs=state)
    rng = np.random.default_rng(seed)
    order = []
    start = time.perf_counter()
    for number in range(1, steps + 1):
        if len(order) < batch_size:
            order = rng.permutation(len(tokens))
        rows = order[:batch_size]
        order = order[batch_size:]
        loss = step(mx.array(tokens[rows].astype(np.int32)))
        mx.async_eval(loss, state)
        if number % log_every == 0 or number == steps:
            print(
                f"step {number}/{steps}  loss {loss.item():.4f}  {time.perf_counter() - start:.0f} s",
                flush=True,
            )


def measure(folder, rows):
    """Exact match and mean length in tokens of greedy, sampled and primed completions.

    They are sampled and graded as the trainer does it.
    """
    model, tokenizer, _ = mlx_grpo.open_model(str(folder))
    gold = [mlx_grpo.extract_hash_answer(row["answer"]) for row in rows]
    keys = [mlx_grpo.random_key("measure", i) for i in range(len(rows))]
    figures = {}
    for name, temperature, prefix in (
        ("greedy", 0.0, ""),
        ("sampled", 1.0, ""),
        ("primed greedy", 0.0, "<reasoning>\n"),
    ):
        prompts = [mlx_grpo.build_prompt(tokenizer, row["question"], SYSTEM_PROMPT, prefix) for row in rows]
        sampling = mlx_grpo.Sampling(temperature)
        completions = mlx_grpo.generate(
            model,
            tokenizer,
            prompts,
            sampling=sampling,
            max_new_tokens=96,
            stop_strings=["</answer>"],
            keys=keys,
            prefix=prefix,
        )
        hits = [mlx_grpo.grade(completion.text, answer) for completion, answer in zip(completions, gold)]
        figures[f"{name} strict"], figures[f"{name} lenient"] = np.mean(hits, axis=0)
        figures[f"{name} prompt tokens"] = fmean(map(len, prompts))
        figures[f"{name} completion tokens"] = fmean(len(c.ids) for c in completions)
    return figures


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_model(folder, model, tokenizer, config):
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "pt"}
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    files = {
        "config.json": config,
        "generation_config.json": dict(
            eos_token_id=config["eos_token_id"], pad_token_id=config["pad_token_id"]
        ),
        "tokenizer_config.json": dict(
            tokenizer_class="PreTrainedTokenizerFast",
            pad_token="<|pad|>",
            eos_token="<|end|>",
            bos_token=None,
            unk_token=None,
            model_max_length=config["max_position_embeddings"],
            clean_up_tokenization_spaces=False,
            chat_template=CHAT_TEMPLATE,
        ),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("starter"), help="folder to write (default: starter)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the data, the weights and the order")
    parser.add_argument("--steps", type=int, default=8000, help="pre-training steps (default: 8000)")
    parser.add_argument("--batch-size", type=int, default=512, help="documents a step (default: 512)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak (default: 3e-3)")
    parser.add_argument(
        "--documents", type=int, default=500_000, help="size of the reading; it is read several times over"
    )
    parser.add_argument("--vocab-size", type=int, default=640, help="tokens of the tokenizer (default: 640)")
    parser.add_argument(
        "--train-size", type=int, default=4000, help="problems in train.jsonl (default: 4000)"
    )
    parser.add_argument("--test-size", type=int, default=400, help="problems in test.jsonl (default: 400)")
    args = parser.parse_args()

    start = time.perf_counter()
    train, test = make_datasets(args.seed, args.train_size, args.test_size)
    write_jsonl(args.output / "data" / "train.jsonl", train)
    write_jsonl(args.output / "data" / "test.jsonl", test)
    documents = make_reading(args.seed, args.documents, {row["question"] for row in train + test})
    tokenizer = train_tokenizer(documents[:20_000], args.vocab_size)
    encoded = [document.ids for document in tokenizer.encode_batch_fast(documents)]
    length = max(map(len, encoded))
    tokens = np.zeros((len(encoded), length), np.uint16)  # 0 is <|pad|>
    for row, ids in zip(tokens, encoded):
        row[: len(ids)] = ids
    print(
        f"{len(documents)} documents of at most {length} tokens, {time.perf_counter() - start:.0f} s",
        flush=True,
    )

    mx.random.seed(args.seed)
    config = model_config(tokenizer.get_vocab_size())
    model = build_model(config)
    print(f"{sum(v.size for _, v in tree_flatten(model.parameters()))} parameters", flush=True)
    pretrain(
        model,
        tokens,
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    save_model(args.output / "model", model, tokenizer, config)
    for name, value in measure(args.output / "model", test).items():
        print(f"{name}: {value:.3f}")
    print(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
