"""How much is in memory while an image is predicted: by counting tensors, not by looking at the process."""

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from live_memory import LiveMemory
from toy_models import toy_model, toy_volume

from autoseg.domain.dataset import Case
from autoseg.inference.columns import make_columns
from autoseg.inference.gather import Gathering, Wanted
from autoseg.inference.line import run_line
from autoseg.inference.outcome import Tally
from autoseg.inference.predictor import Predictor
from autoseg.inference.sliding_window import make_grid
from autoseg.runtime import NoProgress

SPACING = (2.0, 1.5, 1.0)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors for resampling are as small beside small images as real ones beside real images."""
    monkeypatch.setattr("autoseg.inference.export._CHUNK_VOXELS", 2000)


def peak_of(shape: Sequence[int], spacing: Sequence[float], folder: Path | None = None, **options: object) -> int:
    """The most bytes of tensors while a volume is segmented, its image and its label map not counted.

    With a folder, probabilities and uncertainty are gathered, too.
    """
    settings = {"device": "cpu", "precision": "fp32", "tile_batch": 1, **options}
    predictor = Predictor([toy_model(spacing=SPACING)], **settings)  # type: ignore[arg-type]
    prepared = predictor.prepare(toy_volume((shape[0], shape[1], shape[2]), tuple(spacing)))
    gathering = None
    if folder is not None:
        gathering = gathering_of(predictor, prepared.trail.geometry.shape, folder)
    live = LiveMemory()
    with live:
        predictor.segment(prepared, gathering=gathering)
    return live.peak


def gathering_of(predictor: Predictor, shape: tuple[int, int, int], folder: Path) -> Gathering:
    return Gathering(shape, predictor.labels, Wanted(probabilities=True, uncertainty=True), folder)


@pytest.mark.parametrize(("axis", "spacing"), [(0, (1.0, 1.5, 2.0)), (1, (0.8, 1.1, 3.0)), (2, (1.0, 1.5, 2.0))])
def test_memory_does_not_grow_with_the_length_whichever_axis_is_long(axis: int, spacing: tuple[float, ...]) -> None:
    peaks = []
    for length in (48, 144):
        shape = [16, 15, 14]
        shape[axis] = length
        peaks.append(peak_of(shape, spacing))
    assert peaks[1] <= 1.01 * peaks[0]


@pytest.mark.parametrize("tta", ["none", "full"])
def test_tensors_for_probabilities_do_not_grow_with_the_length(tta: str, tmp_path: Path) -> None:
    """What is kept of them is 8 bit a class and voxel, in memory or in a file; in float there are a few rows."""
    peaks = [peak_of((16, 15, length), (1.0, 1.5, 2.0), tmp_path, tta=tta, uncertainty=True) for length in (48, 144)]
    assert peaks[1] <= 1.01 * peaks[0]


def test_memory_of_sums_grows_with_the_cross_section_only_up_to_the_limit() -> None:
    limit = 40_000
    free, held = (
        [peak_of((24, side, side), (1.0, 1.5, 2.0), most_sums_bytes=most) for side in (20, 40)]
        for most in (2**40, limit)
    )
    # Four times the cross-section: the sums are what grows.
    assert free[1] > 1.5 * free[0]
    assert held[1] < 1.3 * held[0]
    assert held[1] < 0.75 * free[1]


def test_columns_are_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums of a column take what `make_columns` says they take."""
    sizes: list[int] = []
    zeros = torch.zeros

    def counted(*arguments: object, **options: object) -> torch.Tensor:
        made = zeros(*arguments, **options)  # type: ignore[arg-type]
        sizes.append(made.untyped_storage().nbytes())
        return made

    predictor = Predictor([toy_model()], device="cpu", precision="fp32", most_sums_bytes=60_000)
    prepared = predictor.prepare(toy_volume((40, 60, 30), (1.0, 1.5, 2.0)))
    monkeypatch.setattr("autoseg.inference.sums.torch.zeros", counted)
    predictor.segment(prepared)
    grid = make_grid(prepared.image.shape[1:], (8, 8, 8), 0.5)
    change = prepared.trail.change_back(predictor.settings.preprocess)
    columns = make_columns(grid, change, 3, 4, 60_000)
    assert len(columns) > 1
    assert len(sizes) >= len(columns)
    assert 0 < max(sizes) <= 60_000


class Counted:
    """A case in memory; how many there are at once."""

    alive = 0
    most = 0
    lock = threading.Lock()

    def __init__(self, case_id: str) -> None:
        self.case_id = case_id
        with Counted.lock:
            Counted.alive += 1
            Counted.most = max(Counted.most, Counted.alive)

    def __del__(self) -> None:
        with Counted.lock:
            Counted.alive -= 1


def test_at_most_three_cases_are_in_memory_however_many_there_are() -> None:
    Counted.most = 0
    cases = [Case(id=f"case_{number:02d}", images=("x.nii.gz",)) for number in range(20)]
    order: list[str] = []

    def segment(ready: Counted) -> Counted:
        order.append(ready.case_id)
        if ready.case_id == "case_07":
            raise OSError("broken")
        return ready  # the label map keeps its case company

    written: list[str] = []

    def write(case: Case, found: Counted) -> list[Path]:
        written.append(found.case_id)
        return [Path(f"{case.id}.nii.gz")]

    tally = Tally(cases, NoProgress())
    # From a generator, as a process gets them.
    run_line((case for case in cases), lambda case: Counted(case.id), segment, write, tally.add)
    outcome = tally.outcome()
    assert order == [case.id for case in cases]
    assert written == [case_id for case_id in order if case_id != "case_07"]
    assert [path.name for path in outcome.written] == [f"{case_id}.nii.gz" for case_id in written]
    assert outcome.failures == ("case_07: broken",)
    assert 1 <= Counted.most <= 3
    assert Counted.alive == 0


def test_the_map_is_the_same_in_one_column_and_in_many() -> None:
    for dims, spacing in ((3, (2.0, 1.5, 1.0)), (3, (9.0, 1.5, 1.0)), (2, (9.0, 1.5, 1.0))):
        volume = toy_volume((26, 30, 24), (1.1, 1.0, 2.5))
        models = [toy_model(seed=seed, dims=dims, spacing=spacing) for seed in (1, 2)]
        found = [
            Predictor(models, device="cpu", precision="fp32", most_sums_bytes=most, tta=tta)(volume)  # type: ignore[arg-type]
            for tta in ("none", "interleaved")
            for most in (None, 15_000)
        ]
        for whole, divided in (found[:2], found[2:]):
            assert len(np.unique(whole)) > 1
            # Products of matrices of other sizes may round otherwise, which tells where two classes are all but equal.
            assert np.mean(whole != divided) < 1e-4
