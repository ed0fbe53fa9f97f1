"""Data preparation against batched ``datasets.map`` with two processes: the same records, vocabulary and job.

    python benchmarks/data_preparation.py [--source alpaca_data.json.gz] [--tokenizer FOLDER] [--repeats 5]

The job: read Alpaca JSON, put each record into the chat template, tokenise, label the assistant's answer and its
<|im_end|>, pack into rows of 512, write to disk. The peer is written the way it is fastest: the template renders the
prompts as text, transformers' fast tokenizer takes prompts and answers in batches of 1,000, both in two processes; its
packing is best fit decreasing within each batch. The vocabulary is loaded before the clock starts, for both. Repeats
alternate; the medians count. Both read the same unpacked file. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from research.core.config.schema import DataConfig  # noqa: E402
from research.core.data.prepare import prepare_dataset  # noqa: E402
from research.core.data.sources import open_bytes  # noqa: E402
from research.core.data.workers import cores  # noqa: E402
from research.core.errors import require_file, run_cli  # noqa: E402
from research.core.text.template import get_template  # noqa: E402
from research.core.text.tokenizer import load_tokenizer  # noqa: E402

SEQ_LENGTH, PROCESSES = 512, 2
Counts = Callable[[], dict]  # counting what was made happens outside the clock


def main(argv: list[str]) -> int:
    data = Path(os.environ.get("QWEN_TEST_DATA") or REPO.parent / "shared" / "data")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default=data / "alpaca" / "alpaca_data.json.gz", help="Alpaca JSON, .gz allowed")
    parser.add_argument("--tokenizer", default=data / "tokenizer_qwen", help="folder of the vocabulary")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--records", type=int, help="the first N records only")
    args = parser.parse_args(argv)
    tokenizer, template = load_tokenizer(args.tokenizer, "qwen2_5"), get_template("qwen2_5")
    source = require_file(args.source, "Alpaca records", "--source=<alpaca_data.json>")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        records = unpack(source, args.records, work / "records.json")
        tokenizer.save(work / "tokenizer", template.source)
        theirs = peer(work)

        def ours() -> Counts:
            cfg = DataConfig(
                source=str(work / "records.json"), seq_length=SEQ_LENGTH, workers=PROCESSES, eval_records=0
            )
            report = prepare_dataset(cfg, tokenizer, template, work / "ours", model_length=None, vocab_size=None)
            return lambda: report.splits["train"]

        runs: dict[str, list[dict]] = {"ours": [], "peer": []}
        for _ in range(args.repeats):
            for name, job in (("ours", ours), ("peer", theirs)):
                runs[name].append(measure(job))
                shown = runs[name][-1]
                print(
                    f"{name}: {shown['seconds']:.2f} s ({shown['cpu']:.2f} s of CPU), {records / shown['seconds']:,.0f} records/s, "
                    f"{shown['tokens']:,} tokens in rows {shown['density']:.2%} full, "
                    f"other work on the machine {shown['others']:.0%} of a core",
                    flush=True,
                )
    cpu = {name: statistics.median(run["cpu"] for run in each) for name, each in runs.items()}
    seconds = {name: statistics.median(run["seconds"] for run in each) for name, each in runs.items()}
    result = {
        "benchmark": "data_preparation",
        "records": records,
        "seq_length": SEQ_LENGTH,
        "processes": PROCESSES,
        "cores": cores(),
        "repeats": args.repeats,
        "records_per_s": round(records / seconds["ours"]),
        "peer_records_per_s": round(records / seconds["peer"]),
        "ratio": round(seconds["peer"] / seconds["ours"], 2),
        "cpu_seconds": round(cpu["ours"], 2),
        "peer_cpu_seconds": round(cpu["peer"], 2),
        "tokens": runs["ours"][-1]["tokens"],
        "peer_tokens": runs["peer"][-1]["tokens"],
        "supervised": runs["ours"][-1]["supervised"],
        "peer_supervised": runs["peer"][-1]["supervised"],
        "density": round(runs["ours"][-1]["density"], 4),
        "peer_density": round(runs["peer"][-1]["density"], 4),
        "seconds": {name: [round(run["seconds"], 2) for run in each] for name, each in runs.items()},
        "other_work_in_cores": {name: [round(run["others"], 2) for run in each] for name, each in runs.items()},
    }
    print(json.dumps(result))
    return 0


def unpack(source: Path, limit: int | None, target: Path) -> int:
    """Write the records that both can use (an answer that is not empty) as plain JSON; returns their number."""
    with open_bytes(source) as file:
        records = [record for record in json.load(file)[:limit] if record["output"].strip()]
    target.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return len(records)


def measure(job: Callable[[], Counts]) -> dict:
    """What ``job`` made, its wall and CPU seconds, and how many cores' worth of other work the machine did meanwhile."""
    start, busy, own = time.perf_counter(), machine_busy(), own_cpu()
    counts = job()
    seconds = time.perf_counter() - start
    cpu = own_cpu() - own
    others = (machine_busy() - busy - cpu) / seconds
    return {**counts(), "seconds": seconds, "cpu": cpu, "others": max(0.0, others)}


def machine_busy() -> float:
    """Seconds that all cores together have worked since the machine started."""
    import psutil

    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def own_cpu() -> float:
    """CPU seconds of this process and the children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


# --- the peer ---------------------------------------------------------------------------------------------------


def peer(work: Path) -> Callable[[], Counts]:
    """The same job with ``datasets`` and ``transformers``; the returned function does it once, into a fresh cache."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the two processes are the parallelism
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")

    def encode(batch: dict) -> dict:
        conversations = [
            [{"role": "user", "content": f"{instruction}\n{given}" if given else instruction}]
            for instruction, given in zip(batch["instruction"], batch["input"])
        ]
        prompts = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
        answers = [f"{output}<|im_end|>\n" for output in batch["output"]]
        prompt_ids, answer_ids = tokenizer(prompts)["input_ids"], tokenizer(answers)["input_ids"]
        ids = [(p + a)[:SEQ_LENGTH] for p, a in zip(prompt_ids, answer_ids)]
        labels = [([-100] * len(p) + a[:-1] + [-100])[:SEQ_LENGTH] for p, a in zip(prompt_ids, answer_ids)]
        return {"input_ids": ids, "labels": labels}

    def pack(batch: dict) -> dict:
        rows: list[list[int]] = []
        free: list[int] = []
        order = sorted(range(len(batch["input_ids"])), key=lambda i: -len(batch["input_ids"][i]))
        for i in order:
            length = len(batch["input_ids"][i])
            fits = [(space, row) for row, space in enumerate(free) if space >= length]
            if fits:
                row = min(fits)[1]
            else:
                row = len(rows)
                rows.append([])
                free.append(SEQ_LENGTH)
            rows[row].append(i)
            free[row] -= length
        return {
            name: [[token for i in row for token in batch[name][i]] for row in rows] for name in ("input_ids", "labels")
        } | {"position_ids": [[p for i in row for p in range(len(batch["input_ids"][i]))] for row in rows]}

    def job() -> Counts:
        cache = Path(tempfile.mkdtemp(dir=work))
        read = datasets.load_dataset(
            "json", data_files=str(work / "records.json"), split="train", cache_dir=str(cache / "hub")
        )
        encoded = read.map(
            encode,
            batched=True,
            num_proc=PROCESSES,
            remove_columns=read.column_names,
            cache_file_name=str(cache / "encoded.arrow"),
        )
        packed = encoded.map(
            pack,
            batched=True,
            num_proc=PROCESSES,
            remove_columns=encoded.column_names,
            cache_file_name=str(cache / "packed.arrow"),
        )

        def counts() -> dict:
            table = packed.data
            flat = {name: table.column(name).combine_chunks().flatten().to_numpy() for name in ("input_ids", "labels")}
            shutil.rmtree(cache)
            tokens = len(flat["input_ids"])
            return {
                "tokens": tokens,
                "supervised": int((flat["labels"] != -100).sum()),
                "density": tokens / (len(packed) * SEQ_LENGTH),
            }

        return counts

    return job


if __name__ == "__main__":
    sys.exit(run_cli(main))
