"""Fetch the authors' original inputs to data/original/: their word lists, head lists and harmful prompts.

  icl      the in-context tasks           data/original/icl/<task>_<Language>.json
  heads    the published head lists       data/original/heads/<folder>/*.json
  prompts  MultiJail, XThreatBench (in the authors' release on the hub) and XSafety
                                          data/original/prompts/<id with / as _>/, and
                                          data/original/prompts/XSafety/<Language>.csv

Nothing else in this project needs them. Only data files are fetched, never a source's code.

icl and heads come from one pinned git commit, whose id is a checksum of every byte. For prompts, the first use trusts
the server: it takes the newest revision and records it in sources.json and the files' sha256 in SHA256SUMS. Later uses
keep to that revision and refuse other bytes. A second call contacts no server for intact files; a file that was changed
or removed is named and fetched again.

Mirrors: --git_url for the authors' repository, git's own url.<mirror>.insteadOf for both repositories, HF_ENDPOINT for
the hub. If a dataset requires access, set HF_TOKEN or run `hf auth login`.
"""

import sys

from soteria import cli
from soteria.errors import UserError
from soteria.storage import original, paths
from soteria.terminal import one_line


def parse_arguments():
    parser = cli.new_parser(__doc__, "bash scripts/fetch_original.sh --only icl heads")
    add = parser.add_argument
    add("--only", nargs="+", choices=original.KINDS, default=list(original.KINDS), help="what to fetch")
    add("--output", type=cli.path, default=paths.DATA / "original", help="output folder")
    add("--git_url", default=original.RELEASE_URL, help="address of the authors' git repository or a mirror of it")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    output, failed = arguments.output, 0
    if not arguments.git_url:
        raise UserError("--git_url is empty; give the address of a git repository, or leave it out")
    original.check_output(output)
    wanted = [
        (source, folders)
        for source in original.sources(arguments.git_url)
        if (folders := [folder for folder in source.folders if folder.partition("/")[0] in arguments.only])
    ]
    for source, folders in wanted:
        try:
            original.fetch(source, folders, output)
        except UserError as error:  # the other sources may still be reachable
            if len(wanted) == 1:
                raise
            print(one_line(f"error: {error}"), file=sys.stderr)
            failed += 1
            continue
        for folder in folders:
            fact = original.recorded(output, folder)
            print(f"{output / folder}: {fact['files']} files, revision {fact['revision']}")
    if "prompts" in arguments.only:
        print(f"{output / original.JOINED}: {original.join_xsafety(output)} languages, one file each")
    if failed:
        raise UserError(f"{failed} of {len(wanted)} sources could not be fetched; run the same command to retry them")


if __name__ == "__main__":
    cli.run(main)
