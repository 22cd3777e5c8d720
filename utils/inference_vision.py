"""Ask a vision-language model about images, from files or URLs: one question, or a chat.

The model is a directory that convert_vision_model.py wrote, an unconverted Hugging Face one, or a hub name.
Answers go to stdout, everything else to stderr.
"""

import argparse
import contextlib
import io
import shlex
import signal
import sys
from pathlib import Path
from urllib.parse import unquote

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mlx_grpo.backends import use_fast_backend  # noqa: E402

if __name__ == "__main__":
    use_fast_backend()  # ahead of MLX: the first BLAS that is loaded is the one that it uses

from inference import DEFAULT_MODEL, add_sampling, ctrl_c_noted, number, write_out  # noqa: E402
from convert_model import ConversionError, Parser, find_source, read_checkpoint, shorten  # noqa: E402
from convert_vision_model import adapted, load_processor, load_vision_model, run_script  # noqa: E402

EXAMPLES = """examples:
  uv run python utils/inference_vision.py --model qwen-vl-4bit --image chart.png --prompt "What does it show?"
  uv run python utils/inference_vision.py --model qwen-vl-4bit --chat"""


class InferenceError(ConversionError):
    """One line for stderr, with the exit status."""


# --- Images -------------------------------------------------------------------------------------------------


def read_image(source):
    """A path, a file:// or an http(s):// URL -> the image in RGB, turned the way the camera was held."""
    import requests
    from PIL import Image, ImageOps

    try:
        file = Path(unquote(source[7:]) if source.startswith("file://") else source).expanduser()
        if source.startswith(("http://", "https://")):
            # Some sites refuse a client that does not name itself.
            response = requests.get(source, timeout=30, headers={"User-Agent": "mlx-grpo"})
            response.raise_for_status()
            file = io.BytesIO(response.content)
        return ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    except requests.RequestException as error:
        reason = (
            str(error)
            if isinstance(error, requests.HTTPError)
            else f"no answer from the server ({type(error).__name__})"
        )
        raise InferenceError(f"Cannot read image {source}: {shorten(reason)}") from error
    except Image.UnidentifiedImageError as error:
        raise InferenceError(
            f"Cannot read image {source}: not an image in a format Pillow knows; use PNG or JPEG", 2
        ) from error
    # SyntaxError is what Pillow says of a broken PNG.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InferenceError(
            f"Cannot read image {source}: {getattr(error, 'strerror', None) or shorten(str(error))}", 2
        ) from error


def read_images(text):
    """The images named after `image` in a chat: one path as it stands, or several in shell quoting."""
    sources = [text]
    if not Path(text).expanduser().exists():
        with contextlib.suppress(ValueError):  # a lone quote
            sources = shlex.split(text)
    if not text:
        raise InferenceError("Which image? Write: image PATH", 2)
    return [read_image(source) for source in sources]


# --- Answers ------------------------------------------------------------------------------------------------


def load(args):
    """(model, processor) with the weights in memory."""
    source = find_source(args.model, args.revision)
    read_checkpoint(source)
    with adapted(source) as (directory, config):
        model = load_vision_model(directory, config, args.model, args.trust_remote_code)
        processor = load_processor(
            directory, args.model, getattr(model.config, "eos_token_id", None), args.trust_remote_code
        )
    return model, processor


class Conversation:
    """The messages so far and their images, in the order in which the prompt shows them."""

    def __init__(self, model, processor, args):
        self.model, self.processor, self.args = model, processor, args
        self.clear()

    def clear(self):
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self.args.system}] if self.args.system else []
        self.images = []  # of the messages
        self.waiting = []  # for the next question
        self.forget_cache()

    def forget_cache(self):
        """mlx-vlm knows the cached prompt by its token ids, which are equal for two images of one size."""
        from mlx_vlm.generate import PromptCacheState

        self.cache = PromptCacheState()

    def ask(self, question, write, stopped=lambda: False):
        """Answer the question and the images that wait for it; `write` gets the text piece by piece."""
        from jinja2 import TemplateError

        content = [*({"type": "image"} for _ in self.waiting), {"type": "text", "text": question}]
        messages = [*self.messages, {"role": "user", "content": content}]
        images = self.images + self.waiting
        try:
            answer = self.generate(messages, images, write, stopped)
        except (ValueError, RuntimeError, TypeError, TemplateError) as error:
            # An image or a chat that the model does not take.
            self.forget_cache()
            self.waiting = []
            raise InferenceError(f"No answer: {shorten(str(error))}") from error
        if answer:
            self.messages = [*messages, {"role": "assistant", "content": answer}]
            self.images = images
            self.waiting = []
        return answer

    def generate(self, messages, images, write, stopped):
        from mlx_vlm.generate import stream_generate
        from mlx_vlm.prompt_utils import apply_chat_template

        args = self.args
        answer = ""
        prompt = apply_chat_template(self.processor, self.model.config, messages)
        for piece in stream_generate(
            self.model,
            self.processor,
            prompt,
            image=images,
            max_tokens=args.max_tokens,
            prompt_cache_state=self.cache,
            temperature=args.temperature,
            top_p=args.top_p,
            # Without top_k mlx-vlm takes the model's own, and Qwen2-VL's is 1: the likeliest token, always.
            top_k=0,
            skip_special_tokens=True,
        ):
            answer += piece.text
            write(piece.text)
            if stopped():
                self.forget_cache()  # it holds more than it says
                break
        self.speed = (
            f"prompt {piece.prompt_tokens} tokens ({piece.cached_tokens} from the cache), "
            f"{piece.prompt_tps:.1f} tokens/s; "
            f"generation {piece.generation_tokens} tokens, {piece.generation_tps:.1f} tokens/s; peak memory "
            f"{piece.peak_memory:.3f} GB"
        )
        return answer


def chat(conversation):
    """Questions and commands from the terminal until Ctrl-D, quit, exit or q."""
    with contextlib.suppress(ImportError):  # some Pythons are built without
        import readline  # noqa: F401  (input() then edits lines and keeps their history)

    if sys.stdin.isatty():
        print(
            "image PATH shows a file or URL, clear starts anew, Ctrl-C ends an answer, quit or Ctrl-D leaves",
            file=sys.stderr,
        )
    while True:
        try:
            line = input(">>> " if sys.stdin.isatty() else "").strip()
            if line in ("quit", "exit", "q"):
                return
            take_turn(conversation, line)
        except InferenceError as error:
            print(error, file=sys.stderr)
        except KeyboardInterrupt:  # at the prompt: a new line
            print()
        except EOFError:
            print()
            return


def take_turn(conversation, line):
    """One line of a chat: a command or a question."""
    command, _, rest = line.partition(" ")
    if line == "clear":
        conversation.clear()
    elif command == "image":
        conversation.waiting += read_images(rest.strip())
        print(f"Images for the next question: {len(conversation.waiting)}", file=sys.stderr)
    elif line:
        with ctrl_c_noted() as stopped:
            conversation.ask(line, write_out, stopped)
        finish(conversation, "\n")


def finish(conversation, rest):
    """The end of an answer, and under --verbose what it took."""
    write_out(rest)
    if conversation.args.verbose:
        print(conversation.speed, file=sys.stderr)


# --- Command line -------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(
        description=__doc__.split("\n\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help=f"local directory or hub name (default: {DEFAULT_MODEL})")
    add(
        "--image",
        action="extend",
        nargs="+",
        default=[],
        metavar="PATH",
        help="image file or URL; several, or the flag several times",
    )
    ways = parser.add_mutually_exclusive_group(required=True)
    ways.add_argument("--prompt", metavar="TEXT", help="answer this; - reads it from stdin")
    ways.add_argument(
        "--chat",
        action="store_true",
        help="talk in the terminal; image PATH adds an image, clear starts anew, quit leaves",
    )
    add("--stream", action="store_true", help="print the answer as it is written, as --chat always does")
    add("--system", "--system-prompt", metavar="TEXT", default="", help="system prompt (default: none)")
    add_sampling(add)
    add("--seed", metavar="N", type=number(int, 0), default=0, help="of the sampling (default: 0)")
    add("--revision", help="branch, tag or commit of a hub model")
    add(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model; only for authors you trust",
    )
    add(
        "--verbose",
        action="store_true",
        help="also speed and memory, the libraries' warnings and the traceback of a failure; on stderr",
    )
    args = parser.parse_args(argv)
    if args.model is None and not Path(DEFAULT_MODEL).is_dir():
        parser.error(
            f"no directory {DEFAULT_MODEL} here: name a model with --model, or make one with "
            "utils/convert_vision_model.py"
        )
    args.model = args.model or DEFAULT_MODEL
    return args


def run(args):
    import mlx.core as mx

    question = sys.stdin.read().removesuffix("\n") if args.prompt == "-" else args.prompt
    images = [read_image(source) for source in args.image]  # ahead of the model, which takes longer
    conversation = Conversation(*load(args), args)
    conversation.waiting = images
    mx.random.seed(args.seed)
    if args.chat:
        return chat(conversation)
    answer = conversation.ask(question, write_out if args.stream else lambda piece: None)
    finish(conversation, "\n" if args.stream else answer + "\n")


def main(argv=None):
    return run_script(parse_args(argv), run)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the program quietly
    sys.exit(main())
