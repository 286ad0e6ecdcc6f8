"""Step 4: the table of results, as text, Markdown, CSV and a picture.

Reads what `run.sh` and `compare_controls.py` left under results/. A language that was not run is not in the table.
"""

from pathlib import Path

from soteria import cli, files
from soteria.errors import UserError
from soteria.languages import find_language


def parse_arguments():
    parser = cli.new_parser(__doc__, "python src/make_tables.py --results results --language English Hindi")
    add = parser.add_argument
    add("--results", type=Path, default=files.RESULTS, help="what the other steps wrote to")
    add("--language", nargs="+", help="names or codes (default: every language that was run)")
    add("--scaling_factor", type=cli.scaling_factor, help="which one (default: the only one that was run)")
    add("--name", default="main", help="file name of the table, under <results>/tables")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    wanted = {find_language(text).name for text in arguments.language or []}

    from soteria import tables

    found = [
        comparison
        for comparison in tables.load_comparisons(arguments.results)
        if (not wanted or comparison["language"] in wanted)
        and arguments.scaling_factor in (None, comparison["scaling_factor"])
    ]
    factors = sorted({comparison["scaling_factor"] for comparison in found})
    if not found:
        raise UserError(f"nothing to tabulate in {arguments.results / 'controls'}; run compare_controls.py first")
    if len(factors) > 1:
        raise UserError(f"{arguments.results} has several scaling factors {factors}; give --scaling_factor")
    table = tables.tidy([tables.use_evaluated(comparison, arguments.results) for comparison in found])
    pairs = tables.paired_table(found, arguments.results)

    from soteria import figures

    title = f"{files.model_slug(found[0]['base_model'])}, scaling factor {factors[0]:g}, judge: {found[0]['judge']}"
    verdict = tables.verdict_on_controls(table)
    missing = sorted(wanted - set(table["language"]))
    if missing:
        verdict += f" Not run: {', '.join(missing)}."
    markdown = tables.to_markdown(tables.main_table(table, tables.divergences(found)))
    folder = arguments.results / "tables"
    files.write_text(folder / f"{arguments.name}.md", f"{title}\n\n{markdown}\n{verdict}\n")
    if len(pairs):
        readable = tables.to_markdown(tables.readable_pairs(pairs))
        files.write_text(folder / f"{arguments.name}_paired.md", f"{title}\n\n{readable}")
        files.write_text(folder / f"{arguments.name}_paired.csv", pairs.to_csv(index=False, lineterminator="\n"))
    files.write_text(folder / f"{arguments.name}.csv", table.to_csv(index=False, lineterminator="\n"))
    figures.save(figures.plot_comparison(table, title), folder / f"{arguments.name}.png")
    print(f"{title}\n\n{markdown}\n{verdict}\n")
    print("wrote " + ", ".join(str(folder / f"{arguments.name}{ending}") for ending in (".md", ".csv", ".png")))


if __name__ == "__main__":
    cli.run(main)
