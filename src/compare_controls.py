"""The method beside its controls, per language: ASR, benign refusals and accuracy in context, same scaling factor.

Controls: as many random heads (three draws), as many from the bottom of the ranking, all heads. Everything runs on one
loaded base model whose weights are steered in place, the same arithmetic as `steer.py`. With --choose several scaling
factors are tried with the method alone, for choosing one on the validation questions.
"""

import hashlib
import json
from pathlib import Path

from soteria import cli
from soteria.errors import UserError
from soteria.languages import find_language, language_names
from soteria.scoring.heads import mean_effect, rank_heads, read_heads
from soteria.scoring.prompts import TASKS
from soteria.storage import files, paths
from soteria.storage.paths import language_file


def parse_arguments():
    parser = cli.new_parser(
        __doc__,
        "python src/compare_controls.py --finetune_model data/models/polyglot-tuned --base_model "
        "data/models/polyglot-base --language Hindi --scaling_factor 3 --head_folder polyglot-base",
    )
    add = parser.add_argument
    cli.add_pair(parser)
    cli.add_languages(parser)
    add("--head_folder", required=True, help="folder of <Language>_Heads.json: a name under results/heads, or a path")
    add("--scaling_factor", nargs="+", type=cli.scaling_factor, required=True, help="one, or with --choose several")
    add("--policy", default="policy", help="question set under data/prompts, as <name>_<Language>.csv")
    add("--benign", default="everyday", help="question set under data/benign, as <name>_<Language>.csv")
    add("--choose", action="store_true", help="method only, each scaling factor, mean over the languages")
    add("--results", type=Path, help="what step 1 wrote (default: results/indirect_effect/<base slug>)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    names = language_names(arguments.language)
    if len(arguments.scaling_factor) > 1 and not arguments.choose:
        raise UserError("several scaling factors are for --choose; give one")
    slug = paths.model_slug(arguments.base_model)
    effects = arguments.results or paths.RESULTS / "indirect_effect" / slug
    folder = paths.head_folder(arguments.head_folder)
    selected = {name: read_heads(folder / language_file(name)) for name in names}
    rankings = {name: rank_heads(mean_effect(effects, name, list(TASKS))) for name in names}

    from tqdm import tqdm

    from soteria.grid.comparison import ACCURACY_SEED, METHOD, VALIDATION_SEED, Bench, compare, conditions
    from soteria.judging.refusal import RefusalJudge
    from soteria.models.loading import load_model
    from soteria.models.task_vector import TaskVector
    from soteria.steering.checkpoint import fingerprint

    vector = TaskVector.open(arguments.base_model, arguments.finetune_model)
    weights = [fingerprint(vector.base), fingerprint(vector.tuned)]
    seed = VALIDATION_SEED if arguments.choose else ACCURACY_SEED
    benches = {name: Bench.read(find_language(name), arguments.policy, arguments.benign, seed) for name in names}

    def inputs(name: str, scaling_factor: float) -> dict:
        """What a measurement was made from; a file that says the same is not made again."""
        bench = benches[name]
        made_from = [
            weights,
            selected[name],
            rankings[name],
            bench.policy,
            bench.benign,
            arguments.choose,
            "with KL and changes",
        ]
        return {
            "base_model": arguments.base_model,
            "finetune_model": arguments.finetune_model,
            "language": name,
            "scaling_factor": scaling_factor,
            "policy": arguments.policy,
            "benign": arguments.benign,
            "inputs_sha256": hashlib.sha256(json.dumps(made_from).encode()).hexdigest(),
        }

    kind = "validation" if arguments.choose else "controls"
    measured_at = {
        (name, factor): paths.RESULTS / kind / f"{slug}_{name}_{arguments.policy}_scaling_{factor:g}.json"
        for factor in arguments.scaling_factor
        for name in names
    }
    found = {cell: files.read_json(path) for cell, path in measured_at.items()}
    pending = [
        cell for cell, at in found.items() if not isinstance(at, dict) or not inputs(*cell).items() <= at.items()
    ]
    if pending:
        loaded = load_model(arguments.base_model)
        geometry, judge = loaded.geometry, RefusalJudge()
        for name, factor in tqdm(pending, desc="measuring", unit="language", disable=None):
            lists = conditions(rankings[name], len(selected[name]), geometry.n_layers, geometry.n_heads)
            lists[METHOD] = [selected[name]]
            if arguments.choose:
                lists = {condition: lists[condition] for condition in ("base", METHOD)}
            measured = compare(loaded, vector, lists, factor, benches[name], judge)
            found[name, factor] = inputs(name, factor) | {
                "judge": judge.description,
                "n_heads": len(selected[name]),
                "conditions": {condition: m.as_json() for condition, m in measured.items()},
            }
            files.write_json(measured_at[name, factor], found[name, factor])
    print(f"means over {len(names)} languages, judge: {RefusalJudge.description}")
    print_means({factor: [found[name, factor]["conditions"] for name in names] for factor in arguments.scaling_factor})


def print_means(table: dict[float, list[dict]]) -> None:
    """Per scaling factor and condition, means over the languages: the four rates, and the divergence in nats."""
    print(
        f"{'scaling':>8} {'heads':14} {'ASR':>7} {'benign refused':>15} {'changed':>8} {'KL from base':>13} "
        f"{'ICL accuracy':>13}"
    )
    for factor, rows in table.items():
        for condition in rows[0]:
            asr, benign, changed, divergence, icl = (
                sum(row[condition][rate]["value"] for row in rows) / len(rows)
                for rate in ("asr", "benign_refusals", "benign_changes", "kl_first_token", "icl_accuracy")
            )
            print(
                f"{factor:>8g} {condition:14} {asr:>7.1%} {benign:>15.1%} {changed:>8.1%} {divergence:>13.3f} "
                f"{icl:>13.1%}"
            )


if __name__ == "__main__":
    cli.run(main)
