"""A long prompt through the engine: memory beyond the blocks of its keys and values, and speed, beside transformers.

    python benchmarks/long_context.py [--model qwen2_5_0_5b] [--layers 4] [--lengths 512,8192,32768,65536]
                                      [--peer-lengths 512,8192,32768] [--new 8]

Random weights, bf16, with the YaRN of Qwen2.5's model cards (factor 4 over 32,768). Every length runs in a process of its
own, whose largest resident set since the weights lay there counts: less the keys and values it is what a step needs.
transformers answers with its dynamic cache. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(Path(__file__).resolve().parent)]

from _transformers_peer import exactly, twin  # noqa: E402
from decode import random_decoder, show  # noqa: E402
from roofline import Busy, commit, machine  # noqa: E402

from research.core.errors import run_cli  # noqa: E402
from research.core.text.without_text import WithoutText  # noqa: E402

YARN_FROM, YARN_FACTOR = 32768, 4.0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2_5_0_5b")
    parser.add_argument("--layers", type=int, default=4, help="fewer layers than the model has")
    parser.add_argument("--lengths", default="512,8192,32768,65536")
    parser.add_argument("--peer-lengths", default="512,8192,32768")
    parser.add_argument("--new", type=int, default=8)
    parser.add_argument("--one", nargs=2, metavar=("WHO", "LENGTH"), help="for the processes that this program starts")
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measured(args.one[0], int(args.one[1]), args)))
        return 0
    found: dict[str, dict[str, dict]] = {"ours": {}, "transformers": {}}
    with Busy() as busy:
        for length in args.lengths.split(","):
            for who in found:
                if who == "ours" or length in args.peer_lengths.split(","):
                    found[who][length] = alone(who, length, args)
                    show(f"{who} {length}: {json.dumps(found[who][length])}")
    share = None if busy.share is None else round(busy.share, 3)
    result = {"benchmark": "long_context", "commit": commit(), **machine(), "busy": share, "model": args.model}
    print(json.dumps(result | {"layers": args.layers, "new": args.new, "contenders": found}))
    return 0


def alone(who: str, length: str, args) -> dict:
    words = ["--model", args.model, "--layers", str(args.layers), "--new", str(args.new), "--one", who, length]
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(who: str, length: int, args) -> dict:
    import torch

    decoder = with_yarn(args.model, args.layers)
    spec = decoder.spec
    prompt = torch.randint(spec.vocab, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    run = (ours if who == "ours" else theirs)(decoder, length + args.new)
    run(prompt[:64], 2)  # warms up
    gc.collect()
    before = peak(since_now=True)
    short, long = run(prompt, 1), run(prompt, args.new)
    keys = 2 * spec.layers * spec.kv_heads * spec.head_dim * 2 * (length + args.new)
    return {
        "prompt_tokens_per_s": round(length / short, 1),
        # a disturbance may be longer than the decoding of few tokens
        "tokens_per_s": round((args.new - 1) / (long - short), 2) if long > short else None,
        "keys_and_values_MB": round(keys / 1e6, 1),
        "beyond_them_MB": round((peak() - before - keys) / 1e6, 1),
    }


def peak(since_now: bool = False) -> int:
    """Largest resident set in bytes since the last call with ``since_now`` (Linux)."""
    if since_now:
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def with_yarn(name: str, layers: int):
    import torch

    from research.core.spec import RopeScaling

    scaling = RopeScaling("yarn", YARN_FACTOR, original_positions=YARN_FROM)
    return random_decoder(name, layers, torch.bfloat16, max_positions=YARN_FROM, rope_scaling=scaling)


def ours(decoder, length: int):
    from research.core.config.schema import EngineConfig
    from research.core.engine.api import EngineRequest
    from research.core.engine.engine import PagedEngine

    engine = PagedEngine(decoder, WithoutText(), EngineConfig(num_blocks=-(-length // 16) + 8, prefix_cache=False))

    def run(prompt: list[int], new: int) -> float:
        start = time.perf_counter()
        engine.submit(EngineRequest(tuple(prompt), max_new_tokens=new, ignore_eos=True))
        while engine.has_work():
            engine.step()
        return time.perf_counter() - start

    return run


def theirs(decoder, length: int):
    import torch

    model = twin(decoder)

    def run(prompt: list[int], new: int) -> float:
        ids = torch.tensor([prompt])
        start = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=exactly(new, "dynamic"))
        return time.perf_counter() - start

    return run


if __name__ == "__main__":
    sys.exit(run_cli(main))
