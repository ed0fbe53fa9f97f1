#!/usr/bin/env bash
# This host's ranks of a job on several: bash run_multinode.sh "COMMAND" RANK_TABLE_FILE [START,END] RANK_SIZE   (-h: all of it)
exec bash "$(dirname "${BASH_SOURCE[0]}")/_launch.sh" multinode "$@"
