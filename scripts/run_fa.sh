#!/usr/bin/env bash
# Prompts through the contiguous cache, as MindIE's run_fa.sh takes them:
#   bash scripts/run_fa.sh -m WEIGHTS [flags of examples/run_fa.py ...]
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
fail() {
  printf 'error: %s\n  try: %s\n' "$1" "$2" >&2
  exit 2
}
model=''
others=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) sed -n '2,3s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -m | --model-path | --model_path)
      [ $# -ge 2 ] || fail "$1 needs a value" "$1 WEIGHTS"
      model=$2
      shift 2
      ;;
    *) others+=("$1"); shift ;;
  esac
done
[ -n "$model" ] || fail "which weights?" "bash $0 -m WEIGHTS"

python=${PY:-$repo/.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3) || fail "no Python found" "make setup"
words=("$python" "$repo/examples/run_fa.py" --model_path "$model" ${others[@]+"${others[@]}"})
{ printf '+'; printf ' %q' "${words[@]}"; printf '\n'; } >&2
exec "${words[@]}"
