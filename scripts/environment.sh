# Sourced by the other scripts, after one `cd` to the repository's root: a virtual environment with the pinned requirements.
# A second call installs nothing: stamps hold the requirements that .venv was made from, whole. A script that needs an
# extra names its file first, as in: extras=(requirements-utility.txt)

lacking() { # the first requirements that .venv does not hold; none if it is whole
  for requirements in requirements.txt ${extras[@]+"${extras[@]}"}; do
    [ -x .venv/bin/python ] && [ -f .venv/bin/activate ] && cmp -s "$requirements" ".venv/${requirements%.txt}.stamp" ||
      return 0
  done
  return 1
}

make_venv() { # also over one whose making was interrupted
  python3.11 -m venv "$@" .venv 2>/dev/null || python3 -m venv "$@" .venv >/dev/null 2>&1 ||
    { echo "error: $PWD/.venv cannot be made; install Python 3.11 with venv, and see that the folder has room" >&2; exit 2; }
}

stop() {
  echo "$1; run the same command again to resume" >&2
  exit "$2"
}

if lacking; then
  trap 'stop interrupted 130' INT # pip and venv end without a word for the script's caller
  trap 'stop terminated 143' TERM
  exec 9<.
  if command -v flock >/dev/null && ! flock --nonblock 9; then
    echo "waiting for another process that is making .venv" >&2
    flock 9 || : # a file system without locks
  fi
  while lacking; do
    if [ ! -f .venv/bin/activate ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
      make_venv
      .venv/bin/python -m pip --version >/dev/null 2>&1 || make_venv --clear
    fi
    for info in .venv/lib/python*/site-packages/*.dist-info; do # half installed, which pip takes for installed
      if [ -d "$info" ] && [ ! -f "$info/RECORD" ]; then rm -rf "$info"; fi
    done
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements" ||
      { echo "error: $requirements cannot be installed; check network and disk, and run the same command again" >&2; exit 2; }
    cp "$requirements" ".venv/${requirements%.txt}.stamp"
  done
  exec 9<&-
  trap - INT TERM
fi
source .venv/bin/activate
export TOKENIZERS_PARALLELISM=false
# A relative folder is the user's, not the repository's.
case ${SOTERIA_RESULTS:-/} in /*) ;; *) export SOTERIA_RESULTS=$OLDPWD/$SOTERIA_RESULTS ;; esac
