"""Where a training computes: its device, its precision, and the processes that share its work.

Several processes are started by torchrun, or by anything that sets the same variables: RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT. The first one leads; what is decided is decided there and told to the others.

Source: docs/decisions/0024.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

from autoseg import runtime
from autoseg.errors import ConfigError, ProcessLost

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import Store

WORK_TIMEOUT = timedelta(minutes=10)
"""Longest wait of one process for the work of another: a slow disk, a compiler, a smaller micro-batch."""

WAIT_TIMEOUT = timedelta(days=30)
"""Longest wait for the first process to say what comes next, which may preprocess or validate for hours.

That it has died is seen at once, by its closed connection, and needs no timeout.
"""

_MEET_INTERVAL_S = 0.05
"""Between two looks of the first process at who has come."""

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LOCAL_RANK = "LOCAL_RANK"


class Processes(Protocol):
    """The processes that share a training. All of them make the same calls in the same order."""

    @property
    def rank(self) -> int:
        """Number of this one, from 0."""

    @property
    def world_size(self) -> int:
        """How many there are."""

    @property
    def is_main(self) -> bool:
        """Whether this is the one that decides, writes files and tells how far it is."""

    @property
    def have_parted(self) -> bool:
        """Whether they are past working together: one is lost, or they agreed to end with an error."""

    def part(self) -> None:
        """They all end now, each with its own error: nobody waits for a word any more."""

    def broadcast(self, value: Any = None) -> Any:
        """What the main process gave, anything that JSON can hold; the others may have to wait for it very long."""

    def copy_from_main(self, tensor: torch.Tensor) -> None:
        """Overwrite the tensor with the main process's, of the same shape and type."""

    def add_up(self, tensor: torch.Tensor) -> None:
        """Overwrite the tensor with the sum over all processes, which is the same bits in each of them."""

    def sums(self, *numbers: float) -> tuple[float, ...]:
        """A few numbers, each added up over all processes."""


@dataclass(frozen=True, slots=True)
class OneProcess:
    """A training with a process to itself: nothing to add up, nobody to tell."""

    rank: int = 0
    world_size: int = 1
    is_main: bool = True
    have_parted: bool = False

    def part(self) -> None:
        """Nothing to do."""

    def broadcast(self, value: Any = None) -> Any:
        """The value."""
        return value

    def copy_from_main(self, tensor: torch.Tensor) -> None:
        """Nothing to do."""

    def add_up(self, tensor: torch.Tensor) -> None:
        """Nothing to do."""

    def sums(self, *numbers: float) -> tuple[float, ...]:
        """The numbers."""
        return numbers


ALONE = OneProcess()


@dataclass(slots=True, eq=False)
class ProcessGroup:
    """Processes joined by torch.distributed: gloo between CPUs, NCCL between GPUs.

    Attributes:
        rank: Number of this one, from 0.
        world_size: How many there are.
        control: Another gloo group, for numbers and decisions, in which one may wait long.
        have_parted: See `Processes`.
    """

    rank: int
    world_size: int
    control: dist.ProcessGroup
    have_parted: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    def part(self) -> None:
        """They all end now, each with its own error."""
        self.have_parted = True

    def broadcast(self, value: Any = None) -> Any:
        """What the main process gave.

        Raises:
            ProcessLost: It has ended.
        """
        import torch
        import torch.distributed as dist

        data = json.dumps(value).encode() if self.is_main else b""
        length = torch.tensor([len(data)])
        self._together(lambda: dist.broadcast(length, 0, group=self.control))
        held = torch.empty(int(length), dtype=torch.uint8)
        if self.is_main:
            held = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._together(lambda: dist.broadcast(held, 0, group=self.control))
        return json.loads(held.numpy().tobytes())

    def copy_from_main(self, tensor: torch.Tensor) -> None:
        """Overwrite the tensor with the main process's.

        Raises:
            ProcessLost: Another process has ended.
        """
        import torch.distributed as dist

        self._together(lambda: dist.broadcast(tensor, 0))

    def add_up(self, tensor: torch.Tensor) -> None:
        """Overwrite the tensor with the sum over all processes.

        Raises:
            ProcessLost: Another process has ended.
        """
        import torch.distributed as dist

        self._together(lambda: dist.all_reduce(tensor))

    def sums(self, *numbers: float) -> tuple[float, ...]:
        """A few numbers, each added up over all processes.

        Raises:
            ProcessLost: Another process has ended.
        """
        import torch
        import torch.distributed as dist

        held = torch.tensor(numbers, dtype=torch.float64)
        self._together(lambda: dist.all_reduce(held, group=self.control))
        return tuple(held.tolist())

    def _together(self, call: Callable[[], object]) -> None:
        with _losses("See its messages. The same command goes on from the last checkpoint."):
            try:
                call()
            except RuntimeError:
                self.part()
                raise


@contextmanager
def _losses(hint: str) -> Iterator[None]:
    """Name what torch.distributed says when it does not reach another process."""
    try:
        yield
    except RuntimeError as problem:
        # Gloo, NCCL and the store say it in different words, all of them by this kind of error: "[FILE:LINE] What
        # happened. What may be the reason."
        first_line = (str(problem).splitlines() or [""])[0].partition(". ")[0]
        words = first_line.rpartition(".cc:")[2].partition("] ")[2] or first_line
        raise ProcessLost(
            "another process of this training has ended or does not answer",
            problems=[words],
            hint=hint,
        ) from problem


def is_launched() -> bool:
    """Whether this process was started as one of several."""
    return all(os.environ.get(name) for name in _VARIABLES) and int(os.environ["WORLD_SIZE"]) > 1


def launched_rank() -> int:
    """Number of this process among those that were started together; 0 of one that is alone."""
    return int(os.environ["RANK"]) if is_launched() else 0


def own_device(name: str) -> torch.device:
    """The device of that name for this process: with several processes each takes the GPU of its own number.

    Args:
        name: As for `runtime.pick_device`.

    Raises:
        ConfigError: This machine does not have it, or has fewer GPUs than processes; several processes cannot share a
            GPU that is named, nor compute on MPS.
    """
    import torch

    device = runtime.pick_device(name)
    if not is_launched() or device.type == "cpu":
        return device
    if device.type == "mps" or device.index is not None:
        raise ConfigError(
            f"several processes cannot share the device {device}", hint="Use --device cuda or --device cpu."
        )
    local_rank = int(os.environ.get(_LOCAL_RANK, os.environ["RANK"]))
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU of its own: there are {torch.cuda.device_count()}",
            hint="Start as many processes as there are GPUs: torchrun --nproc-per-node ...",
        )
    torch.cuda.set_device(local_rank)
    return device


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """The processes that were started together, joined inside the block; one process where it was started alone.

    Args:
        device: Where gradients will be added up, as `own_device` gave it.

    Raises:
        ProcessLost: They do not find each other.
    """
    if not is_launched():
        yield ALONE
        return
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with _losses("See their messages, and whether each was started with the same address and port."):
        store, rank, world_size = next(rendezvous("env://", timeout=WORK_TIMEOUT))
        room = PrefixStore(f"autoseg/{meet(store, rank, world_size)}", store)
        dist.init_process_group(backend, store=room, rank=rank, world_size=world_size, timeout=WORK_TIMEOUT)
        control = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
    try:
        yield ProcessGroup(rank, world_size, control)
    except BaseException:
        # NCCL's groups can wait for the others while they are taken down; the end of the process closes them too.
        if device.type != "cuda":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def meet(store: Store, rank: int, world_size: int) -> int:
    """Agree on a number that no earlier start of these processes has had.

    torchrun may start processes again with the store of those that have died, where addresses of the dead still stand.
    So every process says hello with a name of its own, and the first one answers each name with the number of its
    start, until all have understood.

    Args:
        store: What all of them see.
        rank: Number of this one.
        world_size: How many there are.
    """
    if rank > 0:
        name = secrets.token_hex(8)
        store.set(f"autoseg/hello/{rank}", name)
        store.wait([f"autoseg/number/{name}"], WORK_TIMEOUT)
        number = int(store.get(f"autoseg/number/{name}"))
        store.set(f"autoseg/understood/{number}/{rank}", "")
        return number
    number = int(store.add("autoseg/starts", 1))
    others = set(range(1, world_size))
    deadline = time.monotonic() + WORK_TIMEOUT.total_seconds()
    while others:
        for other in others:
            if store.check([f"autoseg/hello/{other}"]):
                # Of a dead process, perhaps: then nobody reads the answer.
                name = store.get(f"autoseg/hello/{other}").decode()
                store.set(f"autoseg/number/{name}", str(number))
        others = {other for other in others if not store.check([f"autoseg/understood/{number}/{other}"])}
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {sorted(others)} did not come")
        time.sleep(_MEET_INTERVAL_S)
    return number


@dataclass(frozen=True, slots=True, eq=False)
class Compute:
    """Where and how a network computes.

    Attributes:
        device: Of this process.
        precision: "fp32", "bf16" or "fp16".
        processes: Those that share the work.
    """

    device: torch.device
    precision: str
    processes: Processes = ALONE

    def autocast(self) -> AbstractContextManager[object]:
        """The precision, for the block."""
        return runtime.autocast(self.device, self.precision)

    @property
    def sum_dtype(self) -> torch.dtype:
        """The type in which sums over very many voxels are exact, or as exact as the device can."""
        import torch

        return torch.float32 if self.device.type == "mps" else torch.float64

    def free_cache(self) -> None:
        """Give back memory that torch keeps for later; what is left of a step that did not fit lies in pieces."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()
