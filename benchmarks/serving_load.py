"""The engine under load: many requests at once, of mixed lengths, every fourth opening with one common prefix.

    python benchmarks/serving_load.py [--shapes tiny,qwen2_5_0_5b] [--requests 64] [--rounds 3]
                                      [--prompt 32,512] [--new 16,128] [--prefix 256] [--seed 0]
                                      [--peers transformers,vllm] [--vllm-python PYTHON]

Random weights, bf16, greedy, no end token; ``tiny`` has 4 layers of 256 and the real vocabulary. All requests are submitted at
once. Reported: output tokens/s over the whole run, and the median and the 95th percentile of the time to the first token
and between two tokens of an answer. The peers answer the same requests: vLLM, where an interpreter that has it is named
(``--vllm-python`` or BENCH_VLLM_PYTHON), all at once, too; transformers with a static cache in batches of 16, sorted by length and
padded. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(Path(__file__).resolve().parent)]

from _outside import Outside  # noqa: E402
from _transformers_peer import exactly, twin  # noqa: E402
from decode import random_decoder, show  # noqa: E402
from roofline import Busy, commit, machine  # noqa: E402

from research.core.errors import UserError, run_cli  # noqa: E402
from research.core.text.without_text import WithoutText  # noqa: E402

PEER_BATCH = 16


@dataclass
class Load:
    prompts: list[list[int]]
    new: list[int]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="tiny,qwen2_5_0_5b")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", default="32,512", help="shortest and longest")
    parser.add_argument("--new", default="16,128", help="fewest and most")
    parser.add_argument("--prefix", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peers", default="transformers,vllm", help="vllm is left out where no interpreter is named")
    parser.add_argument("--vllm-python", default=os.environ.get("BENCH_VLLM_PYTHON"))
    args = parser.parse_args(argv)

    shapes = {}
    with Busy() as busy:
        for shape in args.shapes.split(","):
            shapes[shape] = run_shape(shape, args)
            show(f"{shape}: {json.dumps(shapes[shape])}")
    share = None if busy.share is None else round(busy.share, 3)
    result = {"benchmark": "serving_load", "commit": commit(), **machine(), "busy": share, "requests": args.requests}
    print(json.dumps(result | {"rounds": args.rounds, "shapes": shapes}))
    return 0


def run_shape(shape: str, args) -> dict:
    """-> each contender's medians over the rounds, and our rate over the others'."""
    with ExitStack() as running:
        return compare(tiny() if shape == "tiny" else bf16_decoder(shape), args, running)


def compare(decoder, args, running: ExitStack) -> dict:
    load = draw_load(decoder.spec.vocab, args)
    engine = new_engine(decoder, load)
    running.callback(engine.close)
    contenders: dict[str, Callable[[Load], dict[str, float]]] = {"ours": lambda some: serve(engine, some)}
    for name in filter(None, args.peers.split(",")):
        if name == "transformers":
            contenders[name] = transformers_batches(decoder)
        elif name != "vllm":
            raise UserError(f"{name!r} is not a peer", where="--peers", hint="transformers, vllm")
        elif args.vllm_python:
            contenders[name] = vllm_at_once(args.vllm_python, decoder, load, running)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for round_number in range(args.rounds + 1):
        # Other tokens in each round: the prefixes of the last one must not be found again.
        fresh = shifted(load, round_number, decoder.spec.vocab)
        if not round_number:  # warms up
            fresh = Load(fresh.prompts[:4], fresh.new[:4])
        for name, run in contenders.items():
            found = run(fresh)
            if round_number:
                rounds[name].append(found)
        if round_number:
            show("  ".join(f"{n} {r[-1]['tokens_per_s']:.1f}" for n, r in rounds.items()) + " tokens/s")
    middle = {
        name: {key: round(statistics.median(r[key] for r in each), 4) for key in each[0]}
        for name, each in rounds.items()
    }
    rates = {name: found["tokens_per_s"] for name, found in middle.items()}
    return middle | {"ratios": {n: round(rates["ours"] / rate, 2) for n, rate in rates.items() if n != "ours"}}


def bf16_decoder(name: str):
    import torch

    return random_decoder(name, None, torch.bfloat16)


def tiny():
    import torch

    from research.core.spec import DecoderSpec
    from research.core.torch.decoder import Decoder
    from research.core.torch.packed_linear import pack_frozen_linears

    spec = DecoderSpec(
        "qwen2",
        layers=4,
        hidden=256,
        heads=4,
        kv_heads=2,
        head_dim=64,
        ffn=1024,
        vocab=151936,
        max_positions=4096,
        tied=True,
    )
    decoder = Decoder(spec).init_weights(0).to(torch.bfloat16).eval().requires_grad_(False)
    decoder.tie()
    pack_frozen_linears(decoder)
    return decoder


def draw_load(vocab: int, args) -> Load:
    numbers = random.Random(args.seed)
    (low, high), (few, many) = (tuple(map(int, pair.split(","))) for pair in (args.prompt, args.new))
    prefix = [numbers.randrange(vocab) for _ in range(args.prefix)]
    prompts, new = [], []
    for i in range(args.requests):
        length = numbers.randint(low, high)
        prompt = [numbers.randrange(vocab) for _ in range(length)]
        if i % 4 == 0:  # as long as drawn, or the prefix and a few more
            prompt = prefix + prompt[args.prefix :] + prompt[:8]
        prompts.append(prompt)
        new.append(numbers.randint(few, many))
    return Load(prompts, new)


def shifted(load: Load, by: int, vocab: int) -> Load:
    return Load([[(token + 7919 * by) % vocab for token in prompt] for prompt in load.prompts], load.new)


def new_engine(decoder, load: Load):
    from research.core.config.schema import EngineConfig
    from research.core.engine.engine import PagedEngine

    blocks = sum(-(-(len(p) + n) // 16) for p, n in zip(load.prompts, load.new)) + 64
    return PagedEngine(decoder, WithoutText(), EngineConfig(num_blocks=blocks))


def serve(engine, load: Load) -> dict[str, float]:
    from research.core.engine.api import EngineRequest

    start, arrivals = time.perf_counter(), {}
    for prompt, new in zip(load.prompts, load.new):
        arrivals[engine.submit(EngineRequest(tuple(prompt), max_new_tokens=new, ignore_eos=True))] = []
    while engine.has_work():
        updates = engine.step()
        now = time.perf_counter()
        for update in updates:
            arrivals[update.request] += [now] * len(update.tokens)
    return figures(load, list(arrivals.values()), start, time.perf_counter())


def figures(load: Load, arrivals: list[list[float]], start: float, end: float) -> dict[str, float]:
    """``arrivals``: of the tokens of each answer, on the clock that ``start`` and ``end`` were read from."""
    assert [len(times) for times in arrivals] == load.new
    first = [times[0] - start for times in arrivals]
    between = [b - a for times in arrivals for a, b in pairwise(times)]
    return {
        "tokens_per_s": sum(load.new) / (end - start),
        "first_p50_s": percentile(first, 50),
        "first_p95_s": percentile(first, 95),
        "between_p50_s": percentile(between, 50),
        "between_p95_s": percentile(between, 95),
    }


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def vllm_at_once(python: str, decoder, load: Load, running: ExitStack):
    from research.core.torch.weights import save_decoder

    longest = max(len(p) + n for p, n in zip(load.prompts, load.new))
    with tempfile.TemporaryDirectory() as folder:
        save_decoder(decoder, Path(folder) / "weights")
        words = Path(folder) / "weights", "bfloat16", len(load.prompts), longest, 1
        outside = running.enter_context(Outside(python, "_vllm_contender.py", *words))

    def run(load: Load) -> dict[str, float]:
        answer = outside(load.prompts, load.new)
        return figures(load, answer["arrivals"], 0.0, answer["seconds"])

    return run


def transformers_batches(decoder):
    import torch

    model = twin(decoder)

    def run(load: Load) -> dict[str, float]:
        order = sorted(range(len(load.prompts)), key=lambda i: (load.new[i], len(load.prompts[i])))
        start = time.perf_counter()
        for first in range(0, len(order), PEER_BATCH):
            some = order[first : first + PEER_BATCH]
            longest = max(len(load.prompts[i]) for i in some)
            ids = torch.zeros(len(some), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(some):
                ids[row, longest - len(load.prompts[i]) :] = torch.tensor(load.prompts[i])
                mask[row, longest - len(load.prompts[i]) :] = 1
            new = max(load.new[i] for i in some)
            model.generate(ids, attention_mask=mask, generation_config=exactly(new))
        return {"tokens_per_s": sum(load.new) / (time.perf_counter() - start)}

    return run


if __name__ == "__main__":
    sys.exit(run_cli(main))
