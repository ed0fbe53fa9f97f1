"""The engine beside transformers, and beside llama.cpp and vLLM where they are installed: batches 1, 8, 32, and prefill.

    python benchmarks/engine.py [--model qwen2_5_0_5b] [--prompt 128] [--new 64] [--batches 1,8,32] [--rounds 3]
                                [--peers transformers,llama,vllm] [--llama-python PYTHON] [--vllm-python PYTHON]

Random weights in the shape of the model, the same for everyone, bf16, greedy, no end token. Everybody answers a batch of
prompts twice: one token, which is the prefill, and --new tokens; the difference is the decoding. Rounds alternate between
contenders, so that a disturbance meets all alike; the median of the rounds counts. llama.cpp runs from the interpreter
that has llama-cpp-python and gguf (``--llama-python`` or BENCH_LLAMA_PYTHON), vLLM from the one that has it
(``--vllm-python`` or BENCH_VLLM_PYTHON); those that are not named are left out. A decode step has to read every weight
once and to multiply it by each row: the longer of the two at the speeds measured here is the roofline. The last line is one
JSON object.
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
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(Path(__file__).resolve().parent)]

from _outside import Outside  # noqa: E402
from _transformers_peer import exactly, twin  # noqa: E402
from decode import bytes_per_token, random_decoder, show  # noqa: E402
from roofline import Busy, Roofline, commit, machine, measure  # noqa: E402

from research.core.errors import UserError, run_cli  # noqa: E402
from research.core.text.without_text import WithoutText  # noqa: E402

# A contender answers prompts with so many tokens each and returns the seconds that took.
Contender = Callable[[list[list[int]], int], float]
PREFILL = 8  # prompts of the prefill's measurement


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2_5_0_5b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default="transformers,llama,vllm", help="those that are not installed are left out")
    parser.add_argument("--llama-python", default=os.environ.get("BENCH_LLAMA_PYTHON"))
    parser.add_argument("--vllm-python", default=os.environ.get("BENCH_VLLM_PYTHON"))
    args = parser.parse_args(argv)
    batches = [int(b) for b in args.batches.split(",")]

    import torch

    roof = measure(3.0)
    show(f"roofline {json.dumps(roof.to_json())}")
    decoder = random_decoder(args.model, args.layers, torch.bfloat16)
    random = torch.Generator().manual_seed(0)
    most = max([PREFILL, *batches])
    prompts = torch.randint(decoder.spec.vocab, (most, args.prompt), generator=random).tolist()

    cells = [(f"first {batch}", prompts[:batch], 1) for batch in sorted({PREFILL, *batches})]
    cells += [(f"all {batch}", prompts[:batch], args.new) for batch in batches]
    seconds: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder, Busy() as busy, ExitStack() as running:
        contenders = {"ours": ours(decoder, args.prompt + args.new, most)}
        contenders |= peers(decoder, args, most, Path(folder), running)
        for run in contenders.values():
            run(prompts[:2], 3)  # warms up
        for round_number in range(args.rounds):
            for label, some, new in cells:
                for name, run in contenders.items():
                    seconds.setdefault(name, {}).setdefault(label, []).append(run(some, new))
                show("  ".join([label, *(f"{name} {each[label][-1]:.2f} s" for name, each in seconds.items())]))
            show(f"round {round_number + 1}: {json.dumps(rates(seconds, batches, args))}")

    found = rates(seconds, batches, args)
    result = {
        "benchmark": "engine",
        "commit": commit(),
        **machine(),
        "model": args.model,
        "layers": decoder.spec.layers,
        "prompt": args.prompt,
        "new": args.new,
        "rounds": args.rounds,
        "roofline": roof.to_json(),
        "busy": None if busy.share is None else round(busy.share, 3),
        "tokens_per_s": found,
        "of_roofline": shares(found, decoder, roof, batches),
        "ratios": {
            peer: {c: round(found["ours"][c] / rate, 2) for c, rate in found[peer].items() if c in found["ours"]}
            for peer in found
            if peer != "ours"
        },
    }
    print(json.dumps(result))
    return 0


def rates(seconds: dict, batches: list[int], args) -> dict[str, dict[str, float]]:
    """Tokens/s of each contender and cell, of the medians so far."""
    out: dict[str, dict[str, float]] = {}
    for name, times in seconds.items():
        middle = {label: statistics.median(values) for label, values in times.items()}
        out[name] = {"prefill": round(PREFILL * args.prompt / middle[f"first {PREFILL}"], 1)}
        for batch in batches:
            decoding = middle[f"all {batch}"] - middle[f"first {batch}"]
            if decoding > 0:  # a disturbance may be longer than the decoding of few tokens
                out[name][f"batch {batch}"] = round(batch * (args.new - 1) / decoding, 1)
    return out


def shares(found: dict, decoder, roof: Roofline, batches: list[int]) -> dict[str, dict[str, float]]:
    """Each rate as a share of the fastest that memory and processor allow here."""
    spec = decoder.spec
    needed, active = bytes_per_token(decoder), spec.active_parameters()
    active -= 0 if spec.tied else spec.vocab * spec.hidden
    product = max(roof.gemm("bf16"), roof.gemm("fp32"))
    bound = {f"batch {b}": b / max(needed / roof.read, 2 * active * b / product) for b in batches}
    bound["prefill"] = product / (2 * (active - spec.vocab * spec.hidden))
    return {name: {cell: round(rate / bound[cell], 3) for cell, rate in cells.items()} for name, cells in found.items()}


# --- contenders -------------------------------------------------------------------------------------------------


def ours(decoder, length: int, batch: int) -> Contender:
    from research.core.config.schema import EngineConfig
    from research.core.engine.api import EngineRequest
    from research.core.engine.engine import PagedEngine

    blocks = batch * (-(-length // 16) + 1)
    # Without prefixes: every round brings the same prompts.
    settings = EngineConfig(num_blocks=blocks, max_batch=batch, prefix_cache=False)
    engine = PagedEngine(decoder, WithoutText(), settings)

    def run(prompts: list[list[int]], new: int) -> float:
        start = time.perf_counter()
        for prompt in prompts:
            engine.submit(EngineRequest(tuple(prompt), max_new_tokens=new, ignore_eos=True))
        tokens = 0
        while engine.has_work():
            tokens += sum(len(update.tokens) for update in engine.step())
        assert tokens == new * len(prompts)
        return time.perf_counter() - start

    return run


def peers(decoder, args, batch: int, folder: Path, running: ExitStack) -> dict[str, Contender]:
    chosen = args.peers.split(",") if args.peers else []
    for name in chosen:
        if name not in ("transformers", "llama", "vllm"):
            raise UserError(f"{name!r} is not a peer", where="--peers", hint="transformers, llama, vllm")
    found: dict[str, Contender] = {}
    if "transformers" in chosen:
        found["transformers"] = transformers_static(decoder)
    outside = {name: getattr(args, f"{name}_python") for name in ("llama", "vllm") if name in chosen}
    outside = {name: python for name, python in outside.items() if python}
    weights, length = folder / "weights", args.prompt + args.new
    if outside:
        from research.core.torch.weights import save_decoder

        save_decoder(decoder, weights)
    if "llama" in outside:
        words = weights, batch, length
        found["llama"] = timed(running.enter_context(Outside(outside["llama"], "_llama_contender.py", *words)))
    if "vllm" in outside:
        words = weights, "bfloat16", batch, length, 0
        found["vllm"] = timed(running.enter_context(Outside(outside["vllm"], "_vllm_contender.py", *words)))
    return found


def timed(outside: Outside) -> Contender:
    return lambda prompts, new: outside(prompts, new)["seconds"]


def transformers_static(decoder) -> Contender:
    import torch

    model = twin(decoder)

    def run(prompts: list[list[int]], new: int) -> float:
        ids = torch.tensor(prompts)
        start = time.perf_counter()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=exactly(new))
        assert out.shape == (len(prompts), len(prompts[0]) + new)
        return time.perf_counter() - start

    return run


if __name__ == "__main__":
    sys.exit(run_cli(main))
