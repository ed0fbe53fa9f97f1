"""main.py of the document qwen_7b_atb_pytorch: ``--task inference|precision|performance`` with its ``config.ini``.

``MAX_SEQ_LEN`` limits prompt and answer together (default: the model's own length); ``TIMEIT=1`` lets performance measure
the parts of every step. Further words are plain settings, as ``device=cpu`` (docs/mindie.md).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from research.core.config.schema import Config, GenerateConfig
from research.core.engine.api import EngineRequest
from research.core.engine.run_all import run_all
from research.core.errors import ConfigError, UserError
from research.core.launch.environment import place
from research.core.launch.torchrun import launch, needs_launch
from research.tasks import atb_performance, atb_precision
from research.tasks.answering import EngineModel, mode, open_engine_model
from research.tasks.atb_config import AtbConfig, read_config
from research.tasks.mindie_flags import Flags, bind_cpu, number, weights_configuration
from research.tasks.sources import say

CONFIG = Path(__file__).resolve().parents[2] / "scripts" / "config.ini"
DEMO = ("登鹳雀楼->王之涣\n夜雨寄北->", "The capital of France is", "人生不过")
DEMO_TOKENS = 32


@dataclass(frozen=True)
class Job:
    """What a task gets: the file's settings, the composed ones, and where lines for a person go."""

    ini: AtbConfig
    cfg: Config
    say: Callable[[str], None]


def main(argv: Sequence[str]) -> int:
    """Run the program; returns the exit status."""
    flags = Flags(__doc__)
    flags.add_argument("--task", required=True, choices=("inference", "precision", "performance"))
    flags.add_argument("--config", help="default: config.ini here, else scripts/config.ini")
    flags.add_argument("--is_quant", type=int, choices=(0, 1), default=0, help="1: the weights are quantised")
    flags.add_argument("--model_path", help="instead of the file's")
    flags.add_argument("--part_model", help="the parts of several cards (default: part_model in the model's folder)")
    chosen, words = flags.read(argv)
    if chosen.is_quant:
        raise ConfigError(
            "quantised weights do not run in this version", where="--is_quant 1", hint="the float weights, --is_quant 0"
        )
    ini = read_config(chosen.config or next(path for path in (Path("config.ini"), CONFIG) if path.is_file()))
    show_devices(ini)
    task = {"inference": inference, "precision": precision, "performance": performance}[chosen.task]
    cfg = settings(ini, chosen.model_path, chosen.part_model, words)
    if mode(cfg) == "paged" and needs_launch(cfg):
        return launch(cfg)
    if ini.model.bind_cpu:
        os.environ.setdefault("BIND_CPU", "1")
    bind_cpu()
    return task(Job(ini, cfg, logger(ini)))


def settings(ini: AtbConfig, model_path: str | None, part_model: str | None, words: Sequence[str]) -> Config:
    """The configuration of the file, the environment and plain settings; of several cards with the cut parts, where the
    folder has them. Raises :class:`ConfigError`."""
    folder = model_path or ini.model.model_path
    if not folder:
        raise ConfigError("model_path is not set", where="config.ini [model]", hint="model_path=<weight folder>")
    cfg = weights_configuration(folder, words)
    cfg.generate.raw = True
    longest = number("MAX_SEQ_LEN")
    if longest is not None and not any(word.startswith("engine.max_length=") for word in words):
        if longest < 2 or longest != int(longest):
            raise ConfigError("is no length", where=f"MAX_SEQ_LEN={longest:g}", hint="MAX_SEQ_LEN=2048")
        cfg.engine.max_length = int(longest)
    cards = place().size if place() is not None else cfg.parallel.cards
    parts = Path(part_model or Path(folder) / "part_model").expanduser()
    if mode(cfg) == "flash":
        raise ConfigError("main.py runs the paged engine", where=f"engine.mode={cfg.engine.mode}", hint="run_fa")
    if mode(cfg) == "paged" and cards > 1 and (part_model or parts.is_dir()):
        cfg.weights = str(parts)
    return cfg


def show_devices(ini: AtbConfig) -> None:
    """``device_ids``: the cards that this process and its ranks may see, where the environment does not say so already."""
    if ini.model.device_ids:
        for name in ("ASCEND_RT_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
            os.environ.setdefault(name, ini.model.device_ids.replace(" ", ""))


def logger(ini: AtbConfig, folder: str | None = None) -> Callable[[str], None]:
    """Says lines, and writes them with the time into ``device<rank>.log`` of ``folder`` (None: ``log_dir``), if set."""
    folder = folder or ini.model.log_dir
    if not folder:
        return say
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder) / f"device{0 if place() is None else place().rank}.log"

    def log(line: str) -> None:
        say(line)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    return log


# --- the tasks --------------------------------------------------------------------------------------------------------


def inference(job: Job) -> int:
    """A few texts continued; ``prompt_list=["..", ".."]`` or ``prompt=..`` gives others."""
    model = open_engine_model(job.cfg)
    chosen = job.cfg.generate.max_new_tokens
    new = DEMO_TOKENS if chosen == GenerateConfig().max_new_tokens else chosen
    texts = job.cfg.prompt_list or ([job.cfg.prompt] if job.cfg.prompt else list(DEMO))
    try:
        for text in texts:
            start = time.perf_counter()
            request = EngineRequest(tuple(model.tokenizer.encode(text)), model.sampling, new, adapter=model.adapter)
            answer = run_all(model.engine, [request])[0]
            print(f"{text}{answer.text}", flush=True)
            job.say(f"{len(answer.ids)} tokens in {time.perf_counter() - start:.2f} s")
    finally:
        model.close()
    return 0


def precision(job: Job) -> int:
    """C-Eval; results in ``<work_dir>/test_result``."""
    own = job.ini.precision
    if not own.work_dir or not Path(own.work_dir).is_dir():
        raise UserError(
            "work_dir is not a folder" if own.work_dir else "work_dir is not set",
            where=f"config.ini [precision] work_dir={own.work_dir}",
            hint="the folder that C-Eval was unpacked in",
        )
    exam = atb_precision.Exam.open(own, job.cfg)
    log = logger(job.ini, str(exam.folder))
    job.cfg.engine.max_batch = own.batch
    model: EngineModel = open_engine_model(job.cfg)
    try:
        return exam.sit(model, log)
    finally:
        model.close()


def performance(job: Job) -> int:
    """First-token and per-token times of every case; one csv file."""
    return atb_performance.measure(job.ini.performance, job.cfg, os.environ.get("TIMEIT", "0") == "1", job.say)
