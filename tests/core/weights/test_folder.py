"""Weight folders: reading, writing, and a clear refusal for each way in which they can be wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from research.core.errors import WeightsError
from research.core.spec import DecoderSpec, spec_from_hf
from research.core.torch.decoder import Decoder
from research.core.torch.weights import load_decoder, save_decoder, save_weights
from research.core.weights.folder import WeightFolder, read_config
from research.core.weights.keys import parameter_shapes, stored_tensors
from tests.conftest import REPO
from tests.core.torch.peers import make_pair, random_ids
from tests.core.torch.test_decoder_qwen1 import CONFIG as QWEN1
from tests.core.torch.test_decoder_qwen1 import make_weights


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A dense and a sparse model as transformers saves them, in several shards and in one file."""
    root = tmp_path_factory.mktemp("saved")
    for name, variant, size in (("dense", "gqa", "100KB"), ("tied", "tied", "5GB"), ("moe", "moe_some_dense", "150KB")):
        make_pair(variant)[0].save_pretrained(root / name, max_shard_size=size)
    return root


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved / "dense", tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def single(tmp_path):
    theirs, _ = make_pair("gqa")
    theirs.save_pretrained(tmp_path / "single")
    return tmp_path / "single"


def rewrite(folder, change) -> None:
    """Apply ``change`` to the tensors of a single-file folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **values) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


# --- reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "tied", "moe"])
def test_sharded_and_single_folders_of_transformers_load(saved, name):
    theirs = AutoModelForCausalLM.from_pretrained(saved / name)
    ours = load_decoder(saved / name)
    ids = random_ids(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=0)
    assert (name == "tied") == (ours.lm_head.weight is ours.model.embed_tokens.weight)


def test_dtype_is_the_configs_unless_told_otherwise(saved, tmp_path):
    shutil.copytree(saved / "tied", tmp_path / "w")
    assert load_decoder(tmp_path / "w").model.norm.weight.dtype == torch.float32
    assert load_decoder(tmp_path / "w", dtype="bfloat16").model.norm.weight.dtype == torch.bfloat16
    edit_config(tmp_path / "w", dtype="bfloat16")
    assert load_decoder(tmp_path / "w").model.norm.weight.dtype == torch.bfloat16


def test_stacked_experts_in_the_folder_load_too(tmp_path):
    theirs, ours = make_pair("moe")
    theirs.config.save_pretrained(tmp_path)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    ids = random_ids(1, 9)
    with torch.no_grad():
        assert torch.equal(load_decoder(tmp_path)(ids), ours(ids))


def test_embedding_model_without_prefix_and_head_loads(tmp_path):
    """gte models are saved from the bare Qwen2Model."""
    theirs, ours = make_pair("gqa")
    theirs.model.save_pretrained(tmp_path)
    assert not any(name.startswith("model.") for name in WeightFolder(tmp_path).names())
    loaded = load_decoder(tmp_path, head=False)
    assert loaded.lm_head is None
    ids = random_ids(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(loaded.embed(ids), ours.embed(ids))
    with pytest.raises(WeightsError, match=r"missing \(1\): lm_head\.weight"):
        load_decoder(tmp_path)


def test_tied_model_with_a_stored_head_loads_only_if_it_is_the_embedding(tmp_path):
    theirs, _ = make_pair("tied")
    theirs.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load_decoder(tmp_path)
    rewrite(tmp_path, lambda t: t["lm_head.weight"].mul_(2))
    with pytest.raises(WeightsError, match="ties the output matrix"):
        load_decoder(tmp_path)


def test_buffers_of_old_checkpoints_are_passed_over(single):
    rewrite(single, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load_decoder(single)


@pytest.mark.slow
def test_loading_peaks_near_the_models_size(tmp_path):
    """Streaming: 90 MB of parameters in 4 MB tensors must not cost twice their size, nor a second copy of a shard."""
    spec = DecoderSpec(
        "qwen2", layers=12, hidden=256, heads=4, kv_heads=2, head_dim=64, ffn=2048, vocab=4096, max_positions=64
    )
    save_decoder(Decoder(spec).init_weights(0), tmp_path / "w")
    probe = (
        "import resource, torch\n"
        "from research.core.torch.weights import load_decoder\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        f"before = peak(); load_decoder({str(tmp_path / 'w')!r}); print(peak() - before)"
    )
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=REPO)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 4 * spec.parameters() + 40e6


# --- refusals ---------------------------------------------------------------------------------------------------


def test_missing_folder_and_file_instead_of_folder(tmp_path, saved):
    with pytest.raises(WeightsError, match="weight folder not found"):
        load_decoder(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="this is a file"):
        load_decoder(saved / "tied" / "model.safetensors")


def test_missing_or_damaged_config(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="not valid JSON"):
        load_decoder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"no config\.json"):
        load_decoder(folder)


@pytest.mark.parametrize("kept", [0, 5, 200, -1000])
def test_truncated_file_is_named(single, kept):
    path = single / "model.safetensors"
    os.truncate(path, kept if kept >= 0 else path.stat().st_size + kept)
    with pytest.raises(WeightsError, match=r"model\.safetensors: (truncated|not a safetensors file)"):
        load_decoder(single)


def test_git_lfs_pointer_is_recognised(single):
    (single / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(WeightsError, match="Git LFS pointer"):
        load_decoder(single)


def test_missing_shard_is_named(folder):
    shard = sorted(folder.glob("model-0*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(WeightsError, match=f"1 of [0-9]+ files .* missing: {shard.name}"):
        load_decoder(folder)


def test_index_that_lies_about_a_tensor(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    name = next(n for n, f in index["weight_map"].items() if f == files[0])
    index["weight_map"][name] = files[1]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=f"says that {name} is in"):
        load_decoder(folder)


def test_missing_and_unexpected_tensors_are_named(single):
    def rename(tensors):
        tensors["model.layers.1.mlp.up.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")

    rewrite(single, rename)
    with pytest.raises(
        WeightsError, match=r"missing \(1\): model\.layers\.1\.mlp\.up_proj\.weight; unexpected \(1\): .*mlp\.up\."
    ):
        load_decoder(single)


def test_unexpected_tensor_alone_is_refused(single):
    rewrite(single, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}))
    with pytest.raises(WeightsError, match=r"do not belong to this model \(1\): model\.layers\.0\.self_attn\.q_norm"):
        load_decoder(single)


def test_wrong_shape_names_tensor_expected_and_found(single):
    rewrite(single, lambda t: t.update({"model.norm.weight": torch.ones(95)}))
    with pytest.raises(WeightsError, match=r"model\.norm\.weight has the wrong shape: expected \[96\], found \[95\]"):
        load_decoder(single)


def test_pickled_weights_need_the_flag(single):
    tensors = load_file(single / "model.safetensors")
    expected = load_decoder(single)
    (single / "model.safetensors").unlink()
    torch.save(tensors, single / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="allow_pickle=true"):
        load_decoder(single)
    ids = random_ids(1, 5)
    with torch.no_grad():
        assert torch.equal(load_decoder(single, allow_pickle=True)(ids), expected(ids))


def test_integer_weights_are_refused(single):
    rewrite(single, lambda t: t.update({"model.norm.weight": torch.ones(96, dtype=torch.int8)}))
    with pytest.raises(WeightsError, match=r"model\.norm\.weight is I8"):
        load_decoder(single)


def test_checkpoint_of_another_model_lists_the_differing_keys(single):
    spec = spec_from_hf(read_config(single))
    load_decoder(single, expect=spec)
    with pytest.raises(WeightsError) as error:
        load_decoder(single, expect=replace(spec, layers=5, rope_theta=1e6))
    assert "layers: expected 5, found 3" in str(error.value)
    assert "rope_theta: expected 1000000.0, found 10000.0" in str(error.value)


# --- writing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["gqa", "tied", "window", "yarn", "linear", "moe", "moe_some_dense"])
@pytest.mark.parametrize("shard", [5_000_000_000, 50_000])
def test_saved_folder_gives_transformers_the_same_logits(tmp_path, variant, shard):
    theirs, ours = make_pair(variant)
    save_decoder(ours, tmp_path / "out", eos=[3, 5], bos=1, shard_bytes=shard)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    ids = random_ids(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, theirs(ids).logits, atol=1e-5, rtol=0)
        assert torch.equal(load_decoder(tmp_path / "out")(ids), ours(ids))
    assert again.generation_config.eos_token_id == [3, 5]
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        assert path.stat().st_size <= shard + 100_000


def test_first_generation_is_written_under_its_own_names(tmp_path):
    weights = make_weights()
    source = tmp_path / "in"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(QWEN1))
    save_file(weights, source / "model.safetensors")
    save_decoder(load_decoder(source), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name]) for name in weights)
    config = read_config(tmp_path / "out")
    assert {key: config[key] for key in QWEN1 if key in config} == {k: v for k, v in QWEN1.items() if k in config}
    assert spec_from_hf(config) == spec_from_hf(QWEN1)


def test_bf16_export_halves_the_bytes_and_says_so(tmp_path):
    _, ours = make_pair("gqa")
    save_decoder(ours, tmp_path / "out", dtype=torch.bfloat16)
    assert {WeightFolder(tmp_path / "out").dtype(n) for n in WeightFolder(tmp_path / "out").names()} == {"BF16"}
    assert read_config(tmp_path / "out")["torch_dtype"] == "bfloat16"
    loaded = load_decoder(tmp_path / "out")
    for mine, theirs in zip(loaded.parameters(), ours.parameters()):
        assert torch.equal(mine, theirs.bfloat16())


def test_fingerprints_and_further_files_travel(tmp_path):
    _, ours = make_pair("gqa")
    (tmp_path / "vocab.json").write_text("{}")
    save_decoder(
        ours,
        tmp_path / "out",
        fingerprints={"tokenizer": "ab"},
        generation={"temperature": 0.5},
        files={"vocab.json": tmp_path / "vocab.json", "note.txt": b"x"},
    )
    assert json.loads((tmp_path / "out" / "workbench.json").read_text()) == {"tokenizer": "ab"}
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.5
    assert (tmp_path / "out" / "vocab.json").read_text() == "{}"
    assert (tmp_path / "out" / "note.txt").read_text() == "x"


def test_existing_folder_is_kept_unless_told_to_overwrite(tmp_path):
    _, ours = make_pair("gqa")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("1")
    with pytest.raises(WeightsError, match="exists already"):
        save_decoder(ours, tmp_path / "out")
    assert (tmp_path / "out" / "precious").exists()
    save_decoder(ours, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "precious").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_failure_while_writing_leaves_nothing_under_the_final_name(tmp_path):
    _, ours = make_pair("gqa")

    class Broken(dict):
        def __getitem__(self, name):
            if name == "model.norm.weight":
                raise OSError(28, "No space left on device")
            return super().__getitem__(name)

    with pytest.raises(OSError, match="No space"):
        save_weights(ours.spec, Broken(ours.named_parameters()), tmp_path / "out", torch.float32)
    assert list(tmp_path.iterdir()) == []


# --- key tables -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["gqa", "tied", "moe", "moe_some_dense", "moe_no_bias"])
def test_parameter_shapes_are_the_decoders(variant):
    _, ours = make_pair(variant)
    assert parameter_shapes(ours.spec) == {n: tuple(p.shape) for n, p in ours.named_parameters()}


@pytest.mark.parametrize("spec", [spec_from_hf(QWEN1), make_pair("moe")[1].spec, make_pair("tied")[1].spec])
def test_key_table_covers_every_row_of_every_parameter_once(spec):
    with torch.device("meta"):
        decoder = Decoder(spec)
    cover = {name: torch.zeros(p.shape[:-1] if p.dim() > 1 else p.shape) for name, p in decoder.named_parameters()}
    for tensor in stored_tensors(spec):
        rows = torch.zeros(tensor.shape[0])
        for piece in tensor.pieces:
            target = cover[piece.parameter] if piece.expert is None else cover[piece.parameter][piece.expert]
            target[slice(*piece.rows_parameter)] += 1
            rows[slice(*piece.rows_stored)] += 1
        assert (rows == 1).all()
    assert all((count == 1).all() for count in cover.values())
