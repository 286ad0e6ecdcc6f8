"""How large a model may be: numbers in a config beyond any model are refused before one is built from them."""

import re

from soteria.errors import UserError

MOST_LAYERS, MOST_HEADS, MOST_WIDTH, MOST_VOCABULARY = 1_000, 10_000, 1_000_000, 10_000_000
MOST_POSITIONS = 20_000_000  # some models compute a table of them
# By how the keys of configs end.
_BOUNDS = {
    r"(layers?|blocks|depth)$": MOST_LAYERS,
    r"(heads?|experts)$": MOST_HEADS,
    r"(hidden_size|intermediate_size|head_dim|hidden_dim|ffn_dim|n_embd|n_inner|d_model|d_ff|d_kv)$": MOST_WIDTH,
    r"vocab_size$": MOST_VOCABULARY,
    r"(max_position_embeddings|n_positions|n_ctx|max_seq_len)$": MOST_POSITIONS,
    r"num_labels$": MOST_WIDTH,
}


def check_sizes(config: dict, name: str) -> None:
    """Raise UserError for a number beyond any model's in a config of the model `name`, or in one of its parts."""
    for key, value in config.items():
        if isinstance(value, dict):
            check_sizes(value, name)
        most = next((most for ending, most in _BOUNDS.items() if re.search(ending, str(key))), None)
        if most and isinstance(value, int) and value > most:
            raise UserError(
                f"the config of {name!r} has {key} {str(value)[:20]}, more than any model ({most:,}); "
                "copy or download it again"
            )
