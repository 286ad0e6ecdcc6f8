"""Step 3.1: base - scaling_factor * (finetune - base) on the output-projection columns of a language's heads.

Writes a complete model folder: every other tensor is the base's, bit for bit. With --format delta, writes the
difference alone, once for any number of languages.
"""

from pathlib import Path

from soteria import cli
from soteria.errors import UserError
from soteria.languages import find_language
from soteria.scoring.heads import read_heads
from soteria.storage import paths
from soteria.storage.paths import language_file


def parse_arguments():
    parser = cli.new_parser(
        __doc__,
        "python src/steer.py --finetune_model data/models/polyglot-tuned --base_model data/models/polyglot-base "
        "--language Hindi --scaling_factor 3 --head_folder polyglot-base",
    )
    add = parser.add_argument
    cli.add_pair(parser)
    add("--language", action="append", required=True, help="name or code; may be given several times")
    add(
        "--scaling_factor",
        type=cli.scaling_factor,
        required=True,
        help="how much of the task vector to subtract, 0 or more",
    )
    add("--head_folder", required=True, help="folder of <Language>_Heads.json: a name under results/heads, or a path")
    add(
        "--format",
        choices=["checkpoint", "delta"],
        default="checkpoint",
        help="checkpoint: a complete model folder per language; delta: one small folder for all the languages given, "
        "for soteria.load_steered",
    )
    add(
        "--output",
        type=Path,
        help="default: results/models/<Language>_<base slug>_scaling_<scaling factor>, or <base slug>_delta there",
    )
    add(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="store the weights so (default: as the base does; of a delta: float32)",
    )
    add("--overwrite", action="store_true", help="replace an output folder that was made from other inputs")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    languages = list(dict.fromkeys(find_language(language).name for language in arguments.language))
    folder = paths.head_folder(arguments.head_folder)
    heads = {language: read_heads(folder / language_file(language)) for language in languages}
    if arguments.format == "checkpoint" and len(languages) > 1 and arguments.output:
        raise UserError("--output takes one language's model; leave it out, or give --format delta")

    # torch takes seconds to load: only once the input is sound
    from soteria.models.task_vector import TaskVector
    from soteria.steering.formula import open_steering

    vector = TaskVector.open(arguments.base_model, arguments.finetune_model)
    steerings = {
        language: open_steering(vector, listed, arguments.scaling_factor, source=str(folder / language_file(language)))
        for language, listed in heads.items()
    }
    shared = {"dtype": arguments.dtype, "overwrite": arguments.overwrite}
    if arguments.format == "delta":
        from soteria.steering.delta import write_delta

        output = arguments.output or paths.delta_folder(paths.RESULTS, arguments.base_model)
        write_delta(steerings, output, **shared)
        print(f"{output}: the task vector, heads of {', '.join(languages)}, scaling {arguments.scaling_factor:g}")
        return
    from soteria.steering.checkpoint import steer_checkpoint

    for language, steering in steerings.items():
        output = arguments.output or paths.steered_folder(
            paths.RESULTS, language, arguments.base_model, arguments.scaling_factor
        )
        facts = steer_checkpoint(steering, output, language=language, **shared)
        n_heads, share = facts["n_heads"], facts["share_of_parameters_changed"]
        print(f"{output}: {n_heads} heads, {share:.2%} of the parameters, scaling {arguments.scaling_factor:g}")


if __name__ == "__main__":
    cli.run(main)
