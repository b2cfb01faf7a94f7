"""A process that segments cases on one device, its networks resident.

Run as ``python -m autoseg.pipeline.device_worker`` it reads an `Order` from the first line of standard input and a case
from each further line; an empty line says that no more will come. It writes a `Report` to standard output whenever a
case is done, all as JSON. It ends when all are done, or when standard input does.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Iterator

import torch

from autoseg.domain.dataset import Case
from autoseg.domain.values import Value
from autoseg.errors import AutosegError
from autoseg.inference.outcome import CaseResult
from autoseg.pipeline.predicting import Predicting
from autoseg.pipeline.worker import KeptWarnings, settle_down


class Order(Value):
    """What a process does.

    Attributes:
        task: With each case.
        device: On which.
        num_threads: Of the network, where that is the CPU.
    """

    task: Predicting
    device: str
    num_threads: int


class Refusal(Value):
    """Why a process cannot work at all.

    Attributes:
        exit_code: Of the error.
        message: Of the error, with its problems and its hint.
    """

    exit_code: int
    message: str


class Report(Value):
    """What a process has to say.

    Attributes:
        result: Of a case.
        refusal: Nothing follows.
        is_over: All cases are done; nothing follows.
        warnings: That were logged since the last report.
    """

    result: CaseResult | None = None
    refusal: Refusal | None = None
    is_over: bool = False
    warnings: tuple[str, ...] = ()


def _cases(lines: queue.SimpleQueue[str]) -> Iterator[Case]:
    while line := lines.get().strip():
        yield Case.model_validate_json(line)


def main() -> None:
    """Work until there are no more cases."""
    output, lines = settle_down()
    warnings = KeptWarnings()

    def write(report: Report) -> None:
        output.write(report.model_copy(update={"warnings": warnings.take()}).model_dump_json() + "\n")
        output.flush()

    def note(result: CaseResult) -> bool:
        write(Report(result=result))
        # Whether there is use in going on is seen by whoever sees the results of all.
        return True

    order = Order.model_validate_json(lines.get())
    torch.set_num_threads(order.num_threads)
    try:
        order.task.run(_cases(lines), order.device, note)
        write(Report(is_over=True))
    except AutosegError as error:
        write(Report(refusal=Refusal(exit_code=error.exit_code, message=str(error))))
    # Python would wait for the thread that reads standard input.
    os._exit(0)


if __name__ == "__main__":
    main()
