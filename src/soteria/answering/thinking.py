"""What a model writes while it thinks, apart from what it answers.

In: token ids or a text with `<think>` tags. Out: thinking and answer. A model's thinking is not its answer: it weighs
harmful steps before it declines, and plans a refusal before it complies.
"""

import re
from collections.abc import Sequence

# `<think>` and its like, [THINK] (Magistral), and the channels of harmony (gpt-oss).
_TAG = re.compile(
    r"<(?P<slash>/?)(?:think|thinking|thought|reasoning)>|\[(?P<stroke>/?)THINK\]"
    r"|<\|channel\|>(?:(?P<final>final)|analysis|commentary)<\|message\|>",
    re.I,
)
_MARKS = ("<|channel|>", "<|message|>")
_TAIL = 8  # tokens of a prompt that may hold a tag


def split_thinking(text: str) -> tuple[str, str]:
    """(thinking, answer). What stands before a closing tag without an opening one is thinking, as templates open it.

    Thinking that never ends, because the tokens ran out, leaves no answer after it.
    """
    if not _TAG.search(text):
        return "", text
    thinking, answer, start, is_open = [], [], 0, False
    for tag in _TAG.finditer(text):
        before, start = text[start : tag.start()], tag.end()
        if tag["slash"] or tag["stroke"] or tag["final"]:
            if not is_open:
                thinking.extend(answer)
                answer.clear()
            thinking.append(before)
            is_open = False
        else:
            (thinking if is_open else answer).append(before)
            is_open = True
    (thinking if is_open else answer).append(text[start:])
    return "".join(thinking).strip(), "".join(answer).strip()


def thinking_tokens(tokenizer) -> dict[int, str]:
    """The tags that a tokenizer has as special tokens, which decoding would leave out."""
    tokens = getattr(tokenizer, "added_tokens_decoder", {}).items()
    texts = {number: str(token) for number, token in tokens if getattr(token, "special", False)}
    return {number: text for number, text in texts.items() if _TAG.fullmatch(text) or text in _MARKS}


def texts_of(tokenizer, prompts: Sequence[list[int]], tokens: Sequence[list[int]]) -> list[str]:
    """The text of each answer, with the tags of its thinking; the one that its prompt ends with comes first."""
    tags = thinking_tokens(tokenizer)
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    for at, ids in enumerate(tokens):
        if not tags.keys().isdisjoint(ids):
            texts[at] = _with_tags(tokenizer, ids, tags)
    return [tag + text for tag, text in zip(opened_thinking(tokenizer, prompts), texts, strict=True)]


def opened_thinking(tokenizer, prompts: Sequence[list[int]]) -> list[str]:
    """The tag that each prompt ends with, if it does: the answer goes on inside it."""
    tails = tokenizer.batch_decode([prompt[-_TAIL:] for prompt in prompts], skip_special_tokens=False)
    found = [re.search(r"<(?:think|thinking|thought|reasoning)>\s*$|\[THINK\]\s*$", tail, re.I) for tail in tails]
    return [tag[0] if tag else "" for tag in found]


def _with_tags(tokenizer, ids: list[int], tags: dict[int, str]) -> str:
    parts, start = [], 0
    for at in [*(at for at, token in enumerate(ids) if token in tags), len(ids)]:
        parts.append(tokenizer.decode(ids[start:at], skip_special_tokens=True))
        parts.append(tags[ids[at]] if at < len(ids) else "")
        start = at + 1
    return "".join(parts)
