"""One step back after the other when memory runs out; nothing that is finished is done again."""

import logging

import pytest
import torch
from torch import Tensor

from autoseg.domain.dataset import LabelClass, LabelSchema
from autoseg.inference.export import Finished, _decide, _finished
from autoseg.inference.ladder import Ladder, if_it_fits
from autoseg.inference.sliding_window import make_grid, stream_logits, stream_slabs
from autoseg.inference.sums import Sums
from autoseg.preprocessing.resample import SlabResampler, grid_change

SHAPE = (8, 8, 20)
GRID = make_grid(SHAPE, (4, 4, 4), 0.5)
IMAGE = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
THREE_CLASSES = LabelSchema(classes=(LabelClass(name="a", values=(1,)), LabelClass(name="b", values=(2,))))
DONE = {"sigma_fraction": 0.125}


class Device:
    """A device with room for so many tiles at a time, less while sums are in its memory."""

    def __init__(self, room: int, room_beside_sums: int | None = None) -> None:
        self.room = room
        self.room_beside_sums = room if room_beside_sums is None else room_beside_sums
        self.ladder: Ladder | None = None
        self.asked: list[int] = []
        self.finished: list[tuple[int, int, int]] = []

    def __call__(self, tiles: Tensor, starts: list[tuple[int, int, int]]) -> list[Tensor]:
        self.asked.append(len(tiles))
        is_relieved = self.ladder is not None and self.ladder.sums_on_host
        if len(tiles) > (self.room if is_relieved else self.room_beside_sums):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot")
        self.finished += starts
        return list(tiles * 2)


def predicted(ladder: Ladder) -> Tensor:
    slabs = stream_slabs(ladder, IMAGE, GRID, **DONE)
    return torch.cat([logits.clone() for _, _, logits in slabs], dim=GRID.stream_axis + 1)


EXPECTED = predicted(Ladder(lambda tiles, _: list(tiles * 2), 1))


@pytest.mark.parametrize(("room", "asked_first", "batch"), [(8, [8, 8], 8), (3, [8, 4, 2], 2), (1, [8, 4, 2, 1, 1], 1)])
def test_the_tile_batch_is_halved_until_it_fits(
    room: int, asked_first: list[int], batch: int, caplog: pytest.LogCaptureFixture
) -> None:
    device = Device(room)
    ladder = Ladder(device, 8)
    with caplog.at_level(logging.WARNING, "autoseg"):
        assert torch.equal(predicted(ladder), EXPECTED)
    assert device.asked[: len(asked_first)] == asked_first
    assert ladder.tile_batch == batch
    assert not ladder.sums_on_host
    assert sorted(device.finished) == sorted(GRID.tiles())
    assert len(caplog.records) == len({size for size in asked_first if size > room})


def test_memory_that_runs_out_in_the_middle_costs_no_tile_that_is_finished() -> None:
    device = Device(4)
    ladder = Ladder(device, 4)
    slabs = []
    for _, _, logits in stream_slabs(ladder, IMAGE, GRID, **DONE):
        slabs.append(logits.clone())
        device.room_beside_sums = 1  # another program took the rest
    assert torch.equal(torch.cat(slabs, dim=GRID.stream_axis + 1), EXPECTED)
    assert ladder.tile_batch == 1
    assert len(device.finished) == len(set(device.finished)) == GRID.num_tiles


def test_then_the_sums_leave_the_device_and_then_the_network_does() -> None:
    on_cpu = Device(1)

    # One tile fits when the sums are gone.
    device = Device(1, room_beside_sums=0)
    device.ladder = ladder = Ladder(device, 2, on_cpu=lambda: on_cpu)
    assert torch.equal(predicted(ladder), EXPECTED)
    assert ladder.sums_on_host
    assert not on_cpu.asked
    assert device.asked[:4] == [2, 1, 1, 1]
    assert len(device.finished) == GRID.num_tiles

    # It does not even then.
    device = Device(0)
    device.ladder = ladder = Ladder(device, 2, on_cpu=lambda: on_cpu)
    assert torch.equal(predicted(ladder), EXPECTED)
    assert device.asked == [2, 1, 1]
    assert len(on_cpu.finished) == GRID.num_tiles


def test_tiles_finished_on_the_device_are_kept_when_the_rest_goes_to_the_cpu() -> None:
    device, on_cpu = Device(1), Device(1)
    ladder = Ladder(device, 1, on_cpu=lambda: on_cpu)
    slabs = []
    for _, _, logits in stream_slabs(ladder, IMAGE, GRID, **DONE):
        slabs.append(logits.clone())
        device.room = device.room_beside_sums = 0
    assert torch.equal(torch.cat(slabs, dim=GRID.stream_axis + 1), EXPECTED)
    assert device.finished
    assert on_cpu.finished
    assert sorted(device.finished + on_cpu.finished) == sorted(GRID.tiles())


def test_when_nothing_is_left_the_error_passes() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="allocate a lot"):
        predicted(Ladder(Device(0), 4))
    with pytest.raises(torch.OutOfMemoryError):
        predicted(Ladder(Device(0), 1, on_cpu=lambda: Device(0)))


def test_other_errors_are_no_want_of_memory() -> None:
    calls = []

    def broken(tiles: Tensor) -> Tensor:
        calls.append(len(tiles))
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot"):
        list(stream_logits(broken, IMAGE, GRID, tile_batch=4))
    assert calls == [4]


def test_adding_a_tile_that_runs_out_of_memory_half_way_goes_on_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was added stays, and is not added again."""
    add_block, failing = Sums._add_block, iter([False, False, True, *[False] * 1000])

    def full(self: Sums, *arguments: object) -> Tensor:
        if next(failing):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return add_block(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("autoseg.inference.sums._BLOCK_VALUES", 16)
    monkeypatch.setattr(Sums, "_add_block", full)
    # As if the sums were not on the CPU, from where there is no other way.
    monkeypatch.setattr("autoseg.inference.sums.if_it_fits", lambda step, has_other_way=True: if_it_fits(step))
    moved: list[bool] = []
    monkeypatch.setattr(Sums, "move_to_host", lambda self: moved.append(True))
    assert torch.equal(predicted(Ladder(lambda tiles, _: list(tiles * 2), 2)), EXPECTED)
    assert moved == [True]


@pytest.mark.parametrize("failing", [{0}, {1, 3}])
def test_resampling_that_runs_out_of_memory_half_way_is_done_again_on_the_host(failing: set[int]) -> None:
    """Some classes have taken the rows by then: they must not take them twice."""
    change = grid_change((8, 6, 5), (12, 9, 4), (1.0, 1.0, 1.0), order=1)
    logits = torch.randn(3, 8, 6, 5, generator=torch.Generator().manual_seed(0))

    def winners(failing: set[int]) -> Tensor:
        resamplers = [SlabResampler(change) for _ in range(3)]
        found = []
        for number, rows in enumerate(torch.split(logits, 2, dim=1)):
            to_come = [number in failing]

            def decide(rows: Tensor, to_come: list[bool] = to_come) -> Finished:
                if to_come and to_come.pop():
                    resamplers[0].push(rows[0])
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return _decide(resamplers, THREE_CLASSES, None, None, 0, rows)

            found.append(_finished(decide, resamplers, rows, has_other_way=True)[2])
        return torch.cat([part for part in found if part is not None])

    assert winners(set()).shape == change.new_shape
    assert torch.equal(winners(failing), winners(set()))


def test_sums_that_do_not_fit_on_the_device_are_in_the_memory_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = torch.zeros

    def full(*arguments: object, device: torch.device, **options: object) -> Tensor:
        if device.type != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return zeros(*arguments, device=device, **options)  # type: ignore[call-overload]

    sums = Sums(GRID, 0.125, GRID.box)
    monkeypatch.setattr("autoseg.inference.sums.torch.zeros", full)
    # "meta" stands for a device that this machine does not have.
    assert sums._allocated(torch.empty(3, 4, 4, 4, device="meta")).device.type == "cpu"


@pytest.mark.parametrize(
    "problem", [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_whoever_says_that_memory_ran_out_is_understood(problem: Exception) -> None:
    def step() -> None:
        raise problem

    assert if_it_fits(step) is None
    with pytest.raises(type(problem)):
        if_it_fits(step, has_other_way=False)
    assert if_it_fits(lambda: 3) == 3
