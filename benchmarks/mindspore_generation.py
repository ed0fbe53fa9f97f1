"""Batch-1 generation on MindSpore: the decoder, its MINDIR graphs through GraphCell, and the torch backend, in one run.

    python benchmarks/mindspore_generation.py [--model qwen2_5_0_5b --layers 4] [--prompt 64] [--new 48] [--rounds 5]

Random weights in the shape of the model, the same for everyone, float32. ``ready_s`` is what passes from weights on the disk
to the first token: for the decoder and for torch loading the folder, for the graphs loading the files, and everywhere
the first prefill, with what is compiled then. The time of a token is the distance of two tokens as they arrive.
Rounds alternate between contenders, so that a disturbance meets all alike. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(Path(__file__).resolve().parent)]

from decode import Clock, equal_prefix, show  # noqa: E402
from roofline import Busy, commit, machine  # noqa: E402

from research.core.config.schema import DeviceConfig, GenerateConfig  # noqa: E402
from research.core.errors import run_cli  # noqa: E402
from research.core.generation.loop import run_requests  # noqa: E402
from research.core.generation.requests import Request  # noqa: E402
from research.tasks.framework import half  # noqa: E402

DEVICE, FLOAT32 = DeviceConfig(kind="cpu"), GenerateConfig(dtype="fp32")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2_5_0_5b")
    parser.add_argument("--layers", type=int, default=4, help="0: all of the model's")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=48, help="tokens generated in a round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, Busy() as busy:
        root = Path(folder)
        spec = write_weights(args.model, args.layers, root / "weights")
        prompt = [(7919 * i) % spec.vocab for i in range(1, args.prompt + 1)]
        length = args.prompt + args.new
        started = time.perf_counter()
        export(root / "weights", root / "graphs", length)
        export_s = time.perf_counter() - started
        show(f"exported in {export_s:.1f} s, {size_of(root / 'graphs') / 1e9:.2f} GB")

        runners, ready = {}, {}
        openers = {
            "decoder": lambda: half("mindspore", "load_runner").load_runner(root / "weights", FLOAT32, DEVICE)[0],
            "mindir": lambda: graphs(root / "graphs"),
            "torch": lambda: half("torch", "load_runner").load_runner(root / "weights", FLOAT32, DEVICE)[0],
        }
        for name, opener in openers.items():
            started = time.perf_counter()
            runners[name] = opener()
            run_requests(runners[name], [Request(prompt, max_new_tokens=1)])
            ready[name] = time.perf_counter() - started
            show(f"{name}: ready in {ready[name]:.1f} s")
        steps: dict[str, list[list[float]]] = {name: [] for name in runners}
        tokens: dict[str, list[int]] = {}
        for round_number in range(args.rounds + 1):
            for name, runner in runners.items():
                clock = Clock()
                tokens[name] = run_requests(runner, [Request(prompt, max_new_tokens=args.new)], on_token=clock.tick)[
                    0
                ].ids
                if round_number:  # the first round compiles and warms up
                    steps[name].append(clock.steps())
            if round_number:
                show("  ".join(f"{n} {1e3 * statistics.median(s[-1]):.1f} ms" for n, s in steps.items()))

    median = {name: statistics.median(statistics.median(times) for times in each) for name, each in steps.items()}
    result = {
        "benchmark": "mindspore_generation",
        "commit": commit(),
        **machine(),
        "model": args.model,
        "layers": spec.layers,
        "prompt": args.prompt,
        "new": args.new,
        "rounds": args.rounds,
        "export_s": round(export_s, 1),
        "busy": None if busy.share is None else round(busy.share, 3),
        "contenders": {
            name: {
                "ready_s": round(ready[name], 1),
                "ms": round(1e3 * median[name], 2),
                "tokens_per_s": round(1 / median[name], 1),
                "rounds_ms": [round(1e3 * statistics.median(times), 2) for times in steps[name]],
            }
            for name in steps
        },
        "mindir_of_decoder": round(median["decoder"] / median["mindir"], 3),
        "decoder_of_torch": round(median["torch"] / median["decoder"], 3),
        "equal_tokens": {name: equal_prefix(tokens["torch"], tokens[name]) for name in tokens},
    }
    print(json.dumps(result))
    return 0


def write_weights(model: str, layers: int, folder: Path):
    """A folder with random weights; -> its spec."""
    import torch

    from research.core.torch.decoder import Decoder
    from research.core.torch.weights import save_decoder
    from research.registry import model_config, model_spec

    spec = model_spec(model_config(model))
    spec = replace(spec, layers=layers, sliding_layers=(), sliding_window=None) if layers else spec
    torch.manual_seed(0)
    save_decoder(Decoder(spec).init_weights(1), folder)
    return spec


def export(weights: Path, root: Path, length: int) -> None:
    from research.core.mindspore.mindir import GraphShapes, Meta
    from research.core.spec import spec_to_hf

    decoder, world = half("mindspore", "load_runner").load_plain(weights, FLOAT32, DEVICE)
    shapes = GraphShapes(length)
    ports = half("mindspore", "export").export_graphs(decoder, shapes, root)
    plain = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    meta = Meta(
        weights.name,
        "qwen2_5",
        spec_to_hf(decoder.spec),
        shapes,
        "float32",
        world.target,
        (),
        plain,
        "",
        "",
        None,
        None,
        ports,
    )
    (root / "meta.json").write_text(meta.text())


def graphs(root: Path):
    from research.core.mindspore import lite
    from research.core.mindspore.mindir import read_meta

    return lite.LiteRunner(read_meta(root), root, lite.GraphCellRuntime(DEVICE))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    sys.exit(run_cli(main))
