"""The ranks of test_tensor_parallel: engines over 2 and over 4 processes, which are forked because importing torch takes
longer than all they compute.

python -m tests.core.engine.tensor_parallel_case FOLDER
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch

from research.core.config.schema import Config
from research.core.engine import build
from research.core.engine.api import EmbedRequest, EngineRequest
from research.core.engine.run_all import run_all
from research.core.errors import WeightsError
from research.core.generation.sampling import Sampling
from research.core.launch.host import free_port
from research.core.native.build import library
from research.core.text.builtin import builtin_tokenizer
from research.core.torch.multi_lora import AdapterSlots

CASES = ("dense", "parts", "tied", "mixture", "qwen1", "embedding")
ADAPTED = ("dense", "mixture")
NEW = 12


def prompts(vocab: int, count: int = 8) -> list[list[int]]:
    """Of many lengths; every second one begins alike."""
    draw = torch.Generator().manual_seed(7)
    shared = torch.randint(0, vocab, (20,), generator=draw).tolist()
    lengths = (3, 50, 17, 90, 1, 33, 64, 25)
    own = [torch.randint(0, vocab, (lengths[n % 8],), generator=draw).tolist() for n in range(count)]
    return [shared + prompt if place % 2 else prompt for place, prompt in enumerate(own)]


def adapter_of(case: str, place: int) -> str | None:
    return (None, "one", "two")[place % 3] if case in ADAPTED else None


def settings() -> Config:
    cfg = Config()
    cfg.device.kind, cfg.device.threads, cfg.generate.dtype = "cpu", 1, "fp32"
    # Few tokens a step cut the prompts, few blocks take some back: 45 of 8 tokens for about 560.
    cfg.engine.block_size, cfg.engine.num_blocks, cfg.engine.max_tokens_per_step = 8, 45, 48
    cfg.parallel.timeout_s = 60
    return cfg


def count_of(case: str) -> int:
    """How many requests stand beside each other."""
    return 64 if case == "dense" else 8


def main(folder: Path, rank: int, cases: tuple[str, ...]) -> dict:
    found = {}
    tokenizer, cfg = builtin_tokenizer(), settings()
    for case in cases:
        adapters = {name: folder / f"{case}-{name}" for name in ("one", "two")} if case in ADAPTED else {}
        cfg.model.embedding = case == "embedding"
        try:
            engine, _ = build.open_engine(folder / case, tokenizer, (), cfg, adapters)
        except SystemExit:
            assert rank > 0
            continue
        assert rank == 0
        if case == "embedding":
            found[case] = embeddings(engine)
            engine.close()
            continue
        requests = [
            EngineRequest(tuple(prompt), max_new_tokens=NEW, adapter=adapter_of(case, place))
            for place, prompt in enumerate(prompts(engine.spec.vocab, count_of(case)))
        ]
        found[case] = [answer.ids for answer in run_all(engine, requests)]
        found[f"{case} preempted"] = engine.stats().total_preemptions
        if case == "dense":
            found["drawn"] = drawn(engine)
            found["refused"] = refused(engine, folder)
            found["again"] = run_all(engine, requests[:1])[0].ids
        engine.close()
    return found


def embeddings(engine) -> list:
    requests = [EmbedRequest(tuple(prompt), normalize=False) for prompt in prompts(engine.spec.vocab)]
    return [answer.embedding for answer in run_all(engine, requests)]


def drawn(engine) -> list:
    """Tokens drawn at random, with log-probabilities, the prompt's too: needs everybody's logits."""
    sampling = Sampling(temperature=0.9, top_k=50, seed=11)
    prompt = tuple(prompts(engine.spec.vocab)[1])
    request = EngineRequest(prompt, sampling, NEW, logprobs=2, prompt_logprobs=0, adapter="one")
    answer = run_all(engine, [request])[0]
    assert len(answer.prompt_logprobs) == len(prompt) - 1
    return [answer.ids, [token.logprob for token in answer.prompt_logprobs + answer.logprobs]]


def refused(engine, folder: Path) -> list[str]:
    """An adapter that only one rank cannot take, and one that none can: neither is loaded, and the engine goes on."""
    words = []
    for name in ("torn", "wrong"):
        try:
            engine.load_adapter(name, folder / f"dense-{name}")
        except WeightsError as error:
            words.append(error.what)
    return [*words, *engine.adapters]


def tear(rank: int) -> None:
    load = AdapterSlots.load

    def torn(self, slot, folder, allow_pickle=False):
        if rank == 1 and str(folder).endswith("torn"):
            raise WeightsError("cannot be read by rank 1", where=folder)
        load(self, slot, folder, allow_pickle)

    AdapterSlots.load = torn


def fail(rank: int) -> None:
    execute, steps = build.ModelRunner.execute, []

    def failing(self, plan):
        steps.append(plan)
        if rank == 1 and len(steps) == 3:
            raise RuntimeError("rank 1 has had enough")
        return execute(self, plan)

    build.ModelRunner.execute = failing


def launch(name: str, size: int, folder: Path, cases: tuple[str, ...], prepare) -> list[int]:
    """Fork ``size`` ranks that do :func:`main`; rank 0 writes what it found. -> their exit statuses."""
    port, children = free_port(), []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank is left when a test is ended
            os.environ |= {"QWEN_LAUNCHED": "torch", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
            status = 1
            try:
                prepare(rank)
                found = main(folder, rank, cases)
                if rank == 0:
                    (folder / f"{name}.json").write_text(json.dumps(found))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    torch.set_num_threads(1)
    library()  # built once, not by every rank
    where = Path(sys.argv[1])
    statuses = {}
    for name, size, cases, prepare in (
        ("two", 2, CASES, tear),
        ("four", 4, CASES, tear),
        ("eight", 8, ("tied", "embedding"), tear),
        ("failing", 2, CASES, fail),
    ):
        statuses[name] = launch(name, size, where, cases, prepare)
    (where / "statuses.json").write_text(json.dumps(statuses))
