#!/usr/bin/env bash
# Find the Python that the ranks will run and hand over to research/core/launch/scripts.py: bash scripts/_launch.sh LAUNCHER ARGS...
# Taken: PY, an activated environment (virtualenv or conda), the repository's .venv, python3.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
for python in "${PY:-}" "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}" \
  "$repo/.venv/bin/python" python3 ''; do
  [ -z "$python" ] || ! command -v "$python" >/dev/null || break
done
[ -n "$python" ] || {
  printf 'error: no Python found\n  try: make setup, or PY=/path/to/python\n' >&2
  exit 2
}
exec "$python" "$repo/scripts/_launch.py" "$@"
