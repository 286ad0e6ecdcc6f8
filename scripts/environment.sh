# Sourced by the other scripts, from the repository's root: a virtual environment with the pinned requirements.
# A second call installs nothing: the stamp holds the requirements that .venv was made from.
if ! cmp -s requirements.txt .venv/requirements.stamp 2>/dev/null; then
  python3.11 -m venv .venv 2>/dev/null || python3 -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  cp requirements.txt .venv/requirements.stamp
fi
source .venv/bin/activate
export TOKENIZERS_PARALLELISM=false

# The paper's twelve languages, from the one place where they are listed.
paper_languages() {
  PYTHONPATH=src python -c 'from soteria.languages import PAPER_LANGUAGES; print(*(each.name for each in PAPER_LANGUAGES))'
}
