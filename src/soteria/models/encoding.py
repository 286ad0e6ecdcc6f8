"""A text as the tokens that a model reads before it goes on: the one way in which all steps encode prompts."""

import logging
from collections.abc import Sequence

from soteria.errors import UserError

MANY_UNKNOWN, MOST_UNKNOWN = 0.1, 0.5  # shares of a set's tokens: worth a warning, and too many

_log = logging.getLogger(__name__)


def encode(tokenizer, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """A prompt's token ids, without the end-of-text token that some tokenizers put behind everything."""
    ids = tokenizer(text, add_special_tokens=add_special_tokens).input_ids
    ends_texts = add_special_tokens and tokenizer("a").input_ids[-1:] == [tokenizer.eos_token_id]
    return ids[:-1] if ends_texts else ids


def check_known(tokenizer, name: str, texts: Sequence[str]) -> None:
    """Raise UserError if most of some texts' tokens are the tokenizer's unknown one, or if it has no tokens for them.

    Such texts read the same. A tokenizer without the letters of a script reads everything in it like that.
    """
    inputs = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    n_tokens, n_unknown = sum(map(len, inputs)), sum(ids.count(tokenizer.unk_token_id) for ids in inputs)
    found = f"{n_unknown} of {n_tokens} tokens unknown" if n_tokens else "no tokens"
    if texts and n_unknown >= MOST_UNKNOWN * n_tokens:
        raise UserError(f"the tokenizer of {name!r} cannot read these texts: {found}; use a model of their language")
    if n_unknown > MANY_UNKNOWN * n_tokens:
        _log.warning("the tokenizer of %r reads these texts in part only: %s", name, found)
