#!/usr/bin/env bash
# Create .venv and install a requirements file into it; the stamp is written last, so a broken set-up starts again.
# Everything goes to stderr: stdout belongs to the target that needed the set-up.
set -euo pipefail
requirements=$1 stamp=$2
venv=$(dirname "$stamp")
python=${PYTHON:-python3}
exec 1>&2

"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || {
  echo "error: $("$python" --version 2>&1) is not supported"
  echo "  try: make setup PYTHON=python3.11"
  exit 2
}
# Two targets started at once must not install into one folder together.
mkdir -p "$venv"
exec 9>"$venv/.lock"
command -v flock >/dev/null && flock 9
[ -x "$venv/bin/python" ] || {
  echo "+ $python -m venv $venv"
  "$python" -m venv "$venv" || {
    echo "error: $python cannot make a virtual environment"
    echo "  try: apt-get install python3-venv"
    exit 2
  }
}
echo "+ $venv/bin/python -m pip install -r $requirements   (once; a few minutes)"
# Not compiled: Python does that for the modules it imports; of the tens of thousands installed most are never asked for.
"$venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check -r "$requirements"
touch "$stamp"
