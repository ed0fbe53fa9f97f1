"""What each flag of the MindFormers scripts does: a setting, a part of the ``--config``, or a reason why it changes nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from research.core.config.names import did_you_mean
from research.core.errors import ConfigError
from research.core.launch.environment import place

FAMILIES = ("qwen", "qwen1_5", "qwen2", "qwen2_5")
RUN_MODES = {
    "train": "pretrain",
    "finetune": "finetune",
    "predict": "predict",
    "export": "export",
    "eval": "perplexity",
}
_TRAINING = ("pretrain", "finetune", "lora")
_TRUTHS = {
    "true": True,
    "t": True,
    "yes": True,
    "y": True,
    "1": True,
    "false": False,
    "f": False,
    "no": False,
    "n": False,
    "0": False,
}


@dataclass
class Command:
    """A command line taken apart: flags with their values, and plain words; what the flags come to."""

    flags: dict[str, list[str]]
    plain: list[str]
    family: str | None = None
    words: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    patches: dict[str, object] = field(default_factory=dict)
    config_task: str | None = None

    def set(self, key: str, value) -> None:
        self.words.append(f"{key}={value if isinstance(value, str) else json.dumps(value)}")

    def note(self, flag: str, why: str) -> None:
        self.notes.append(f"--{flag} has no effect: {why}")

    def has(self, key: str) -> bool:
        return any(word.split("=", 1)[0].lstrip("+") == key for word in self.plain)

    def plain_value(self, key: str) -> str | None:
        found = [
            word.split("=", 1)[1] for word in self.plain if word.split("=", 1)[0].lstrip("+") == key and "=" in word
        ]
        return found[-1] if found else None

    def first(self, *flags: str) -> str | None:
        return next((self.flags[flag][0] for flag in flags if flag in self.flags), None)

    @property
    def task(self) -> str | None:
        """The task that is asked for, where the command line or its --config says it."""
        named = self.plain_value("task") or next((word for word in self.plain if "=" not in word), None)
        return named or RUN_MODES.get(self.first("run_mode") or "") or self.config_task


# --- what a flag does -------------------------------------------------------------------------------------------

Handler = Callable[[Command, str, list[str]], None]


def _setting(key: str) -> Handler:
    return lambda command, name, values: command.set(key, values[0])


def _switch(key: str) -> Handler:
    return lambda command, name, values: command.set(key, truth(name, values[0]))


def _nothing(why: str, unless: str | None = None) -> Handler:
    """Announce that the flag changes nothing; ``unless``: the value with which it asks for nothing."""

    def handle(command: Command, name: str, values: list[str]) -> None:
        if unless is None or values[0].lower() != unless.lower():
            command.note(name, why)

    return handle


def _by_task(**keys: str) -> Handler:
    """Another setting for each kind of task: train, predict, export, eval; a text in brackets is a reason to announce."""

    def handle(command: Command, name: str, values: list[str]) -> None:
        kind = _kind(command.task)
        target = keys.get(kind) or keys["train"]
        if target.startswith("("):
            command.note(name, target.strip("()"))
        else:
            command.set(target, values[0])

    return handle


def _kind(task: str | None) -> str:
    return {"predict": "predict", "chat": "predict", "export": "export", "perplexity": "eval"}.get(task or "", "train")


def truth(name: str, value: str) -> bool:
    if value.lower() not in _TRUTHS:
        raise ConfigError(f"{value!r} is not a value of --{name}", hint="True or False")
    return _TRUTHS[value.lower()]


def _choice(key: str, values: dict[str, str]) -> Handler:
    def handle(command: Command, name: str, given: list[str]) -> None:
        if given[0] not in values:
            raise ConfigError(f"{given[0]!r} is not a value of --{name}", hint=did_you_mean(given[0], values))
        command.set(key, values[given[0]])

    return handle


def _run_mode(command: Command, name: str, values: list[str]) -> None:
    if values[0] not in RUN_MODES:
        raise ConfigError(f"{values[0]!r} is not a value of --{name}", hint=did_you_mean(values[0], RUN_MODES))
    if "config" not in command.flags:  # else the file says whether it is a LoRA
        command.set("task", RUN_MODES[values[0]])


def _only(value: str, why: str) -> Handler:
    def handle(command: Command, name: str, values: list[str]) -> None:
        if any(given != value for given in values):
            raise ConfigError(f"{' '.join(values)!r} is not a value of --{name}", hint=f"--{name} {value}: {why}")

    return handle


def _vocabulary(command: Command, name: str, values: list[str]) -> None:
    # The vocabulary's files lie in one folder, which is what the setting names.
    folder = os.path.dirname(values[0]) or "."
    other = command.first("merges_file" if name == "vocab_file" else "vocab_file")
    if other is not None and (os.path.dirname(other) or ".") != folder:
        raise ConfigError(
            "vocabulary and merges are taken from one folder",
            where=f"--{name} {values[0]}, beside {other}",
            hint="copies or links of both in one folder",
        )
    command.set("tokenizer", folder)


def _predict_data(command: Command, name: str, values: list[str]) -> None:
    texts = [value.replace("\\n", "\n") for value in values]
    if len(texts) > 1:
        command.set("prompt_list", texts)
    elif texts[0].endswith((".txt", ".jsonl")) and os.path.isfile(texts[0]):
        command.set("prompts", texts[0])
    else:
        command.set("prompt", texts[0])


def _do_sample(command: Command, name: str, values: list[str]) -> None:
    samples = truth(name, values[0])
    if "config" in command.flags:
        command.patches["model.model_config.do_sample"] = samples  # its temperature counts
    else:
        command.set("generate.temperature", 1.0 if samples else 0.0)


def _device_id(command: Command, name: str, values: list[str]) -> None:
    value = values[0]
    if value == "-1":
        value = os.environ.get("DEVICE_ID", "")
    if value and place() is None:
        if not value.isdigit():
            raise ConfigError(f"{value!r} is no device", where=f"--{name}", hint="--device_id 0")
        command.set("device.index", int(value))


def _use_parallel(command: Command, name: str, values: list[str]) -> None:
    wanted, here = truth(name, values[0]), place()
    started = 1 if here is None else here.size
    if "config" in command.flags:
        return  # the grid is the file's
    if not wanted and started > 1:
        raise ConfigError(
            f"a launcher started {started} ranks, which would all do the same",
            where=f"--{name} False",
            hint=f"--{name} True, or the command without the launcher",
        )
    if wanted and started == 1 and not command.has("parallel.cards"):
        command.note(name, "nothing says how many cards: parallel.cards=N, a --config with a grid, or a launcher")


def _resume(command: Command, name: str, values: list[str]) -> None:
    if values[0].lower() not in _TRUTHS:
        raise ConfigError(
            f"a run goes on from its newest checkpoint, not from {values[0]!r}",
            where=f"--{name}",
            hint=f"--{name} True, with the newer checkpoints moved away",
        )
    resumes = truth(name, values[0])
    command.set("train.resume", resumes)
    checkpoint = command.first("load_checkpoint")
    if resumes and checkpoint and (Path(checkpoint) / "config.yaml").is_file() and "output_dir" not in command.flags:
        command.set("run", checkpoint)


def _load_checkpoint(command: Command, name: str, values: list[str]) -> None:
    resumes = command.first("resume_training")
    if resumes is not None and _TRUTHS.get(resumes.lower()) and (Path(values[0]) / "config.yaml").is_file():
        return  # a run folder that goes on
    if values[0]:
        command.set("weights", values[0])


def _do_eval(command: Command, name: str, values: list[str]) -> None:
    if not truth(name, values[0]):
        command.set("data.eval_records", 0)


def _eval_data(command: Command, name: str, values: list[str]) -> None:
    if command.task == "perplexity":
        command.set("data", values[0])
    else:
        command.note(name, "what is evaluated while training is held out of the training data (data.eval_records)")


def _adapter_id(command: Command, name: str, values: list[str]) -> None:
    if len(values) > 1:
        raise ConfigError(
            "one adapter is put on the weights", where=f"--{name} {' '.join(values)}", hint=f"--{name} {values[0]}"
        )
    folder = values[0]
    if not os.path.isdir(folder):
        table = Path(command.first("load_checkpoint") or ".") / "lora_adapter.json"
        known = json.loads(table.read_text(encoding="utf-8")) if table.is_file() else {}
        if values[0] not in known:
            raise ConfigError(
                "is neither an adapter's folder nor in lora_adapter.json of the weights",
                where=f"--{name} {values[0]}",
                hint=did_you_mean(values[0], known) if known else "adapter=<folder with adapter_config.json>",
            )
        folder = known[values[0]]
    command.set("adapter", folder)


def _options(command: Command, name: str, values: list[str]) -> None:
    for value in values:
        key, given, text = value.partition("=")
        if not given:
            raise ConfigError(f"{value!r} is not of the form key=value", where=f"--{name}")
        patch(command, key, text, f"--{name} {value}")


def patch(command: Command, key: str, text: str, where: str) -> None:
    if "config" not in command.flags:
        raise ConfigError(
            "changes a key of a --config, and there is none", where=where, hint="--config FILE, or setting=value"
        )
    command.patches[key] = yaml_value(text)


def yaml_value(text: str):
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _register_path(command: Command, name: str, values: list[str]) -> None:
    family = Path(values[0]).name
    if family not in FAMILIES:
        raise ConfigError(
            "names no family of this repository",
            where=f"--{name} {values[0]}",
            hint=did_you_mean(family, FAMILIES, prefix="research/"),
        )
    command.family = family


_CLOUD = "nothing is uploaded: results stay in the run folder"
_ONE_TRANSFORMS = "one process transforms a checkpoint, with threads, and the others wait for it"

FLAGS: dict[str, Handler] = {
    # all three scripts
    "config": lambda command, name, values: None,
    "run_mode": _run_mode,
    "load_checkpoint": _load_checkpoint,
    "auto_trans_ckpt": _switch("auto_transform"),
    "use_parallel": _use_parallel,
    "device_id": _device_id,
    "predict_data": _predict_data,
    "do_sample": _do_sample,
    "batch_size": _by_task(train="train.micro_batch", predict="generate.batch", export="mindir.batch"),
    "remote_save_url": _nothing(_CLOUD, unless=""),
    # run_qwen.py, run_qwen1_5.py
    "model": _setting("model"),
    "task": _only("text_generation", "what Qwen models do"),
    "vocab_file": _vocabulary,
    "merges_file": _vocabulary,
    "seq_length": _by_task(
        train="data.seq_length",
        predict="(keys and values take the room that prompt and answer need)",
        export="mindir.seq_length",
    ),
    "predict_length": _setting("generate.max_new_tokens"),
    "use_past": _by_task(
        train="(training keeps no keys and values)", predict="(keys and values are always kept)", export="mindir.past"
    ),
    "top_k": _setting("generate.top_k"),
    "top_p": _setting("generate.top_p"),
    "train_dataset": _setting("data"),
    "train_data": _setting("data"),  # the documents'; it worked there only as the beginning of a longer name
    "optimizer_parallel": lambda command, name, values: command.set(
        "parallel.shard", "optimizer" if truth(name, values[0]) else "none"
    ),
    "paged_attention": _switch("mindir.paged"),
    "dynamic": _switch("mindir.dynamic"),
    # run_mindformer.py
    "register_path": _register_path,
    "mode": _nothing("training and answers run as graphs", unless="0"),
    "device_target": _choice("device", {"Ascend": "npu", "GPU": "cuda", "CPU": "cpu"}),
    "do_eval": _do_eval,
    "train_dataset_dir": _setting("data"),
    "eval_dataset_dir": _eval_data,
    "modal_type": _only("text", "the models here read text"),
    "predict_batch_size": _setting("generate.batch"),
    "adapter_id": _adapter_id,
    "src_strategy_path_or_dir": _setting("reshard.strategy"),
    "strategy_load_checkpoint": _setting("reshard.strategy"),
    "transform_process_num": _nothing(_ONE_TRANSFORMS, unless="1"),
    "only_save_strategy": _nothing("`make reshard` writes shards with their strategy files", unless="False"),
    "resume_training": _resume,
    "seed": _by_task(train="train.seed", predict="generate.seed"),
    "profile": _nothing("there is no profiler behind it", unless="False"),
    "options": _options,
    "epochs": _setting("train.epochs"),
    "gradient_accumulation_steps": _setting("train.accumulation"),
    "sink_mode": _nothing("steps are fed as the backend does it best"),
    "num_samples": _setting("data.max_records"),
    "output_dir": _setting("run"),
}
# Those that take several values, and those that change or tell how to read the --config: they come before it.
SEVERAL = {"predict_data", "modal_type", "adapter_id", "options"}
PATCHING = {"options", "do_sample", "register_path"}
