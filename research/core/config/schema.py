"""Every setting there is, with its type and default. A key that is not here does not exist.

The Hydra files under ``conf/`` and ``research/<family>/conf/`` only give values; composition
(:mod:`research.core.config.compose`) merges them into these dataclasses, so a typo or a wrong type is found before
anything starts. Lengths count tokens, sizes count elements, fractions lie in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelConfig:
    """One model: the name users type, and the keys of its ``config.json`` (``hf``)."""

    name: str = "???"
    family: str = "???"  # qwen | qwen1_5 | qwen2 | qwen2_5
    hub_id: str | None = None  # where `make weights` finds it
    template: str | None = None  # chat template; None: the family's
    tokenizer: str = "hub"  # hub: files beside the weights; builtin: the byte-level BPE trained on Python's own text
    embedding: bool = False  # last-token embedding instead of logits (gte)
    hf: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataConfig:
    """What is trained on, and how a record becomes tokens."""

    source: str = "skills"  # a built-in name (skills) or a file, folder or glob; several separated by commas
    format: str = "auto"  # auto | alpaca | messages | sharegpt | text | wikitext | skills | mindrecord (.json .jsonl .gz .parquet .txt ...)
    documents: str = "blank"  # what separates documents of plain text: blank (lines) | line | file
    seq_length: int = 512
    supervise: str = "assistant"  # assistant | last | all | mindformers
    packing: bool = True
    on_long: str = "truncate"  # truncate | drop | error
    system: str | None = None  # replaces the template's default system prompt; "" for none
    max_records: int | None = None
    eval_records: int = 256  # held out from the end of a seeded shuffle, never trained
    eval_fraction: float = 0.05  # upper bound of the held-out part
    workers: int = 0  # processes that tokenise; 0: one per core
    shuffle: bool = True
    seed: int = 1234
    max_truncated: float | None = None  # audit findings that become errors: share of records truncated,
    max_dropped: float | None = None  # share of records dropped,
    min_supervised: float | None = None  # and the least share of tokens supervised
    dump: str | None = None  # write {"id","input_ids","labels"} per record, before packing
    output: str | None = None  # dataset folder; None: in the run folder
    folder: str | None = None  # use this prepared dataset folder instead of preparing one
    mindrecord: str | None = None  # make data: also write the rows as MindRecord, the held-out ones beside it as *_eval
    file_partition: int = 1  # files that data.mindrecord is cut into
    overwrite: bool = False  # replace data.mindrecord where it exists
    skills: list[str] = field(default_factory=list)  # of the built-in set; empty: all of its training mix
    skills_records: int = 40000


@dataclass
class TrainConfig:
    """The optimisation. A step is one optimiser update over ``micro_batch * accumulation * cards`` sequences."""

    steps: int | None = None
    epochs: float | None = None  # used when steps is null
    max_minutes: float | None = None  # stop in good order after this time, schedule fitted to it
    micro_batch: int = 1  # sequences of seq_length per forward
    accumulation: int = 1
    lr: float = 1e-5
    min_lr_ratio: float = 0.1
    schedule: str = "cosine"  # cosine | linear | constant | wsd
    warmup_steps: int | None = None  # None: warmup_ratio of the steps
    warmup_ratio: float = 0.03
    decay_ratio: float = 0.2  # wsd: share of the steps that decay
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0
    dtype: str = "auto"  # compute: fp32 | bf16 | fp16 (mindspore); auto: bf16 where the device multiplies it faster
    master: str = "fp32"  # fp32 | same: dtype of the stored weights and optimiser state
    loss_scale: float = 65536.0  # fp16: what the loss is multiplied by at first; halved at an overflow,
    loss_scale_window: int = 1000  # and doubled after so many steps without one
    checkpointing: str = "none"  # activations: none | selective | full
    compile: bool = False  # torch.compile of each block
    head_chunk: int = 1024  # rows of logits that exist at one time
    router_aux: float | None = None  # MoE load-balance coefficient; None: the model's
    seed: int = 1234
    log_every: int = 10
    eval_every: int = 0  # steps; 0: at the end only
    sample_every: int = 0
    save_every: int = 0  # steps; 0: at the end only
    keep_last: int = 2
    async_save: bool = True
    resume: bool = False
    from_scratch: bool | None = None  # None: only for models without published weights, and for task=pretrain
    export: bool = True  # write weights/ in Hugging Face format at the end


@dataclass
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685), in the terms of PEFT's adapter_config.json."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: Any = "all-linear"  # a list of names, a regular expression, or all-linear
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    rslora: bool = False
    adapter: str | None = None  # start from this PEFT folder


@dataclass
class GenerateConfig:
    """Decoding. ``temperature=0`` is greedy."""

    max_new_tokens: int = 256
    temperature: float | None = None  # None: the checkpoint's generation_config.json, else 0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 0
    stop: list[str] = field(default_factory=list)  # the answer ends before any of these texts
    raw: bool = False  # continue the plain text, no template
    system: str | None = None
    dtype: str = "auto"
    batch: int | None = None  # prompts that run at a time; None: 8, in the paged engine engine.max_batch
    compile: bool = False  # steps through torch.compile (contiguous cache)


@dataclass
class ParallelConfig:
    """Cards and nodes; ``shard=full`` splits weights, gradients and optimiser state over them (FSDP2).

    ``data * tensor * pipeline`` is the number of all cards. With pipeline stages, the micro batches that fill them are
    those of ``train.accumulation``.
    """

    cards: int = 1  # processes on this node
    nodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 29500
    data: int | None = None  # groups that see different sequences; None: what the cards leave
    tensor: int = 1  # cards that share each layer (mindspore)
    pipeline: int = 1  # stages that share the layers (training on mindspore)
    stage_layers: list[int] = field(default_factory=list)  # decoder layers of each stage; empty: even
    shard: str = "none"  # none | optimizer (its state only; mindspore) | full (torch)
    timeout_s: int = 600


@dataclass
class DeviceConfig:
    kind: str = "auto"  # auto | cpu | cuda | npu
    attention: str = "auto"  # auto | sdpa | reference | npu
    threads: int = 0  # CPU threads; 0: every core
    index: int | None = None  # which card a run on one card takes; None: the first


@dataclass
class ConvertConfig:
    """``make convert``: ``weights`` -> ``output``, between Hugging Face's and MindFormers' layouts."""

    to: str = "auto"  # huggingface | mindformers; auto: the one that the source is not
    dtype: str = "keep"  # keep | fp32 | bf16 | fp16
    qkv_concat: str | None = (
        None  # of the MindFormers side: none | stacked | grouped; of a source also probe (try both)
    )
    source_concat: str | None = None  # the source's, where both sides are MindFormers
    use_gmm: bool | None = None  # experts' matrices with exchanged axes, as grouped matmul wants them
    tied_head: str = "copy"  # a tied head in the MindFormers file: copy | omit
    files: str = "ckpt"  # ckpt | safetensors, where the output's name does not say
    lora: bool = False  # the source is an adapter
    config: str | None = None  # config.json (or its folder) of a MindFormers source; of an adapter: its base model
    allow_overflow: bool = False  # write infinities where fp16 is too small
    overwrite: bool = False
    shard_gb: float = 5.0  # largest safetensors file of a Hugging Face folder
    verify: bool = False  # compare the result with the source, tensor by tensor, at the end


@dataclass
class ReshardConfig:
    """``make split``, ``merge-shards``, ``reshard``: ``weights`` -> ``output``, shards of any grid. dtype, qkv_concat, files
    and the like of MindSpore ranks are ``convert``'s."""

    to: str = "auto"  # hf | parts | ranks | dcp; auto: split parts, merge-shards hf, reshard what the source is
    grid: str | None = None  # tp4, dp2-tp4-pp2; None: parallel.cards tensor-parallel cards
    stage_layers: list[int] = field(default_factory=list)  # decoder layers per pipeline stage; empty: even
    kv: str = "replicate"  # kv heads fewer than cards: replicate | refuse
    vocab: str = (
        "auto"  # that does not divide: pad | replicate | refuse; whole: on every card; auto: parts pad, ranks replicate
    )
    strategy: str | None = None  # the source's MindSpore strategy files, where they are not beside its ranks
    target_strategy: str | None = None  # lay the ranks out as these strategy files say
    document_names: bool = False  # ckpt_strategy_rank_N_rank_N.ckpt, as the documents list them


@dataclass
class VerifyConfig:
    """``make verify A= B=``: two weights of any layouts, tensor by tensor; ``logits``: on a fixed prompt too."""

    a: str | None = None
    b: str | None = None
    logits: bool = False
    tolerance: float | None = None  # largest difference of logits, relative to the largest logit; None: by dtype
    tokens: int = 32  # length of the fixed prompt
    a_concat: str | None = None  # none | stacked | grouped | probe, where a file does not say it
    b_concat: str | None = None
    config: str | None = None  # config.json of a MindFormers file that has none beside it


@dataclass
class MindirConfig:
    """``make export BACKEND=mindspore``: the graphs' shapes, which are fixed when they are written."""

    seq_length: int | None = None  # prompt and answer together; None: data.seq_length
    batch: int = 1
    past: bool = True  # write the incremental graph beside the full one
    dynamic: bool = False  # any batch and length up to these
    paged: bool = False  # keys and values in blocks; block_size * num_blocks must hold seq_length * batch
    block_size: int = 16  # 16 | 32 | 128
    num_blocks: int = 512


@dataclass
class ServeConfig:
    """``make serve``: where it listens, who may ask, how much, and what is written down."""

    host: str = "127.0.0.1"  # 0.0.0.0: on every network of this machine
    port: int = 8000  # 0: any free one
    name: str | None = None  # what requests call the model; None: model.name
    api_keys: str | None = None  # file with a key on each line; more keys, between commas, in QWEN_API_KEYS
    max_requests: int = 512  # prompts that run or wait at a time; one more is answered 429
    requests_per_minute: int = 0  # of each key, without keys of each address; 0: no limit
    max_body_mb: float = 8.0
    max_choices: int = 16  # answers to one prompt (n)
    max_prompts: int = 256  # prompts or texts in one request
    max_new_tokens: int | None = None  # no answer is longer; None: what the context leaves
    read_timeout_s: float = 30.0  # within which a request must have come whole
    write_timeout_s: float = 60.0  # a client that takes nothing of its answer for so long has left
    drain_s: float = 30.0  # after SIGTERM: running answers get so long to end
    adapter_folder: str | None = None  # POST /v1/load_lora_adapter loads what lies in this folder; None: nothing
    page: bool = True  # the chat page at /
    log_prompts: bool = False  # put prompts and answers into the log


@dataclass
class HubConfig:
    """``make weights``: where a model comes from and where it goes (``output``; default weights/<model>)."""

    source: str = "huggingface"  # huggingface | modelscope; HF_ENDPOINT and MODELSCOPE_ENDPOINT name mirrors
    revision: str | None = None  # None: main (huggingface), master (modelscope)


@dataclass
class EngineConfig:
    """The paged inference engine (docs/engine.md)."""

    mode: str = "auto"  # paged | flash (contiguous cache, one batch after another) | vllm (where installed); auto: paged on torch
    block_size: int = 16  # tokens of one block of the key/value cache
    num_blocks: int | None = None  # blocks of the cache; None: what memory_fraction of the free memory holds
    memory_fraction: float | None = None  # None: 0.5 of the host's free memory, 0.9 of a card's
    max_batch: int = 128  # answers that run at one time
    max_tokens_per_step: int | None = None  # prompt and answer tokens of one forward; None: 512 on a CPU, else 8192
    max_length: int | None = None  # prompt and answer together; None: what the model is made for
    prefix_cache: bool = True  # prompts that open alike share their blocks
    attention: str = "auto"  # auto | reference | sdpa | native (cpu) | triton (cuda) | npu
    native_step: bool = True  # decode steps of a dense model on a CPU as one native call
    cuda_graphs: bool = True  # decode steps on CUDA replayed from graphs, one per batch size of a few


@dataclass
class TaskConfig:
    name: str = "finetune"


@dataclass
class Config:
    """The whole configuration, as written to ``config.yaml`` in the run folder."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    reshard: ReshardConfig = field(default_factory=ReshardConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    mindir: MindirConfig = field(default_factory=MindirConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    backend: str = "torch"  # torch | mindspore
    weights: str | None = None  # a weight folder in Hugging Face format, or a run folder
    auto_transform: bool = True  # a checkpoint of another grid is made into this one's (mindspore); false: refused
    adapter: str | None = None  # a PEFT adapter folder put on the weights (predict, chat, merge)
    tokenizer: str | None = None  # folder of the vocabulary, when it is not beside the weights
    run: str | None = None  # the run folder to write or to go on with; None: runs/<task>/<model>/<time>
    prompt: str | None = None  # predict: one prompt; or
    prompt_list: list[str] = field(default_factory=list)  # several, each answered on its own; or
    prompts: str | None = None  # a file with one prompt a line (.txt) or {"prompt"} / {"messages"} records (.jsonl)
    output: str | None = None  # export, merge, convert, split, merge-shards, reshard, weights: what to write
    allow_pickle: bool = False  # read .bin weights and adapters where there are no safetensors: only from who you trust
    allow_special: bool = False  # let control tokens inside a user's text become control tokens
