"""vLLM for decode.py, engine.py and serving_load.py, run by an interpreter that has it.

    _vllm_contender.py WEIGHTS DTYPE BATCH LENGTH PREFIXES

Loads WEIGHTS (a Hugging Face folder without a vocabulary) for at most BATCH sequences of LENGTH tokens at once, says so, and
then answers a JSON line {"prompts", "new"} with {"seconds", "tokens", "arrivals"}: greedy, all prompts submitted at once, the
tokens of each and when they came in seconds after that. PREFIXES: 1 to keep the cache of common prefixes between them.
"""

from __future__ import annotations

import json
import os
import sys
import time

# Compute in this process, on all processors: an engine in a process of its own would compete with it for them.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "-".join(map(str, (0, len(os.sched_getaffinity(0)) - 1))))
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    folder, dtype, batch, length, prefixes = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])

    from vllm import LLM

    llm = LLM(
        folder,
        skip_tokenizer_init=True,
        dtype=dtype,
        max_model_len=length,
        max_num_seqs=batch,
        enable_prefix_caching=bool(prefixes),
        disable_log_stats=True,
    )
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for number, line in enumerate(sys.stdin):
        wanted = json.loads(line)
        print(json.dumps(run(llm.llm_engine, wanted["prompts"], wanted["new"], number)), file=answers, flush=True)


def run(engine, prompts: list[list[int]], new: int | list[int], number: int) -> dict:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    counts = [new] * len(prompts) if isinstance(new, int) else new
    tokens: list[list[int]] = [[] for _ in prompts]
    arrivals: list[list[float]] = [[] for _ in prompts]
    start = time.perf_counter()
    for i, (prompt, count) in enumerate(zip(prompts, counts)):
        settings = SamplingParams(
            temperature=0,
            max_tokens=count,
            min_tokens=count,
            detokenize=False,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        engine.add_request(f"{number}-{i}", {"prompt_token_ids": prompt}, settings)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter() - start
        for output in outputs:
            i, fresh = int(output.request_id.split("-")[1]), list(output.outputs[0].token_ids)
            tokens[i] += fresh
            arrivals[i] += [now] * len(fresh)
    seconds = time.perf_counter() - start
    assert [len(t) for t in tokens] == counts
    return {"seconds": seconds, "tokens": tokens, "arrivals": arrivals}


if __name__ == "__main__":
    main()
