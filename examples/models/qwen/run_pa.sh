#!/usr/bin/env bash
# MindIE's place for scripts/run_pa.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../../scripts/run_pa.sh" "$@"
