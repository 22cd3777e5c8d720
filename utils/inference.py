#!/usr/bin/env python3
"""Ask a model: one prompt, a chat that keeps its history, or a file of prompts answered in batches.

Models open through mlx-grpo.py as in training, so that whatever the trainer, the converters or mlx-lm wrote
works here, adapters and tokenizer.pkl directories included. Answers go to stdout, everything else to stderr.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mlx_grpo.backends import use_fast_backend  # noqa: E402

if __name__ == "__main__":
    use_fast_backend()  # ahead of MLX: the first BLAS that is loaded is the one that it uses

import mlx.core as mx  # noqa: E402
import mlx_grpo  # noqa: E402

EXAMPLES = """examples:
  uv run python utils/inference.py --model outputs/run/final --chat
  uv run python utils/inference.py --model Qwen/Qwen2.5-0.5B-Instruct --prompt "What is 17 * 3?" \
--stream --verbose"""
DEFAULT_MODEL = "mlx_model"  # where the converters write unless told otherwise
PREFILL_CHUNK = 2048  # prompt positions in one forward
FILE_BATCH = 256  # prompts of a file between two writes


# --- One answer ---------------------------------------------------------------------------------------------


class TextStream:
    """Token ids in, text out as soon as later ids cannot change it; the pieces joined are decode(all ids).

    Held back: a character whose bytes are not all there yet, a run of SentencePiece byte tokens (it decodes
    as one), and the last characters where the tokenizer takes spaces before punctuation away.
    """

    # Ids decoded again at each step, at most and at least: the cost stays flat as text grows.
    WINDOW = 128
    CONTEXT = 32

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        # " n't" is the longest
        self.hold = 4 if getattr(tokenizer, "clean_up_tokenization_spaces", False) else 0
        self.ids = []  # the window
        self.sent = 0  # how many characters of the window's text are out

    def text(self, ids: list[int]) -> str:
        return mlx_grpo.completion_text(self.tokenizer, ids)

    def add(self, token: int) -> str:
        """The text that has become certain with this id; often "" or several characters."""
        self.ids.append(token)
        text = self.text(self.ids)
        in_byte_run = str(self.tokenizer.convert_ids_to_tokens(token)).startswith("<0x")
        certain = self.sent if in_byte_run else max(self.sent, len(text.rstrip("\ufffd")) - self.hold)
        piece = text[self.sent : certain]
        self.sent = certain
        if len(self.ids) >= self.WINDOW:
            self.shorten(text)
        return piece

    def shorten(self, text: str) -> None:
        """Forget the window's older ids, unless that would change what the others decode to."""
        tail = self.text(self.ids[-self.CONTEXT :])
        before = len(text) - len(tail)
        if before < self.sent and text.endswith(tail):
            self.ids = self.ids[-self.CONTEXT :]
            self.sent -= before

    def rest(self) -> str:
        """What was held back, once no more ids come."""
        return self.text(self.ids)[self.sent :]


@dataclass
class Answer:
    ids: list[int]  # the id that ended it included
    text: str
    prompt_tokens: int
    reused: int  # of them, found in the KV cache of the turn before
    first: float  # seconds until the first id
    seconds: float  # in all

    def describe(self) -> str:
        new = self.prompt_tokens - self.reused
        written = len(self.ids)
        decoding = (written - 1) / (self.seconds - self.first) if written > 1 else 0.0
        return (
            f"prompt {self.prompt_tokens} tokens ({self.reused} from the cache), "
            f"{new / self.first:.1f} tokens/s; generation {written} tokens, {decoding:.1f} tokens/s; "
            f"first token after {self.first:.3f} s; {peak_memory()}"
        )


def peak_memory() -> str:
    return f"peak memory {mx.get_peak_memory() / 1e9:.3f} GB"


class Session:
    """A model that answers one prompt at a time and keeps the KV cache for what the next prompt shares."""

    def __init__(self, model, tokenizer, sampling, max_tokens: int, stops: list[str] = ()):
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.stops = stops
        self.cache = None  # the KV cache
        self.held = []  # the ids at its positions

    def reuse(self, prompt: list[int]) -> int:
        """How many of the prompt's ids the cache holds, its last id never; the cache is cut back to them."""
        from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

        shared = len(os.path.commonprefix([self.held, prompt[:-1]]))
        surplus = len(self.held) - shared
        if self.cache is None or surplus and not can_trim_prompt_cache(self.cache):
            self.cache = make_prompt_cache(self.model)
            shared = 0
            surplus = 0
        if surplus:
            trim_prompt_cache(self.cache, surplus)
        self.held = prompt[:shared]
        return shared

    def tokens(self, prompt: list[int], key: mx.array, stopped):
        """Yield an answer's ids one by one, those mlx_grpo.generate draws with this key.

        Whenever it is left, `held` says what the cache holds.
        """
        for start in range(len(self.held), len(prompt) - 1, PREFILL_CHUNK):
            if stopped():
                return
            part = prompt[start : min(start + PREFILL_CHUNK, len(prompt) - 1)]
            self.model(mx.array([part]), cache=self.cache)
            mx.eval([layer.state for layer in self.cache])
            self.held = self.held + part
        uniforms = mx.random.uniform(shape=(self.max_tokens,), key=mx.random.split(key, 1)[0])
        seen = None

        def step(last, position):
            nonlocal seen
            logits = self.model(last[None], cache=self.cache)[:, -1]  # (1, V)
            if self.sampling.repetition_penalty != 1.0:
                if seen is None:
                    seen = mx.put_along_axis(
                        mx.zeros(logits.shape, mx.bool_), mx.array([prompt]), mx.array(True), axis=-1
                    )
                seen = mx.put_along_axis(seen, last[None], mx.array(True), axis=-1)
            token, _ = mlx_grpo.sample(logits, uniforms[position : position + 1], self.sampling, seen)
            mx.async_eval(token)
            return token

        token = step(mx.array(prompt[-1:]), 0)
        self.held = self.held + prompt[-1:]
        for position in range(1, self.max_tokens + 1):
            # The device works on the next id while the host waits for this one.
            ahead = step(token, position) if position < self.max_tokens else None
            number = token.item()
            if ahead is not None:
                self.held.append(number)
            yield number
            token = ahead

    def answer(self, prompt: list[int], key: mx.array, write, stopped=lambda: False) -> Answer:
        """Answer a prompt (ids); `write` gets the text piece by piece; `stopped` is asked after each id."""
        from mlx_lm.generate import wired_limit

        start = time.perf_counter()
        first = 0.0
        ids = []
        stream = TextStream(self.tokenizer)
        reused = self.reuse(prompt)
        row = mlx_grpo.Row(
            self.tokenizer, self.stops, self.max_tokens, mlx_grpo.primed_text(self.tokenizer, prompt)
        )
        with wired_limit(self.model):  # on Metal large models stay in memory; elsewhere nothing
            for token in self.tokens(prompt, key, stopped):
                first = first or time.perf_counter() - start
                ids.append(token)
                write(stream.add(token))
                row.take((token,), (0.0,))
                if row.finish_reason or stopped():
                    break
        write(stream.rest())
        seconds = time.perf_counter() - start
        text = mlx_grpo.completion_text(self.tokenizer, ids)
        return Answer(ids, text, len(prompt), reused, first or seconds, seconds)


# --- The three ways to ask ----------------------------------------------------------------------------------


def write_out(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def prompt_ids(tokenizer, prompt: str, args) -> list[int]:
    """Ids of a prompt, in the chat template unless --raw. Raises UserError where there are none."""
    try:
        ids = (
            list(tokenizer.encode(prompt))
            if args.raw
            else mlx_grpo.build_prompt(tokenizer, prompt, args.system, **args.template)
        )
    except mlx_grpo.UserError as error:
        raise mlx_grpo.UserError(f"{error}, or use --raw") from None
    if not ids:
        raise mlx_grpo.UserError("The prompt is empty")
    return ids


def answer_one(session: Session, args) -> None:
    prompt = sys.stdin.read().removesuffix("\n") if args.prompt == "-" else args.prompt
    ids = prompt_ids(session.tokenizer, prompt, args)
    key = mlx_grpo.random_key("inference", args.seed, 0)
    answer = session.answer(ids, key, write_out if args.stream else lambda piece: None)
    write_out("\n" if args.stream else answer.text + "\n")
    if args.verbose:
        print(answer.describe(), file=sys.stderr)


@contextlib.contextmanager
def ctrl_c_noted():
    """Within, Ctrl-C raises nothing: no forward pass stops halfway. Yields a function that tells of it."""
    pressed = []
    previous = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, previous)


def chat(session: Session, args) -> None:
    """Questions from the terminal until Ctrl-D, quit, exit or q; clear forgets the conversation."""
    with contextlib.suppress(ImportError):  # some Pythons are built without
        import readline  # noqa: F401  (input() then edits lines and keeps their history)

    if sys.stdin.isatty():
        print("Ctrl-C ends an answer, clear starts anew, quit or Ctrl-D leaves", file=sys.stderr)
    messages = []
    while True:
        try:
            line = input(">>> " if sys.stdin.isatty() else "").strip()
            if line in ("quit", "exit", "q"):
                return
            if line == "clear":
                messages = []
            elif line:
                messages = take_turn(session, messages, line, args)
        except KeyboardInterrupt:  # at the prompt: a new line
            print()
        except EOFError:
            print()
            return


def take_turn(session: Session, messages: list[dict], question: str, args) -> list[dict]:
    """Answer as the text is written; the conversation with both turns, or as it was without an answer."""
    asked = [*messages, {"role": "user", "content": question}]
    prompt = mlx_grpo.build_prompt(session.tokenizer, asked, args.system, **args.template)
    key = mlx_grpo.random_key("inference", args.seed, len(messages) // 2)
    with ctrl_c_noted() as stopped:
        answer = session.answer(prompt, key, write_out, stopped)
    write_out("\n")
    if args.verbose:
        print(answer.describe(), file=sys.stderr)
    said = next(
        (answer.text.removesuffix(stop) for stop in session.stops if answer.text.endswith(stop)), answer.text
    )
    return [*asked, {"role": "assistant", "content": said}] if said.strip() else messages


def read_prompts(path: Path) -> list[dict]:
    """A text file's lines as {"prompt": line}; a .jsonl file's objects, "question" renamed to "prompt"."""
    try:
        # Not splitlines: JSON text may hold other line breaks.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise mlx_grpo.UserError(
            f"Failed to read prompts: {path}: {getattr(error, 'strerror', None) or error}"
        ) from None
    rows = []
    for number, line in ((n, line) for n, line in enumerate(lines, 1) if line.strip()):
        try:
            row = json.loads(line) if path.suffix == ".jsonl" else {"prompt": line.strip()}
        except json.JSONDecodeError as error:
            raise mlx_grpo.UserError(f"Failed to read prompts: {path}, line {number}: {error.msg}") from None
        prompt = row.get("prompt", row.get("question")) if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise mlx_grpo.UserError(f'{path}, line {number}: no text under "prompt" or "question"')
        rows.append({**row, "prompt": prompt})
    if not rows:
        raise mlx_grpo.UserError(f"No prompts in {path}")
    return rows


def answer_file(model, tokenizer, rows: list[dict], sampling, args) -> None:
    """Write each row with its completion as a line of JSON, in the file's order."""
    prompts = [prompt_ids(tokenizer, row["prompt"], args) for row in rows]
    start = time.perf_counter()
    written = 0
    for first in range(0, len(rows), FILE_BATCH):
        part = range(first, min(first + FILE_BATCH, len(rows)))
        completions = mlx_grpo.generate(
            model, tokenizer, [prompts[i] for i in part], sampling=sampling, max_new_tokens=args.max_tokens,
            keys=[mlx_grpo.random_key("inference", args.seed, i) for i in part], stop_strings=args.stops,
        )  # fmt: skip
        for i, completion in zip(part, completions):
            facts = {
                "completion": completion.text,
                "tokens": len(completion.ids),
                "finish_reason": completion.finish_reason,
            }
            print(json.dumps({**rows[i], **facts}, ensure_ascii=False))
            written += len(completion.ids)
        sys.stdout.flush()
    if args.verbose:
        seconds = time.perf_counter() - start
        print(
            f"{len(rows)} prompts of {sum(map(len, prompts))} tokens; "
            f"generation {written} tokens in {seconds:.2f} s, {written / seconds:.1f} tokens/s; "
            f"{peak_memory()}",
            file=sys.stderr,
        )


# --- Command line -------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """What the user wrote wrong is one line, without the usage above it."""

    def error(self, message):
        self.exit(2, f"{message.removeprefix('argument ')}; see --help\n")


def number(kind, low, high=math.inf):
    """An argparse type: a number of this kind in [low, high]."""

    def convert(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return kind(text)

    convert.__name__ = kind.__name__  # argparse says "invalid int value" with it
    return convert


def json_object(text: str) -> dict:
    """An argparse type."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text} is no JSON object")
    return found


def add_sampling(add) -> None:
    """The flags that inference_vision.py has too; `add` is a parser's add_argument."""
    add("--max-tokens", metavar="N", type=number(int, 1), default=512, help="longest answer (default: 512)")
    add(
        "--temperature",
        metavar="T",
        type=number(float, 0),
        default=0.0,
        help="0 takes the likeliest token (default: 0)",
    )
    add(
        "--top-p",
        metavar="P",
        type=number(float, 0, 1),
        default=1.0,
        help="keep the likeliest tokens of this share (default: 1, all)",
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        description=__doc__.split("\n\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help=f"local directory or hub name (default: {DEFAULT_MODEL})")
    add("--adapter-path", metavar="DIR", help="mlx-lm adapter directory (LoRA, DoRA) to put on the model")
    add(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model; only for authors you trust",
    )
    ways = parser.add_mutually_exclusive_group(required=True)
    ways.add_argument("--prompt", metavar="TEXT", help="answer this; - reads it from stdin")
    ways.add_argument(
        "--chat", action="store_true", help="talk in the terminal; clear starts anew, quit leaves"
    )
    ways.add_argument(
        "--prompts-file",
        metavar="FILE",
        type=Path,
        help="answer every line (.txt) or object (.jsonl), as JSON Lines",
    )
    add("--stream", action="store_true", help="print the answer as it is written, as --chat always does")
    add("--raw", action="store_true", help="give the prompt to the model as it is, without the chat template")
    add(
        "--system",
        "--system-prompt",
        metavar="TEXT",
        help="system prompt (default: that of the run which trained the model, or none)",
    )
    add(
        "--prompt-template",
        metavar="TEXT",
        help="plain text with {prompt} in the place of the chat template, for base models "
        "(default: that run's)",
    )
    add(
        "--chat-template-kwargs",
        metavar="JSON",
        type=json_object,
        help='values for the chat template, such as {"enable_thinking": false} (default: that run\'s)',
    )
    add_sampling(add)
    add(
        "--top-k",
        metavar="K",
        type=number(int, 0),
        default=0,
        help="keep the K likeliest tokens (default: 0, all)",
    )
    add(
        "--min-p",
        metavar="P",
        type=number(float, 0, 1),
        default=0.0,
        help="drop tokens below this share of the likeliest (default: 0)",
    )
    add(
        "--repetition-penalty",
        metavar="X",
        type=number(float, 1e-6),
        default=1.0,
        help="above 1: against repetition (default: 1)",
    )
    add("--seed", metavar="N", type=number(int, 0), default=0, help="of the sampling (default: 0)")
    add(
        "--verbose",
        action="store_true",
        help="tokens/s of prompt and generation, time to first token, peak memory; on stderr",
    )
    args = parser.parse_args(argv)
    if args.chat and args.raw:
        parser.error("--raw has no turns to tell apart: use it with --prompt or --prompts-file")
    if args.prompts_file and args.stream:
        parser.error("--stream has no effect with --prompts-file: leave it out")
    if args.raw and args.system:
        parser.error("--system needs the chat template: leave --raw out, or write it into the prompt")
    if args.model is None and not Path(DEFAULT_MODEL).is_dir():
        parser.error(
            f"no directory {DEFAULT_MODEL} here: name a model with --model, "
            "or make one with utils/convert_model.py"
        )
    return args


def trained_with(model: str) -> dict:
    """The settings of the run that wrote the directory `model`, which lie beside it; {} where no run did."""
    settings = Path(model).resolve().parent / "config.resolved.toml"
    return tomllib.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}


def choose_prompting(args: argparse.Namespace, tokenizer) -> None:
    """How the model is asked: as the flags say, else as in the run that trained it. Raises UserError."""
    args.template = {}
    args.stops = []
    if args.raw:
        return
    trained = trained_with(args.model or DEFAULT_MODEL)
    if args.system is None:
        args.system = trained.get("system_prompt", "")
        if args.system:
            print(
                f"With the system prompt of its training (--system '' for none): {args.system}",
                file=sys.stderr,
            )
    plain = trained.get("prompt_template", "") if args.prompt_template is None else args.prompt_template
    values = (
        trained.get("chat_template_kwargs", {})
        if args.chat_template_kwargs is None
        else args.chat_template_kwargs
    )
    stops = {"stop_strings": trained["stop_strings"]} if "stop_strings" in trained else {}
    config = mlx_grpo.MLXGRPOConfig(prompt_template=plain, chat_template_kwargs=values, **stops)
    mlx_grpo.set_template(tokenizer, config)
    args.template = {"chat_template_kwargs": values} if values else {}
    args.stops = config.stops if plain else []  # other models end by themselves


def run(args: argparse.Namespace) -> None:
    rows = read_prompts(args.prompts_file) if args.prompts_file else None
    model, tokenizer, _ = mlx_grpo.open_model(
        args.model or DEFAULT_MODEL, args.adapter_path, args.trust_remote_code
    )
    choose_prompting(args, tokenizer)
    top_k = (
        args.top_k if args.top_k < len(tokenizer.get_vocab()) else 0
    )  # mlx-lm's filter refuses the whole vocabulary
    sampling = mlx_grpo.Sampling(args.temperature, args.top_p, top_k, args.min_p, args.repetition_penalty)
    if rows:
        answer_file(model, tokenizer, rows, sampling, args)
    elif args.chat:
        chat(Session(model, tokenizer, sampling, args.max_tokens, args.stops), args)
    else:
        answer_one(Session(model, tokenizer, sampling, args.max_tokens, args.stops), args)


def exit_status(script) -> int:
    """Run a script built on mlx-grpo.py; its errors are one line on stderr and a status."""
    try:
        script()
    except (mlx_grpo.UserError, mlx_grpo.RunError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, mlx_grpo.UserError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


def main(argv: list[str] | None = None) -> int:
    return exit_status(lambda: run(parse_arguments(argv)))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the program quietly
    sys.exit(main())
