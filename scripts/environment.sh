# Sourced by the other scripts, from the repository's root: a virtual environment with the pinned requirements.
# A second call installs nothing: stamps hold the requirements that .venv was made from. A script that needs an extra
# names its file first, as in: extras=(requirements-utility.txt)
for requirements in requirements.txt ${extras[@]+"${extras[@]}"}; do
  stamp=.venv/${requirements%.txt}.stamp
  if ! cmp -s "$requirements" "$stamp" 2>/dev/null; then
    [ -x .venv/bin/python ] || python3.11 -m venv .venv 2>/dev/null || python3 -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
    cp "$requirements" "$stamp"
  fi
done
source .venv/bin/activate
export TOKENIZERS_PARALLELISM=false
