"""nanochat's tokenizer.pkl, a pickled tiktoken Encoding, read as data: nothing of it is executed."""

import io
import pickle
import pickletools

# What pickle.dump needs for a tiktoken Encoding (protocols 3 to 5). None of them calls or imports anything.
PICKLE_OPCODES = frozenset(
    "PROTO FRAME MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL EMPTY_TUPLE NEWOBJ "
    "EMPTY_DICT MARK SETITEM SETITEMS SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES BININT BININT1 "
    "BININT2 BUILD STOP".split()
)


class PickledEncoding:
    """Inert stand-in for tiktoken.core.Encoding in a pickle.

    The real one looks a string state up in a registry that downloads.
    """

    state = None

    def __setstate__(self, state):
        self.state = state


class EncodingUnpickler(pickle.Unpickler):
    def find_class(self, module, name):  # never calls super(), which would import
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise pickle.UnpicklingError(
                f"the pickle names {module}.{name}; only tiktoken.core.Encoding is admitted"
            )
        return PickledEncoding


def read_tokenizer_pickle(path):
    """A tokenizer.pkl -> {"name", "pat_str", "mergeable_ranks": {bytes: id}, "special_tokens": {str: id}},
    validated plain data. Nothing in the file is executed or imported. Raises ValueError with the reason."""

    def check(ok, reason):
        if not ok:
            raise ValueError(reason)

    with open(path, "rb") as file:
        data = file.read(2**26 + 1)
    check(len(data) <= 2**26, "the file is larger than 64 MiB")
    for op, arg, _ in pickletools.genops(data):
        check(
            op.name in PICKLE_OPCODES,
            f"the pickle has opcode {op.name}, which plain tokenizer data does not need",
        )
        # The memo is allocated up to its index.
        check(op.name != "LONG_BINPUT" or arg <= len(data), "the pickle's memo index is out of range")
    try:
        found = EncodingUnpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, TypeError, AttributeError, LookupError) as error:
        # What a malformed pickle raises.
        raise ValueError(str(error)) from None
    state = found.state if type(found) is PickledEncoding else None
    check(
        type(state) is dict,
        "it holds no tiktoken Encoding with its data (a registered encoding's name is not enough)",
    )
    check(
        set(state) == {"name", "pat_str", "mergeable_ranks", "special_tokens"},
        "its fields are not those of an Encoding",
    )
    for field, limit in (("name", 256), ("pat_str", 8192)):
        check(
            type(state[field]) is str and 0 < len(state[field]) <= limit,
            f"{field} is no string of 1 to {limit} characters",
        )
    for field, kind in (("mergeable_ranks", bytes), ("special_tokens", str)):
        table = state[field]
        check(type(table) is dict and len(table) <= 2**20, f"{field} is no table of at most 2**20 tokens")
        check(
            all(type(t) is kind and 0 < len(t) <= 1024 for t in table),
            f"{field} has a token that is no short {kind.__name__}",
        )
        check(
            all(type(i) is int and 0 <= i < 2**20 for i in table.values()),
            f"{field} has an id that is no integer below 2**20",
        )
    ranks, special = state["mergeable_ranks"], state["special_tokens"]
    check(len({*ranks.values(), *special.values()}) == len(ranks) + len(special), "two tokens share one id")
    check(
        all(bytes([byte]) in ranks for byte in range(256)),
        "mergeable_ranks lacks some of the 256 single bytes",
    )
    return state
