"""Estimate the work, hours and disk that running a grid would take.

In: the grid, the results folder (what is done, and how long steps took on this machine) and `configs/costs.yaml` (how
long they took elsewhere, and figures for estimating the rest, marked as measured or assumed). Loads no model.
"""

import math
import statistics
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import pandas as pd

from soteria.answering.question_files import find_local
from soteria.errors import UserError
from soteria.grid import durations
from soteria.grid.cells import Cell, Shard, grid_cells, language_cells
from soteria.grid.found import CellOnDisk, SubjectOnDisk
from soteria.grid.grid_file import Grid, Pair, Shape
from soteria.storage import paths
from soteria.storage.table_formats import to_markdown
from soteria.storage.yaml_files import read_yaml

COSTS = paths.ROOT / "configs" / "costs.yaml"
# How much of each step: models to load, datasets, answers, cells with a cost, measurements, verdicts.
STEPS = ("load", "score", "answers", "cost", "utility", "judge")
PROMPTS_PER_TASK = 25  # in-context prompts that the accuracy of a cell is measured on
HARMLESS_ROWS = 64
NOT_HERE, MISSING = "not here", "Not on this machine:"


class Plan:
    """What a grid still needs, given its results folder, and how long a unit of each step takes."""

    def __init__(self, grid: Grid, results: Path):
        self.grid, self.results = grid, results
        costs = read_yaml(COSTS, f"no {COSTS}; check the repository out again")
        self.measured, self.assumed, self.models = (costs[key] for key in ("measured", "assumed", "models"))
        self.rows, self.shape, self.measured_here = map(cache, (self._rows, self._shape, self._measured_here))
        self.subject = cache(lambda pair: SubjectOnDisk(grid, pair, results))
        self.on_disk = cache(lambda pair, cell: CellOnDisk(self.subject(pair), cell))
        # At most as many tokens as the grid allows.
        self.n_harmless = min(HARMLESS_ROWS, grid.answers.questions or HARMLESS_ROWS)
        self.answer_tokens = min(self.assumed["answer_tokens"], grid.answers.max_new_tokens)

    def _rows(self, prompt_set: str, language: str) -> tuple[int, str]:
        """The number of questions in a set, and why it is declared or assumed; empty where they were counted."""
        asked = self.grid.questions(prompt_set)
        n, why = asked.rows or self.assumed["questions"], NOT_HERE
        if find_local(asked.dataset_in(language)):
            try:
                n, why = len(asked.read(language).questions), ""
            except UserError as error:
                why = str(error)
        return min(n, self.grid.answers.questions or n), why

    def _shape(self, pair: Pair) -> Shape | None:
        """A model's shape: from its files if they are on this machine, else what the grid declares."""
        if not Path(pair.base).is_dir():
            return pair.shape
        from soteria.models.checkpoints import Checkpoint
        from soteria.models.loading import load_geometry

        geometry = load_geometry(pair.base)
        shapes = [place.shape for place in Checkpoint.open(pair.base).places.values()]
        return Shape(
            parameters=sum(map(math.prod, shapes)),
            layers=geometry.n_layers,
            heads=geometry.n_heads,
            head_dim=geometry.head_dim,
            vocabulary=max((shape[0] for shape in shapes if len(shape) == 2), default=1),
        )

    def _measured_here(self, pair: Pair) -> dict[str, tuple[float, str, int]]:
        """Per step that ran on this machine: median seconds per unit, the latest device, the number of units."""
        seen = defaultdict(list)
        for cost in durations.noted(self.results, pair.slug):
            seen[cost["step"]].append((cost["seconds"] / cost["units"], cost["device"], cost["units"]))
        return {
            step: (statistics.median(seconds), devices[-1], sum(units))
            for step, costs in seen.items()
            for seconds, devices, units in [zip(*costs, strict=True)]
        }

    def left(self, pair: Pair, languages: list[str]) -> dict[str, int]:
        """Units of each step that a model's languages still need: what is missing, or made from other inputs."""
        units, grid = dict.fromkeys(STEPS, 0), self.grid
        for language in languages:
            units["score"] += sum(not path.exists() for path in grid.score_files(self.results, pair, language))
            for at, cell in enumerate(language_cells(grid, pair, language)):
                found = self.on_disk(pair, cell)
                for name in found.sets:
                    is_harmful, most = name in cell.sets, cell.n_questions or math.inf
                    rows = min(self.rows(name, language)[0] if is_harmful else self.n_harmless, most)
                    units["answers"] += rows if found.answers(name) is None else 0
                    units["judge"] += rows * sum(
                        found.verdicts(name, judge) is None for judge in grid.judges if is_harmful
                    )
                units["cost"] += cell.with_cost and not found.facts
                # A language's first two cells are the base and the method.
                asks_utility = at < 2 and grid.utility and language in (grid.utility.languages or grid.languages)
                units["utility"] += bool(asks_utility and not found.utility)
        units["load"] = int(any(units[step] for step in ("score", "answers", "cost", "utility")))
        return units

    def is_done(self, pair: Pair, cell: Cell) -> bool:
        """Whether nothing of a cell is left to answer, measure or judge."""
        found = self.on_disk(pair, cell)
        return bool(found.facts) and all(
            found.verdicts(name, judge) is not None for name in found.sets for judge in found.judges_of(name)
        )

    def seconds(self, pair: Pair, step: str) -> tuple[float | None, str]:
        """Seconds per unit of a step, None if the model's shape is unknown, and how they are known."""
        here, elsewhere, shape = self.measured_here(pair), self.models.get(pair.slug, {}), self.shape(pair)
        if step == "judge":
            total, ways, judges = 0.0, [], self.grid.judges
            for judge in judges:
                if f"judge {judge}" in here:
                    seconds, way = here[f"judge {judge}"][0], "measured here"
                elif judge == "refusal":
                    seconds, way = self.measured["refusal_seconds_per_verdict"], "measured elsewhere"
                else:
                    seconds, way = self.assumed["endpoint_seconds"] / self.assumed["endpoint_at_once"], "assumed"
                total, ways = total + seconds, [*ways, f"{judge}: {way}"]
            return total / len(judges), ", ".join(ways)
        if step in here:
            seconds, device, n = here[step]
            return seconds, f"measured here on {device}, {n} units"
        if step in elsewhere:
            return elsewhere[step], f"measured on {elsewhere['where']}"
        if shape is None:
            return None, "unknown: the model is not here, and the grid gives no shape"
        return self.estimate(shape, step), "estimated"

    def estimate(self, shape: Shape, step: str) -> float:
        """Seconds per unit on the assumed GPU, from operations, bytes and host time."""
        assumed, measured, grid = self.assumed, self.measured, self.grid
        weights = shape.parameters * assumed["bytes_per_parameter"]

        def forward(tokens: float) -> float:
            """One forward pass."""
            operations = 2 * shape.parameters * tokens / (assumed["peak_flops"] * assumed["share_of_peak"])
            reading = weights / (assumed["bandwidth"] * assumed["share_of_bandwidth"])
            return max(operations, reading, measured["host_seconds_per_layer"] * shape.layers)

        prompt, question = assumed["icl_prompt_tokens"], assumed["question_tokens"]
        if step == "load":
            return weights / assumed["load_bandwidth"]
        if step == "score":
            patched = shape.heads * (shape.layers + 1) / (2 * prompt)
            return grid.scoring.n_trials * (1 + measured["sweep_over_bound"] * (1 + patched)) * forward(prompt)
        if step == "answers":
            batch = grid.answers.batch_size
            return (forward(batch * question) + self.answer_tokens * forward(batch)) / batch
        if step == "cost":
            first_tokens = forward(self.n_harmless * question) if grid.benign else 0.0
            return len(grid.tasks) * forward(PROMPTS_PER_TASK * prompt) + first_tokens
        return forward(assumed["utility_tokens"])

    def hours(self, pair: Pair, units: dict[str, int]) -> dict[str, float | None]:
        """Hours per step. Judging needs no GPU, or that of an endpoint, but still takes its time."""
        each = {step: self.seconds(pair, step)[0] for step in STEPS}
        return {step: None if each[step] is None else each[step] * n / 3600 for step, n in units.items()}

    def shard_hours(self, n: int) -> list[float]:
        """Hours of each of n shards, which all load the models that they need."""
        found = []
        for index in range(1, n + 1):
            units = Shard(index, n).units(self.grid)
            total = 0.0
            for pair in self.grid.models:
                left = self.left(pair, [language for each, language in units if each.slug == pair.slug])
                total += sum(hours or 0.0 for hours in self.hours(pair, left).values())
            found.append(total)
        return found

    def disk(self, pair: Pair, units: dict[str, int]) -> tuple[float, float, float]:
        """Bytes: models that are not on this machine, scores that are left, answers with their verdicts."""
        shape, assumed = self.shape(pair), self.assumed
        if shape is None:
            return 0.0, 0.0, 0.0
        numbers = self.measured["mean_slots"] * shape.head_dim + self.grid.scoring.n_trials  # per head, in float32
        characters = (self.answer_tokens + assumed["question_tokens"]) * assumed["characters_per_token"]
        missing = sum(not Path(name).exists() for name in (pair.base, pair.tuned))
        return (
            missing * shape.parameters * assumed["bytes_per_parameter"],
            units["score"] * shape.layers * shape.heads * numbers * 4,
            units["answers"] * characters * (1 + len(self.grid.judges)),  # verdict files repeat the answers
        )


def bill(grid: Grid, results: Path) -> str:
    """The plan as text: work that is left, hours on one and on eight GPUs, disk, and how each figure is known."""
    plan = Plan(grid, results)
    counts, times, disks, sources = [], [], [], defaultdict(list)
    verdicts = 0
    for pair in grid.models:
        units, cells = plan.left(pair, grid.languages), list(grid_cells(grid, pair))
        done = sum(plan.is_done(pair, cell) for cell in cells)
        columns = {"datasets to score": "score", "answers": "answers", "costs": "cost", "utility": "utility"}
        row = {"model": pair.slug, "cells": f"{len(cells)} ({done} done)"}
        counts.append(row | {name: f"{units[step]:,}" for name, step in (columns | {"verdicts": "judge"}).items()})
        hours = plan.hours(pair, units)
        total = None if None in hours.values() else sum(hours.values())
        times.append({"model": pair.slug} | {step: _hours(value) for step, value in (hours | {"all": total}).items()})
        disks.append(plan.disk(pair, units))
        verdicts += units["judge"]
        for step in filter(units.get, STEPS):
            sources[f"{step}: {plan.seconds(pair, step)[1]}"].append(pair.slug)
    alone, eight = plan.shard_hours(1), plan.shard_hours(8)
    models, scores, answers = (sum(column) / 1e9 for column in zip(*disks, strict=True))
    endpoints = [judge for judge in grid.judges if judge.startswith("openai:")]
    calls = verdicts * len(endpoints) // len(grid.judges)
    tokens = calls * (plan.answer_tokens + plan.assumed["question_tokens"] + plan.assumed["judge_prompt_tokens"])
    lines = [
        f"Grid {grid.name}: {len(grid.models)} models, {len(grid.languages)} languages, {len(grid.tasks)} tasks, "
        f"prompts {', '.join(each.name for each in grid.prompt_sets)}, judges {', '.join(grid.judges)}.",
        "",
        "Left to do:",
        to_markdown(pd.DataFrame(counts)),
        "Hours, one process:",
        to_markdown(pd.DataFrame(times)),
        f"One process, one GPU: {_spelled(sum(alone))}. Eight, --shard 1/8 to 8/8: {_spelled(max(eight))}, the longest "
        f"shard (all together {_spelled(sum(eight))}).",
    ]
    if endpoints:
        lines.append(f"Endpoints ({', '.join(endpoints)}): {calls:,} calls, about {tokens / 1e6:,.0f} million tokens.")
    lines += [
        f"Disk: {models + scores + answers:.1f} GB ({models:.1f} models that are not here, {scores:.1f} scores, "
        f"{answers:.2f} answers and verdicts).",
        "",
        "How the time per unit is known:",
        *(f"  {source} ({', '.join(slugs)})" for source, slugs in sources.items()),
    ]
    if any("estimated" in source or "assumed" in source for source in sources):
        lines += _explanations(plan.assumed, plan.measured)
    others = _others(plan)
    for title, found in (("Not counted, for the grid asks for something else:", others), (MISSING, _missing(plan))):
        lines += [title, *found] if found else []
    return "\n".join(lines)


def _spelled(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"


def _hours(hours: float | None) -> str:
    if hours is None:
        return "unknown"
    return "0" if hours == 0 else f"{hours:.2f}" if hours < 10 else f"{hours:.0f}"


def _explanations(assumed: dict, measured: dict) -> list[str]:
    """What the estimates rest on, and which of these figures were measured where."""
    return [
        f"Estimated for one {assumed['gpu']}, on which nothing was measured: {assumed['peak_flops']:.3g} operations/s "
        f"and {assumed['bandwidth']:.3g} bytes/s according to its maker, {assumed['share_of_peak']:.0%} and "
        f"{assumed['share_of_bandwidth']:.0%} of which are assumed to be reached; {assumed['icl_prompt_tokens']} "
        f"tokens per in-context prompt, {assumed['question_tokens']} per question, {assumed['answer_tokens']} per "
        "answer.",
        "Measured on two cores of an AMD EPYC: host time per layer "
        f"{1000 * measured['host_seconds_per_layer']:.2f} ms; the sweep's forward passes take "
        f"{measured['sweep_over_bound']:g} times their lower bound. All figures are in configs/costs.yaml.",
        "Once a cell has run on your machine, its own times replace them.",
    ]


def _others(plan: Plan) -> list[str]:
    """What lies in cells and is of other inputs, by the reason, with the number of cells."""
    reasons = Counter()
    for pair in plan.grid.models:
        for cell in grid_cells(plan.grid, pair):
            reasons.update({(pair.slug, reason) for reason in plan.on_disk(pair, cell).others.values()})
    return [f"  {slug}: {n} cells: {reason}" for (slug, reason), n in reasons.most_common()]


def _missing(plan: Plan) -> list[str]:
    """Inputs that the grid names and this machine does not have."""
    grid, lines = plan.grid, []
    for pair in grid.models:
        models = {"base": pair.base, "tuned": pair.tuned}.items()
        absent = [f"{role} model {name}" for role, name in models if not Path(name).exists()]
        lines += [f"  {model}: no such folder here; taken as a hub id" for model in absent]
    for asked in grid.prompt_sets:
        rows = [plan.rows(asked.name, language) for language in grid.languages if asked.has(language)]
        reasons = Counter(why for _, why in rows if why)
        for why, missing in reasons.items():
            what = "are not here" if why == NOT_HERE else f"could not be read ({why})"
            lines.append(
                f"  prompts {asked.name} ({asked.dataset}): {missing} of {len(rows)} languages {what}; assumed "
                f"to have {rows[0][0]} questions each"
            )
    return lines
