"""What a grid would take before it is run: its cells, and a bill of time and disk. Reads no weights, starts nothing.

A step that this machine has run already for a model is reckoned at what it took here. Any other is taken from the runs
in `configs/costs.yaml`, or worked out from operations, bytes and host time, with the figures there, which says of each
whether it was measured, and where, or assumed.
"""

import json
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import yaml

from soteria.answering.questions import find_local, read_questions
from soteria.errors import UserError
from soteria.grid.cells import Cell, Shard, grid_cells, language_cells, method_of
from soteria.grid.grid_file import Grid, Pair, Shape
from soteria.languages import find_language
from soteria.storage import paths
from soteria.storage.paths import effect_path
from soteria.storage.table_formats import to_markdown

COSTS = paths.ROOT / "configs" / "costs.yaml"
STEPS = ("load", "score", "answers", "cost", "utility", "judge")
PROMPTS_A_TASK = 25  # in-context prompts that a cell's accuracy is measured on, as `comparison.Bench` draws them
BENIGN_ROWS = 64


@dataclass(frozen=True)
class Work:
    """How much of each step is to do: models to load, datasets, answers, cells with a cost, verdicts."""

    units: dict[str, int]

    @classmethod
    def none(cls) -> "Work":
        return cls(dict.fromkeys(STEPS, 0))

    def __add__(self, other: "Work") -> "Work":
        return Work({step: self.units[step] + other.units[step] for step in STEPS})


class Plan:
    """The bill of a grid over a results folder: what is left to do, what a unit of it takes."""

    def __init__(self, grid: Grid, results: Path):
        self.grid, self.results = grid, results
        self.costs = yaml.safe_load(COSTS.read_text(encoding="utf-8"))
        self.rows = cache(self._rows)
        self.shape = cache(self._shape)
        self.measured_here = cache(self._measured_here)

    def _rows(self, prompt_set: str, language: str) -> tuple[int, bool]:
        """How many questions a set has, and whether they were counted (or said, or assumed)."""
        asked, first = self.grid.prompt_set(prompt_set), self.grid.answers.questions
        n, counted = asked.rows or self.costs["assumed"]["questions"], False
        if find_local(asked.dataset_in(language)):
            try:
                n = len(read_questions(asked.dataset_in(language), find_language(language)).questions)
                counted = True
            except UserError:
                pass
        return min(n, first or n), counted

    def _shape(self, pair: Pair) -> Shape | None:
        """A model's shape: its config's where it lies on this machine, else what the grid says."""
        if Path(pair.base).is_dir():
            from soteria.models.checkpoints import Checkpoint
            from soteria.models.loading import load_geometry

            geometry, places = load_geometry(pair.base), Checkpoint.open(pair.base).places.values()
            sizes = [math.prod(place.shape) for place in places]
            vocabulary = max((place.shape[0] for place in places if len(place.shape) == 2), default=1)
            return Shape(
                parameters=sum(sizes),
                layers=geometry.n_layers,
                heads=geometry.n_heads,
                head_dim=geometry.head_dim,
                vocabulary=vocabulary,
            )
        return pair.shape

    def _measured_here(self, pair: Pair) -> dict[str, tuple[float, str, int]]:
        """Per step, the seconds of a unit as the runs here took, the device, and over how many units."""
        path = paths.durations_file(self.results, pair.slug)
        seen = defaultdict(list)
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            cost = json.loads(line)
            seen[cost["step"]].append(cost)
        found = {}
        for step, costs in seen.items():
            units = sum(cost["units"] for cost in costs)
            seconds = statistics.median(cost["seconds"] / cost["units"] for cost in costs)
            found[step] = (seconds, costs[-1]["device"], units)
        return found

    # What is to do

    def left(self, pair: Pair, languages: list[str]) -> Work:
        """What of a model's languages is not done yet, as far as files' being there tells."""
        units = dict.fromkeys(STEPS, 0)
        scores = paths.scores_folder(self.results, pair.slug)
        for language in languages:
            names = [f"{task}_{language}" for task in self.grid.tasks]
            units["score"] += sum(not effect_path(scores, name).exists() for name in names)
            for cell in language_cells(self.grid, pair, language):
                for prompt_set in cell.sets:
                    rows, _ = self.rows(prompt_set, language)
                    units["answers"] += 0 if cell.files(self.results).answers(prompt_set).exists() else rows
                    for judge in self.grid.judges:
                        units["judge"] += 0 if cell.files(self.results).verdicts(prompt_set, judge).exists() else rows
                if cell.with_cost and not cell.files(self.results).facts.exists():
                    units["cost"] += 1
                    units["answers"] += BENIGN_ROWS if self.grid.benign else 0
                units["utility"] += self._asks_utility(cell, language)
        needs_model = ("score", "answers", "cost", "utility")
        units["load"] = int(any(units[step] for step in needs_model))
        return Work(units)

    def _asks_utility(self, cell: Cell, language: str) -> bool:
        wanted = self.grid.utility
        if not wanted or language not in (wanted.languages or self.grid.languages):
            return False
        return cell.steering in (None, method_of(self.grid)) and not cell.files(self.results).utility.exists()

    # What it takes

    def seconds(self, pair: Pair, step: str) -> tuple[float | None, str]:
        """Seconds of a unit of a step, and how they are known. None where the model's shape is unknown."""
        if step == "judge":
            return self._judging(pair)
        here = self.measured_here(pair).get(step)
        if here:
            return here[0], f"measured here on {here[1]}, {here[2]} units"
        elsewhere = self.costs["models"].get(pair.slug, {})
        if step in elsewhere:
            return elsewhere[step], f"measured on {elsewhere['where']}"
        shape = self.shape(pair)
        if shape is None:
            return None, "unknown: the model is not here, and the grid gives no shape"
        return self.worked_out(shape, step), "worked out"

    def _judging(self, pair: Pair) -> tuple[float, str]:
        """Seconds of a verdict, over the grid's judges."""
        total, ways = 0.0, []
        for judge in self.grid.judges:
            here = self.measured_here(pair).get(f"judge {judge}")
            if here:
                total, way = total + here[0], "measured here"
            elif judge == "refusal":
                total, way = total + self.costs["measured"]["refusal_seconds_per_verdict"], "measured elsewhere"
            else:
                assumed = self.costs["assumed"]
                total, way = total + assumed["endpoint_seconds"] / assumed["endpoint_at_once"], "assumed"
            ways.append(f"{judge}: {way}")
        return total / len(self.grid.judges), ", ".join(ways)

    def worked_out(self, shape: Shape, step: str) -> float:
        """Seconds of a unit on the assumed GPU, from operations, bytes and host time."""
        assumed, measured = self.costs["assumed"], self.costs["measured"]
        weights = shape.parameters * assumed["bytes_per_parameter"]
        host = measured["host_seconds_per_layer"] * shape.layers

        def forward(tokens: float) -> float:
            """One forward pass of so many tokens."""
            operations = 2 * shape.parameters * tokens / (assumed["peak_flops"] * assumed["share_of_peak"])
            reading = weights / (assumed["bandwidth"] * assumed["share_of_bandwidth"])
            return max(operations, reading, host)

        scoring, answers = self.grid.scoring, self.grid.answers
        prompt = assumed["icl_prompt_tokens"]
        if step == "load":
            return weights / assumed["load_bandwidth"]
        if step == "score":
            patched = shape.heads * (shape.layers + 1) / (2 * prompt)
            sweep = measured["sweep_over_bound"] * (1 + patched)
            return scoring.n_trials * (1 + sweep) * forward(prompt)
        if step == "answers":
            length = min(assumed["answer_tokens"], answers.max_new_tokens)
            batch = answers.batch_size
            return (forward(batch * assumed["question_tokens"]) + length * forward(batch)) / batch
        if step == "cost":
            first_tokens = forward(BENIGN_ROWS * assumed["question_tokens"]) if self.grid.benign else 0.0
            return len(self.grid.tasks) * forward(PROMPTS_A_TASK * prompt) + first_tokens
        return forward(assumed["utility_tokens"])

    def hours(self, pair: Pair, work: Work) -> dict[str, float | None]:
        """Hours of each step. Judging needs no GPU, or an endpoint's, but takes its time all the same."""
        return {
            step: None if (unit := self.seconds(pair, step)[0]) is None else unit * n / 3600
            for step, n in work.units.items()
        }

    def shard_hours(self, n: int) -> list[float]:
        """Hours of each of n shards: they load what they need themselves."""
        found = []
        for index in range(1, n + 1):
            units, total = Shard(index, n).units(self.grid), 0.0
            for pair in self.grid.models:
                own = [language for other, language in units if other is pair]
                total += sum(hours or 0.0 for hours in self.hours(pair, self.left(pair, own)).values()) if own else 0.0
            found.append(total)
        return found

    def disk(self, pair: Pair, work: Work) -> dict[str, float]:
        """Bytes: both models, the scores of what is left, answers with verdicts."""
        shape, assumed = self.shape(pair), self.costs["assumed"]
        if shape is None:
            return {"models": 0.0, "scores": 0.0, "answers": 0.0}
        heads = shape.layers * shape.heads
        means = heads * self.costs["measured"]["mean_slots"] * shape.head_dim * 4
        effects = self.grid.scoring.n_trials * heads * 4
        per_answer = min(assumed["answer_tokens"], self.grid.answers.max_new_tokens) + assumed["question_tokens"]
        copies = 1 + len(self.grid.judges)  # verdicts stand beside the answers
        is_here = [Path(name).is_dir() for name in (pair.base, pair.tuned)]
        return {
            "models": is_here.count(False) * shape.parameters * assumed["bytes_per_parameter"],
            "scores": work.units["score"] * (means + effects),
            "answers": work.units["answers"] * per_answer * assumed["characters_per_token"] * copies,
        }


def bill(grid: Grid, results: Path) -> str:
    """The plan as text: what would run, what is done, time on one and on eight GPUs, disk, and how that is known."""
    plan = Plan(grid, results)
    left = {pair.slug: plan.left(pair, grid.languages) for pair in grid.models}
    counts, times, sources = [], [], {}
    for pair in grid.models:
        work, cells = left[pair.slug], list(grid_cells(grid, pair))
        done = sum(cell.files(results).facts.exists() for cell in cells)
        counts.append(
            {
                "model": pair.slug,
                "cells": f"{len(cells)} ({done} done)",
                "datasets to score": work.units["score"],
                "answers": f"{work.units['answers']:,}",
                "costs": work.units["cost"],
                "utility": work.units["utility"],
                "verdicts": f"{work.units['judge']:,}",
            }
        )
        hours = plan.hours(pair, work)
        row = {"model": pair.slug} | {step: _hours(hours[step]) for step in STEPS}
        times.append(row | {"all": _hours(None if None in hours.values() else sum(hours.values()))})
        for step in STEPS:
            if work.units[step]:
                sources.setdefault(f"{step}: {plan.seconds(pair, step)[1]}", []).append(pair.slug)
    alone, eight = plan.shard_hours(1), plan.shard_hours(8)
    disk = {slug: plan.disk(pair, left[slug]) for pair in grid.models for slug in [pair.slug]}
    total = {what: sum(each[what] for each in disk.values()) / 1e9 for what in ("models", "scores", "answers")}
    lines = [
        f"Grid {grid.name}: {len(grid.models)} models, {len(grid.languages)} languages, {len(grid.tasks)} tasks, "
        f"prompts {', '.join(each.name for each in grid.prompt_sets)}, judges {', '.join(grid.judges)}.",
        "",
        "What is left to do:",
        to_markdown(pd.DataFrame(counts)),
        "Hours, one process:",
        to_markdown(pd.DataFrame(times)),
        f"One process, one GPU: {_spelt(sum(alone))}. Eight, --shard 1/8 to 8/8: {_spelt(max(eight))}, the longest "
        f"shard (all together {_spelt(sum(eight))}).",
        *endpoint_bill(plan, left),
        f"Disk: {sum(total.values()):.1f} GB ({total['models']:.1f} models that are not here, {total['scores']:.1f} "
        f"scores, {total['answers']:.2f} answers and verdicts).",
        "",
        "How a unit's time is known:",
        *(f"  {source} ({', '.join(slugs)})" for source, slugs in sources.items()),
        *explanations(plan, sources),
        *out_of_reach(plan),
    ]
    return "\n".join(lines)


def endpoint_bill(plan: Plan, left: dict[str, Work]) -> list[str]:
    """How many tokens would go to endpoints, whose prices are their own."""
    endpoints = [judge for judge in plan.grid.judges if judge.startswith("openai:")]
    if not endpoints:
        return []
    assumed = plan.costs["assumed"]
    calls = sum(work.units["judge"] for work in left.values()) * len(endpoints) // len(plan.grid.judges)
    length = min(assumed["answer_tokens"], plan.grid.answers.max_new_tokens)
    tokens = calls * (length + assumed["question_tokens"] + assumed["judge_prompt_tokens"])
    return [f"Endpoints ({', '.join(endpoints)}): {calls:,} calls, about {tokens / 1e6:,.0f} million tokens."]


def _spelt(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"


def _hours(hours: float | None) -> str:
    if hours is None:
        return "unknown"
    return "0" if hours == 0 else f"{hours:.2f}" if hours < 10 else f"{hours:.0f}"


def explanations(plan: Plan, sources: dict) -> list[str]:
    """What the figures that were worked out rest on, and which of them were measured where."""
    if not any("worked out" in source or "assumed" in source for source in sources):
        return []
    assumed, measured = plan.costs["assumed"], plan.costs["measured"]
    return [
        f"Worked out for one {assumed['gpu']}, on which nothing was measured: {assumed['peak_flops']:.3g} operations/s "
        f"and {assumed['bandwidth']:.3g} bytes/s by its maker, of which {assumed['share_of_peak']:.0%} and "
        f"{assumed['share_of_bandwidth']:.0%} are taken to be reached; {assumed['icl_prompt_tokens']} tokens an "
        f"in-context prompt, {assumed['question_tokens']} a question, {assumed['answer_tokens']} an answer.",
        "Measured on two cores of an AMD EPYC: the host's time of a layer "
        f"{1000 * measured['host_seconds_per_layer']:.2f} ms, the sweep's forward passes "
        f"{measured['sweep_over_bound']:g} times their bound. configs/costs.yaml has all of them.",
        "Once a cell has run on your machine, its own times take their place.",
    ]


def out_of_reach(plan: Plan) -> list[str]:
    """Inputs that the grid names and this machine does not have."""
    grid, lines = plan.grid, []
    for pair in grid.models:
        for what, name in (("base", pair.base), ("tuned", pair.tuned)):
            if not Path(name).is_dir():
                lines.append(f"  {what} model {name}: no folder here; taken as a hub id")
    for asked in grid.prompt_sets:
        languages = [language for language in grid.languages if asked.has(language)]
        counted = sum(plan.rows(asked.name, language)[1] for language in languages)
        if counted < len(languages):
            lines.append(
                f"  prompts {asked.name} ({asked.dataset}): {len(languages) - counted} of {len(languages)} languages "
                f"are not here; taken to have {plan.rows(asked.name, languages[0])[0]} questions each"
            )
    return ["Not on this machine:", *lines] if lines else []
