"""Logits of every position for given token ids: the program by which conversions and backends are compared.

    python tools/logits.py --weights DIR --ids ids.npz --out out.npz [--adapter DIR] [--dtype float32] [--prefill N]
                           [--backend torch|mindspore]

``ids.npz`` holds ``input_ids`` (integers, batch x time) and optionally ``attention_mask`` of the same shape (rows
padded left or right); ``out.npz`` gets ``input_ids`` and ``logits`` (float32, batch x time x vocabulary). At padding
the logits are finite and mean nothing. With ``--prefill N`` the first N positions are one forward and the others
single decode steps through the key/value cache.
"""

from __future__ import annotations

import argparse
import os
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from research.core.errors import DataError, UserError, require_file, run_cli

TOKENS_AT_ONCE = 16384  # of one forward; bounds the activations
LOGITS_AT_ONCE = 1 << 24  # elements of one block of logits (64 MB)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True, help="folder with config.json and weights")
    parser.add_argument("--ids", required=True, help=".npz with input_ids [batch, time] and optionally attention_mask")
    parser.add_argument("--out", required=True, help=".npz to write")
    parser.add_argument("--adapter", help="PEFT adapter folder put on the weights")
    parser.add_argument("--backend", choices=("torch", "mindspore"), default="torch")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and arithmetic")
    parser.add_argument("--prefill", type=int, metavar="N", help="first N positions as a prompt, the rest decode steps")
    parser.add_argument("--allow-pickle", action="store_true", help="read .bin weights, if you trust their source")
    args = parser.parse_args(argv)

    ids_BT, mask_BT = read_ids(args.ids)
    out = Path(args.out).expanduser()
    if out.is_dir():
        raise UserError("this is a folder; a file is written", where=f"--out {out}")
    if args.prefill is not None and not 1 <= args.prefill <= ids_BT.shape[1]:
        raise UserError(f"--prefill {args.prefill} is outside 1..{ids_BT.shape[1]}, the length of the rows")
    backend = torch_backend if args.backend == "torch" else mindspore_backend
    vocab, blocks = backend(args, ids_BT, mask_BT)
    write_npz(out, ids_BT, vocab, blocks)


def read_ids(path: str) -> tuple[np.ndarray, np.ndarray | None]:
    """-> input_ids int64 [B, T] and attention_mask bool [B, T] or None. Raises :class:`DataError`."""
    path = require_file(path, "file of token ids", "an .npz with an array input_ids")
    try:
        arrays = np.load(path, allow_pickle=False)
        content = {name: arrays[name] for name in arrays.files if name in ("input_ids", "attention_mask")}
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError, EOFError) as error:
        raise DataError(f"not an .npz of plain arrays: {error}", where=path) from None
    if "input_ids" not in content:
        raise DataError(f"no array input_ids in it, only: {', '.join(arrays.files) or 'nothing'}", where=path)
    ids = content["input_ids"]
    if not np.issubdtype(ids.dtype, np.integer) or ids.ndim != 2 or ids.size == 0:
        raise DataError(f"input_ids must be integers [batch, time], found {ids.dtype}{list(ids.shape)}", where=path)
    mask = content.get("attention_mask")
    return ids.astype(np.int64), None if mask is None else check_mask(mask, ids.shape, path)


def check_mask(mask: np.ndarray, shape: tuple[int, ...], path: Path) -> np.ndarray:
    if mask.shape != shape or not (np.issubdtype(mask.dtype, np.integer) or mask.dtype == bool):
        raise DataError(
            f"attention_mask must be integers {list(shape)} like input_ids, found {mask.dtype}{list(mask.shape)}",
            where=path,
        )
    if not np.isin(mask, (0, 1)).all():
        raise DataError("attention_mask must hold only 0 and 1", where=path)
    mask = mask.astype(bool)
    for row, real in enumerate(mask):
        places = np.flatnonzero(real)
        if len(places) == 0:
            raise DataError(f"attention_mask: row {row} has no real token", where=path)
        if places[-1] - places[0] + 1 != len(places):
            raise DataError(f"attention_mask: row {row} has a hole; only left and right padding exist", where=path)
    return mask


def torch_backend(args, ids_BT: np.ndarray, mask_BT: np.ndarray | None) -> tuple[int, Iterator[np.ndarray]]:
    """-> (vocabulary size, logits in row-major order as float32 blocks [positions, V])."""
    import torch

    from research.core.torch.weights import load_decoder

    decoder = load_decoder(args.weights, args.dtype, allow_pickle=args.allow_pickle)
    if args.adapter:
        from research.core.torch.lora import load_adapter

        load_adapter(decoder, args.adapter, allow_pickle=args.allow_pickle)
        decoder.eval()
    spec = decoder.spec
    check_request(args, ids_BT, spec)
    ids = torch.from_numpy(ids_BT)
    mask = None if mask_BT is None else torch.from_numpy(mask_BT)
    compute = whole if args.prefill is None else stepwise(args.prefill)

    @torch.inference_mode()
    def blocks() -> Iterator[np.ndarray]:
        rows = max(1, TOKENS_AT_ONCE // ids.shape[1])
        positions = max(1, LOGITS_AT_ONCE // spec.vocab)
        for begin in range(0, len(ids), rows):
            part = None if mask is None else mask[begin : begin + rows]
            hidden_BTH = compute(decoder, ids[begin : begin + rows], part)
            for row, hidden_TH in enumerate(hidden_BTH, begin):
                for start in range(0, len(hidden_TH), positions):
                    logits = decoder.logits(hidden_TH[start : start + positions]).float().numpy()
                    check_finite(logits, row, start)
                    yield logits

    return spec.vocab, blocks()


def mindspore_backend(args, ids_BT: np.ndarray, mask_BT: np.ndarray | None) -> tuple[int, Iterator[np.ndarray]]:
    """The same from MindSpore's decoder. Shapes stay the same from block to block, since each is compiled."""
    from research.core.config.schema import DeviceConfig
    from research.core.mindspore import runtime

    runtime.start(DeviceConfig())
    from mindspore import Tensor

    from research.core.mindspore.decode import Head
    from research.core.mindspore.weights import load_decoder

    decoder = load_decoder(args.weights, args.dtype, allow_pickle=args.allow_pickle)
    if args.adapter:
        from research.core.mindspore.lora import load_adapter

        load_adapter(decoder, args.adapter, allow_pickle=args.allow_pickle)
    spec, head = decoder.spec, Head(decoder)
    check_request(args, ids_BT, spec)
    mask_BT = np.ones(ids_BT.shape, bool) if mask_BT is None else mask_BT
    states_of = mindspore_whole(decoder) if args.prefill is None else mindspore_stepwise(decoder, args.prefill)

    def blocks() -> Iterator[np.ndarray]:
        rows = min(len(ids_BT), max(1, TOKENS_AT_ONCE // ids_BT.shape[1]))
        positions = min(ids_BT.shape[1], max(1, LOGITS_AT_ONCE // spec.vocab))
        for begin in range(0, len(ids_BT), rows):
            chosen = np.minimum(np.arange(begin, begin + rows), len(ids_BT) - 1)  # the last rows repeat the last one
            states_BTH = states_of(ids_BT[chosen], mask_BT[chosen])[: len(ids_BT) - begin]
            for row, states_TH in enumerate(states_BTH, begin):
                for start in range(0, len(states_TH), positions):
                    part = states_TH[start : start + positions]
                    filled = np.concatenate((part, np.zeros((positions - len(part), part.shape[1]), part.dtype)))
                    logits = head(Tensor(filled)).asnumpy()[: len(part)]
                    check_finite(logits, row, start)
                    yield logits

    return spec.vocab, blocks()


def mindspore_whole(decoder) -> Callable:
    from mindspore import Tensor

    from research.core.mindspore.decode import States
    from research.core.mindspore.layout import Layout, rope_base

    states = States(decoder)

    def compute(ids_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
        layout = Layout.padded(mask_BT)
        base = rope_base(decoder.spec, layout.lengths)
        inputs = [ids_BT.astype(np.int32), layout.positions, layout.documents, *([] if base is None else [base])]
        return states(*map(Tensor, inputs)).asnumpy()

    return compute


def mindspore_stepwise(decoder, prompt: int) -> Callable:
    """What is real of the first ``prompt`` columns is one forward, every further column a step."""
    from research.core.mindspore.generate import Runner

    runner = Runner(decoder, states=True)

    def compute(ids_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
        real = mask_BT[:, :prompt]
        # A row that begins later has a token of filling here, which its first one overwrites.
        prompts = [row[kept].tolist() or [0] for row, kept in zip(ids_BT[:, :prompt], real)]
        cache = runner.new_cache(len(prompts), ids_BT.shape[1])
        found = runner.prefill(cache, prompts)
        cache.lengths = real.sum(1).astype(np.int32)
        out = np.zeros((*ids_BT.shape, found.shape[-1]), found.dtype)
        for row, kept in enumerate(real):
            out[row, :prompt][kept] = found[row, : int(kept.sum())]
        for column in range(prompt, ids_BT.shape[1]):
            out[:, column] = runner.step(cache, ids_BT[:, column])
            cache.lengths = (
                cache.lengths - ~mask_BT[:, column]
            )  # filling does not count: the next token takes its place
        return out

    return compute


def check_request(args, ids_BT: np.ndarray, spec) -> None:
    check_ids(ids_BT, spec.vocab, args.ids)
    if ids_BT.shape[1] > spec.usable_length:
        print(f"note: {ids_BT.shape[1]} positions, the model is made for {spec.usable_length}", file=sys.stderr)
    if args.prefill is not None and not spec.causal:
        raise UserError("--prefill needs a causal model; this one sees both ways", where=args.weights)


def check_ids(ids_BT: np.ndarray, vocab: int, path: str) -> None:
    bad = np.argwhere((ids_BT < 0) | (ids_BT >= vocab))
    if len(bad):
        row, place = bad[0]
        raise DataError(
            f"input_ids[{row}, {place}] is {ids_BT[row, place]}; the model's vocabulary has {vocab} ids "
            f"({len(bad)} such ids)",
            where=path,
            hint="ids of this model's tokenizer, 0 at padding",
        )


def check_finite(logits: np.ndarray, row: int, start: int) -> None:
    finite = np.isfinite(logits).all(-1)
    if not finite.all():
        place = start + int(np.flatnonzero(~finite)[0])
        raise UserError(
            f"the logits of row {row} are not finite from position {place} on",
            hint="--dtype float32; if that does not help, the weights hold NaN or infinity",
        )


def whole(decoder, ids, mask):
    from research.core.torch.layout import Layout

    return decoder.hidden(ids, None if mask is None else Layout.padded(mask))


def stepwise(prompt: int) -> Callable:
    def compute(decoder, ids, mask):
        import torch

        from research.core.torch.cache import KVCache
        from research.core.torch.layout import Layout

        batch, time = ids.shape
        weight = decoder.model.embed_tokens.weight
        cache = KVCache(decoder.spec, batch, time, weight.dtype, weight.device)
        parts, begin = [], 0
        for end in range(prompt, time + 1):
            now = None if mask is None else mask[:, begin:end]
            parts.append(decoder.hidden(ids[:, begin:end], Layout.cached(cache, end - begin, now), cache))
            begin = end
        return torch.cat(parts, dim=1)

    return compute


def write_npz(path: Path, ids_BT: np.ndarray, vocab: int, blocks: Iterator[np.ndarray]) -> None:
    """Write the result block by block (the whole may be larger than memory) and give it its name at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED, allowZip64=True) as file:
            with file.open("input_ids.npy", "w") as entry:
                np.lib.format.write_array(entry, ids_BT)
            with file.open("logits.npy", "w", force_zip64=True) as entry:
                shape = (*ids_BT.shape, vocab)
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(entry, header)
                for block in blocks:
                    entry.write(np.ascontiguousarray(block, dtype="<f4").data)
        with aside.open("rb") as done:
            os.fsync(done.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(run_cli(main))
