"""One error for everything by which torch, NumPy and Python say that memory ran out."""

import pytest
import torch

from autoseg.errors import DeviceMemoryError
from autoseg.runtime import device_memory_errors

TOO_MANY_BYTES = 2**60


def test_the_cpu_allocators_plain_runtime_error_is_an_error_of_memory() -> None:
    with pytest.raises(DeviceMemoryError) as caught, device_memory_errors("the CPU is full", "Buy memory."):
        torch.empty(TOO_MANY_BYTES, dtype=torch.uint8)
    assert caught.value.message.startswith("the CPU is full: can't allocate memory: you tried to allocate")
    assert caught.value.hint == "Buy memory."
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (MemoryError(), "full"),
        (MemoryError("Unable to allocate 5 TiB"), "full: Unable to allocate 5 TiB"),
        (torch.OutOfMemoryError("CUDA out of memory."), "full: CUDA out of memory."),
        (RuntimeError("std::bad_alloc"), "full: std::bad_alloc"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: 5"), "full: not enough memory: 5"),
    ],
)
def test_every_way_of_saying_it_becomes_one_error(problem: Exception, message: str) -> None:
    with pytest.raises(DeviceMemoryError) as caught, device_memory_errors("full", ""):
        raise problem
    assert str(caught.value) == message


@pytest.mark.parametrize("problem", [RuntimeError("shapes differ"), ValueError("memory"), KeyboardInterrupt()])
def test_other_errors_pass_untouched(problem: BaseException) -> None:
    with pytest.raises(type(problem)) as caught, device_memory_errors("full", ""):
        raise problem
    assert caught.value is problem


def test_an_error_of_memory_from_further_in_keeps_its_words() -> None:
    with (
        pytest.raises(DeviceMemoryError, match="inner"),
        device_memory_errors("outer", ""),
        device_memory_errors("inner", ""),
    ):
        raise MemoryError
