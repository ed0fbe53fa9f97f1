"""llama.cpp for engine.py, run by an interpreter that has llama-cpp-python and gguf.

    _llama_contender.py WEIGHTS BATCH LENGTH

Writes WEIGHTS (a Hugging Face folder in bf16) as a GGUF file beside them, with matrices in bf16 and no vocabulary, loads it,
says so, and then answers a JSON line {"prompts", "new"} with {"seconds"}: greedy, all prompts in one batch.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from pathlib import Path

import gguf
import llama_cpp as llama
import numpy as np

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OTHERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
UBATCH = 512


def write_gguf(folder: Path) -> Path:
    config, path = json.loads((folder / "config.json").read_text()), folder / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for file in sorted(folder.glob("*.safetensors")):
        for name, words in bf16_tensors(file):
            add(writer, renamed(name), words)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def bf16_tensors(file: Path):
    """The tensors of a safetensors file as 16-bit words."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    for name, entry in json.loads(raw[8 : 8 + size]).items():
        if name != "__metadata__":
            assert entry["dtype"] == "BF16", name
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            yield name, np.frombuffer(raw[begin:end], np.uint16).reshape(entry["shape"])


def renamed(name: str) -> str:
    path, _, last = name.rpartition(".")
    if path in OTHERS:
        return f"{OTHERS[path]}.{last}"
    _, _, layer, part = path.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{last}"


def add(writer, name: str, words: np.ndarray) -> None:
    if words.ndim == 1:  # norms and biases are float32 in a GGUF file
        writer.add_tensor(name, (words.astype(np.uint32) << 16).view(np.float32))
    else:
        writer.add_tensor(name, words.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)


class Model:
    def __init__(self, path: Path, batch: int, length: int):
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        self.vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        settings = llama.llama_context_default_params()
        settings.n_ctx = batch * -(-length // 256) * 256
        settings.n_seq_max = batch
        settings.n_batch, settings.n_ubatch = 4096, UBATCH
        settings.n_threads = settings.n_threads_batch = len(os.sched_getaffinity(0))
        self.context = llama.llama_init_from_model(self.model, settings)
        self.batch = llama.llama_batch_init(4096, 0, 1)

    def run(self, prompts: list[list[int]], new: int) -> float:
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        start = time.perf_counter()
        tokens = self.step([(row, t, at) for row, p in enumerate(prompts) for at, t in enumerate(p)], prompts)
        for count in range(new - 1):
            self.step([(row, token, len(prompts[row]) + count) for row, token in enumerate(tokens)], None)
            tokens = self.best(range(len(tokens)))
        return time.perf_counter() - start

    def step(self, entries, prompts) -> list[int]:
        """Compute (row, token, position) entries; after prompts -> each row's best next token."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (row, token, position) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0] = row
            batch.logits[i] = prompts is None or position + 1 == len(prompts[row])
        if llama.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        ends = np.cumsum([len(p) for p in prompts]) - 1 if prompts else []
        return self.best(ends)

    def best(self, places) -> list[int]:
        def row(i: int) -> np.ndarray:
            pointer = llama.llama_get_logits_ith(self.context, int(i))
            return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self.vocab,))

        return [int(row(i).argmax()) for i in places]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    folder, batch, length = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    model = Model(write_gguf(folder), batch, length)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        print(json.dumps({"seconds": model.run(wanted["prompts"], wanted["new"])}), file=answers, flush=True)


if __name__ == "__main__":
    main()
