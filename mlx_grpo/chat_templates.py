"""What a chat template may do to a chat: lose its system message, and take text for special tokens."""

import functools
import re


def system_in_first_user_message(messages: list[dict]) -> list[dict]:
    """The chat without its system message, which then stands at the head of what the user says first."""
    system, rest = messages[0]["content"], [dict(message) for message in messages[1:]]
    first = next((message for message in rest if message["role"] == "user"), None)
    if first is None:
        return messages
    first["content"] = f"{system}\n\n{first['content']}"
    return rest


@functools.lru_cache(maxsize=8)
def special_tokens(tokenizer) -> re.Pattern | None:
    """What finds the tokenizer's special tokens in a text; None where a text cannot hold one."""
    tokens = [
        token.content for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special
    ]
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None


def without_special_tokens(
    tokenizer, messages: list[dict], own_words: str
) -> tuple[list[dict], dict[str, str]]:
    """The chat with a private character for each special token that its texts spell, and what each means.

    Spelling a special token makes none, as in nanochat: a question may speak of <|im_end|> and does not end
    there. What the run's own words hold, such as a tag of the answer's form, stays a special token wherever
    it is written.
    """
    pattern = special_tokens(tokenizer)
    contents = "".join(message["content"] for message in messages)
    if pattern is None or not pattern.search(contents):
        return messages, {}
    unused = (chr(n) for n in range(0xF0000, 0xFFFFE) if chr(n) not in contents)
    marks = {
        token: next(unused)
        for token in sorted({found[0] for found in pattern.finditer(contents)})
        if token not in own_words
    }

    def marked(text: str) -> str:
        return pattern.sub(lambda found: marks.get(found[0], found[0]), text)

    chat = [{**message, "content": marked(message["content"])} for message in messages]
    return chat, {mark: token for token, mark in marks.items()}


def encode_chat(tokenizer, text: str, ordinary: dict[str, str]) -> list[int]:
    """Ids of a rendered chat. Its special tokens are read as such.

    ordinary: marks in the text, and what each stands for, which is read as ordinary text.
    """
    if not ordinary:
        return list(tokenizer.encode(text, add_special_tokens=False))
    parts = re.split(f"([{''.join(ordinary)}])", text)
    ids = [
        tokenizer.encode(ordinary.get(p, p), add_special_tokens=False, split_special_tokens=p in ordinary)
        for p in parts
        if p
    ]
    return [i for part in ids for i in part]
