"""Trained weights that others made: a small story model, and a LoRA adapter for Qwen2.5-0.5B-Instruct."""

from __future__ import annotations

import copy
import json
import re
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from research.core.spec import spec_from_hf
from research.core.torch.cache import KVCache
from research.core.torch.decoder import Decoder
from research.core.torch.lora import load_adapter
from research.core.torch.weights import load_decoder, save_decoder


def decode(pieces: list[dict], ids: list[int]) -> str:
    """Pieces of the llama2.c vocabulary: raw bytes, byte tokens as <0xNN>."""
    raw = b""
    for token in ids:
        piece = pieces[token]["piece"]
        byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
        raw += bytes([int(byte[1], 16)]) if byte else bytes.fromhex(pieces[token]["piece_hex"])
    return raw.decode("utf-8")


@pytest.mark.slow
def test_story_model_tells_a_story_with_transformers_greedy_tokens(shared_data, tmp_path):
    folder = shared_data / "weights" / "stories260K"
    pieces = json.loads((folder / "vocab.json").read_text())
    ours = load_decoder(folder / "hf_qwen2")
    theirs = AutoModelForCausalLM.from_pretrained(folder / "hf_qwen2")
    expected = theirs.generate(torch.tensor([[1]]), max_new_tokens=200, do_sample=False, pad_token_id=0)[0].tolist()

    with torch.inference_mode():
        cache, tokens = KVCache(ours.spec, 1, 201, torch.float32), [1]
        while len(tokens) < len(expected):
            logits = ours(torch.tensor([tokens[-1:]]), cache=cache)
            tokens.append(int(logits[0, -1].argmax()))
    assert tokens == expected
    # Known from the model's publication: greedy from <s> begins with its commonest opening.
    story = decode(pieces, tokens[1:]).lstrip()
    assert story.startswith("Once upon a time, there was a little girl named Lily.")
    words = re.findall("[a-z]+", story.lower())
    assert len(words) > 60 and {"she", "the", "and", "to"} <= set(words)

    save_decoder(ours, tmp_path / "again", eos=2, bos=1)
    assert load_file(tmp_path / "again" / "model.safetensors").keys() >= {"model.norm.weight"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(torch.tensor([tokens[:50]])).logits, theirs(torch.tensor([tokens[:50]])).logits)


def test_story_model_knows_more_than_chance(shared_data):
    """Its loss on its own story is far under log(512) = 6.2; swapped gate and up matrices, say, would be above 4."""
    folder = shared_data / "weights" / "stories260K"
    ours = load_decoder(folder / "hf_qwen2")
    pieces = [row["piece"] for row in json.loads((folder / "vocab.json").read_text())]
    text, ids = " Once upon a time, there was a little boy named Tim. He had a big red ball.", [1]
    while text:  # longest known piece first: near enough to the real segmentation
        length = max(n for n in range(1, len(text) + 1) if text[:n] in pieces)
        ids.append(pieces.index(text[:length]))
        text = text[length:]
    batch = torch.tensor([ids])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(ours(batch)[0, :-1], batch[0, 1:])
    assert loss < 2.5


def check_adapter(shared_data, tmp_path, layers: int, vocab: int) -> None:
    """Random weights of the 0.5B shape with the published adapter, in peft and here."""
    config = json.loads((shared_data / "configs" / "Qwen2.5-0.5B.json").read_text())
    config |= {"num_hidden_layers": layers, "vocab_size": vocab, "torch_dtype": "float32"}
    torch.manual_seed(0)
    theirs = Qwen2ForCausalLM(Qwen2Config(**config)).eval()
    with torch.device("meta"):
        ours = Decoder(spec_from_hf(config))
    ours.load_state_dict(theirs.state_dict(), assign=True)  # the same memory: peft leaves the base weights alone
    ours.tie()
    ours.eval()

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    source = shared_data / "lora" / "qwen2.5-0.5b-instruct_r8"
    shutil.copyfile(source / "adapter_config.json", adapter / "adapter_config.json")
    tensors = load_file(source / "adapter_model.safetensors")
    kept = {k: v for k, v in tensors.items() if int(re.search(r"layers\.(\d+)\.", k)[1]) < layers}
    assert len(kept) == 4 * layers
    save_file(kept, adapter / "adapter_model.safetensors", metadata={"format": "pt"})

    ids = torch.randint(0, vocab, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = ours(ids)
        adapted = PeftModel.from_pretrained(copy.copy(theirs), str(adapter)).eval()(ids).logits
        load_adapter(ours, adapter)
        ours.eval()
        # fp32 sums in another order, logits of size ~1
        torch.testing.assert_close(ours(ids), adapted, atol=1e-4, rtol=0)
        assert (adapted - plain).abs().max() > 1e-3


def test_published_adapter_gives_pefts_logits_on_two_layers(shared_data, tmp_path):
    check_adapter(shared_data, tmp_path, layers=2, vocab=512)


@pytest.mark.slow
def test_published_adapter_gives_pefts_logits_on_the_whole_shape(shared_data, tmp_path):
    check_adapter(shared_data, tmp_path, layers=24, vocab=151936)
