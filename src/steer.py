"""Step 3.1: base - scaling_factor * (finetune - base) on the output-projection columns of a language's heads.

Writes a complete model folder: every other tensor is the base's, bit for bit.
"""

from pathlib import Path

from soteria import cli, files
from soteria.heads import language_file, read_heads
from soteria.languages import find_language


def parse_arguments():
    parser = cli.new_parser(
        __doc__,
        "python src/steer.py --finetune_model data/models/polyglot-tuned --base_model data/models/polyglot-base "
        "--language Hindi --scaling_factor 3 --head_folder polyglot-base",
    )
    add = parser.add_argument
    add("--finetune_model", required=True, help="the harmfully tuned model: hub id, folder, or LoRA adapter folder")
    add("--base_model", required=True, help="the model to make safer: hub id or folder")
    add("--language", required=True, help="name or code")
    add(
        "--scaling_factor",
        type=cli.scaling_factor,
        required=True,
        help="how much of the task vector to subtract, 0 or more",
    )
    add("--head_folder", required=True, help="folder of <Language>_Heads.json: a name under results/heads, or a path")
    add("--output", type=Path, help="default: results/models/<Language>_<base slug>_scaling_<scaling factor>")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="store the weights so (default: as the base does)")
    add("--overwrite", action="store_true", help="replace an output folder that was made from other inputs")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    language = find_language(arguments.language)
    folder = files.head_folder(arguments.head_folder)
    heads = read_heads(folder / language_file(language.name))

    from soteria import steering

    output = arguments.output or files.steered_folder(
        files.RESULTS, language.name, arguments.base_model, arguments.scaling_factor
    )
    facts = steering.steer_checkpoint(
        steering.TaskVector.open(arguments.base_model, arguments.finetune_model),
        heads,
        arguments.scaling_factor,
        output,
        language=language.name,
        head_source=str(folder / language_file(language.name)),
        dtype=arguments.dtype,
        overwrite=arguments.overwrite,
    )
    share = facts["share_of_parameters_changed"]
    print(f"{output}: {facts['n_heads']} heads, {share:.2%} of the parameters, scaling {arguments.scaling_factor:g}")


if __name__ == "__main__":
    cli.run(main)
