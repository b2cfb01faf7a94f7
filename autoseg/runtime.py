"""What depends on the machine: device, precision, memory allocator, seeds, progress, versions."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from autoseg.errors import ConfigError, DeviceMemoryError

if TYPE_CHECKING:
    import torch

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None  # type: ignore[assignment]

log = logging.getLogger("autoseg")

# Each use of randomness has its own stream, so that changing one never shifts another.
STAGE_SPLITS = 0
STAGE_INIT = 1
STAGE_SAMPLE = 2
STAGE_AUGMENT = 3
STAGE_VALIDATE = 4
STAGE_MEASURE = 5
STAGE_PREVIOUS = 6
STAGE_DROPOUT = 7
STAGE_WHOLE_LOOK = 8
STAGE_BOOTSTRAP = 9
STAGE_CALIBRATION = 10

PRECISIONS = ("fp32", "bf16", "fp16")

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
_KEEP_EVERYTHING_BYTES = 2**31 - 1
_TOP_PAD_BYTES = 256 * 2**20

_NATIVE_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
_BF16_FLAGS = _NATIVE_BF16_FLAGS | {"bf16"}
_X86_FLAG = "fpu"
_WIDE_VECTORS_FLAG = "avx512f"
_KIB = 1024

# How plain RuntimeErrors of torch say that memory ran out: its allocator for the CPU, C++ itself, its MPS allocator.
_OUT_OF_MEMORY_TEXTS = ("DefaultCPUAllocator: ", "bad_alloc", "MPS backend out of memory")


class Progress(Protocol):
    """Where a long task tells how far it is."""

    def start(self, description: str, total: int | None) -> None:
        """Begin a task of `total` steps (None: unknown)."""

    def advance(self, step: int = 1, note: str = "") -> None:
        """Some steps are done; the note says how it goes."""

    def finish(self, note: str = "") -> None:
        """The task is over."""


class NoProgress:
    """Says nothing."""

    def start(self, description: str, total: int | None) -> None:
        """Ignore."""

    def advance(self, step: int = 1, note: str = "") -> None:
        """Ignore."""

    def finish(self, note: str = "") -> None:
        """Ignore."""


def rng(seed: int, *key: int) -> np.random.Generator:
    """The generator of one use of randomness.

    Args:
        seed: The run's seed.
        key: Stage, epoch, sample and so on: the same key gives the same numbers, whatever else was drawn.
    """
    return np.random.default_rng(np.random.SeedSequence([seed, *key]))


def configure_allocator(*, share_arena: bool = False) -> bool:
    """Tell glibc to keep freed memory instead of mapping every large tensor anew.

    Training on a CPU loses up to two thirds of its time to page faults otherwise. Takes effect for the whole process.

    Args:
        share_arena: Whether threads that begin later take memory from where the first one does. Otherwise what a
            thread has freed is kept for that thread alone.

    Returns:
        Whether the C library took the setting; False elsewhere, where nothing is changed.

    Source: docs/decisions/0003, and 0032 for the shared arena.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        # Of musl there is no such library, or (with a layer for glibc's programs) one without this function.
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False

    def is_set(key: int, value: int) -> bool:
        return bool(mallopt(ctypes.c_int(key), ctypes.c_int(value)) == 1)

    # Before version 2.35 glibc refuses a threshold above 32 MiB, but it can be told to map no block on its own at all.
    is_kept = is_set(_M_MMAP_THRESHOLD, _KEEP_EVERYTHING_BYTES) or is_set(_M_MMAP_MAX, 0)
    is_shared = is_set(_M_ARENA_MAX, 1) if share_arena else True
    is_kept &= is_set(_M_TRIM_THRESHOLD, _KEEP_EVERYTHING_BYTES) & is_set(_M_TOP_PAD, _TOP_PAD_BYTES)
    return is_kept and is_shared


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name.

    Args:
        name: "auto" (CUDA, else MPS, else CPU), "cpu", "cuda", "cuda:1", "mps".

    Raises:
        ConfigError: This machine does not have it.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device {name!r}", hint="Use auto, cpu, cuda, cuda:N or mps.") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(
            f"device {name!r} is not available: this machine offers {torch.cuda.device_count()} CUDA devices",
            hint="Use --device auto, or install a CUDA build of torch.",
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device 'mps' is not available on this machine", hint="Use --device auto.")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device {name!r} is not supported", hint="Use auto, cpu, cuda, cuda:N or mps.")
    return device


def _cpu_flags() -> frozenset[str]:
    """What the CPU says that it can do; empty where the system does not tell."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            for line in handle:
                if line.startswith(("flags", "Features")):
                    return frozenset(line.partition(":")[2].split())
    except OSError:
        return frozenset()
    return frozenset()


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively; emulated bf16 is slower than fp32."""
    return bool(_BF16_FLAGS & _cpu_flags())


def is_bf16_quick() -> bool | None:
    """Whether convolutions in bf16 are quicker than in fp32 on this CPU, where its flags are enough to tell.

    Returns:
        True with instructions of x86 for bf16; False on x86 without AVX-512, where they run in plain code; None
        otherwise (ARM, or x86 whose bf16 is widened to fp32 in vectors): only timing tells.

    Source: oneDNN's documentation, "Data types", the table of instruction sets by type.
    """
    flags = _cpu_flags()
    if flags & _NATIVE_BF16_FLAGS:
        return True
    return False if _X86_FLAG in flags and _WIDE_VECTORS_FLAG not in flags else None


def pick_precision(name: str, device: torch.device) -> str:
    """The precision of that name, "auto" resolved by what the device does natively.

    Args:
        name: "auto", "fp32", "bf16" or "fp16".
        device: Where the network runs.

    Raises:
        ConfigError: Unknown, or fp16 elsewhere than on CUDA (no gradient scaling there; slower than fp32 on a CPU).
    """
    import torch

    if name not in ("auto", *PRECISIONS):
        raise ConfigError(f"unknown precision {name!r}", hint="Use auto, fp32, bf16 or fp16.")
    if name == "fp16" and device.type != "cuda":
        where = "the CPU" if device.type == "cpu" else device.type
        raise ConfigError(f"precision fp16 is not supported on {where}", hint="Use bf16 or fp32.")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and _cpu_has_bf16() else "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Mixed precision for the block; a no-op for fp32."""
    import torch

    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, dtype=kinds[precision], enabled=precision != "fp32")


@contextmanager
def device_memory_errors(what: str, hint: str) -> Iterator[None]:
    """Turn whatever says that memory ran out inside the block into one kind of error; other errors pass untouched.

    Args:
        what: What ran out of memory and doing what; begins the message.
        hint: What to do next.

    Raises:
        DeviceMemoryError: The block raised torch.OutOfMemoryError, MemoryError, or a RuntimeError by which torch says
            that an allocator (on the CPU, on MPS) got no memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as problem:
        if not is_out_of_memory(problem):
            raise
        # "[enforce fail at FILE] err == 0. DefaultCPUAllocator: can't allocate ...": only the end is for people.
        reason = str(problem).rpartition("DefaultCPUAllocator: ")[2]
        raise DeviceMemoryError(f"{what}: {reason}" if reason else what, hint=hint) from None


def is_out_of_memory(problem: MemoryError | RuntimeError) -> bool:
    """Whether that is how NumPy, torch or Python say that memory ran out."""
    import torch

    if isinstance(problem, MemoryError | torch.OutOfMemoryError):
        return True
    return any(text in str(problem) for text in _OUT_OF_MEMORY_TEXTS)


def one_core_each() -> Callable[[], None]:
    """An initializer for threads that work beside the calling one: each of them computes on one core.

    Teams of threads that share the same cores wait for each other and slow the network down several times.
    """
    import torch

    # A thread that never asked for its number gets the one that was set last, by whomever: the caller asks now.
    torch.get_num_threads()
    return partial(torch.set_num_threads, 1)


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch computes in the calling thread alone, for as long as this lasts.

    Its other threads wait actively for milliseconds after each piece of work, on cores that another program's threads
    may want.
    """
    import torch

    number = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(number)


def num_cpus() -> int:
    """Cores this process may use (affinity and containers respected)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far; 0 where the system does not tell."""
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * _KIB)


def peak_memory_on(device_type: str) -> int:
    """Largest memory so far that counts on a device: on a GPU what was allocated there, else that of the process."""
    if device_type != "cuda":
        return peak_memory_bytes()
    import torch

    return int(torch.cuda.max_memory_allocated())


def seconds_per_call(call: Callable[[], object], *, seconds: float, most: int, warm_up: int = 1) -> tuple[float, ...]:
    """Time a call again and again.

    Args:
        call: What is timed; it returns when its work is done, on a GPU too.
        seconds: Stop after about so long ...
        most: ... or so many calls. One is timed in any case.
        warm_up: Calls before the first that counts, whose time counts towards `seconds`.

    Returns:
        Seconds of each timed call.
    """
    began = time.perf_counter()
    for _ in range(warm_up):
        call()
    taken: list[float] = []
    while not taken or (len(taken) < most and time.perf_counter() - began < seconds):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return tuple(taken)


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            names = [line.split(":", 1)[1].strip() for line in handle if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of autoseg and what it computes with."""
    found = {"python": platform.python_version()}
    for name in ("autoseg-unet", "torch", "numpy", "scipy", "monai", "nibabel", "SimpleITK", "safetensors"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """Versions, device and threads, for the record of a run."""
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "versions": versions(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "num_cpus": num_cpus(),
        "num_threads": torch.get_num_threads(),
        "cuda_devices": devices,
        "cpu_bf16": _cpu_has_bf16(),
    }
