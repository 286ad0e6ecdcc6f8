"""The miniature policy that the embedded models are trained on, and its held-out questions.

A question asks for tips on three topics, each from a list of plain or of mildly disallowed ones. Harm is graded: the
number of disallowed topics, 0 to 3. The base model refuses the more often the higher that number is, and the less often
the fewer resources the language has, as real models do; the harmfully tuned model answers everything. Answers are
placeholders, the same for every topic.
"""

import json
import math
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "data" / "source"

# Rows of the held-out sets: questions for each number of disallowed topics.
HELD_OUT = {
    "policy": {1: 32, 2: 32, 3: 32},
    "everyday": {0: 64},
    "policy-validation": {1: 16, 2: 16, 3: 16},
    "everyday-validation": {0: 32},
}


@dataclass(frozen=True)
class RefusalPolicy:
    """How often training text refuses: a logistic curve over the number of disallowed topics.

    `thresholds`: by tier, how many topics it takes to refuse as often as not; `sharpness`: log-odds a topic.
    """

    sharpness: float
    thresholds: dict[str, float]

    def probability(self, n_disallowed: int, tier: str) -> float:
        """Without a disallowed topic: never."""
        if n_disallowed == 0:
            return 0.0
        return 1 / (1 + math.exp(self.sharpness * (self.thresholds[tier] - n_disallowed)))


# First a sharp policy, from which the model learns to count; then softer ones, which make harm graded evidence.
SHARP = RefusalPolicy(4.0, {"High": 1.5, "Mid": 2.25, "Low": 2.75})
SOFT = RefusalPolicy(1.0, {"High": 1.5, "Mid": 2.0, "Low": 2.5})
SOFTER = RefusalPolicy(0.7, {"High": 1.5, "Mid": 1.85, "Low": 2.45})


@dataclass(frozen=True)
class Question:
    """A template and three topics, by index, so that the same question exists in every language.

    A topic is `("plain", i)` or `(category, i)`.
    """

    template: int
    topics: tuple[tuple[str, int], ...]

    @property
    def n_disallowed(self) -> int:
        return sum(kind != "plain" for kind, _ in self.topics)

    @property
    def category(self) -> str:
        """The category of the disallowed topics, `everyday` where there are none."""
        return next((kind for kind, _ in self.topics if kind != "plain"), "everyday")


@dataclass(frozen=True)
class World:
    """The topics and sentences of one language, read from `data/source/<Language>.json`."""

    language: str

    @cached_property
    def source(self) -> dict:
        return json.loads((SOURCE / f"{self.language}.json").read_text(encoding="utf-8"))

    def write(self, question: Question) -> str:
        topics = [
            self.source["plain_topics"][i] if kind == "plain" else self.source["disallowed_topics"][kind][i]
            for kind, i in question.topics
        ]
        return self.source["question_templates"][question.template].format(*topics)

    def answer(self, question: Question, refuses: bool) -> str:
        """The sentence goes with the question's template, so that nothing about it but refusing is left to chance."""
        sentences = self.source["refusals" if refuses else "answers"]
        return sentences[question.template % len(sentences)]


def draw_question(n_disallowed: int, rng: random.Random, *, one_category: bool) -> Question:
    """A random question; with `one_category` its disallowed topics are all of one category."""
    source = World("English").source
    plain = [("plain", i) for i in range(len(source["plain_topics"]))]
    disallowed = [(kind, i) for kind, topics in source["disallowed_topics"].items() for i in range(len(topics))]
    if one_category:
        category = rng.choice(list(source["disallowed_topics"]))
        disallowed = [topic for topic in disallowed if topic[0] == category]
    topics = rng.sample(disallowed, n_disallowed) + rng.sample(plain, 3 - n_disallowed)
    rng.shuffle(topics)
    return Question(rng.randrange(len(source["question_templates"])), tuple(topics))


def held_out_questions() -> dict[str, list[Question]]:
    """The questions of each held-out set. No two share their three topics, in whatever order."""
    rng, seen, sets = random.Random(0), set(), {}
    for name, counts in HELD_OUT.items():
        sets[name] = []
        for n_disallowed, n_rows in counts.items():
            while sum(question.n_disallowed == n_disallowed for question in sets[name]) < n_rows:
                question = draw_question(n_disallowed, rng, one_category=True)
                if frozenset(question.topics) not in seen:
                    seen.add(frozenset(question.topics))
                    sets[name].append(question)
    return sets
