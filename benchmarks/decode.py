"""Batch-1 decoding against transformers' generate (dynamic and static cache) and, where one is named, vLLM's CPU build.

    python benchmarks/decode.py [--model qwen2_5_0_5b] [--dtype bf16] [--prompt 64] [--new 48] [--rounds 5]
                                [--vllm-python PYTHON]

Random weights in the shape of the model, the same for everyone. Each round every contender continues the same prompt
greedily; the time of a token is the distance of two tokens as they arrive, so the prefill is not in it, and what the
contender does between two steps is. Rounds alternate between contenders, so that a disturbance meets all alike. A
token has to read every weight that it uses once: those bytes over its time, as a share of the measured reading speed of
this machine's memory, is the figure to compare. ``linear`` is the sum of the plain ``F.linear`` calls of a token, a
bound for everything built on them. vLLM runs from the interpreter that has it (``--vllm-python`` or BENCH_VLLM_PYTHON).
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(Path(__file__).resolve().parent)]

from _outside import Outside  # noqa: E402
from _transformers_peer import exactly, twin  # noqa: E402
from roofline import Busy, commit, machine, measure  # noqa: E402

from research.core.errors import run_cli  # noqa: E402

# A contender continues the prompt and returns (seconds of each step, new tokens).
Contender = Callable[[list[int]], tuple[list[float], list[int]]]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2_5_0_5b")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=48, help="tokens generated in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vllm-python", default=os.environ.get("BENCH_VLLM_PYTHON"))
    args = parser.parse_args(argv)

    import torch

    from research.core.torch.device import DTYPES

    dtype = DTYPES[args.dtype]
    roof = measure(3.0)
    show(f"roofline {json.dumps(roof.to_json())}")
    decoder = random_decoder(args.model, args.layers, dtype)
    needed = bytes_per_token(decoder)
    prompt = torch.randint(decoder.spec.vocab, (args.prompt,), generator=torch.Generator().manual_seed(0)).tolist()

    contenders = {"ours": ours(decoder, args.new), "linear": linear_only(decoder, args.new)}
    contenders |= transformers_contenders(decoder, args.new)
    steps: dict[str, list[list[float]]] = {}
    tokens: dict[str, list[int]] = {}
    with Busy() as busy, ExitStack() as running:
        if args.vllm_python:
            contenders["vllm"] = vllm_contender(args.vllm_python, decoder, args.new, running)
        for round_number in range(args.rounds + 1):
            for name, run in contenders.items():
                times, tokens[name] = run(prompt)
                if round_number:  # the first round warms up
                    steps.setdefault(name, []).append(times)
            if round_number:
                show("  ".join(f"{n} {1e3 * statistics.median(s[-1]):.1f} ms" for n, s in steps.items()))

    result = {
        "benchmark": "decode",
        "commit": commit(),
        **machine(),
        "model": args.model,
        "layers": decoder.spec.layers,
        "dtype": args.dtype,
        "prompt": args.prompt,
        "new": args.new,
        "rounds": args.rounds,
        "GB_per_token": round(needed / 1e9, 4),
        "roofline": roof.to_json(),
        "busy": None if busy.share is None else round(busy.share, 3),
        "contenders": {name: summary(each, needed, roof.read) for name, each in steps.items()},
    }
    median = {name: contender["ms"] for name, contender in result["contenders"].items()}
    result["ratios"] = {name: round(median[name] / median["ours"], 2) for name in median if name != "ours"}
    result["equal_tokens"] = {
        name: equal_prefix(tokens["ours"], tokens[name]) for name in tokens if name != "ours" and tokens[name]
    }
    print(json.dumps(result))
    return 0


def summary(rounds: list[list[float]], needed: int, read: float) -> dict:
    """Median over rounds of the median step, and the best round's, in milliseconds, tokens/s and share of the roofline."""
    medians = [statistics.median(times) for times in rounds]
    middle, best = statistics.median(medians), min(medians)
    return {
        "ms": round(1e3 * middle, 2),
        "best_ms": round(1e3 * best, 2),
        "tokens_per_s": round(1 / middle, 1),
        "GB_per_s": round(needed / middle / 1e9, 1),
        "of_roofline": round(needed / middle / read, 3),
        "best_of_roofline": round(needed / best / read, 3),
        "rounds_ms": [round(1e3 * m, 2) for m in medians],
    }


def equal_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens two answers begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def show(text: str) -> None:
    print(text, flush=True)


# --- the model --------------------------------------------------------------------------------------------------


def random_decoder(name: str, layers: int | None, dtype, **changed):
    """The decoder of a model's shape with random weights, prepared as make predict prepares it; ``changed``: fields of its
    spec that are others."""
    from dataclasses import replace

    import torch

    from research.core.torch.decoder import Decoder
    from research.core.torch.packed_linear import pack_frozen_linears
    from research.registry import model_config, model_spec

    spec = replace(model_spec(model_config(name)), **changed)
    if layers:
        spec = replace(spec, layers=layers, sliding_layers=(), sliding_window=None)
    with torch.device("meta"):
        decoder = Decoder(spec)
    decoder = decoder.to(dtype).to_empty(device="cpu")
    decoder.tie()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in decoder.named_parameters():
            if "norm" in key:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
    decoder = decoder.eval().requires_grad_(False)
    pack_frozen_linears(decoder)
    return decoder


def bytes_per_token(decoder) -> int:
    """Bytes of the parameters that one token uses: all but the embedding's other rows (a tied one is the head) and the
    experts that are not chosen."""
    spec, size = decoder.spec, decoder.lm_head.weight.element_size()
    embedding = 0 if spec.tied else spec.vocab * spec.hidden
    return (spec.active_parameters() - embedding) * size


# --- contenders -------------------------------------------------------------------------------------------------


class Clock:
    """Seconds between arrivals."""

    def __init__(self):
        self.at: list[float] = []

    def tick(self, *_) -> None:
        self.at.append(time.perf_counter())

    def steps(self) -> list[float]:
        return [after - before for before, after in zip(self.at, self.at[1:])]


def ours(decoder, new: int) -> Contender:
    from research.core.generation.loop import run_requests
    from research.core.generation.requests import Request
    from research.core.torch.generate import Runner

    runner = Runner(decoder)

    def run(prompt: list[int]):
        clock = Clock()
        result = run_requests(runner, [Request(prompt, max_new_tokens=new)], on_token=clock.tick)[0]
        return clock.steps(), result.ids

    return run


def linear_only(decoder, new: int) -> Contender:
    import torch
    import torch.nn.functional as F
    from torch import nn

    weights = [m.weight for m in decoder.modules() if isinstance(m, nn.Linear)]
    inputs = {w.shape[1]: torch.randn(1, w.shape[1]).to(w.dtype) for w in weights}

    def run(prompt: list[int]):
        clock = Clock()
        clock.tick()
        with torch.inference_mode():
            for _ in range(new - 1):
                for weight in weights:
                    F.linear(inputs[weight.shape[1]], weight)
                clock.tick()
        return clock.steps(), []

    return run


def transformers_contenders(decoder, new: int) -> dict[str, Contender]:
    import torch

    model = twin(decoder)

    def contender(cache: str) -> Contender:
        settings = exactly(new, cache)

        def run(prompt: list[int]):
            clock = Clock()
            ids = torch.tensor([prompt])
            streamer = type("Arrivals", (), {"put": staticmethod(clock.tick), "end": staticmethod(lambda: None)})()
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=streamer
            )
            clock.at.pop(0)  # generate hands the prompt to the streamer first
            return clock.steps(), out[0, len(prompt) :].tolist()

        return run

    return {"transformers_dynamic": contender("dynamic"), "transformers_static": contender("static")}


def vllm_contender(python: str, decoder, new: int, running: ExitStack) -> Contender:
    from research.core.torch.weights import save_decoder

    with tempfile.TemporaryDirectory() as folder:
        save_decoder(decoder, Path(folder) / "weights")
        dtype = str(decoder.lm_head.weight.dtype).removeprefix("torch.")
        words = Path(folder) / "weights", dtype, 1, 2048, 0
        engine = running.enter_context(Outside(python, "_vllm_contender.py", *words))

    def run(prompt: list[int]):
        answer = engine([prompt], new)
        return [b - a for a, b in pairwise(answer["arrivals"][0])], answer["tokens"][0]

    return run


if __name__ == "__main__":
    sys.exit(run_cli(main))
