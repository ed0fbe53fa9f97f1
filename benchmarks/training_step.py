"""A training step against transformers' Trainer (with peft for LoRA) on the same Alpaca records and the same weights.

    python benchmarks/training_step.py [--method lora|full] [--dtype bf16|fp32] [--layers N] [--rounds 3]

Contenders: ``ours`` (the repository's trainer on packed rows), ``dynamic`` (Trainer, each batch padded to its longest
record) and ``padded`` (Trainer, every record padded to the row length). Every round each of them trains on the very
same records: those in the packed rows of that round. Each runs in a process of its own, all are loaded before the first
round, and rounds alternate between them, so that a disturbance meets all alike; the first round warms up and is not
counted. The weights are random, in the shape of Qwen2.5-0.5B (``--layers`` for fewer layers), the vocabulary is the
real one. The losses of the first round must agree: all train the same targets.

Real tokens are those of the records, padding not counted; supervised ones are the targets of the loss. ``roofline`` is
the share of the measured matrix-product rate that the useful operations of the step come to: those of real tokens in
the layers and of supervised ones in the head, whatever else a contender computes. Memory is the peak resident set
during the rounds. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(Path(__file__).resolve().parent)]

from roofline import Busy, Roofline, commit, machine, measure  # noqa: E402

from research.core.config.schema import DataConfig  # noqa: E402
from research.core.errors import UserError, require_file, run_cli  # noqa: E402

CONTENDERS = ("ours", "dynamic", "padded")
WORKER = Path(__file__).resolve().parent / "_training_contender.py"


def main(argv: list[str]) -> int:
    data = Path(os.environ.get("QWEN_TEST_DATA") or REPO.parent / "shared" / "data")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--model", default="qwen2_5_0_5b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--rows", type=int, default=2, help="packed rows of a step")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="comma-separated")
    parser.add_argument("--source", default=data / "alpaca" / "alpaca_data.json.gz", help="Alpaca JSON, .gz allowed")
    parser.add_argument("--tokenizer", default=data / "tokenizer_qwen", help="folder of the vocabulary")
    args = parser.parse_args(argv)
    names = args.contenders.split(",")
    if unknown := set(names) - set(CONTENDERS):
        raise UserError(f"no contender {unknown.pop()!r}", where="--contenders", hint=", ".join(CONTENDERS))
    require_file(args.source, "Alpaca records", "--source=<alpaca_data.json>")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        spec = prepare(args, work)
        show(f"{args.model} with {spec.layers} layers, {spec.parameters():,} parameters, {args.method} in {args.dtype}")
        workers = {name: Worker(name, args, work) for name in names}
        try:
            for worker in workers.values():
                worker.read()  # loaded
            roof, results, ended = run_rounds(workers, args.rounds)
        finally:
            for worker in workers.values():
                worker.close()
    report(args, spec, roof, results, ended)
    return 0


def show(line: str) -> None:
    print(line, flush=True)


def prepare(args: argparse.Namespace, work: Path):
    """Write the packed data set and the random weights that all contenders load; returns the spec."""
    from dataclasses import replace

    from research.core.data.prepare import prepare_dataset
    from research.core.text.template import get_template
    from research.core.text.tokenizer import load_tokenizer
    from research.core.torch.decoder import Decoder
    from research.core.torch.device import DTYPES
    from research.core.torch.weights import save_decoder
    from research.registry import model_config, model_spec

    spec = model_spec(model_config(args.model))
    if args.layers:
        spec = replace(
            spec, layers=args.layers, sliding_layers=tuple(i for i in spec.sliding_layers if i < args.layers)
        )
    records = 40 * args.rows * (args.rounds + 1) * args.seq_length // 512  # a row of 512 holds some 5 records
    cfg = DataConfig(
        source=str(args.source), seq_length=args.seq_length, max_records=records, eval_records=0, workers=1
    )
    tokenizer, template = load_tokenizer(args.tokenizer, "qwen2_5"), get_template("qwen2_5")
    prepare_dataset(
        cfg, tokenizer, template, work / "data", model_length=None, vocab_size=spec.vocab, log=lambda line: None
    )
    save_decoder(Decoder(spec).init_weights(0), work / "weights", DTYPES[args.dtype], eos=tokenizer.eos_id)
    return spec


class Worker:
    """A contender's process. It loads, says so, and then trains one step for every line it is sent."""

    def __init__(self, name: str, args: argparse.Namespace, work: Path):
        self.name, self.log = name, work / f"{name}.log"
        settings = {"name": name, "work": str(work), "method": args.method, "dtype": args.dtype}
        settings |= {"rows": args.rows, "seq_length": args.seq_length, "rounds": args.rounds + 1}
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            env=environment,
            text=True,
        )

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def step(self) -> dict:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def run_rounds(workers: dict[str, Worker], rounds: int) -> tuple[Roofline, dict[str, list[dict]], dict[str, str]]:
    """Everybody's steps, the best roofline of those measured between the rounds, and why a peer left.

    A peer whose process ends (out of memory, most often) is said to have done so, and the others go on without it.
    """
    results: dict[str, list[dict]] = {name: [] for name in workers}
    ended: dict[str, str] = {}
    roof = None
    for number in range(rounds + 1):
        roof = measure(1.0).best(roof)
        for name, worker in workers.items():
            if name in ended:
                continue
            with Busy() as busy:
                try:
                    step = worker.step()
                except RuntimeError:
                    if name == "ours":
                        raise
                    status = worker.process.wait()
                    ended[name] = "killed: out of memory" if status == -9 else f"exit status {status}"
                    show(f"round {number} {name:8} {ended[name]}")
                    results.pop(name)
                    continue
            # the workers are not this process's finished children yet: their time counts as others'
            if busy.share is not None:
                step["busy"] = max(0.0, busy.share - step["cpu_seconds"] / step["seconds"] / os.cpu_count())
            results[name].append(step)
            show(
                f"round {number} {name:8} {step['seconds']:7.2f} s ({step['cpu_seconds']:.1f} CPU)  {step['tokens'] / step['seconds']:6.1f} real tok/s  "
                f"loss {step['loss']:.4f}  peak {step['memory'] / 2**30:.2f} GiB  others {step.get('busy', 0):.0%}"
            )
    show(f"roofline {json.dumps(roof.to_json())}")
    return roof, results, ended


def report(
    args: argparse.Namespace, spec, roof: Roofline, results: dict[str, list[dict]], ended: dict[str, str]
) -> None:
    from research.core.run.flops import step_flops

    summary = {}
    for name, steps in results.items():
        counted = steps[1:]
        rates = []
        for step in counted:
            useful = step_flops(
                spec,
                tokens=step["tokens"],
                targets=step["targets"],
                pairs=step["pairs"],
                frozen=args.method == "lora",
                adapter=step["adapter"],
            )
            rates.append(useful / step["seconds"] / roof.gemm(args.dtype))
        real = [step["tokens"] / step["seconds"] for step in counted]
        summary[name] = {
            "real_tokens_per_s": round(statistics.median(real), 1),
            "best_real_tokens_per_s": round(max(real), 1),
            "supervised_tokens_per_s": round(statistics.median(s["targets"] / s["seconds"] for s in counted), 1),
            "real_tokens_per_cpu_s": round(statistics.median(s["tokens"] / s["cpu_seconds"] for s in counted), 1),
            "roofline": round(statistics.median(rates), 3),
            "best_roofline": round(max(rates), 3),
            "peak_memory_GiB": round(max(step["memory"] for step in steps) / 2**30, 2),
            "first_loss": round(steps[0]["loss"], 4),
            "busy": round(statistics.median(step.get("busy", 0.0) for step in counted), 2),
        }
    show(
        f"\n{'':10}{'real tok/s':>12}{'supervised':>12}{'roofline':>10}{'peak GiB':>10}{'first loss':>12}{'others':>8}"
    )
    for name, row in summary.items():
        show(
            f"{name:10}{row['real_tokens_per_s']:>12}{row['supervised_tokens_per_s']:>12}{row['roofline']:>10.0%}"
            f"{row['peak_memory_GiB']:>10}{row['first_loss']:>12}{row['busy']:>8.0%}"
        )
    result = {"benchmark": "training_step", "commit": commit(), **machine(), **roof.to_json()}
    result |= {"model": args.model, "layers": spec.layers, "method": args.method, "dtype": args.dtype}
    result |= {"rows": args.rows, "seq_length": args.seq_length, "rounds": args.rounds, **summary, **ended}
    for peer in set(results) - {"ours"} if "ours" in results else ():
        # round by round, so that both sides of each ratio met the same disturbance
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(results["ours"][1:], results[peer][1:])]
        result[f"ours_over_{peer}"] = round(statistics.median(ratios), 2)
        show(f"ours over {peer}: {statistics.median(ratios):.2f}x (median of the rounds' ratios)")
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(run_cli(main))
