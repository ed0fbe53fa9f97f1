#!/usr/bin/env bash
# MindSpore ranks: bash msrun_launcher.sh "COMMAND" [WORKERS] [LOCAL] [ADDR] [PORT] [NODE_RANK] [LOG] [JOIN] [TIMEOUT]   (-h: all of it)
exec bash "$(dirname "${BASH_SOURCE[0]}")/_launch.sh" msrun "$@"
