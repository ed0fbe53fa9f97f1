"""Compile the C++ kernels beside this file with the machine's compiler, once, and load them.

The library is cached under ``$QWEN_CACHE`` (default: ``.cache`` in the repository), named by a hash of sources, flags,
compiler and processor, and appears there complete or not at all, so processes may build at the same time. Without a
compiler the caller gets None, the reason is logged once, and plain operators are used. ``QWEN_NATIVE=0``
switches the kernels off.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

_log = logging.getLogger("research.native")
_HERE = Path(__file__).resolve().parent
_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
_EXTRA_FLAGS = {"elementwise": ["-ffp-contract=off"]}

# Arguments of every kernel: i int, l int64, f float, p pointer. None of them returns anything.
_SIGNATURES = {
    "rms_norm_forward": "illfppppi",
    "rms_norm_backward": "illppppppi",
    "swiglu_forward": "ilpppi",
    "swiglu_backward": "ilpppppi",
    "rotary": "iillllppppfi",
    "attention_forward": "illllppifpppppi",
    "attention_backward": "illllppifpppppppppi",
    "cross_entropy": "illpppii",
    "linear_rows": "illlppppi",
    "linear_panels": "illlppppi",
    "set_custom_threads": "i",
    "decode_step": "ipfppppppppppi",
    "paged_attention": "illlllllfpppppppi",
    "paged_step": "ipf" + "p" * 17 + "i",
}
_TYPES = {"i": ctypes.c_int, "l": ctypes.c_int64, "f": ctypes.c_float, "p": ctypes.c_void_p}


@cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels, or None where they cannot be built. Takes some seconds the first time on a machine."""
    found = _loaded()
    if found is None:
        return None
    kernels, _ = found
    for name, signature in _SIGNATURES.items():
        function = getattr(kernels, name)
        function.argtypes, function.restype = [_TYPES[letter] for letter in signature], None
    return kernels


def library_file() -> Path | None:
    """The file of the loaded kernels, for frameworks that load by file and symbol; None where they cannot be built."""
    found = _loaded()
    return None if found is None else found[1]


@cache
def _loaded() -> tuple[ctypes.CDLL, Path] | None:
    if os.environ.get("QWEN_NATIVE") == "0":
        return None
    compiler = _compiler()
    if compiler is None:
        _log.warning("no C++ compiler (g++): plain operators are used, which are slower")
        return None
    try:
        path = _built(compiler)
        return ctypes.CDLL(str(path)), path
    except (OSError, subprocess.SubprocessError) as bad:
        detail = getattr(bad, "stderr", None) or str(bad)
        _log.warning("CPU kernels were not built (%s): plain operators are used", detail.strip()[-400:])
        return None


def _compiler() -> str | None:
    return next((path for name in (os.environ.get("CXX"), "g++", "c++") if name and (path := shutil.which(name))), None)


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    return Path(os.environ.get("QWEN_CACHE") or _HERE.parents[2] / ".cache") / "native"


def _built(compiler: str) -> Path:
    sources = sorted(_HERE.glob("*.cpp"))
    flags = [*_FLAGS, "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"]
    key = hashlib.sha256()
    for path in [*sources, *sorted(_HERE.glob("*.h"))]:
        key.update(path.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key.update(repr((flags, _EXTRA_FLAGS, version, _processor())).encode())
    target = cache_folder() / f"kernels-{key.hexdigest()[:16]}.so"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    _log.warning("compiling the CPU kernels, once on this machine (half a minute)")
    with tempfile.TemporaryDirectory(dir=target.parent) as aside:
        jobs = []
        for path in sources:
            command = [
                compiler,
                *flags,
                *_EXTRA_FLAGS.get(path.stem, []),
                "-c",
                str(path),
                "-o",
                f"{aside}/{path.stem}.o",
            ]
            jobs.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
        errors = [job.communicate()[1] for job in jobs]  # waits for all, so that none writes into a removed folder
        for job, error in zip(jobs, errors):
            if job.returncode:
                raise subprocess.CalledProcessError(job.returncode, compiler, stderr=error)
        objects = [f"{aside}/{path.stem}.o" for path in sources]
        link = [compiler, "-shared", "-fopenmp", *objects, "-o", f"{aside}/kernels.so"]
        subprocess.run(link, capture_output=True, text=True, check=True)
        os.replace(f"{aside}/kernels.so", target)
    _log.warning("compiled the CPU kernels in %.0f s (kept in %s)", time.monotonic() - started, target.parent)
    return target


@cache
def multiplies_bf16() -> bool:
    """Whether the processor has products of bfloat16 (AVX512_BF16, AMX, Arm's)."""
    return "bf16" in _processor()


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
