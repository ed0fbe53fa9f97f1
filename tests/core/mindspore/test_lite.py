"""Exported graphs through GraphCell beside the decoder that they were exported from, and the Lite runtime by a stand-in."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import numpy as np
import pytest

from research.core.config.schema import DeviceConfig
from research.core.errors import ConfigError, UserError
from research.core.generation.loop import run_requests
from research.core.generation.requests import Request
from research.core.generation.sampling import Sampling
from research.core.mindspore import lite
from research.core.mindspore.decoder import Decoder
from research.core.mindspore.export import export_graphs
from research.core.mindspore.mindir import FULL, INC, GraphShapes, Meta, graph_file, read_meta, variables_folder
from research.core.mindspore.weights import set_value
from research.core.spec import DecoderSpec, spec_to_hf
from research.core.torch import generate as torchs
from tests.core.torch.test_generate import _decoder

BASE = DecoderSpec(
    "qwen2", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=199, max_positions=256, init_range=0.2
)
QWEN = replace(
    BASE, model_type="qwen", kv_heads=4, logn_attention=True, dynamic_ntk=True, train_length=16, rope_theta=10000.0
)
PROMPTS = [[5, 9, 2, 77, 31, 8, 120], [4], [7, 7, 7, 11, 150, 3, 8, 9, 10, 42, 6, 1, 0, 198]]
LENGTH = 144  # the longest prompt and 128 new tokens, and no whole number of blocks of 32


def _meta(spec: DecoderSpec, shapes: GraphShapes, graphs: dict) -> Meta:
    return Meta(
        model="tiny",
        family="qwen2",
        config=spec_to_hf(spec),
        shapes=shapes,
        dtype="float32",
        target="CPU",
        eos_ids=(),
        sampling={"temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0},
        tokenizer="",
        template="",
        template_name=None,
        system=None,
        graphs=graphs,
    )


def _exported(ours, root, shapes: GraphShapes) -> Meta:
    decoder = Decoder(ours.spec, kernels="composite")
    theirs = dict(ours.named_parameters())
    for parameter in decoder.get_parameters():
        set_value(parameter, theirs[parameter.name].detach().numpy())
    meta = _meta(ours.spec, shapes, export_graphs(decoder, shapes, root))
    (root / "meta.json").write_text(meta.text())
    return read_meta(root)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        (BASE, GraphShapes(LENGTH, batch=4)),
        (replace(BASE, layers=1), GraphShapes(LENGTH, batch=4, paged=True, block_size=32, num_blocks=21)),
        (replace(BASE, layers=1), GraphShapes(LENGTH, batch=4, dynamic=True)),
        (replace(QWEN, layers=1), GraphShapes(LENGTH, batch=2, paged=True, block_size=16, num_blocks=18)),
    ],
    ids=["dense", "paged", "dynamic", "qwen-v1-paged"],
)
def test_full_and_incremental_graphs_give_128_tokens_of_the_decoder(spec, shapes, tmp_path):
    ours = _decoder(spec)
    meta = _exported(ours, tmp_path, shapes)
    runner = lite.LiteRunner(meta, tmp_path, lite.GraphCellRuntime(DeviceConfig(kind="cpu")))
    expected = torchs.generate(ours, PROMPTS, max_new_tokens=128)
    assert len({tuple(ids) for ids in expected}) > 1
    requests = [Request(p, max_new_tokens=128) for p in PROMPTS]
    assert [r.ids for r in run_requests(runner, requests, batch=shapes.batch)] == expected
    if shapes == GraphShapes(LENGTH, batch=4):  # sampling is really used
        sampling = [Sampling(temperature=1.0, top_p=0.9, seed=s, repetition_penalty=1.1) for s in range(3)]
        expected = torchs.generate(ours, PROMPTS, sampling, 40)
        requests = [Request(p, s, 40) for p, s in zip(PROMPTS, sampling)]
        assert [r.ids for r in run_requests(runner, requests, batch=4)] == expected


@pytest.mark.slow
def test_without_an_incremental_graph_and_with_weights_beside_it_the_full_one_gives_the_same_tokens(
    tmp_path, monkeypatch
):
    from mindspore.train import serialization

    monkeypatch.setattr(serialization, "TOTAL_SAVE", 0)  # KB from which MindSpore writes a model's weights beside it
    ours = _decoder(replace(BASE, layers=1))
    meta = _exported(ours, tmp_path, GraphShapes(32, batch=2, past=False))
    assert not graph_file(tmp_path, INC, 0).exists()
    beside = sum(file.stat().st_size for file in variables_folder(tmp_path, FULL, 0).iterdir())
    assert beside >= 4 * ours.spec.parameters() and graph_file(tmp_path, FULL, 0).stat().st_size < beside
    runner = lite.LiteRunner(meta, tmp_path, lite.GraphCellRuntime(DeviceConfig(kind="cpu")))
    got = run_requests(runner, [Request(p, max_new_tokens=12) for p in PROMPTS[:2]], batch=2)
    assert [r.ids for r in got] == torchs.generate(ours, PROMPTS[:2], max_new_tokens=12)


def test_shapes_that_contradict_the_model_or_each_other_are_refused_with_the_value_to_use():
    with pytest.raises(ConfigError, match=r"mindir.seq_length=256"):
        GraphShapes(512).check(BASE)
    with pytest.raises(ConfigError, match=r"need 10 blocks[\s\S]*mindir.num_blocks=10"):
        GraphShapes(144, batch=2, paged=True, block_size=32, num_blocks=9).check(BASE)
    GraphShapes(144, batch=2, paged=True, block_size=32, num_blocks=10).check(BASE)
    with pytest.raises(ConfigError, match=r"mindir.past=true"):
        GraphShapes(144, paged=True, past=False).check(BASE)
    with pytest.raises(ConfigError, match="one of them"):
        GraphShapes(144, paged=True, dynamic=True).check(BASE)


def test_an_export_that_is_damaged_or_none_at_all_is_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_meta(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"meta.json"):
        read_meta(tmp_path)
    meta = _meta(BASE, GraphShapes(64), {FULL: {"inputs": [], "outputs": []}})
    (tmp_path / "meta.json").write_text(meta.text())
    with pytest.raises(UserError, match=r"rank_0_graph.mindir: is missing"):
        read_meta(tmp_path)
    graph_file(tmp_path, FULL, 0).parent.mkdir()
    graph_file(tmp_path, FULL, 0).write_bytes(b"no graph")
    assert read_meta(tmp_path) == meta
    with pytest.raises(ConfigError, match=r"rank_0_graph.mindir: is not a graph"):
        lite.LiteRunner(meta, tmp_path, lite.GraphCellRuntime(DeviceConfig(kind="cpu")))
    (tmp_path / "meta.json").write_text(meta.text().replace('"format": 1', '"format": 9'))
    with pytest.raises(UserError, match="format 9"):
        read_meta(tmp_path)
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(UserError, match=r"meta.json"):
        read_meta(tmp_path)


# --- MindSpore Lite, by its published interface ----------------------------------------------------------------------


class _StandIn(types.ModuleType):
    """mindspore_lite as far as it is used: counts its calls and lets a function compute."""

    def __init__(self, compute):
        super().__init__("mindspore_lite")
        outer = self
        self.built, self.resized, self.shared = [], [], []

        class Tensor:
            def __init__(self, array):
                self.array = np.asarray(array)
                self.shape = self.array.shape

            def get_data_to_numpy(self):
                return self.array

        class Model:
            def build_from_file(self, path, kind, context, config):
                outer.built.append((path, kind, context.target, vars(context.ascend), config))
                self.path = path

            def get_inputs(self):
                return []

            def resize(self, inputs, dims):
                outer.resized.append(dims)

            def predict(self, inputs):
                assert all(isinstance(x, Tensor) for x in inputs)
                return [Tensor(x) for x in compute(self.path, [x.array for x in inputs])]

        class ModelGroup:
            def __init__(self, flag):
                outer.shared.append(flag)

            def add_model(self, models):
                outer.shared.append(len(models))

        self.Tensor, self.Model, self.ModelGroup = Tensor, Model, ModelGroup
        self.ModelType = types.SimpleNamespace(MINDIR="mindir")
        self.ModelGroupFlag = types.SimpleNamespace(SHARE_WEIGHT="share")
        self.Context = lambda: types.SimpleNamespace(target=[], ascend=types.SimpleNamespace())


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_lite_runtime_gets_graphs_configuration_and_inputs_in_the_graphs_order(monkeypatch, tmp_path, dynamic):
    calls = []

    def compute(path, inputs):
        """The next token is the last one plus one; the cache counts what it has been given."""
        calls.append((path, [x.shape for x in inputs]))
        if FULL in path:
            ids, lengths = inputs
            last, cache = ids[np.arange(len(ids)), lengths - 1], lengths
        else:
            last, positions, cache = inputs
            assert (positions == cache)[: 1 if dynamic else 2].all()
            cache = cache + 1
        logits = np.zeros((len(last), BASE.vocab), np.float32)
        logits[np.arange(len(last)), (last + 1) % BASE.vocab] = 1
        return [logits, cache]

    module = _StandIn(compute)
    monkeypatch.setitem(sys.modules, "mindspore_lite", module)
    shapes = GraphShapes(16, batch=2, dynamic=dynamic)
    meta = _meta(BASE, shapes, {kind: {"inputs": [], "outputs": []} for kind in (FULL, INC)})
    runtime = lite.LiteRuntime("Ascend", 3, [tmp_path / "full.ini", tmp_path / "inc.ini"])
    runner = lite.LiteRunner(replace(meta, target="Ascend"), tmp_path, runtime, rank=1)
    prompts = [[5, 6, 7], [10]] if not dynamic else [[5, 6, 7]]
    got = run_requests(runner, [Request(p, max_new_tokens=4) for p in prompts], batch=2)
    assert [r.ids for r in got] == [[8, 9, 10, 11], [11, 12, 13, 14]][: len(prompts)]
    assert [built[0] for built in module.built] == [str(graph_file(tmp_path, kind, 1)) for kind in (FULL, INC)]
    assert [built[4] for built in module.built] == [str(tmp_path / "full.ini"), str(tmp_path / "inc.ini")]
    assert module.built[0][1:4] == ("mindir", ["ascend"], {"device_id": 3, "rank_id": 1, "provider": "ge"})
    assert module.shared == ["share", 2]
    assert calls[0][1] == ([(1, 3), (1,)] if dynamic else [(2, 16), (2,)])
    assert module.resized == ([[[1, 3], [1]]] + [[[1], [1], [1]]] * 3 if dynamic else [])


def test_lite_ini_has_the_documents_sections():
    import configparser

    meta = _meta(BASE, GraphShapes(64, paged=True), {})
    ini = configparser.ConfigParser()
    ini.optionxform = str
    ini.read_string(lite.lite_ini(meta, "table.json"))
    assert dict(ini["ascend_context"]) == {"provider": "ge", "rank_table_file": "table.json"}
    assert ini["ge_session_options"]["ge.exec.precision_mode"] == "must_keep_origin_dtype"
    assert len(ini["ge_session_options"]) == 6 and ini["graph_kernel_param"]["opt_level"] == "2"
    assert "graph_kernel_param" not in lite.lite_ini(replace(meta, shapes=GraphShapes(64)))
    assert "rank_table_file" not in lite.lite_ini(meta)
