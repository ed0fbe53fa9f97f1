#!/usr/bin/env python
"""One rank table for a job on several hosts: python tools/merge_hccl.py hccl_a.json hccl_b.json ...

Ranks are numbered in the order of the arguments: the first file's host is the one with rank 0. Writes
hccl_{servers}s_{devices}p.json into the current folder; every host needs the same file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from research.core.errors import run_cli
from research.core.launch.ranktable import merge_rank_tables, read_rank_table, write_rank_table


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("tables", nargs="+", metavar="hccl.json", help="tables of single hosts, or merged ones")
    parser.add_argument("--output", help="file to write instead of hccl_{servers}s_{devices}p.json")
    args = parser.parse_args(argv)
    merged = merge_rank_tables([read_rank_table(path) for path in args.tables])
    path = write_rank_table(merged, args.output or f"hccl_{len(merged.servers)}s_{len(merged.ranks)}p.json")
    for server in merged.servers:
        first, last = server.devices[0].rank_id, server.devices[-1].rank_id
        print(f"ranks {first} to {last}: {server.server_id}", file=sys.stderr)
    print(path.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
