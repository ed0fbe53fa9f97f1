#!/usr/bin/env bash
# As the documents call it from here; the script itself is in scripts/.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../scripts/run_multinode.sh" "$@"
