"""Ask a vision-language model about images, from files or URLs: one question, or a chat.

The model is a directory that convert_vision_model.py wrote, an unconverted Hugging Face one, or a hub name. Sampling is greedy
unless --temperature says otherwise.
"""

import argparse
import contextlib
import io
import shlex
import sys
from pathlib import Path

from convert_model import ConversionError, Parser, find_source, read_checkpoint, shorten
from convert_vision_model import adapted, load_processor, load_vision_model
from convert_vision_model import main as run_script

EXAMPLES = """examples:
  uv run python utils/inference_vision.py --model qwen-vl-4bit --image chart.png --prompt "What does this chart show?"
  uv run python utils/inference_vision.py --model qwen-vl-4bit --chat"""
COMMANDS = "Commands: image PATH (or a URL; several may follow each other), clear, quit. Ctrl-C ends an answer, Ctrl-D leaves."


class InferenceError(ConversionError):
    """One line for stderr, with the exit status."""


def read_image(source):
    """A path, file:// or http(s):// URL -> the RGB image, turned the way the camera was held."""
    import requests
    from PIL import Image, ImageOps

    try:
        if source.startswith(("http://", "https://")):
            # Some sites refuse a client that does not name itself.
            response = requests.get(source, timeout=30, headers={"User-Agent": "mlx-grpo"})
            response.raise_for_status()
            file = io.BytesIO(response.content)
        else:
            file = Path(source.removeprefix("file://")).expanduser()
        return ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    except Image.UnidentifiedImageError:
        raise InferenceError(f"Cannot read image {source}: it is in no image format that Pillow knows", 2) from None
    # SyntaxError is what Pillow says of a broken PNG.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or shorten(str(error))
        raise InferenceError(f"Cannot read image {source}: {reason}", 2) from error


def load(args):
    """(model, processor) with the weights in memory."""
    source = find_source(args.model, args.revision)
    read_checkpoint(source)
    with adapted(source) as (directory, config):
        model = load_vision_model(directory, config, args.model, args.trust_remote_code)
        processor = load_processor(directory, args.model, getattr(model.config, "eos_token_id", None), args.trust_remote_code)
    return model, processor


class Conversation:
    """The messages so far and their images, in the order in which the prompt shows them."""

    def __init__(self, model, processor, args):
        self.model, self.processor, self.args = model, processor, args
        self.clear()

    def clear(self):
        """Forget everything but the system message."""
        from mlx_vlm.generate import PromptCacheState

        self.messages = [{"role": "system", "content": self.args.system}] if self.args.system else []
        self.images, self.waiting, self.cache = [], [], PromptCacheState()

    def ask(self, question, stream):
        """The answer to `question` and the images that wait for it; a failure leaves the conversation as it was."""
        from jinja2 import TemplateError

        content = [{"type": "image"} for _ in self.waiting] + [{"type": "text", "text": question}]
        messages, images = [*self.messages, {"role": "user", "content": content}], self.images + self.waiting
        parts = []
        try:
            self.generate(messages, images, parts, stream)
        except KeyboardInterrupt:
            self.forget_cache()
            if not self.args.chat:
                raise
        except (ValueError, RuntimeError, TemplateError) as error:
            self.forget_cache()
            raise InferenceError(f"No answer: {shorten(str(error))}") from error
        answer = "".join(parts)
        if stream:
            print()
        if parts:
            self.messages = [*messages, {"role": "assistant", "content": answer}]
            self.images, self.waiting = images, []
        return answer

    def generate(self, messages, images, parts, stream):
        """Append the answer's pieces to `parts` as they come."""
        from mlx_vlm.generate import stream_generate
        from mlx_vlm.prompt_utils import apply_chat_template

        args = self.args
        prompt = apply_chat_template(self.processor, self.model.config, messages)
        # top_k: where it is left out, mlx-vlm takes the model's own, and Qwen2-VL's is 1: greedy at any temperature.
        sampling = dict(temperature=args.temperature, top_p=args.top_p, top_k=0)
        for result in stream_generate(
            self.model, self.processor, prompt, image=images, max_tokens=args.max_tokens, prompt_cache_state=self.cache, **sampling
        ):
            parts.append(result.text)
            if stream:
                print(result.text, end="", flush=True)
        if result.finish_reason == "length":
            print(f"{'\n' if stream else ''}[stopped at --max-tokens {args.max_tokens}]", file=sys.stderr)
        if args.verbose:
            print(
                f"[{result.prompt_tokens} prompt tokens ({result.cached_tokens} cached) at {result.prompt_tps:.0f}/s, "
                f"{result.generation_tokens} tokens at {result.generation_tps:.1f}/s, peak {result.peak_memory:.2f} GB]", file=sys.stderr,
            )  # fmt: skip


def add_images(conversation, text):
    """The images named after `image`: one path as it stands, spaces and all, or several in shell quoting."""
    sources = [text]
    if not Path(text).expanduser().exists():
        with contextlib.suppress(ValueError):  # a lone quote
            sources = shlex.split(text)
    if not sources:
        raise InferenceError("Which image? image PATH", 2)
    conversation.waiting += [read_image(source) for source in sources]
    print(f"{len(conversation.waiting)} image{'s' * (len(conversation.waiting) > 1)} for the next question")


def chat(conversation):
    """Read questions and commands until quit, Ctrl-D or the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (makes input() editable)
    print(COMMANDS)
    while True:
        try:
            line = input("> ").strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        command, _, rest = line.partition(" ")
        if line in ("quit", "exit", "q"):
            return
        try:
            if line == "clear":
                conversation.clear()
            elif command == "image":
                add_images(conversation, rest.strip())
            elif line:
                conversation.ask(line, stream=True)
        except InferenceError as error:
            print(error, file=sys.stderr)


def run(args):
    images = [read_image(source) for source in args.image]  # before the model, which takes longer
    model, processor = load(args)
    if args.seed is not None:
        import mlx.core as mx

        mx.random.seed(args.seed)
    conversation = Conversation(model, processor, args)
    conversation.waiting += images
    if args.prompt is not None:
        answer = conversation.ask(args.prompt, stream=args.stream or args.chat)
        if not (args.stream or args.chat):
            print(answer)
    if args.chat:
        chat(conversation)


def number(kind, low, high, what):
    """An argparse type: `kind` within [low, high]."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return value

    parse.__name__ = kind.__name__
    return parse


def parse_args(argv=None):
    parser = Parser(description=__doc__.split("\n\n")[0], epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", "--model-path", default="mlx_model", help="directory or hub name (default: mlx_model, where the converter writes)")
    add("--image", action="extend", nargs="+", default=[], metavar="PATH", help="image file or URL; several, or the flag several times")
    add("--prompt", help="the question; with --chat the first one")
    add("--chat", action="store_true", help="go on asking; `image PATH` adds an image, `clear` starts anew, `quit` leaves")
    add("--system", help="system message")
    add("--stream", action="store_true", help="print the answer as it is made (--chat always does)")
    add("--max-tokens", type=number(int, 1, 10**9, "a positive number"), default=512, help="longest answer (default: 512)")
    add("--temperature", type=number(float, 0, 100, "0 or more"), default=0.0, help="0 takes the likeliest token (default)")
    add("--top-p", type=number(float, 1e-6, 1, "within (0, 1]"), default=1.0, help="sample from the likeliest tokens of this mass (default: 1)")
    add("--seed", type=int, help="makes sampling repeatable")
    add("--revision", help="branch, tag or commit of a hub model")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with the model or its processor")
    add("--verbose", action="store_true", help="also print speed and memory, the libraries' warnings and the traceback of a failure")
    args = parser.parse_args(argv)
    if args.prompt is None and not args.chat:
        parser.error("Nothing to do: give --prompt or --chat")
    return args


def main(argv=None):
    return run_script(argv, parse_args, run)


if __name__ == "__main__":
    sys.exit(main())
