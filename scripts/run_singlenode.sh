#!/usr/bin/env bash
# The ranks of one host: bash run_singlenode.sh "COMMAND" RANK_TABLE_FILE [START,END] RANK_SIZE   (-h: all of it)
exec bash "$(dirname "${BASH_SOURCE[0]}")/_launch.sh" singlenode "$@"
