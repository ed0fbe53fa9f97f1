"""Conversion and split of a large sharded checkpoint beside ``cp`` of the same files, and beside transformers on 1 GB.

    python benchmarks/convert_weights.py [--layers 2] [--folder DIR] [--parts 4]

The checkpoint is synthetic, with the shapes of Qwen2.5-7B and ``--layers`` of its 28 layers (28: 15.2 GB in bfloat16, 2:
3.1 GB). Every program runs in a process of its own: seconds of wall clock up to and with the sync of the files, peak
resident memory as the kernel counts it. ``cp`` syncs too. Nothing drops the page cache, for either side.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.roofline import Busy
from research.core.spec import spec_from_hf
from research.core.weights.blocks import hf_layout, logical_shapes
from research.core.weights.formats.safetensors import HF_METADATA, frame
from research.core.weights.plan import Target, index_file, shard_files

REPO = Path(__file__).resolve().parents[1]
QWEN2_5_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_hidden_layers": 28,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
# 1 GB for the comparison with transformers: the same shapes, a smaller vocabulary
ONE_GB = QWEN2_5_7B | {"num_hidden_layers": 2, "vocab_size": 8192}
SHARD_BYTES = 4_000_000_000
LIMIT = 1 << 30  # bytes of memory on top of twice the largest tensor
TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2], max_shard_size="4GB")
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2, help="of 28; 28 is the whole model, 15.2 GB")
    parser.add_argument("--parts", type=int, default=4, help="tensor-parallel parts of the split")
    parser.add_argument("--folder", help="where to work (twice the checkpoint's size); default: the temporary folder")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each program; the best counts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="convert-", dir=args.folder) as name:
        result = measure(Path(name), args)
    print(json.dumps(result))
    return 0


def measure(root: Path, args) -> dict:
    source = synthetic(root / "hf", QWEN2_5_7B | {"num_hidden_layers": args.layers})
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    largest = 2 * QWEN2_5_7B["vocab_size"] * QWEN2_5_7B["hidden_size"]
    out: dict = {"benchmark": "convert_weights", "gb": size / 1e9, "limit_gb": (LIMIT + 2 * largest) / 1e9, "runs": {}}
    tool = [
        sys.executable,
        str(REPO / "tools" / "convert_weight.py"),
        "--model",
        "qwen2_5",
        "--input_path",
        str(source),
    ]
    target = root / "out"
    programs = {
        "cp": ["cp", "-r", str(source), str(target)],
        "convert": [*tool, "--output_path", f"{target}.ckpt"],
        "convert_grouped": [*tool, "--output_path", f"{target}.ckpt", "--qkv_concat", "grouped"],
        "convert_fp16": [*tool, "--output_path", f"{target}.ckpt", "--dtype", "fp16", "--allow_overflow"],
        f"split_{args.parts}": task("split", source, target, f"reshard.grid=tp{args.parts}"),
    }
    with Busy() as busy:
        for _ in range(args.repeat):
            for name, command in programs.items():
                record(out["runs"], name, run(command), size)
                clear(root, keep=source)
        shutil.rmtree(source)
        small = synthetic(root / "small", ONE_GB)
        small_size = sum(path.stat().st_size for path in small.glob("*.safetensors"))
        for _ in range(args.repeat):
            record(
                out["runs"], "transformers_1gb", run([sys.executable, "-c", TRANSFORMERS, small, target]), small_size
            )
            clear(root, keep=small)
            again = task("convert", small, target, "convert.to=huggingface", "convert.shard_gb=4")
            record(out["runs"], "convert_1gb", run(again), small_size)
            clear(root, keep=small)
    rate = {name: run["gb_per_s"] for name, run in out["runs"].items()}
    out["share_of_cp"] = {name: rate[name] / rate["cp"] for name in programs if name != "cp"}
    out["times_transformers"] = rate["convert_1gb"] / rate["transformers_1gb"]
    out["busy"] = busy.share
    return out


def task(name: str, source: Path, target: Path, *words: str) -> list[str]:
    script = str(REPO / "research" / "qwen2_5" / "run_qwen2_5.py")
    return [sys.executable, script, f"task={name}", f"weights={source}", f"output={target}", *words]


def run(command: list) -> tuple[float, int]:
    """-> (seconds up to the sync of everything written, peak resident bytes)."""
    os.sync()
    started = time.monotonic()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[:4]} failed:\n{errors}")
    os.sync()
    return time.monotonic() - started, usage.ru_maxrss * 1024


def record(runs: dict, name: str, found: tuple[float, int], size: int) -> None:
    seconds, peak = found
    best = min(seconds, runs.get(name, {}).get("seconds", seconds))
    peak = max(peak, int(runs.get(name, {}).get("peak_gb", 0) * 1e9))
    runs[name] = {"seconds": best, "gb_per_s": size / best / 1e9, "peak_gb": peak / 1e9}
    print(f"{name:18} {best:7.1f} s  {size / best / 1e9:5.2f} GB/s  peak {peak / 1e9:5.2f} GB", flush=True)


def clear(root: Path, keep: Path) -> None:
    for path in root.iterdir():
        if path != keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def synthetic(folder: Path, config: dict) -> Path:
    """A sharded folder of bfloat16 weights around 0.02, written straight to its places."""
    folder.mkdir()
    spec = spec_from_hf(config)
    assert logical_shapes(spec)
    targets = [Target(stored, "BF16") for stored in hf_layout(spec)]
    files = shard_files(targets, SHARD_BYTES, HF_METADATA)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if len(files) > 1:
        (folder / "model.safetensors.index.json").write_bytes(index_file(files))
    block = (np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(np.float32).view(np.uint32) >> 16).astype(
        np.uint16
    )
    for file in files:
        shape = frame([(t.name, t.dtype, t.shape) for t in file.tensors], HF_METADATA)
        with (folder / file.path).open("wb") as stream:
            for offset, data in shape.pieces:
                assert offset == stream.tell()
                stream.write(data)
            left = shape.size - stream.tell()
            while left:
                stream.write(memoryview(block).cast("B")[:left])
                left -= min(left, block.nbytes)
    os.sync()
    return folder


if __name__ == "__main__":
    sys.exit(main())
