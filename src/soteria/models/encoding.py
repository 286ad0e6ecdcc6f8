"""A text as the tokens that a model reads before it goes on: the one way in which all steps encode prompts."""

import logging
from collections.abc import Sequence

from soteria.errors import UserError

MANY_UNKNOWN, MOST_UNKNOWN = 0.1, 0.5  # shares of a set's tokens: worth a warning, and too many

_log = logging.getLogger(__name__)


def encode(tokenizer, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """A prompt's token ids, without the special tokens that some tokenizers put behind everything (EOS, SEP).

    Raises UserError for a tokenizer that puts others there.
    """
    ids = tokenizer(text, add_special_tokens=add_special_tokens).input_ids
    behind = _put_behind(tokenizer) if add_special_tokens else []
    if not {*behind} <= {*tokenizer.all_special_ids}:
        tokens = " ".join(map(repr, tokenizer.convert_ids_to_tokens(behind)))
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} adds tokens after the prompt ({tokens}), which are not "
            "special; its model cannot go on from there"
        )
    return ids[: len(ids) - len(behind)]


def _put_behind(tokenizer) -> list[int]:
    """The tokens that a tokenizer puts behind every text."""
    whole, plain = (tokenizer("a", add_special_tokens=adds).input_ids for adds in (True, False))
    starts = [at for at in range(len(whole)) if plain and whole[at : at + len(plain)] == plain]
    if starts:
        return whole[starts[-1] + len(plain) :]
    return whole[-1:] if whole[-1:] == [tokenizer.eos_token_id] else []


def check_known(tokenizer, name: str, texts: Sequence[str]) -> None:
    """Raise UserError if most of some texts' tokens are the tokenizer's unknown one, or if it has no tokens for them.

    Such texts read the same. A tokenizer without the letters of a script reads everything in it like that. Warns of
    texts that are read in part only, and as `warn_of_special`.
    """
    warn_of_special(tokenizer, name, texts)
    inputs = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    n_tokens, n_unknown = sum(map(len, inputs)), sum(ids.count(tokenizer.unk_token_id) for ids in inputs)
    found = f"{n_unknown} of {n_tokens} tokens unknown" if n_tokens else "no tokens"
    if texts and n_unknown >= MOST_UNKNOWN * n_tokens:
        raise UserError(f"the tokenizer of {name!r} cannot read these texts: {found}; use a model of their language")
    if n_unknown > MANY_UNKNOWN * n_tokens:
        _log.warning("the tokenizer of %r reads these texts in part only: %s", name, found)


def warn_of_special(tokenizer, name: str, texts: Sequence[str]) -> None:
    """Warn if data hold a special token's text: the tokenizer makes that token of it, which may end or begin a turn."""
    whole = "\0".join(texts)
    if held := [token for token in tokenizer.all_special_tokens if token.strip() and token in whole]:
        _log.warning("these texts hold %r, which the tokenizer of %r reads as a special token", held[0], name)
