#!/usr/bin/env bash
# torch ranks: bash torchrun_launcher.sh "COMMAND" [WORKERS] [LOCAL] [ADDR] [PORT] [NODE_RANK] [LOG] [JOIN] [TIMEOUT]   (-h: all of it)
exec bash "$(dirname "${BASH_SOURCE[0]}")/_launch.sh" torchrun "$@"
