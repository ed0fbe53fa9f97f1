"""The loss of weights on a data set (`--run_mode eval` of run_mindformer.py): mean over all supervised targets, and its exp."""

from __future__ import annotations

import math
import time
from pathlib import Path

from research.core.config.compose import to_yaml
from research.core.config.schema import Config
from research.core.data.dataset import PackedDataset
from research.core.errors import ConfigError, DataError, WeightsError
from research.core.run.folder import RunFolder
from research.core.run.progress import Progress
from research.core.spec import spec_from_hf
from research.tasks.data import dataset_for
from research.tasks.sources import check_architecture, read_json, resolve_template, resolve_tokenizer, resolve_weights


def run(cfg: Config) -> int:
    if cfg.model.embedding:
        raise ConfigError(
            "an embedding model predicts no tokens", where=f"model={cfg.model.name}", hint="another MODEL"
        )
    weights = resolve_weights(cfg)
    if weights is None:
        raise WeightsError("there are no weights to measure", where="task=perplexity", hint="WEIGHTS=<folder>")
    check_architecture(cfg, weights)
    tokenizer, template = resolve_tokenizer(cfg, weights), resolve_template(cfg, weights)
    spec = spec_from_hf(read_json(weights / "config.json"), where=str(weights / "config.json"))
    with RunFolder(cfg.run, task="perplexity", model=cfg.model.name) as folder:
        folder.write_text("config.yaml", to_yaml(cfg))
        dataset, report = dataset_for(cfg, folder, tokenizer, template, spec)
        rows = PackedDataset(dataset / "train")
        begin = time.perf_counter()
        total, targets = measure(cfg, weights, rows, folder)
        if not targets:
            raise DataError(
                "no token is supervised: there is no loss", where=cfg.data.source, hint="data.supervise=all"
            )
        loss = total / targets
        folder.say(
            f"loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.4g} over {targets:,} targets of {len(rows):,} rows "
            f"({time.perf_counter() - begin:.1f} s)"
        )
        result = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "targets": targets, "rows": len(rows)}
        folder.write_report({"result": result} | ({"data": report.to_json()} if report is not None else {}))
    return 0


def measure(cfg: Config, weights: Path, rows: PackedDataset, folder: RunFolder) -> tuple[float, int]:
    """(sum of the cross-entropies, number of targets) over all rows, ``train.micro_batch`` at a time."""
    import torch

    from research.core.torch.device import resolve_device, resolve_dtype
    from research.core.torch.layout import Layout
    from research.core.torch.lora import load_adapter
    from research.core.torch.loss import Objective
    from research.core.torch.weights import load_decoder

    device = resolve_device(cfg.device)
    dtype = resolve_dtype(cfg.train.dtype, device)
    decoder = load_decoder(weights, dtype, device, attention=cfg.device.attention, allow_pickle=cfg.allow_pickle)
    if cfg.adapter:
        load_adapter(decoder, cfg.adapter, allow_pickle=cfg.allow_pickle)
    objective = Objective(decoder.eval(), cfg.train.head_chunk)
    total, targets, size = 0.0, 0, cfg.train.micro_batch
    with torch.inference_mode(), Progress(folder, len(rows), "measure", "rows") as bar:
        for start in range(0, len(rows), size):
            batch = rows.rows(range(start, min(start + size, len(rows))), pad_to=0)
            layout = Layout.packed(torch.from_numpy(batch.position_ids), torch.from_numpy(batch.doc_ids), device)
            ids, labels = torch.from_numpy(batch.input_ids).to(device), torch.from_numpy(batch.labels).to(device)
            summed, _ = objective(ids, labels, layout)
            total, targets = total + float(summed), targets + batch.supervised
            bar.update(start + len(batch.input_ids), f"loss {total / max(1, targets):.3f}")
    return total, targets
