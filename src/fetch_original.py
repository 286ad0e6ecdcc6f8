"""Bring the authors' original inputs to data/original/: their word lists, head lists and harmful prompts.

  icl      the in-context tasks           data/original/icl/<task>_<Language>.json
  heads    the published head lists       data/original/heads/<folder>/*.json
  prompts  MultiJail, XThreatBench (in the authors' release on the hub) and XSafety
                                          data/original/prompts/<id with / as _>/, and
                                          data/original/prompts/XSafety/<Language>.csv

Nothing else in this project needs them. Data files only: no code of a source comes along, and none is run.

How far the bytes are known: icl and heads are those of one git commit whose id is written in this project, and that
id is a checksum of every byte. For prompts no revision and no checksum was known when this was written. Their first use
takes the newest revision, checks that it came whole, and writes the revision to sources.json and the files' sha256 to
SHA256SUMS. Later uses keep to that revision and refuse other bytes. So the first use trusts the server.

A second call asks nobody for what is there and sound. A file that was changed, cut short or removed is named and
brought again. Mirrors: --git_url for the authors' repository, git's own url.<mirror>.insteadOf for both repositories,
HF_ENDPOINT for the hub. HF_TOKEN, or `hf auth login`, where a dataset asks for it.
"""

import sys
from pathlib import Path

from soteria import cli
from soteria.errors import UserError
from soteria.storage import original, paths
from soteria.storage.xsafety import JOINED, join_categories


def parse_arguments():
    parser = cli.new_parser(__doc__, "bash scripts/fetch_original.sh --only icl heads")
    add = parser.add_argument
    add("--only", nargs="+", choices=original.KINDS, default=list(original.KINDS), help="what to bring")
    add("--output", type=Path, default=paths.DATA / "original", help="where to")
    add("--git_url", default=original.RELEASE_URL, help="the authors' git repository, or a mirror of it")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    jobs = [
        (source, folders)
        for source in original.sources(arguments.git_url)
        if (folders := [folder for folder in source.folders if folder.kind in arguments.only])
    ]
    failed = 0
    with original.open_store(arguments.output) as store:
        for source, folders in jobs:
            try:
                source.bring(folders, store)
            except UserError as error:  # the other sources may well be in reach
                print(f"error: {error}", file=sys.stderr)
                failed += 1
                continue
            for folder in folders:
                there = store.output / folder.path
                print(f"{there}: {store.count(folder)} files, revision {store.revision(folder)}")
        if "prompts" in arguments.only:
            joined = join_categories(store.output)
            print(f"{store.output / JOINED}: {len(joined)} languages, XSafety's categories in one file each")
    if failed:
        raise UserError(f"{failed} of {len(jobs)} sources did not come; the same command tries them again")


if __name__ == "__main__":
    cli.run(main)
