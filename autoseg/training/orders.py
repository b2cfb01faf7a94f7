"""What the main process of a training tells the others, which decide nothing themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Literal

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor

from autoseg.compute import Processes
from autoseg.domain.values import Value
from autoseg.errors import AutosegError, LeaderStopped
from autoseg.training.records import Choices, Fold


class TakePart(Value):
    """Take part in the training of a fold.

    Attributes:
        fold: Its number, or "all".
    """

    kind: Literal["take_part"] = "take_part"
    fold: Fold


class Begin(Value):
    """Be ready to train a fold.

    Attributes:
        precision: As resolved.
        choices: How to compute.
    """

    kind: Literal["begin"] = "begin"
    precision: str
    choices: Choices


class TensorLike(Value):
    """What a tensor is like: its name, shape, type, and whether it is kept on the CPU whatever the device."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    is_on_cpu: bool

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorLike:
        """Of that tensor."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(name=name, shape=tuple(tensor.shape), dtype=dtype, is_on_cpu=tensor.device.type == "cpu")

    def empty(self, device: torch.device) -> Tensor:
        """Room for it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return torch.empty(self.shape, dtype=dtype, device="cpu" if self.is_on_cpu else device)


class State(Value):
    """Take over weights and what the optimiser remembers; the tensors follow, one after the other.

    Attributes:
        tensors: What they are like.
        loss_scale: Of the gradient scaler.
        growth: Its good steps since the last change.
    """

    kind: Literal["state"] = "state"
    tensors: tuple[TensorLike, ...]
    loss_scale: float | None
    growth: int


class Step(Value):
    """Learn from one's share of a batch.

    Attributes:
        number: Of the step.
        learning_rate: Of the step.
        momentum: Of the step; None: the plan's.
        micro_batch: Most samples of a process at a time.
    """

    kind: Literal["step"] = "step"
    number: int
    learning_rate: float
    momentum: float | None
    micro_batch: int | None


class Done(Value):
    """What the others waited for is over."""

    kind: Literal["done"] = "done"


class Leave(Value):
    """The main process ends with an error.

    Attributes:
        message: Of the error.
        exit_code: Of the process.
    """

    kind: Literal["leave"] = "leave"
    message: str
    exit_code: int


Order = TakePart | Begin | State | Step | Done

_ANY: TypeAdapter[Order | Leave] = TypeAdapter(Annotated[Order | Leave, Field(discriminator="kind")])


def tell(processes: Processes, order: Order | Leave) -> None:
    """Give an order; the other processes are waiting for one, or will be."""
    processes.broadcast(order.model_dump(mode="json"))


def hear(processes: Processes) -> Order:
    """Wait for the next order.

    Raises:
        LeaderStopped: The main process ends with an error.
        ProcessLost: The main process is gone.
    """
    order = _ANY.validate_python(processes.broadcast(), strict=False)
    if isinstance(order, Leave):
        raise LeaderStopped(order.message, order.exit_code)
    return order


def take_part(processes: Processes, fold: Fold) -> None:
    """Have the others take part in a fold."""
    if processes.world_size > 1:
        tell(processes, TakePart(fold=fold))


def begin(processes: Processes, precision: str, choices: Choices) -> None:
    """Have the others make ready for a fold."""
    if processes.world_size > 1:
        tell(processes, Begin(precision=precision, choices=choices))


def tell_state(processes: Processes, tensors: Mapping[str, Tensor], loss_scale: tuple[float | None, int]) -> None:
    """Have the others take over a state."""
    likes = tuple(TensorLike.of(name, tensor) for name, tensor in tensors.items())
    tell(processes, State(tensors=likes, loss_scale=loss_scale[0], growth=loss_scale[1]))
    for tensor in tensors.values():
        processes.copy_from_main(tensor)


def hear_state(processes: Processes, state: State, device: torch.device) -> dict[str, Tensor]:
    """The tensors that follow the order."""
    tensors = {like.name: like.empty(device) for like in state.tensors}
    for tensor in tensors.values():
        processes.copy_from_main(tensor)
    return tensors


@contextmanager
def leading(processes: Processes) -> Iterator[None]:
    """Work of the main process, which the others follow: they hear how it ended.

    Args:
        processes: With one process nothing is told.
    """
    if processes.world_size == 1:
        yield
        return
    try:
        yield
    except BaseException as problem:
        if not processes.have_parted:
            if isinstance(problem, AutosegError):
                tell(processes, Leave(message=problem.message, exit_code=problem.exit_code))
            else:
                tell(processes, Leave(message=repr(problem), exit_code=AutosegError.exit_code))
            processes.part()
        raise
    tell(processes, Done())
