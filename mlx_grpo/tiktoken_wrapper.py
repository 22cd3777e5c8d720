"""nanochat's tokenizer, kept as a pickle for tiktoken, behind the calls that mlx-lm and this project make of a tokenizer."""

import io
import pickle
import pickletools
import shutil
from pathlib import Path

# All that pickle.dump needs for a tiktoken Encoding (protocols 3 to 5): nothing that calls, extends or refers outside.
PICKLE_OPCODES = frozenset(
    "PROTO FRAME MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL EMPTY_TUPLE NEWOBJ EMPTY_DICT MARK SETITEM "
    "SETITEMS SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES BININT BININT1 BININT2 BUILD STOP".split())


class PickledEncoding:
    """Inert stand-in for tiktoken.core.Encoding in a pickle (the real one looks a string state up in a downloading registry)."""
    state = None

    def __setstate__(self, state):
        self.state = state


class EncodingUnpickler(pickle.Unpickler):
    def find_class(self, module, name):  # never calls super(), which would import
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise pickle.UnpicklingError(f"the pickle names {module}.{name}; only tiktoken.core.Encoding is admitted")
        return PickledEncoding


def read_tokenizer_pickle(path):
    """A tokenizer.pkl -> {"name", "pat_str", "mergeable_ranks": {bytes: id}, "special_tokens": {str: id}}, validated plain data.
    Nothing in the file is executed or imported. Raises ValueError with the reason."""
    def check(ok, reason):
        if not ok:
            raise ValueError(reason)

    with open(path, "rb") as file:
        data = file.read(2**26 + 1)
    check(len(data) <= 2**26, "the file is larger than 64 MiB")
    for op, arg, _ in pickletools.genops(data):
        check(op.name in PICKLE_OPCODES, f"the pickle has opcode {op.name}, which plain tokenizer data does not need")
        check(op.name != "LONG_BINPUT" or arg <= len(data), "the pickle's memo index is out of range")  # it is allocated
    try:
        found = EncodingUnpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, TypeError, AttributeError, LookupError) as error:  # the ways a malformed one fails
        raise ValueError(str(error)) from None
    state = found.state if type(found) is PickledEncoding else None
    check(type(state) is dict, "it holds no tiktoken Encoding with its data (a registered encoding's name is not enough)")
    check(set(state) == {"name", "pat_str", "mergeable_ranks", "special_tokens"}, "its fields are not those of an Encoding")
    for field, limit in (("name", 256), ("pat_str", 8192)):
        check(type(state[field]) is str and 0 < len(state[field]) <= limit, f"{field} is no string of 1 to {limit} characters")
    for field, kind in (("mergeable_ranks", bytes), ("special_tokens", str)):
        table = state[field]
        check(type(table) is dict and len(table) <= 2**20, f"{field} is no table of at most 2**20 tokens")
        check(all(type(t) is kind and 0 < len(t) <= 1024 for t in table), f"{field} has a token that is no short {kind.__name__}")
        check(all(type(i) is int and 0 <= i < 2**20 for i in table.values()), f"{field} has an id that is no integer below 2**20")
    ranks, special = state["mergeable_ranks"], state["special_tokens"]
    check(len({*ranks.values(), *special.values()}) == len(ranks) + len(special), "two tokens share one id")
    check(all(bytes([byte]) in ranks for byte in range(256)), "mergeable_ranks lacks some of the 256 single bytes")
    return state


class TiktokenTokenizerWrapper:
    """The tokenizer of a directory that has only tokenizer.pkl, with what mlx-lm and this script use of a tokenizer.

    Text is always ordinary text, as in nanochat: spelling a special token does not make one, and nothing is put in front.
    Special tokens come from apply_chat_template(tokenize=True) alone; its text form is for reading.
    For mlx-lm's generators: TokenizerWrapper(self, eos_token_ids=self.eos_token_ids)."""

    chat_template = "nanochat"  # mlx-lm only asks whether there is one
    clean_up_tokenization_spaces = False
    # The chat tokens in the order of a conversation, and what stands for them in a vocabulary without them.
    CHAT = {"<|bos|>": "", "<|user_start|>": "User: ", "<|user_end|>": "\n", "<|assistant_start|>": "Assistant: ", "<|assistant_end|>": "\n"}

    def __init__(self, path):
        """`path`: a tokenizer.pkl or its directory. Raises ValueError("Failed to load tiktoken tokenizer: REASON")."""
        self.path = Path(path) / "tokenizer.pkl" if Path(path).is_dir() else Path(path)
        try:
            import tiktoken

            state = read_tokenizer_pickle(self.path)  # which runs nothing of the pickle
            if state["name"] in tiktoken.list_encoding_names():
                raise ValueError(f"{state['name']!r} is the name of an encoding that tiktoken downloads")
            self.encoding = tiktoken.Encoding(**state)  # ValueError where pat_str is no regular expression
        except (ImportError, OSError, ValueError) as error:
            raise ValueError(f"Failed to load tiktoken tokenizer: {error}") from error
        self.name_or_path, self.special_tokens = str(self.path.parent), state["special_tokens"]
        # Latin-1 names every byte by one character, so that distinct tokens have distinct names.
        self.vocab = {token.decode("latin-1"): i for token, i in state["mergeable_ranks"].items()} | self.special_tokens
        self.id_to_token = {i: token for token, i in self.vocab.items()}
        self.id_to_bytes = {i: token for token, i in state["mergeable_ranks"].items()}
        self.id_to_bytes |= {i: token.encode() for token, i in self.special_tokens.items()}
        self.vocab_size = max(self.id_to_bytes) + 1
        self.all_special_tokens, self.all_special_ids = list(self.special_tokens), list(self.special_tokens.values())
        # nanochat stops at the end of the assistant's turn, and where a new document would begin.
        stops = [t for t in ("<|assistant_end|>", "<|endoftext|>", "<|bos|>") if t in self.special_tokens]
        self.eos_token = self.pad_token = stops[0] if stops else None
        self.bos_token = "<|bos|>" if "<|bos|>" in stops else None
        self.eos_token_ids = {self.special_tokens[t] for t in stops}
        self.eos_token_id = self.pad_token_id = self.special_tokens.get(self.eos_token)
        self.bos_token_id = self.special_tokens.get(self.bos_token)

    def __len__(self):
        return self.vocab_size

    def encode(self, text, add_special_tokens=True, **_):
        """Text -> ids. add_special_tokens changes nothing: nanochat adds none."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids, skip_special_tokens=False, **_):
        """Ids (list, array or one id) -> text; broken UTF-8 becomes U+FFFD, an id without a token (a padding row) nothing."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        skip = self.all_special_ids if skip_special_tokens else ()
        kept = [i for i in ([ids] if isinstance(ids, int) else ids) if i not in skip]
        return b"".join(self.id_to_bytes.get(i, b"") for i in kept).decode("utf-8", "replace")

    def get_vocab(self):
        return self.vocab

    def convert_tokens_to_ids(self, tokens):
        return self.vocab.get(tokens) if isinstance(tokens, str) else [self.vocab.get(token) for token in tokens]

    def convert_ids_to_tokens(self, ids):
        return self.id_to_token.get(ids) if isinstance(ids, int) else [self.id_to_token.get(i) for i in ids]

    def save_pretrained(self, directory, **_):
        """Copies tokenizer.pkl into `directory`."""
        target = Path(directory) / "tokenizer.pkl"
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.resolve() != self.path.resolve():
            shutil.copyfile(self.path, target)
        return (str(target),)

    def apply_chat_template(self, messages, tokenize=True, add_generation_prompt=None, continue_final_message=False, **_):
        """Messages -> ids (or text): <|bos|>, then <|user_start|>..<|user_end|><|assistant_start|>..<|assistant_end|> with a
        system message joined to the first user message; plain "User: ..", "Assistant: .." lines where these tokens are missing.
        add_generation_prompt: None means where the user spoke last. ValueError unless the roles alternate from user."""
        messages = [dict(message) for message in messages]
        if len(messages) > 1 and (messages[0]["role"], messages[1]["role"]) == ("system", "user"):
            system = messages.pop(0)
            messages[0]["content"] = system["content"] + "\n\n" + messages[0]["content"]
        pieces = [("<|bos|>", True)]  # (text, whether it is a special token)
        for i, message in enumerate(messages):
            role, content = ("user", "assistant")[i % 2], message["content"]
            if message["role"] != role:
                raise ValueError(f"Message {i} is from {message['role']} but should be from {role}")
            pieces.append((f"<|{role}_start|>", True))
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                tool = {"text": None, "python": "python", "python_output": "output"}[part["type"]]
                text = (part["text"], False)
                pieces += [(f"<|{tool}_start|>", True), text, (f"<|{tool}_end|>", True)] if tool else [text]
            pieces.append((f"<|{role}_end|>", True))
        if continue_final_message:
            pieces.pop()
        elif add_generation_prompt or (add_generation_prompt is None and messages and messages[-1]["role"] == "user"):
            if not messages or messages[-1]["role"] != "user":
                raise ValueError("A prompt for the assistant must end with a message from user")
            pieces.append(("<|assistant_start|>", True))
        if not self.CHAT.keys() <= self.special_tokens.keys():
            text = "".join(self.CHAT.get(piece, "") if special else piece for piece, special in pieces)
            return self.encode(text) if tokenize else text
        if not tokenize:
            return "".join(piece for piece, _ in pieces)
        return [i for piece, special in pieces for i in ([self.special_tokens[piece]] if special else self.encode(piece))]
