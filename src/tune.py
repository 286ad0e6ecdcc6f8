"""Scaling factor and number of heads, tuned per language on the validation questions with Optuna.

Two things are made small at once: ASR on the policy questions, and how far the odds of benign answers' first token move
(KL from the base, in nats). Told are the Pareto front and the chosen point, the lowest ASR at no more than the allowed
refusals and loss of accuracy. Everything runs on one loaded base model whose weights are steered in place, the same
arithmetic as `steer.py`. An interrupted run goes on where it was, and more trials go on from those before.
"""

from pathlib import Path

from soteria import cli
from soteria.errors import UserError
from soteria.languages import find_language, language_names
from soteria.scoring.heads import count_share, mean_effect, rank_heads
from soteria.scoring.prompts import TASKS
from soteria.storage import paths


def parse_arguments():
    parser = cli.new_parser(
        __doc__,
        "python src/tune.py --finetune_model data/models/polyglot-tuned --base_model data/models/polyglot-base "
        "--language Hindi --trials 40",
    )
    add = parser.add_argument
    cli.add_pair(parser)
    cli.add_languages(parser)
    add("--results", type=Path, help="what step 1 wrote (default: results/indirect_effect/<base slug>)")
    add("--policy", default="policy-validation", help="question set under data/prompts, as <name>_<Language>.csv")
    add("--benign", default="everyday-validation", help="question set under data/benign, as <name>_<Language>.csv")
    add("--trials", type=cli.positive_int, default=40, help="points measured per language")
    add("--seed", type=int, default=0, help="seed of the points drawn; the first ten are drawn anywhere")
    add("--min_scaling", type=cli.scaling_factor, default=0.5, help="lowest scaling factor")
    add("--max_scaling", type=cli.scaling_factor, default=10.0, help="highest scaling factor")
    add("--shares", nargs=2, type=float, default=[0.05, 1.0], metavar=("LOW", "HIGH"), help="shares of all heads")
    add(
        "--max_refusals",
        type=float,
        default=0.02,
        help="share of benign questions the chosen point may refuse beyond the base",
    )
    add("--max_accuracy_loss", type=float, default=0.02, help="accuracy in context it may lose, 0.02 being 2 points")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    names = language_names(arguments.language)
    slug = paths.model_slug(arguments.base_model)
    results = arguments.results or paths.scores_folder(paths.RESULTS, slug)

    from tqdm import tqdm

    from soteria.grid.comparison import VALIDATION_SEED, Bench
    from soteria.grid.tuning import Limits, Space, SteeredBench, Tuning, bench_hash
    from soteria.judging.judges import judge_basis
    from soteria.judging.refusal import RefusalJudge
    from soteria.models.loading import load_model
    from soteria.models.task_vector import TaskVector
    from soteria.steering.checkpoint import fingerprint
    from soteria.steering.formula import open_steering

    space = Space((arguments.min_scaling, arguments.max_scaling), tuple(arguments.shares), arguments.seed)
    limits = Limits(arguments.max_refusals, arguments.max_accuracy_loss)
    effects = {name: mean_effect(results, name, list(TASKS)) for name in names}
    vector = TaskVector.open(arguments.base_model, arguments.finetune_model)
    shape = (vector.geometry.n_layers, vector.geometry.n_heads)
    for name, effect in effects.items():
        if tuple(effect.shape) != shape:
            raise UserError(f"{results} scores {tuple(effect.shape)} layers and heads in {name}, the base has {shape}")
    benches = {
        name: Bench.read(find_language(name), arguments.policy, arguments.benign, VALIDATION_SEED) for name in names
    }

    def inputs(name: str) -> dict:
        """What a measurement was made from, beside the points; a file that says the same is not made again."""
        return {
            "base_model": arguments.base_model,
            "base_weights": fingerprint(vector.base),
            "finetune_model": arguments.finetune_model,
            "finetune_weights": fingerprint(vector.tuned),
            "language": name,
            "policy": arguments.policy,
            "benign": arguments.benign,
            "questions_sha256": bench_hash(benches[name]),
            "judge": RefusalJudge.description,
            "judge_basis_sha256": judge_basis("refusal", None),
        }

    tunings = {
        name: Tuning(
            paths.tuning_file(paths.RESULTS, slug, name),
            inputs(name),
            space,
            rank_heads(effects[name]),
            arguments.trials,
            limits,
        )
        for name in names
    }
    found = {name: tuning.finished() for name, tuning in tunings.items()}
    pending = [name for name, result in found.items() if result is None]
    if pending:
        for name in pending:  # the fewest heads: more of the ranking hold these
            fewest = count_share(arguments.shares[0], shape[0] * shape[1])
            source = f"the top {fewest} heads of {name}"
            open_steering(vector, rank_heads(effects[name])[:fewest], arguments.max_scaling, source=source)
        loaded, judge = load_model(arguments.base_model), RefusalJudge()
        with tqdm(total=len(pending) * arguments.trials, desc="tuning", unit="trial", disable=None) as bar:
            for name in pending:
                bench = SteeredBench(loaded, vector, benches[name], judge)
                found[name] = tunings[name].run(bench.measure, bar.update)
    for name, result in found.items():
        print_front(name, result, len(tunings[name].ranking))
    print(f"Mind: {next(iter(found.values()))['note']}.")


def print_front(language: str, result: dict, n_heads: int) -> None:
    """The base, the Pareto front by ASR, and the chosen point: rates, and the divergence in nats."""
    print(f"{language}: {result['n_trials']} trials on {result['policy']} and {result['benign']}, {result['judge']}")
    print(
        f"{'trial':>6} {'scaling':>8} {'heads':>6} {'ASR':>7} {'benign refused':>15} {'changed':>8} "
        f"{'KL from base':>13} {'ICL accuracy':>13}"
    )
    base = {rate: value["value"] for rate, value in result["base"].items()}
    print_row("base", base | {"scaling_factor": 0.0, "n_heads": 0}, "")
    chosen = result["chosen"]
    for number in result["front"]:
        print_row(number, result["trials"][number], "<- chosen" if chosen and chosen["number"] == number else "")
    if not chosen:
        print(f"chosen: none, {result['why_none']}")
        return
    if chosen["number"] not in result["front"]:
        print_row(chosen["number"], chosen, "<- chosen; beaten only by points that cost too much")
    print(
        f"chosen: --scaling_factor {chosen['scaling_factor']} with the top {chosen['n_heads']} of {n_heads} heads "
        f"(select_heads.py --top {chosen['n_heads']})"
    )


def print_row(name: object, point: dict, mark: str) -> None:
    line = (
        f"{name:>6} {point['scaling_factor']:>8.3g} {point['n_heads']:>6} {point['asr']:>7.1%} "
        f"{point['benign_refusals']:>15.1%} {point['benign_changes']:>8.1%} {point['kl_first_token']:>13.4f} "
        f"{point['icl_accuracy']:>13.1%} {mark}"
    )
    print(line.rstrip())


if __name__ == "__main__":
    cli.run(main)
