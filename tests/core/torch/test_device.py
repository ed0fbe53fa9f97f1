"""Device, dtype and threads; the measured roofline and its cache."""

from __future__ import annotations

import json

import pytest
import torch

from research.core.config.schema import DeviceConfig
from research.core.errors import ConfigError
from research.core.torch import device as module
from research.core.torch.device import cpu_count, gemm_flops, measure_gemm, resolve_device, resolve_dtype

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    module._gemm_flops.cache_clear()
    torch.set_num_threads(before)


def test_cpu_takes_the_number_of_threads_it_is_told():
    assert resolve_device(DeviceConfig(kind="cpu", threads=1)) == CPU
    assert torch.get_num_threads() == 1


def test_processes_of_one_node_share_its_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert (cpu_count(), cpu_count(4), cpu_count(16)) == (8, 2, 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert (cpu_count(), cpu_count(4)) == (3, 3)


@pytest.mark.parametrize("kind", ["cuda", "npu"])
def test_device_that_is_not_here_is_named(kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "_has_npu", lambda: False)
    with pytest.raises(ConfigError, match=f"device.kind={kind}.*\n.*DEVICE=cpu"):
        resolve_device(DeviceConfig(kind=kind))
    assert resolve_device(DeviceConfig(kind="auto", threads=1)) == CPU


def test_auto_dtype_is_the_one_that_multiplies_faster(monkeypatch):
    rates = {torch.float32: 100.0, torch.bfloat16: 90.0}
    monkeypatch.setattr(module, "gemm_flops", lambda device, dtype: rates[dtype])
    assert resolve_dtype("auto", CPU) == torch.float32
    rates[torch.bfloat16] = 200.0
    assert resolve_dtype("auto", CPU) == torch.bfloat16
    assert resolve_dtype("fp32", CPU) == torch.float32 and resolve_dtype("bf16", CPU) == torch.bfloat16


def test_roofline_is_the_best_that_any_process_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN_CACHE", str(tmp_path / "cache"))
    for measured, expected in ((5.0, 5.0), (9.0, 9.0), (2.0, 9.0)):
        monkeypatch.setattr(module, "measure_gemm", lambda *args, rate=measured: rate)
        module._gemm_flops.cache_clear()  # as in a new process
        assert gemm_flops(CPU, torch.float32) == expected
    key = next(iter(json.loads((tmp_path / "cache" / "gemm.json").read_text())))
    assert "float32" in key and f"{torch.get_num_threads()} threads" in key


def test_damaged_cache_is_measured_again(tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN_CACHE", str(tmp_path))
    (tmp_path / "gemm.json").write_text("{half")
    monkeypatch.setattr(module, "measure_gemm", lambda *args: 7.0)
    module._gemm_flops.cache_clear()
    assert gemm_flops(CPU, torch.float32) == 7.0
    module._gemm_flops.cache_clear()


def test_measured_rate_counts_two_operations_per_multiply_add():
    import time

    start = time.perf_counter()
    rate = measure_gemm(CPU, torch.float32, seconds=0.0)
    assert 2 * 1024**3 / rate <= time.perf_counter() - start  # one product cannot take longer than all of it
