"""Step 4: the tables of results as text, Markdown and CSV, and the figures as PNG and PDF.

Reads what `run.sh` and `compare_controls.py` left under results/. A language that was not run is not in the table. With
--grid, reads what `reproduce.py` left of a grid, and writes the paper's tables, its figures and an HTML report.
"""

from pathlib import Path

from soteria import cli
from soteria.errors import UserError
from soteria.languages import find_language
from soteria.storage import files, paths


def parse_arguments():
    parser = cli.new_parser(__doc__, "python src/make_tables.py --results results --language English Hindi")
    add = parser.add_argument
    add("--results", type=Path, default=paths.RESULTS, help="what the other steps wrote to")
    add("--language", nargs="+", help="names or codes (default: every language that was run)")
    add("--scaling_factor", type=cli.scaling_factor, help="which one (default: the only one that was run)")
    add("--grid", type=Path, help="a grid file: all of its tables, instead of one table of the controls")
    add("--name", default="main", help="file name of the table, under <results>/tables")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.grid:
        from soteria.grid.grid_file import read_grid

        write_grid(read_grid(arguments.grid), arguments.grid, arguments.results)
        return
    wanted = {find_language(text).name for text in arguments.language or []}

    from soteria.reporting import tables

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

    from soteria.reporting import figures, fonts

    title = f"{paths.model_slug(found[0]['base_model'])}, scaling factor {factors[0]:g}, judge: {found[0]['judge']}"
    verdict = tables.verdict_on_controls(table)
    missing = sorted(wanted - set(table["language"]))
    if missing:
        verdict += f" Not run: {', '.join(missing)}."
    main = tables.main_table(table, tables.divergences(found))
    markdown = tables.to_markdown(main)
    folder = arguments.results / "tables"
    files.write_text(folder / f"{arguments.name}.md", f"{title}\n\n{markdown}\n{verdict}\n")
    files.write_text(folder / f"{arguments.name}.tex", tables.to_latex(main, title))
    if len(pairs):
        readable = tables.readable_pairs(pairs)
        files.write_text(folder / f"{arguments.name}_paired.md", f"{title}\n\n{tables.to_markdown(readable)}")
        files.write_text(folder / f"{arguments.name}_paired.tex", tables.to_latex(readable, title))
        files.write_text(folder / f"{arguments.name}_paired.csv", pairs.to_csv(index=False, lineterminator="\n"))
    files.write_text(folder / f"{arguments.name}.csv", table.to_csv(index=False, lineterminator="\n"))
    pictures = {"": figures.plot_comparison(table, title)} | draw(found, table, arguments.results)
    for figure, picture in pictures.items():
        figures.save(picture, folder / f"{arguments.name}{figure}.png")
    print(f"{title}\n\n{markdown}\n{verdict}\n")
    if message := fonts.missing_fonts(list(dict.fromkeys(table["language"]))):
        print(message)
    print(f"wrote {folder / arguments.name}.md, .csv and .tex, and as .png and .pdf " + ", ".join(map(repr, pictures)))


def write_grid(grid, grid_file: Path, results: Path) -> None:
    """Write all of a grid's tables, its figures and the report, and print the main table and what is blank.

    Where nothing that they are made from has changed, they are left as they are.
    """
    from soteria.reporting import fonts, write_up
    from soteria.storage.table_formats import to_markdown

    inputs = write_up.made_from(grid, grid_file, results)  # before they are read: they may change meanwhile
    written = write_up.written_before(grid, results, inputs)
    if written:
        print((paths.table_file(results, grid.name, "main", "md")).read_text(encoding="utf-8"))
        print(f"{len(written)} files under {results / 'tables'}, and {written[-1]}: nothing has changed")
        return
    found = write_up.compose(grid, results)
    written = write_up.write(found, grid_file)
    write_up.note_written(grid, results, inputs, written)
    main = found.tables[0]
    print(f"{found.caption(main)}\n\n{to_markdown(main.readable)}")
    for table in found.tables:
        print(f"{found.path(table.name, 'md')}: {table.counted}")
    for line in (*write_up.verdicts(found), *found.left_out, *filter(None, [fonts.missing_fonts(grid.languages)])):
        print(line)
    print(f"wrote {len(written)} files under {found.folder}, and {written[-1]}")


def draw(comparisons: list[dict], table, results: Path) -> dict:
    """The figures whose numbers are there, by what their files' names end in: ASR, heads and layers, the trade-off."""
    from soteria.grid.comparison import METHOD
    from soteria.reporting import figures, steering_figures, tables
    from soteria.scoring.heads import mean_effect, rank_heads
    from soteria.scoring.prompts import TASKS

    method = table[(table["rate"] == "asr") & (table["heads"] == METHOD)]
    pictures = {"_asr": steering_figures.plot_asr(method)}
    scores = results / "indirect_effect" / paths.model_slug(comparisons[0]["base_model"])
    try:
        effects = {item["language"]: mean_effect(scores, item["language"], list(TASKS)) for item in comparisons}
    except UserError:  # step 1 ran elsewhere
        return pictures
    selected = {item["language"]: rank_heads(effects[item["language"]])[: item["n_heads"]] for item in comparisons}
    pictures["_effects"] = figures.plot_effects(effects, selected)
    pictures["_layers"] = figures.plot_layer_profiles(effects)
    if len(selected) > 1:
        pictures["_overlaps"] = figures.plot_overlaps(selected)
    tried = tables.load_comparisons(results, "validation")
    if tried:
        n_heads = next(iter(effects.values())).numel()
        pictures["_trade_off"] = steering_figures.plot_trade_off(tables.trade_off(tried, n_heads))
    return pictures


if __name__ == "__main__":
    cli.run(main)
