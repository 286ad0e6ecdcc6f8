"""Step 3.1: base - scaling_factor * (finetune - base) on the output-projection columns of a language's heads.

Writes a complete model folder in which every other tensor is the base's, bit for bit. With --format delta, writes only
the difference, once for any number of languages; with --format lora, a small adapter per language.
"""

from soteria import cli
from soteria.errors import UserError
from soteria.languages import find_language
from soteria.scoring.heads import read_heads
from soteria.storage import files, outputs, paths
from soteria.storage.paths import language_file


def parse_arguments():
    parser = cli.new_parser(
        __doc__,
        "python src/steer.py --finetune_model data/models/polyglot-tuned --base_model data/models/polyglot-base "
        "--language Hindi --scaling_factor 2 --head_folder polyglot-base",
    )
    add = parser.add_argument
    cli.add_pair(parser)
    add("--language", action="append", required=True, help="name or code; may be given several times")
    add("--scaling_factor", type=cli.scaling_factor, required=True, help="how much task vector to subtract, >= 0")
    add("--head_folder", required=True, help="folder of <Language>_Heads.json: a name under results/heads, or a path")
    format_help = "checkpoint: a complete model folder per language; delta: one small folder for all the languages "
    format_help += "given, for soteria.load_steered; lora: a PEFT adapter of the base per language"
    add("--format", choices=["checkpoint", "delta", "lora"], default="checkpoint", help=format_help)
    output_help = "default: results/models/<Language>_<base slug>_scaling_<scaling factor>, with _lora for an adapter, "
    output_help += "or <base slug>_delta there"
    add("--output", type=cli.output_folder, help=output_help)
    rank_help = "with --format lora and a tuned model that is a whole checkpoint: rank of the adapter"
    add("--rank", type=cli.positive_int, default=64, help=rank_help)
    error_help = "then, how far the adapter may be from the exact change, as a share of its norm"
    add("--max_error", type=cli.positive_number, default=0.05, help=error_help)
    dtype_help = "dtype of the weights written (default: the base's; for a delta or an adapter, float32)"
    add("--dtype", choices=["float32", "float16", "bfloat16"], help=dtype_help)
    add("--overwrite", action="store_true", help="replace an output folder that was made from other inputs")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    languages = list(dict.fromkeys(find_language(language).name for language in arguments.language))
    folder, output, factor = paths.head_folder(arguments.head_folder), arguments.output, arguments.scaling_factor
    lists = {language: folder / language_file(language) for language in languages}
    heads = {language: read_heads(path) for language, path in lists.items()}
    if arguments.format != "delta" and len(languages) > 1 and output:
        raise UserError("--output takes one language's model; leave it out, or give --format delta")
    base, places = arguments.base_model, {}
    for language in languages:
        if arguments.format == "delta":
            places[language] = output or paths.delta_folder(paths.RESULTS, base)
        else:
            places[language] = output or paths.steered_folder(paths.RESULTS, language, base, factor, arguments.format)
        outputs.check_folder(places[language], "finetune_model", "a steered model")

    # torch takes seconds to import, so the inputs above are checked first
    from soteria.models.task_vector import TaskVector
    from soteria.steering.adapter import write_adapter
    from soteria.steering.checkpoint import check_replaceable, steer_checkpoint, steering_inputs
    from soteria.steering.delta import write_delta
    from soteria.steering.formula import open_steering

    vector = TaskVector.open(base, arguments.finetune_model)
    steerings = {name: open_steering(vector, heads[name], factor, source=str(lists[name])) for name in languages}
    shared = {"dtype": arguments.dtype, "overwrite": arguments.overwrite}
    if arguments.format == "delta":
        output = places[languages[0]]
        with files.held(output.parent):  # a second identical call waits, and finds it made
            write_delta(steerings, output, **shared)
        print(f"{output}: the task vector, heads of {', '.join(languages)}, scaling {factor:g}")
        return
    write = steer_checkpoint
    if arguments.format == "lora":
        write, shared = write_adapter, shared | {"rank": arguments.rank, "max_error": arguments.max_error}
    for language, steering in steerings.items():  # before the first is written
        inputs = steering_inputs(steering, arguments.format, language, arguments.dtype, arguments.rank)
        check_replaceable(places[language], inputs, (vector.base, vector.tuned), arguments.overwrite)
    for language, steering in steerings.items():
        place = places[language]
        with files.held(place.parent):
            facts = write(steering, place, language=language, **shared)
        if arguments.format == "lora":
            size, off = f"rank {facts['rank']}", f", relative error {facts['relative_error']:.2g}"
        else:
            size, off = f"{facts['share_of_parameters_changed']:.2%} of the parameters", ""
        print(f"{place}: {facts['n_heads']} heads, {size}, scaling {factor:g}{off}")


if __name__ == "__main__":
    cli.run(main)
