"""From volumes to label maps: streaming, mirroring, several models, files that fail."""

from pathlib import Path

import numpy as np
import pytest
import torch
from toy_models import SCHEMA, toy_model, toy_volume

from autoseg.domain.dataset import Case, LabelClass, LabelSchema
from autoseg.errors import ConfigError, DatasetError, DeviceMemoryError, ModelError
from autoseg.inference.cases import predict_cases
from autoseg.inference.columns import make_columns
from autoseg.inference.export import labels_from_stream
from autoseg.inference.interleaved import interleaved
from autoseg.inference.ladder import AtATime
from autoseg.inference.outcome import PredictionOutcome
from autoseg.inference.predictor import Predictor
from autoseg.inference.sliding_window import make_grid
from autoseg.inference.tta import Mirrors, mirror_combinations, mirrored
from autoseg.io.images import read_image, write_image
from autoseg.preprocessing.resample import resample_image
from autoseg.preprocessing.transform import invert


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("spacing", [(2.0, 1.5, 1.0), (9.0, 1.5, 1.0), (3.0, 1.0, 1.3), (1.0, 0.7, 0.8)])
def test_streaming_equals_resampling_all_logits_at_once(
    dims: int, spacing: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoseg.inference.export._CHUNK_VOXELS", 600)
    model = toy_model(dims=dims, spacing=spacing)
    predictor = Predictor([model], device="cpu", precision="fp32")
    prepared = predictor.prepare(toy_volume())
    with torch.inference_mode():
        axis, stream = predictor.logits(prepared)
        slabs = [logits.clone() for _, _, logits in stream]
    trail, plan = prepared.trail, predictor.settings.preprocess
    logits = torch.cat(slabs, dim=axis + 1).numpy()
    assert logits.shape == (3, *trail.resampled_shape)
    whole = resample_image(
        logits, trail.crop_shape, trail.planned_spacing_mm, trail.source_spacing_mm, order=plan.logits_order
    )
    expected = invert(SCHEMA.decode_table()[whole.argmax(axis=0)], trail)
    result = predictor.segment(prepared)
    assert result.dtype == np.uint16
    assert set(np.unique(result)) <= {0, 7, 300}
    assert len(np.unique(result)) > 1
    assert np.mean(result != expected) < 1e-3  # float32 sums in another order may break a tie


def test_labels_land_on_the_voxels_they_belong_to() -> None:
    """Logits that copy a marked corner of the prepared image come out at that corner of the file."""
    predictor = Predictor([toy_model(spacing=(3.0, 1.0, 1.3))], device="cpu", precision="fp32")
    volume = toy_volume()
    prepared = predictor.prepare(volume)
    marked = np.zeros((3, *prepared.image.shape[1:]), np.float32)
    marked[0] = 0.5
    marked[2, :, :, -3:] = 1.0
    plan = predictor.settings.preprocess
    result = labels_from_stream(iter([(0, 7, torch.from_numpy(marked))]), 0, prepared.trail, plan, SCHEMA)
    # Network axis 2 is canonical x, which runs against the file's first axis; the crop leaves the border out.
    expected = np.zeros(volume.geometry.shape, np.uint16)
    expected[1:4, 1:-1, 1:-1] = 300
    assert np.array_equal(result, expected)


def test_full_mirroring_makes_predictions_equivariant_to_flips() -> None:
    predictor = Predictor([toy_model(seed=3)], device="cpu", precision="fp32", tta="full")
    image = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for axis in range(3):
            flipped = predictor._forward(image.flip(axis + 2)).flip(axis + 2)
            torch.testing.assert_close(flipped, predictor._forward(image), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
def test_interleaved_mirroring_of_a_single_tile_is_the_mean_of_four_passes(dims: int) -> None:
    volume = toy_volume((7, 8, 8) if dims == 3 else (7, 8, 1), (1.0, 1.5, 2.0))
    found = {}
    for tta in ("none", "interleaved", "full"):
        predictor = Predictor([toy_model(seed=3, dims=dims)], device="cpu", precision="fp32", tta=tta)  # type: ignore[arg-type]
        with torch.inference_mode():
            prepared = predictor.prepare(volume)
            _, stream = predictor.logits(prepared)
            found[tta] = torch.cat([logits.clone().flatten() for _, _, logits in stream])
        assert predictor.num_passes == {"none": 1, "interleaved": 4, "full": 2**dims}[tta]
        # As it was expected when the engine was to be chosen.
        assert predictor._num_passes(predictor._grid(prepared)) == predictor.num_passes
    assert not torch.allclose(found["none"], found["interleaved"], atol=1e-3)
    # In 2D four combinations are all there are.
    assert torch.allclose(found["interleaved"], found["full"], atol=1e-5) == (dims == 2)


@pytest.mark.parametrize("tta", ["none", "interleaved", "full"])
def test_skipping_empty_tiles_changes_no_label(tta: str) -> None:
    volume = toy_volume((60, 20, 20), (1.0, 1.5, 2.0))
    volume.array[:, 12:-12] = 0  # air between two bodies
    found, passes = [], []
    for skip_empty in (False, True):
        predictor = Predictor(
            [toy_model(seed=1)],
            device="cpu",
            precision="fp32",
            tta=tta,  # type: ignore[arg-type]
            tile_batch=3,
            skip_empty=skip_empty,
        )
        found.append(predictor(volume))
        passes.append(predictor.num_passes)
    assert len(np.unique(found[0])) > 1
    assert np.array_equal(found[0], found[1])
    assert passes[1] < 0.8 * passes[0]


def test_mirroring_averages_every_combination_once() -> None:
    assert mirror_combinations((0, 2)) == ((), (0,), (2,), (0, 2))
    assert len(mirror_combinations((0, 1, 2))) == 8
    seen: list[torch.Tensor] = []

    def forward(tiles: torch.Tensor) -> torch.Tensor:
        seen.append(tiles)
        return tiles * len(seen)

    tiles = torch.arange(8.0).reshape(1, 1, 2, 2, 2)
    result = mirrored(forward, (0, 2))(tiles)
    assert len({tuple(item.flatten().tolist()) for item in seen}) == 4
    torch.testing.assert_close(result, tiles * 2.5)
    assert mirrored(forward, ()) is forward


@pytest.mark.parametrize(
    ("most", "fits", "passes"),
    [(7, 8, [6, 6, 4]), (8, 4, [8, 4, 4, 4, 4]), (8, 2, [8, 4, *[2] * 8]), (1, 8, [2] * 8)],
)
def test_mirror_images_of_few_tiles_go_through_the_network_together(most: int, fits: int, passes: list[int]) -> None:
    """And half of what was too much once memory ran out."""
    tiles = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    seen: list[int] = []

    def forward(some: torch.Tensor) -> torch.Tensor:
        seen.append(len(some))
        if len(some) > fits:
            raise MemoryError
        return some.cumsum(2) + some.cumsum(4) * 2

    found = mirrored(forward, (0, 1, 2), at_a_time=AtATime(most))(tiles)
    assert seen == passes
    assert torch.equal(found, mirrored(forward, (0, 1, 2))(tiles))


def test_further_mirror_images_of_a_tile_go_through_the_network_together() -> None:
    grid = make_grid((4, 4, 4), (4, 4, 4), 0.5)
    tiles = torch.randn(1, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    seen: list[int] = []

    def forward(some: torch.Tensor) -> torch.Tensor:
        seen.append(len(some))
        return some.cumsum(2) + some.cumsum(4) * 2

    mirrors = Mirrors((0, 1, 2))
    (found,) = interleaved(forward, mirrors, grid, is_regions=True, at_a_time=AtATime(2))(tiles, [(0, 0, 0)])
    assert seen == [1, 2, 1]
    (expected,) = interleaved(forward, mirrors, grid, is_regions=True)(tiles, [(0, 0, 0)])
    assert torch.equal(found, expected)


def test_models_are_averaged_before_the_winner_is_taken() -> None:
    models = [toy_model(seed=seed) for seed in (0, 1)]
    volume = toy_volume()
    streams = []
    for members in (models, models[:1], models[1:]):
        predictor = Predictor(members, device="cpu", precision="fp32")
        with torch.inference_mode():
            _, stream = predictor.logits(predictor.prepare(volume))
            streams.append(torch.cat([logits.clone().flatten() for _, _, logits in stream]))
    torch.testing.assert_close(streams[0], (streams[1] + streams[2]) / 2, atol=1e-5, rtol=1e-5)


def test_bf16_agrees_with_fp32() -> None:
    volume = toy_volume((20, 22, 24), (1.0, 1.5, 2.0))
    fp32, bf16 = (
        Predictor([toy_model(seed=2)], device="cpu", precision=precision)(volume) for precision in ("fp32", "bf16")
    )
    assert np.mean(fp32 == bf16) > 0.97


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 40, 2), (30, 5, 1)])
def test_images_far_from_the_patch_size_are_segmented(shape: tuple[int, int, int]) -> None:
    for dims in (2, 3):
        result = Predictor([toy_model(dims=dims)], device="cpu", precision="fp32")(toy_volume(shape))
        assert result.shape == shape


def test_models_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ModelError, match="differ in preprocessing"):
        Predictor([toy_model(), toy_model(spacing=(1.0, 1.0, 1.0))], device="cpu")
    with pytest.raises(ModelError, match="no model"):
        Predictor([], device="cpu")
    with pytest.raises(ConfigError, match="overlap"):
        Predictor([toy_model()], device="cpu", overlap=1.0)


def write_cases(folder: Path, names: tuple[str, ...]) -> list[Case]:
    folder.mkdir()
    cases = []
    for name in names:
        volume = toy_volume()
        write_image(folder / f"{name}.nii.gz", volume.array[0], volume.geometry)
        cases.append(Case(id=name, images=(str(folder / f"{name}.nii.gz"),)))
    return cases


def test_a_failing_case_does_not_stop_the_others(tmp_path: Path) -> None:
    cases = write_cases(tmp_path / "in", ("a", "b", "c", "d"))
    Path(cases[1].images[0]).write_bytes(b"not an image")
    outcome = predict_cases([toy_model()], cases, tmp_path / "out", device="cpu", precision="fp32")
    assert [path.name for path in outcome.written] == ["a.nii.gz", "c.nii.gz", "d.nii.gz"]
    assert len(outcome.failures) == 1
    assert outcome.failures[0].startswith("b: ")
    with pytest.raises(DatasetError, match="1 of 4 cases"):
        outcome.raise_failures()
    predictor = Predictor([toy_model()], device="cpu", precision="fp32", tta="interleaved")
    expected = predictor(read_image(cases[0].images[0]))
    written = read_image(outcome.written[0])
    assert np.array_equal(written.array[0], expected)
    np.testing.assert_array_equal(written.geometry.affine, read_image(cases[0].images[0]).geometry.affine)


TOO_MANY_BYTES = 2**60


def exhaust(*_: object, **__: object) -> None:
    torch.empty(TOO_MANY_BYTES, dtype=torch.uint8)


def test_too_little_memory_of_the_cpu_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch says it by a plain RuntimeError, which stopped the prediction as if it were a bug."""
    cases = write_cases(tmp_path / "in", ("a", "b"))
    predictor = Predictor([toy_model()], device="cpu", precision="fp32")
    monkeypatch.setattr("autoseg.inference.predictor.labels_from_stream", exhaust)
    with pytest.raises(DeviceMemoryError, match=r"cpu ran out of memory with 32 tiles .*: can't allocate memory"):
        predictor(toy_volume())
    outcome = predict_cases([toy_model()], cases, tmp_path / "out", device="cpu", precision="fp32")
    assert [failure[:3] for failure in outcome.failures] == ["a: ", "b: "]
    with pytest.raises(DeviceMemoryError, match="2 of 2 cases") as caught:
        outcome.raise_failures()
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("step", ["segmenter.read_case", "predictor.apply", "cases.write_labels"])
def test_memory_that_runs_out_beside_the_network_is_counted_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    cases = write_cases(tmp_path / "in", ("a",))
    monkeypatch.setattr(f"autoseg.inference.{step}", exhaust)
    outcome = predict_cases([toy_model()], cases, tmp_path / "out", device="cpu", precision="fp32")
    assert (outcome.written, len(outcome.failures), outcome.num_short_of_memory) == ((), 1, 1)


def test_networks_that_do_not_fit_are_an_error_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoseg.inference.resident.restore", exhaust)
    with pytest.raises(DeviceMemoryError, match="cpu has too little memory for the networks"):
        Predictor([toy_model()], device="cpu", precision="fp32")


def test_one_case_that_fails_otherwise_makes_it_an_error_of_data() -> None:
    PredictionOutcome((Path("a"),), ()).raise_failures()
    with pytest.raises(DatasetError, match="2 of 2"):
        PredictionOutcome((), ("a: memory", "b: broken"), num_short_of_memory=1).raise_failures()


def test_outputs_never_overwrite_inputs(tmp_path: Path) -> None:
    cases = write_cases(tmp_path / "in", ("a",))
    with pytest.raises(ConfigError, match="overwrite"):
        predict_cases([toy_model()], cases, tmp_path / "in", device="cpu")


CROSSING = LabelSchema(classes=(LabelClass(name="a", values=(1, 3)), LabelClass(name="b", values=(300, 3))))


@pytest.mark.parametrize("spacing", [(2.0, 1.5, 1.0), (9.0, 1.5, 1.0)])
def test_regions_are_streamed_slab_by_slab(spacing: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """As thresholding the logits of the whole image, and writing each combination with its value."""
    monkeypatch.setattr("autoseg.inference.export._CHUNK_VOXELS", 600)
    predictor = Predictor([toy_model(spacing=spacing)], device="cpu", precision="fp32")
    prepared = predictor.prepare(toy_volume())
    trail, plan = prepared.trail, predictor.settings.preprocess
    logits = torch.randn(2, *trail.resampled_shape, generator=torch.Generator().manual_seed(0))
    slabs = ((start, start + 1, logits[:, start : start + 1]) for start in range(logits.shape[1]))
    result = labels_from_stream(slabs, 0, trail, plan, CROSSING)
    whole = resample_image(
        logits.numpy(), trail.crop_shape, trail.planned_spacing_mm, trail.source_spacing_mm, order=plan.logits_order
    )
    values = np.array([[0, 300], [1, 3]], np.uint16)[(whole[0] > 0).astype(int), (whole[1] > 0).astype(int)]
    assert result.dtype == np.uint16
    assert set(np.unique(result)) == {0, 1, 3, 300}
    assert np.mean(result != invert(values, trail)) < 1e-3  # float32 sums in another order may cross 0

    # The same in columns, one after the other into one map.
    grid = make_grid(logits.shape[1:], (8, 8, 8), 0.5)
    columns = make_columns(grid, trail.change_back(plan), 2, 4, 3_000)
    assert len(columns) > 1
    pieced = None
    for column in columns:
        rows = logits[(slice(None), *column.rows)]
        slabs = iter([(0, rows.shape[grid.stream_axis + 1], rows)])
        pieced = labels_from_stream(slabs, grid.stream_axis, trail, plan, CROSSING, column=column, into=pieced)
    assert pieced is not None
    assert np.mean(pieced != result) < 1e-3
