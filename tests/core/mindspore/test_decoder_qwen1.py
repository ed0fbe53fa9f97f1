"""The first generation against the plain reference: log-n attention, dynamic NTK, within and past the training length."""

from __future__ import annotations

import json

import numpy as np
import pytest
from mindspore import Tensor
from safetensors.torch import save_file

from research.core.mindspore.generate import Runner
from research.core.mindspore.layout import Layout, ntk_alpha, rope_base
from research.core.mindspore.weights import load_decoder
from tests.core.mindspore.peers import as_tensor, layout_inputs
from tests.core.torch.test_decoder_qwen1 import CONFIG, TRAINED, make_weights, some_ids
from tests.reference import qwen1_plain

CLOSE = {"atol": 1e-4, "rtol": 0}  # fp32 against float64: logits of size ~5, errors of a few 1e-6
WEIGHTS = make_weights()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen1")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(WEIGHTS, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def decoder(folder):
    return load_decoder(folder)


def plain(ids, prompt: int, **changes) -> np.ndarray:
    return qwen1_plain.logits(WEIGHTS, CONFIG | changes, list(map(int, ids)), prompt).numpy()


def forward(decoder, ids: np.ndarray, layout: Layout) -> np.ndarray:
    base = Tensor(rope_base(decoder.spec, layout.lengths))
    return decoder(as_tensor(ids), *layout_inputs(layout), base).asnumpy()


@pytest.mark.slow
def test_padded_and_packed_documents_have_the_base_of_their_own_length(decoder):
    """Lengths within, at and past the training length, in every place of a row; one compilation."""
    rows = [[50], [TRAINED, TRAINED + 1, 7], [2 * TRAINED, 2 * TRAINED + 1, 1]]
    ids, documents, positions = (np.zeros((len(rows), 50), np.int64) for _ in range(3))
    expected = []
    for row, lengths in enumerate(rows):
        begin = 0
        for number, length in enumerate(lengths, 1):
            part = slice(begin, begin + length)
            ids[row, part] = some_ids(length, seed=10 * row + number).numpy()
            documents[row, part], positions[row, part] = number, np.arange(length)
            expected.append((row, part, plain(ids[row, part], length)))
            begin += length
    out = forward(decoder, ids, Layout.packed(positions, documents))
    for row, part, logits in expected:
        np.testing.assert_allclose(out[row, part], logits, **CLOSE)

    ids, mask = np.zeros((3, 50), np.int64), np.zeros((3, 50), bool)
    for row, place in enumerate((slice(10, 50), slice(0, 26), slice(41, 50))):
        ids[row, place], mask[row, place] = some_ids(place.stop - place.start, seed=row).numpy(), True
    out = forward(decoder, ids, Layout.padded(mask))
    for row, real in enumerate(mask):
        np.testing.assert_allclose(out[row, real], plain(ids[row, real], int(real.sum())), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["use_dynamic_ntk", "use_logn_attn"])
def test_each_switch_acts(folder, tmp_path, switch):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {switch: False}))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    ids, other = some_ids(40).numpy(), load_decoder(tmp_path)
    base = rope_base(other.spec, np.full((1, 1), 40))
    assert (base is None) == (switch == "use_dynamic_ntk")
    out = other(as_tensor(ids[None]), None, None, None if base is None else Tensor(base)).asnumpy()[0]
    np.testing.assert_allclose(out, plain(ids, 40, **{switch: False}), **CLOSE)


@pytest.mark.slow
def test_decode_keeps_the_base_of_each_rows_prompt(decoder):
    prompts, time = [5, TRAINED, 14, 30], 40
    ids = np.stack([some_ids(time, seed=prompt).numpy() for prompt in prompts])
    expected = [plain(row, prompt) for row, prompt in zip(ids, prompts)]
    runner = Runner(decoder)
    cache = runner.new_cache(len(prompts), 64)
    logits = runner.prefill(cache, [row[:prompt].tolist() for row, prompt in zip(ids, prompts)])
    for _ in range(10):
        for row, place in enumerate(cache.lengths):
            np.testing.assert_allclose(logits[row], expected[row][place - 1], **CLOSE)
        logits = runner.step(cache, [int(ids[row, place]) for row, place in enumerate(cache.lengths)])


@pytest.mark.slow
def test_training_mode_has_neither_log_n_nor_dynamic_ntk(folder):
    """As published: both switches act in evaluation only."""
    decoder, ids = load_decoder(folder), some_ids(40).numpy()
    decoder.set_train()
    out = forward(decoder, ids[None], Layout.full(1, 40))[0]
    np.testing.assert_allclose(out, plain(ids, 40, use_dynamic_ntk=False, use_logn_attn=False), **CLOSE)


def test_alpha_is_the_published_staircase():
    lengths = np.array([1, 8192, 8193, 16384, 16385, 32768, 32769])
    assert ntk_alpha(lengths, 8192).tolist() == [1, 1, 3, 3, 7, 7, 15]
