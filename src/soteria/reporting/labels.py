"""The names that tables and figures share, and how both write a rate."""

# Which heads are steered.
BASE, METHOD = "base", "language-specific"
SHARED_TIER, SHARED_ALL = "shared by the tier", "universal"
TOP, RANDOM, BOTTOM, ALL_HEADS = "top heads", "random heads", "bottom heads", "all heads"
ALL = "all languages"
# What is compared along λ: how heads are ranked, or what is steered in place of ranked heads.
GIVEN = "given lists"
RANKINGS = {
    "first": "effect, first token",
    "whole": "effect, whole answer",
    "absolute": "absolute effect",
    "task_vector": "task vector",
    "safety": "safety",
    "random": RANDOM,
    "all_parameters": "all parameters",
}


def percent(value: float) -> str:
    """A share as a percentage with one decimal; none where it is exactly 0 or 1."""
    return f"{value:.0%}" if value in (0, 1) else f"{value:.1%}"
