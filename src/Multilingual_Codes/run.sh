exec bash "$(dirname "${BASH_SOURCE[0]}")/../../scripts/run.sh" "$@"
