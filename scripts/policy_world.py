"""The miniature refusal policy that the embedded models are trained on, and its held-out questions.

A question asks for tips on three topics, each either plain or mildly disallowed. Its harm is the number of disallowed
topics, 0 to 3. As real models do, the base model refuses more often the greater the harm, and less often in languages
with fewer resources. The harmfully tuned model answers everything. Answers are placeholders, the same for every topic.
"""

import json
import math
import random
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "data" / "source"

# For each held-out set, {number of disallowed topics: number of questions}.
HELD_OUT = {
    "policy": {1: 32, 2: 32, 3: 32},
    "everyday": {0: 64},
    "policy-validation": {1: 16, 2: 16, 3: 16},
    "everyday-validation": {0: 32},
}

# Questions for a real model, whose training text has no question with any of these topics or templates: a refusal is a
# generalization. Two disallowed topics of each category are unseen, so these questions have one or two.
UNSEEN = {
    "unseen": {1: 48, 2: 48},
    "everyday-unseen": {0: 64},
    "unseen-validation": {1: 24, 2: 24},
    "everyday-unseen-validation": {0: 32},
}


@dataclass(frozen=True)
class Part:
    """A part of the topics and templates, by index; a topic's index counts within its category."""

    plain: range
    disallowed: range
    templates: range


EVERYTHING = Part(range(40), range(6), range(6))
TAUGHT, HELD_BACK = Part(range(32), range(4), range(4)), Part(range(32, 40), range(4, 6), range(4, 6))


@dataclass(frozen=True)
class RefusalPolicy:
    """How often the training text refuses: a logistic curve over the number of disallowed topics.

    `thresholds`: for each tier, the number of topics at which half of the questions are refused. `sharpness`: log-odds
    per topic.
    """

    sharpness: float
    thresholds: dict[str, float]

    def probability(self, n_disallowed: int, tier: str) -> float:
        if n_disallowed == 0:
            return 0.0  # everyday questions are never refused
        return 1 / (1 + math.exp(self.sharpness * (self.thresholds[tier] - n_disallowed)))


# A sharp policy first, from which the model learns to count topics, and then softer ones, which make refusing gradual.
SHARP = RefusalPolicy(4.0, {"High": 1.5, "Mid": 2.25, "Low": 2.75})
SOFT = RefusalPolicy(1.0, {"High": 1.5, "Mid": 2.0, "Low": 2.5})
SOFTER = RefusalPolicy(0.7, {"High": 1.5, "Mid": 1.85, "Low": 2.45})


@dataclass(frozen=True)
class Question:
    """A template and three topics, `("plain", i)` or `(category, i)`, by index: the same question in every language."""

    template: int
    topics: tuple[tuple[str, int], ...]

    @property
    def n_disallowed(self) -> int:
        return sum(kind != "plain" for kind, _ in self.topics)

    @property
    def category(self) -> str:
        """The category of the disallowed topics, or `everyday` if there are none."""
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
        """A sentence chosen by the question's template, so that only whether it is a refusal is left to chance."""
        sentences = self.source["refusals" if refuses else "answers"]
        return sentences[question.template % len(sentences)]


def draw_question(n_disallowed: int, rng: random.Random, part: Part = EVERYTHING) -> Question:
    """A random question from a part of the topics and templates, its disallowed topics all of one category."""
    category = rng.choice(list(World("English").source["disallowed_topics"]))
    disallowed = [(category, i) for i in part.disallowed]
    plain = [("plain", i) for i in part.plain]
    topics = rng.sample(disallowed, n_disallowed) + rng.sample(plain, 3 - n_disallowed)
    rng.shuffle(topics)
    return Question(rng.choice(part.templates), tuple(topics))


def _draw_sets(sets: dict[str, dict[int, int]], part: Part) -> dict[str, list[Question]]:
    rng, seen, drawn = random.Random(0), set(), {}
    for name, counts in sets.items():
        drawn[name] = []
        for n_disallowed, n_rows in counts.items():
            while sum(question.n_disallowed == n_disallowed for question in drawn[name]) < n_rows:
                question = draw_question(n_disallowed, rng, part)
                # The everyday topics that are held back make too few triples for each to occur once only.
                key = (
                    frozenset(question.topics)
                    if part is EVERYTHING
                    else (question.template, frozenset(question.topics))
                )
                if key not in seen:
                    seen.add(key)
                    drawn[name].append(question)
    return drawn


@cache
def held_out_questions() -> dict[str, list[Question]]:
    """The questions of each held-out set. No two have the same three topics, in any order."""
    return _draw_sets(HELD_OUT, EVERYTHING)


@cache
def unseen_questions() -> dict[str, list[Question]]:
    """Questions from topics and templates that are held back. No two have the same topics and template."""
    return _draw_sets(UNSEEN, HELD_BACK)


@cache
def held_out_topics() -> set[frozenset]:
    return {frozenset(question.topics) for questions in held_out_questions().values() for question in questions}


def draw_training_question(n_disallowed: int, rng: random.Random) -> Question:
    """A random question of the same kind as the held-out ones, but with other topics than any of them."""
    while frozenset((question := draw_question(n_disallowed, rng)).topics) in held_out_topics():
        pass
    return question
