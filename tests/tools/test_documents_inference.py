"""The documents' commands for predict, chat, export and Lite, with tiny models and paths filled in, on MindSpore."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from research.core.config.compose import compose
from research.core.errors import run_cli
from research.core.mindspore.mindir import read_meta
from research.tasks import chat_script, lite_script, predict
from research.tasks.cli import main
from tests import small_model

pytest.importorskip("mindspore", reason="the documents' commands run on MindSpore")
pytestmark = pytest.mark.slow

# Smaller than the tiny presets: every command compiles its graphs.
SIZES = ["model.hf.num_hidden_layers=1"]
QUESTION = "比较适合深度学习入门的书籍有"


@dataclass(frozen=True)
class Tiny:
    """A model as the documents have one: a Hugging Face folder, its MindFormers file, ranks, and a YAML."""

    name: str
    family: str
    folder: Path
    ckpt: Path
    model_dir: Path
    yaml: Path

    def expected(self, capsys, *words: str) -> str:
        """The torch backend's answer."""
        own = ["task=predict", f"model={self.name}", *SIZES, f"weights={self.folder}", "device=cpu"]
        assert predict.run(compose([*own, "generate.dtype=fp32", "generate.temperature=0", *words])) == 0
        return capsys.readouterr().out


def _tiny(folder: Path, name: str, family: str) -> Tiny:
    small_model.save(folder / "hf", name, 1, eos=True)
    ckpt = folder / "ckpt" / f"{name}_base.ckpt"
    assert main(["task=convert", f"weights={folder / 'hf'}", f"output={ckpt}", "convert.tied_head=copy"]) == 0
    model_dir = folder / "model_dir"
    (model_dir / "rank_0").mkdir(parents=True)
    for file in ckpt.parent.iterdir():
        target = model_dir / "rank_0" / file.name if file.suffix == ".ckpt" else model_dir / file.name
        target.write_bytes(file.read_bytes())
    (model_dir / "config.json").write_bytes((folder / "hf" / "config.json").read_bytes())
    content = {
        "model": {"model_config": {"seq_length": 64, "batch_size": 1, "block_size": 16, "num_blocks": 8}},
        "run_mode": "predict",
        "use_parallel": False,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return Tiny(name, family, folder / "hf", ckpt, model_dir, folder / "run.yaml")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Tiny:
    return _tiny(tmp_path_factory.mktemp("qwen"), "qwen_tiny", "qwen")


@pytest.fixture(scope="module")
def qwen1_5(tmp_path_factory) -> Tiny:
    return _tiny(tmp_path_factory.mktemp("qwen1_5"), "qwen1_5_tiny", "qwen1_5")


def _own(tiny: Tiny) -> list[str]:
    return [f"model={tiny.name}", *SIZES, "device=cpu", "generate.max_new_tokens=12"]


def test_predict_from_a_mindformers_file_and_from_ranks(qwen, qwen1_5, capsys):
    words = ["--config", str(qwen.yaml), "--predict_data", QUESTION, "--run_mode", "predict"]
    assert main([*words, "--load_checkpoint", str(qwen.ckpt), "--device_id", "0", *_own(qwen)], "qwen") == 0
    got = capsys.readouterr()
    assert "on CPU (MindSpore)" in got.err
    assert got.out == qwen.expected(capsys, f"prompt={QUESTION}", "generate.max_new_tokens=12")

    words = ["--config", str(qwen1_5.yaml), "--run_mode", "predict", "--use_parallel", "True"]
    words += ["--load_checkpoint", str(qwen1_5.model_dir), "--predict_data", "帮助我制定一份去上海的旅游攻略"]
    assert main([*words, *_own(qwen1_5)], "qwen1_5") == 0
    expected = capsys.readouterr().out
    answer = ["prompt=帮助我制定一份去上海的旅游攻略", "generate.max_new_tokens=12"]
    assert expected == qwen1_5.expected(capsys, *answer) != "\n"


def test_run_mindformer_predicts_as_a_program(repo, qwen1_5, capsys, tmp_path):
    command = [sys.executable, str(repo / "run_mindformer.py"), "--register_path", "research/qwen1_5"]
    command += ["--config", str(qwen1_5.yaml), "--load_checkpoint", str(qwen1_5.model_dir), "--run_mode", "predict"]
    command += ["--use_parallel", "False", "--auto_trans_ckpt", "False", "--predict_data", "你好", *_own(qwen1_5)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == qwen1_5.expected(capsys, "prompt=你好", "generate.max_new_tokens=12")


def test_the_chat_command_with_its_yaml_demo_and_several_questions(qwen1_5, capsys, monkeypatch):
    monkeypatch.setattr(chat_script, "DEMO", ("One?",))
    words = ["--config", str(qwen1_5.yaml), "--load_checkpoint", str(qwen1_5.ckpt), "--enable_history", "True"]
    words += ["--use_parallel", "False", "--auto_trans_ckpt", "False", "--run_demo", "True", "--device_id", "0"]
    words += [
        "--do_sample",
        "False",
        "--predict_data",
        "《三体》这本小说的精彩之处在什么地方",
        "再推荐几部刘慈欣的作品吧",
    ]
    assert chat_script.main([*words, *_own(qwen1_5)], "qwen1_5") == 0
    got = capsys.readouterr()
    assert len(got.out.splitlines()) >= 3 and got.err.count("\n> ") + got.err.startswith("> ") == 3


def test_shards_of_another_grid_are_joined_or_with_auto_transform_off_refused(qwen1_5, capsys, tmp_path):
    parts = tmp_path / "parts"
    words = ["task=split", f"weights={qwen1_5.folder}", f"output={parts}", "parallel.cards=2"]
    assert main([*words, f"model={qwen1_5.name}", *SIZES]) == 0
    capsys.readouterr()
    words = ["--config", str(qwen1_5.yaml), "--run_mode", "predict", "--load_checkpoint", str(parts)]
    words += ["--predict_data", "你好", *_own(qwen1_5)]
    assert main([*words, "--auto_trans_ckpt", "False"], "qwen1_5") == 2
    assert "cut for 2 ranks, and 1 runs here" in capsys.readouterr().err
    assert main([*words, "--auto_trans_ckpt", "True", f"tokenizer={qwen1_5.folder}"], "qwen1_5") == 0
    assert capsys.readouterr().out == qwen1_5.expected(capsys, "prompt=你好", "generate.max_new_tokens=12")


@pytest.fixture(scope="module")
def exported(qwen, tmp_path_factory) -> Path:
    """The folder in which both export commands were run, the first export moved away as the documents advise."""
    folder = tmp_path_factory.mktemp("work")
    before = Path.cwd()
    os.chdir(folder)
    try:
        own = [f"model={qwen.name}", *SIZES, "device=cpu", f"weights={qwen.ckpt}"]
        words = ["--run_mode", "export", "--config_path", str(qwen.yaml), *own]
        assert main(words, "qwen") == 0
        Path("output").rename("dense")
        assert main([*words, "--paged_attention", "True"], "qwen") == 0
        Path("output").rename("paged")
    finally:
        os.chdir(before)
    return folder


def test_export_writes_the_documents_folders_and_a_meta_that_says_everything(exported):
    for root in (exported / "dense", exported / "paged"):
        names = sorted(path.name for path in root.iterdir())
        assert names == ["meta.json", "mindir_full_checkpoint", "mindir_inc_checkpoint", "tokenizer"]
        assert (root / "mindir_full_checkpoint" / "rank_0_graph.mindir").is_file()
        assert (root / "mindir_inc_checkpoint" / "rank_0_graph.mindir").is_file()
    dense, paged = read_meta(exported / "dense"), read_meta(exported / "paged")
    assert (dense.shapes.seq_length, dense.shapes.batch, dense.shapes.paged) == (64, 1, False)
    assert (paged.shapes.paged, paged.shapes.block_size, paged.shapes.num_blocks) == (True, 16, 8)
    assert dense.eos_ids and dense.eos_ids != (151643,) and dense.dtype == "float32"


def test_lite_answers_as_predict_does_with_and_without_paged_attention(qwen, exported, capsys, monkeypatch):
    monkeypatch.chdir(exported)
    expected = qwen.expected(capsys, "prompt=你好", "generate.max_new_tokens=12")
    words = ["--seq_length", "64", "--batch_size", "1", "--predict_data", "你好", "--predict_length", "12"]
    assert lite_script.main(["--mindir_root_dir", "dense", *words, "device=cpu"]) == 0
    assert capsys.readouterr().out == expected
    words += ["--paged_attention", "True", "--pa_block_size", "16", "--pa_num_blocks", "8"]
    assert lite_script.main(["--mindir_root_dir", "paged", *words, "device=cpu"]) == 0
    assert capsys.readouterr().out == expected
    # make lite: no shape is repeated; several prompts, sampled as predict samples
    case = ['prompt_list=["你好","Hello"]', "generate.temperature=1", "generate.seed=5", "generate.max_new_tokens=12"]
    assert main(["task=lite", "weights=dense", "device=cpu", *case]) == 0
    lines = [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()]
    own = ["task=predict", f"model={qwen.name}", *SIZES, f"weights={qwen.folder}", "device=cpu", "generate.dtype=fp32"]
    assert predict.run(compose([*own, *case])) == 0
    assert lines == [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seq_length", "2048"], "exported with --seq_length 64"),
        (["--batch_size", "4"], "--batch_size 1"),
        (["--pa_block_size", "32"], "--pa_block_size 16"),
        (["--pa_num_blocks", "512"], "--pa_num_blocks 8"),
        (["--paged_attention", "False"], "--paged_attention True"),
        (["--predict_length", "60"], "more than the model's 64"),
        (["--ge_config_path", "no.ini"], "no.ini"),
        (["--mindir_root_dir", "nowhere"], "nowhere"),
        (["--pa_num_block", "3"], "did you mean --pa_num_blocks"),
        (["--do_sample", "perhaps"], "--do_sample"),
    ],
)
def test_lite_flags_that_contradict_the_export_end_with_status_2(exported, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(exported)
    words = ["--mindir_root_dir", "paged", "--predict_data", "你好", "device=cpu", *flags]
    assert run_cli(lite_script.main, words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mindir.seq_length=100000"], "mindir.seq_length="),
        (["--paged_attention", "True", "mindir.num_blocks=3"], "mindir.num_blocks=4"),
        (["model.hf.num_hidden_layers=3"], "these weights are not qwen_tiny"),
        (["output=taken"], "exists already"),
    ],
)
def test_impossible_exports_end_with_status_2_and_leave_nothing(qwen, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Path("taken/mindir_full_checkpoint").mkdir(parents=True)
    own = [
        "--run_mode",
        "export",
        "--config",
        str(qwen.yaml),
        f"weights={qwen.ckpt}",
        f"model={qwen.name}",
        "device=cpu",
    ]
    own += [] if any("hidden_layers" in word for word in words) else SIZES
    assert main([*own, *words], "qwen") == 2
    assert message in capsys.readouterr().err
    assert [str(path) for path in Path().rglob("*")] in (["taken", "taken/mindir_full_checkpoint"],) or not list(
        Path("output").rglob("*")
    )
