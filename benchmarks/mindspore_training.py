"""Training in MindSpore beside torch: the same model, weights, packed rows and optimiser, in fp32.

    python benchmarks/mindspore_training.py [--task finetune|lora] [--rounds 5] [--steps 20] [--threads 2]

The quick start's model and data: qwen2_5_tiny on the built-in skills, packed rows, micro batches of 4. Each backend
runs the repository's own trainer in a process of its own; both are ready before the first round, rounds of some
steps alternate between them, so that a disturbance meets both alike, and the first round warms up (MindSpore compiles
its graphs in it) and is not counted. Both begin with the same weights and read the same rows, so their losses must agree.

Tokens are real ones, padding not counted. ``roofline`` is the share of the measured fp32 matrix-product rate that the
useful operations of the steps come to. The last line is one JSON object; ``ratio`` is the median over the rounds of
MindSpore's tokens a second over torch's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(Path(__file__).resolve().parent)]

from roofline import Busy, commit, machine, measure  # noqa: E402
from training_step import show  # noqa: E402

from research.core.errors import run_cli  # noqa: E402

BACKENDS = ("torch", "mindspore")
WORKER = Path(__file__).resolve().parent / "_mindspore_training_contender.py"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=("finetune", "lora"), default="finetune")
    parser.add_argument("--model", default="qwen2_5_tiny")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of a round")
    parser.add_argument("--threads", type=int, default=0, help="0: every core")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(args, work)
        workers = {backend: Worker(backend, args, work) for backend in BACKENDS}
        try:
            for worker in workers.values():
                worker.read()  # built
            roof, results = run_rounds(workers, args.rounds)
        finally:
            for worker in workers.values():
                worker.close()
    report(args, roof, results)
    return 0


def prepare(args: argparse.Namespace, work: Path) -> None:
    """Write the packed data set, the settings and the spec that both read."""
    from research.core.config.compose import compose, to_yaml
    from research.core.data.prepare import prepare_dataset
    from research.core.text.builtin import builtin_tokenizer
    from research.core.text.template import get_template
    from research.registry import model_spec

    words = [f"task={args.task}", f"model={args.model}", "data=skills", "train.dtype=fp32", "device=cpu"]
    words += [f"data.seq_length={args.seq_length}", f"train.micro_batch={args.micro_batch}", "data.eval_records=0"]
    words += [f"train.steps={args.steps * (args.rounds + 1)}", "train.epochs=null", "train.max_minutes=null"]
    words += [f"device.threads={args.threads}", "train.log_every=1000000", "train.warmup_steps=0"]
    # a row of 256 holds some ten of these conversations
    rows = args.micro_batch * args.steps * (args.rounds + 2)
    cfg = compose([*words, f"data.skills_records={max(100, rows * args.seq_length // 16)}", "weights=none"])
    cfg.weights = None
    tokenizer, template = builtin_tokenizer(), get_template("qwen2_5")
    spec = model_spec(cfg.model, tokens=tokenizer.vocab_size)
    prepare_dataset(
        cfg.data, tokenizer, template, work / "data", model_length=None, vocab_size=spec.vocab, log=lambda line: None
    )
    (work / "config.yaml").write_text(to_yaml(cfg))
    (work / "spec.json").write_text(json.dumps(asdict(spec)))
    show(f"{args.model}, {spec.parameters():,} parameters, {args.task} in fp32, rows of {args.seq_length}")


class Worker:
    """A backend's process. It builds its trainer, says so, and then trains some steps for every line it is sent."""

    def __init__(self, backend: str, args: argparse.Namespace, work: Path):
        self.backend, self.log = backend, work / f"{backend}.log"
        settings = {"backend": backend, "work": str(work), "steps": args.steps}
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
        )

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.backend} ended:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def round(self) -> dict:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def run_rounds(workers: dict[str, Worker], rounds: int):
    """Everybody's rounds, and the best roofline of those measured between them."""
    results: dict[str, list[dict]] = {backend: [] for backend in workers}
    roof = None
    for number in range(rounds + 1):
        roof = measure(0.5).best(roof)
        for backend, worker in workers.items():
            with Busy() as busy:
                found = worker.round()
            if busy.share is not None:  # the workers' time counts as others' until they have ended
                found["busy"] = max(0.0, busy.share - found["cpu_seconds"] / found["seconds"] / os.cpu_count())
            results[backend].append(found)
            show(
                f"round {number} {backend:10} {found['tokens'] / found['seconds']:8.0f} tok/s ({found['cpu_seconds']:.1f} CPU s)  loss {found['loss']:.4f}  "
                f"peak {found['memory'] / 2**30:.2f} GiB  others {found.get('busy', 0):.0%}"
            )
    return roof, results


def report(args: argparse.Namespace, roof, results: dict[str, list[dict]]) -> None:
    result = {"benchmark": "mindspore_training", "commit": commit(), **machine(), **roof.to_json()}
    result |= {"model": args.model, "task": args.task, "seq_length": args.seq_length, "micro_batch": args.micro_batch}
    for backend, rounds in results.items():
        counted = rounds[1:]
        result[backend] = {
            "tokens_per_s": round(statistics.median(r["tokens"] / r["seconds"] for r in counted), 1),
            "supervised_tokens_per_s": round(statistics.median(r["targets"] / r["seconds"] for r in counted), 1),
            "tokens_per_cpu_s": round(statistics.median(r["tokens"] / r["cpu_seconds"] for r in counted), 1),
            "roofline": round(statistics.median(r["flops"] / r["seconds"] for r in counted) / roof.gemm("fp32"), 3),
            "peak_memory_GiB": round(max(r["memory"] for r in counted) / 2**30, 2),
            "last_loss": round(rounds[-1]["loss"], 4),
            "busy": round(statistics.median(r.get("busy", 0.0) for r in counted), 2),
        }
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(results["torch"][1:], results["mindspore"][1:])]
    result |= {"ratio": round(statistics.median(ratios), 3), "ratios": [round(r, 3) for r in ratios]}
    cpu = [a["cpu_seconds"] / b["cpu_seconds"] for a, b in zip(results["torch"][1:], results["mindspore"][1:])]
    result["cpu_ratio"] = round(statistics.median(cpu), 3)  # what a busy machine can still say
    result["rounds"], result["steps"] = args.rounds, args.steps
    show(f"mindspore over torch: {result['ratio']:.2f}x (median of the rounds' ratios)")
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(run_cli(main))
