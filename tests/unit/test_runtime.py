"""What depends on the machine, on machines that are not this one."""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from autoseg import machine, runtime
from autoseg.errors import ConfigError

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
"""Parameters of mallopt, from malloc.h."""


class Libc:
    """A C library with a mallopt that takes some settings."""

    def __init__(self, refused: tuple[int, ...] = ()) -> None:
        self.calls: list[tuple[int, int]] = []
        self._refused = refused

    def mallopt(self, key: ctypes.c_int, value: ctypes.c_int) -> int:
        self.calls.append((key.value, value.value))
        return int(key.value not in self._refused)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    """Have loading the C library give something, or raise it."""

    def give(found: object) -> None:
        def cdll(name: str) -> object:
            assert name == "libc.so.6"
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(ctypes, "CDLL", cdll)

    return give


def test_glibc_is_told_to_keep_what_is_freed(load: Callable[[object], None]) -> None:
    libc = Libc()
    load(libc)
    assert runtime.configure_allocator()
    settings = dict(libc.calls)
    assert settings.keys() == {M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD}
    assert settings[M_MMAP_THRESHOLD] == settings[M_TRIM_THRESHOLD] == 2**31 - 1


def test_an_old_glibc_that_refuses_the_threshold_maps_nothing_on_its_own(load: Callable[[object], None]) -> None:
    libc = Libc(refused=(M_MMAP_THRESHOLD,))
    load(libc)
    assert runtime.configure_allocator()
    assert dict(libc.calls)[M_MMAP_MAX] == 0


@pytest.mark.parametrize("refused", [(M_MMAP_THRESHOLD, M_MMAP_MAX), (M_TRIM_THRESHOLD,), (M_TOP_PAD,)])
def test_a_setting_that_is_not_taken_is_said(load: Callable[[object], None], refused: tuple[int, ...]) -> None:
    libc = Libc(refused)
    load(libc)
    assert not runtime.configure_allocator()
    assert {key for key, _ in libc.calls} >= {M_TRIM_THRESHOLD, M_TOP_PAD}, "the others are set all the same"


@pytest.mark.parametrize("found", [OSError("libc.so.6: cannot open shared object file"), ModuleType("musl")])
def test_musl_is_left_alone(load: Callable[[object], None], found: object) -> None:
    """Without a layer for glibc's programs there is no such library, with one it has no mallopt."""
    load(found)
    assert not runtime.configure_allocator()


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    def never(name: str) -> object:
        raise AssertionError(f"{name} was loaded")

    monkeypatch.setattr(ctypes, "CDLL", never)
    monkeypatch.setattr(sys, "platform", system)
    assert not runtime.configure_allocator()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator of Linux")
def test_this_machine_takes_the_setting() -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("not glibc")
    assert runtime.configure_allocator()


@pytest.mark.parametrize("module", [runtime, machine])
def test_modules_load_on_systems_without_posix(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert module.__file__ is not None
    spec = importlib.util.spec_from_file_location("elsewhere", module.__file__)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "elsewhere", loaded)
    spec.loader.exec_module(loaded)
    if module is runtime:
        assert loaded.peak_memory_bytes() == 0
    else:
        loaded.limit_memory(2**60)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"fpu", "avx2", "avx512f", "avx512_bf16"}, True),
        ({"fpu", "amx_bf16", "avx512f"}, True),
        ({"fpu", "sse2", "avx2"}, False),
        ({"fpu", "avx512f"}, None),
        ({"fp", "asimd", "bf16"}, None),
        ({"fp", "asimd"}, None),
        (set(), None),
    ],
)
def test_flags_decide_where_they_can(monkeypatch: pytest.MonkeyPatch, flags: set[str], expected: bool | None) -> None:
    monkeypatch.setattr(runtime, "_cpu_flags", lambda: frozenset(flags))
    assert runtime.is_bf16_quick() is expected


@pytest.mark.parametrize(("device", "words"), [("cpu", "the CPU"), ("mps", "mps")])
def test_fp16_is_for_cuda(device: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"fp16 is not supported on {words}"):
        runtime.pick_precision("fp16", torch.device(device))


def test_mps_computes_in_fp32_without_a_scaler_and_without_a_word() -> None:
    device = torch.device("mps")
    assert runtime.pick_precision("auto", device) == "fp32"
    torch.amp.GradScaler(device.type, enabled=False)
    with runtime.autocast(device, "fp32"):
        pass
