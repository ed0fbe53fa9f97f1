"""main.py --task performance: first-token and per-token times by batch size and lengths, in the document's csv file.

``normal``: each case runs twice, with one new token and with all of them; the time of a later token is
``(t(n) - t(1)) / (n - 1)``. ``detail`` (with TIMEIT=1) takes the parts of every step: what is done before the model's
forward (scheduling, block tables), the forward itself until the device has done it, and what is done after it (sampling,
text).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from research.core.config.schema import Config
from research.core.engine.api import EngineRequest
from research.core.engine.run_all import run_all
from research.core.errors import ConfigError
from research.tasks.answering import EngineModel, mode, open_engine_model
from research.tasks.atb_config import PerformanceSection
from research.tasks.step_times import mean, write_rows

Case = tuple[int, int, int]  # batch size, tokens of a prompt, new tokens


def cases(own: PerformanceSection) -> list[Case]:
    """Every case of the file, in its order."""
    lengths = [2**power for power in range(own.min_len_exp, own.max_len_exp + 1)]
    pairs = own.case_pair or [(prompt, new) for prompt in lengths for new in lengths]
    return [(batch, prompt, 1 if own.skip_decode else new) for batch in own.batch_size for prompt, new in pairs]


def measure(own: PerformanceSection, cfg: Config, timeit: bool, say: Callable[[str], None]) -> int:
    """Run the cases and write the csv file; returns the exit status. Raises UserErrors before anything is measured."""
    detail = own.perf_mode == "detail"
    if detail and not timeit:
        raise ConfigError(
            "the parts of a step are measured with TIMEIT=1 only",
            where="config.ini [performance] perf_mode=detail",
            hint="TIMEIT=1 python main.py --task performance, or perf_mode=normal",
        )
    if detail and mode(cfg) != "paged":
        raise ConfigError(
            "the parts of a step are this engine's", where=f"engine.mode={cfg.engine.mode}", hint="perf_mode=normal"
        )
    wanted = cases(own)
    cfg.engine.prefix_cache = False  # a prompt is computed each time
    cfg.engine.max_batch = max(batch for batch, _, _ in wanted)
    if cfg.engine.max_tokens_per_step is None:
        cfg.engine.max_tokens_per_step = max(batch * prompt for batch, prompt, _ in wanted)  # a prefill is one step
    model = open_engine_model(cfg)
    try:
        longest = max(wanted, key=lambda case: case[1] + case[2])
        if longest[1] + longest[2] > model.length_limit:
            raise ConfigError(
                f"{longest[1]} tokens and {longest[2]} new ones are more than {model.length_limit}",
                where="config.ini [performance]",
                hint="shorter cases, or a larger MAX_SEQ_LEN if it is set",
            )
        device = model.how.partition(" on ")[2].split(":")[0].split()[0]
        name = own.model_name or Path(cfg.weights).resolve().name
        path = Path(own.save_file_name or f"performance_test_{device}_{name}_{time.strftime('%Y%m%d%H%M%S')}.csv")
        clock = StepClock(model.engine) if detail else None
        rows: list[dict[str, Any]] = []
        _run(
            model, (wanted[0][0], wanted[0][1], 2 if wanted[0][2] > 1 else 1), seed=-1
        )  # kernels are made, memory is touched
        for number, case in enumerate(wanted):
            rows.append(_detailed(model, case, clock, number) if clock else _normal(model, case, number))
            write_rows(path, rows)
            say("  ".join(f"{key}={value}" for key, value in rows[-1].items()))
    finally:
        model.close()
    say(f"results: {path}")
    return 0


def _run(model: EngineModel, case: Case, seed: int) -> float:
    """Seconds that ``case`` takes, with random prompts that are all different."""
    batch, prompt, new = case
    ids = np.random.default_rng(seed + 1).integers(0, model.engine.spec.vocab, (batch, prompt))
    requests = [EngineRequest(tuple(row), max_new_tokens=new, ignore_eos=True) for row in ids.tolist()]
    start = time.perf_counter()
    run_all(model.engine, requests)
    return time.perf_counter() - start


def _normal(model: EngineModel, case: Case, seed: int) -> dict[str, Any]:
    batch, prompt, new = case
    first = _run(model, (batch, prompt, 1), seed)
    whole = _run(model, case, seed) if new > 1 else first
    later = (whole - first) / (new - 1) if new > 1 else None
    return _row(case, whole, first, later, None, None)


def _detailed(model: EngineModel, case: Case, clock: StepClock, seed: int) -> dict[str, Any]:
    clock.steps.clear()
    whole = _run(model, case, seed)
    # Prompts begin in the first steps; from then on every step brings one token to each answer.
    begun = 1
    while begun < len(clock.steps) and clock.steps[begun].queries > case[0]:
        begun += 1
    first, later = clock.steps[:begun], clock.steps[begun:]
    return _row(
        case,
        whole,
        sum(step.forward for step in first),
        *(mean([getattr(step, part) for step in later]) if later else None for part in ("forward", "before", "after")),
    )


def _row(
    case: Case, whole: float, first: float, later: float | None, before: float | None, after: float | None
) -> dict:
    batch, prompt, new = case

    def ms(seconds: float | None) -> str:
        return "" if seconds is None else f"{1000 * seconds:.4f}"

    return {
        "batch_size": batch,
        "input_seq_len(Encoding)": prompt,
        "output_seq_len(Decoding)": new,
        "ResponseTime(s)": f"{whole:.4f}",
        "forward_first_token_time(ms)": ms(first),
        "forward_next_token_time(ms)": ms(later),
        "pre_next_token_time(ms)": ms(before),
        "post_next_token_time_post(ms)": ms(after),
    }


# --- the parts of a step ----------------------------------------------------------------------------------------------


@dataclass
class StepParts:
    """Seconds of one step before, in and after the forward; ``queries`` tokens went through it."""

    before: float
    forward: float
    after: float
    queries: int


@dataclass
class StepClock:
    """Times the steps of an engine of ours: stands between it and its runner."""

    engine: Any
    steps: list[StepParts] = field(default_factory=list)

    def __post_init__(self):
        self._runner, self._step = self.engine.runner, self.engine.step
        self.engine.runner, self.engine.step = self, self._timed_step

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_runner"], name)

    def execute(self, plan):
        from research.core.torch.device import synchronize

        self._began = time.perf_counter()
        output = self._runner.execute(plan)
        found = output.logits if output.logits is not None else output.hidden
        if found is not None:
            synchronize(found.device)
        self._ended, self._queries = time.perf_counter(), len(plan.tokens)
        return output

    def _timed_step(self):
        start, self._ended = time.perf_counter(), None
        updates = self._step()
        if self._ended is not None:
            end = time.perf_counter()
            parts = StepParts(self._began - start, self._ended - self._began, end - self._ended, self._queries)
            self.steps.append(parts)
        return updates
