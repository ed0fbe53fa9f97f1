#!/usr/bin/env bash
# Run every benchmark (or those named), each beside its peer, and collect the last line of each: scripts/bench.sh [NAME ...]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PY:-.venv/bin/python}
names=("$@")
[ ${#names[@]} -gt 0 ] || for file in benchmarks/*.py; do
  [ "$(basename "$file" .py)" = roofline ] || [[ $(basename "$file") = _* ]] || names+=("$(basename "$file" .py)")
done
mkdir -p runs/bench
out=runs/bench/$(date +%Y-%m-%d_%H-%M-%S).jsonl
status=0
for name in "${names[@]}"; do
  [ -f "benchmarks/$name.py" ] || {
    echo "error: benchmarks/$name.py not found; there are: $(cd benchmarks && ls *.py | tr '\n' ' ')" >&2
    exit 2
  }
  echo "+ $python benchmarks/$name.py"
  if "$python" "benchmarks/$name.py" | tee "$out.last"; then
    tail -n 1 "$out.last" >>"$out"
  else
    status=1
    echo "error: benchmarks/$name.py failed" >&2
  fi
done
rm -f "$out.last"
echo "results: $out"
exit $status
