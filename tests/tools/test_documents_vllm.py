"""ENGINE=vllm: the same requests and server settings arrive at vLLM. A stand-in with vLLM's interface takes its place."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from research.core.config.compose import compose
from research.core.errors import run_cli
from research.core.torch.generate import generate
from research.core.torch.lora import load_adapter
from research.core.torch.weights import load_decoder
from research.tasks import predict, run_pa, serve_vllm
from tests.tools.test_documents_serving import QUESTION, answers, expected, weights  # noqa: F401 (a fixture)


@dataclass
class StandIn:
    """vLLM's LLMEngine as far as it is used: one greedy token of every request in each step."""

    arguments: dict
    waiting: dict = field(default_factory=dict)
    seen: list = field(default_factory=list)
    aborted: list = field(default_factory=list)

    def add_request(self, request_id, prompt, params, lora_request=None, priority=0):
        decoder = load_decoder(self.arguments["model"], torch.float32)
        if lora_request is not None:
            load_adapter(decoder, lora_request.path)
        new = generate(decoder, [prompt["prompt_token_ids"]], max_new_tokens=params.max_tokens)[0]
        end = next((at for at, token in enumerate(new) if token in params.stop_token_ids), len(new) - 1)
        self.waiting[request_id] = (new[: end + 1], params)
        self.seen.append((params, lora_request))

    def step(self):
        outputs = []
        for number, (tokens, params) in list(self.waiting.items()):
            token, rest = tokens[0], tokens[1:]
            reason = None if rest else "stop" if token in params.stop_token_ids else "length"
            one = SimpleNamespace(index=0, token_ids=[token], finish_reason=reason, logprobs=None)
            outputs.append(SimpleNamespace(request_id=number, outputs=[one], finished=not rest, num_cached_tokens=None))
            self.waiting[number] = (rest, params)
            if not rest:
                del self.waiting[number]
        return outputs

    def abort_request(self, numbers):
        self.aborted += numbers
        for number in numbers:
            self.waiting.pop(number, None)


@pytest.fixture
def vllm(monkeypatch) -> list[StandIn]:
    """Puts the stand-in where vLLM is imported from; -> the engines that are opened."""
    opened: list[StandIn] = []

    def from_engine_args(arguments):
        opened.append(StandIn(vars(arguments)))
        return opened[-1]

    module, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    module.EngineArgs = SimpleNamespace
    module.LLMEngine = SimpleNamespace(from_engine_args=from_engine_args)
    module.SamplingParams = module.PoolingParams = SimpleNamespace
    module.sampling_params = SimpleNamespace(RequestOutputKind=SimpleNamespace(DELTA="delta"))
    request.LoRARequest = lambda name, number, path: SimpleNamespace(name=name, number=number, path=path)
    for name, one in (("vllm", module), ("vllm.lora", lora), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, one)
    return opened


def test_request_files_of_run_pa_and_predict_go_to_vllm(weights, vllm, capsys, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setenv("ENGINE", "vllm")
    asked = [{"prompt": QUESTION, "adapter": "qwen_lora1"}, {"prompt": QUESTION}]
    words = ["--model_path", str(weights), "--is_chat_model", "--max_output_length", "9", "--max_batch_size", "2"]
    words += ["--max_position_embeddings", "512", "--tp", "2", "--input_dict", json.dumps(asked)]
    assert run_pa.main(words) == 0
    both = [expected(weights, [QUESTION], 9, chat=True, adapter=adapter)[0] for adapter in (True, False)]
    assert answers(capsys.readouterr().out) == both
    (engine,) = vllm
    given = {"max_num_seqs": 2, "block_size": 128, "max_model_len": 512, "tensor_parallel_size": 2}
    given |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8}  # vLLM has no rank of 4
    assert given.items() <= engine.arguments.items()
    assert [None if lora is None else lora.name for _, lora in engine.seen] == ["qwen_lora1", None]

    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": QUESTION}) + "\n")
    stop = both[1][len(both[1]) // 2 :][:2]
    words = ["task=predict", "model=qwen1_5_tiny", f"weights={weights}", f"prompts={tmp_path / 'p.jsonl'}"]
    words += ["engine.mode=vllm", "generate.max_new_tokens=9", f"generate.stop=[{json.dumps(stop)}]"]
    assert predict.run(compose(words)) == 0
    answer = json.loads(capsys.readouterr().out)["answer"]
    assert answer == both[1][: both[1].index(stop)] and vllm[1].aborted == ["0"]  # nothing is computed behind it


def test_wrong_requests_and_a_missing_vllm_end_with_status_2(weights, vllm, capsys, monkeypatch):  # noqa: F811
    words = ["--model_path", str(weights), "engine.mode=vllm"]
    assert run_cli(run_pa.main, [*words, "--input_dict", '[{"prompt": "a", "adapter": "other"}]']) == 2
    assert "'other' is not a loaded adapter" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert run_cli(run_pa.main, words) == 2
    assert "engine.mode=vllm: vLLM cannot be imported" in capsys.readouterr().err


def test_server_settings_become_vllms_flags(weights, vllm, capsys, monkeypatch, tmp_path):  # noqa: F811
    called: list[list[str]] = []
    monkeypatch.setattr(serve_vllm.os, "execv", lambda program, words: called.append(words))
    monkeypatch.setenv("QWEN_API_KEYS", "first,second")
    words = ["task=serve", "model=qwen1_5_tiny", f"weights={weights}", "engine.mode=vllm", "serve.port=8123"]
    words += ["serve.name=tiny", "serve.page=false", "parallel.cards=2", "engine.prefix_cache=false"]
    serve_vllm.run(compose(words))
    line = " ".join(called[0][1:])
    for part in (
        "-m vllm.entrypoints.openai.api_server --host 127.0.0.1 --port 8123 --served-model-name tiny",
        f"--model {weights}",
        "--tensor-parallel-size 2",
        "--no-enable-prefix-caching",
        "--enable-lora",
        f"--lora-modules qwen_lora1={Path(weights).parent / 'adapter1'}",
        "--api-key first second",
    ):
        assert part in line
    said = capsys.readouterr().err
    assert "serve.page has no effect" in said and "first" not in said
