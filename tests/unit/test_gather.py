"""Probabilities, entropy and intervals: from the logits that decide the labels, on the image's own grid."""

from math import log
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from toy_models import SCHEMA, toy_model, toy_volume

from autoseg.domain.dataset import LabelClass, LabelSchema
from autoseg.domain.geometry import Geometry
from autoseg.domain.sides import Sides
from autoseg.inference.export import labels_from_stream
from autoseg.inference.gather import Gathering, Wanted, entropy
from autoseg.inference.predictor import Predictor
from autoseg.inference.tta import mirrors_of
from autoseg.inference.votes import CERTAIN, Votes
from autoseg.io.fractions import LARGEST_ERROR, LEVELS, write_fractions
from autoseg.io.images import read_image
from autoseg.io.label_names import read_comment
from autoseg.io.scratch import Scratch
from autoseg.preprocessing.resample import resample_image
from autoseg.preprocessing.transform import Prepared, invert

ALL = Wanted(probabilities=True, uncertainty=True)


def gathered(
    predictor: Predictor, prepared: Prepared, folder: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Gathering]:
    """Labels, levels (K, I, J, K) and entropy (I, J, K) of an image, and the gathering."""
    gathering = Gathering(prepared.trail.geometry.shape, predictor.labels, ALL, folder)
    labels = predictor.segment(prepared, gathering=gathering)
    assert gathering.levels is not None
    assert gathering.entropy is not None
    return labels, gathering.levels.array.transpose(0, 3, 2, 1), gathering.entropy.T, gathering


def resampled_logits(predictor: Predictor, prepared: Prepared) -> np.ndarray:
    """All logits at once, on the crop's own grid."""
    with torch.inference_mode():
        axis, stream = predictor.logits(prepared)
        logits = torch.cat([slab.clone() for _, _, slab in stream], dim=axis + 1).numpy()
    trail, plan = prepared.trail, predictor.settings.preprocess
    return resample_image(
        logits, trail.crop_shape, trail.planned_spacing_mm, trail.source_spacing_mm, order=plan.logits_order
    )


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("spacing", [(2.0, 1.5, 1.0), (9.0, 1.5, 1.0), (1.0, 0.7, 0.8)])
def test_probabilities_are_the_softmax_of_the_logits_that_decide(
    dims: int, spacing: tuple[float, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoseg.inference.export._CHUNK_VOXELS", 600)
    monkeypatch.setattr("autoseg.io.scratch.MOST_IN_MEMORY_BYTES", 0 if dims == 2 else 2**26)
    monkeypatch.setattr("autoseg.io.scratch._RELEASED_BYTES", 500)
    predictor = Predictor([toy_model(dims=dims, spacing=spacing)], device="cpu", precision="fp32")
    prepared = predictor.prepare(toy_volume())
    labels, levels, doubt, gathering = gathered(predictor, prepared, tmp_path)
    assert gathering.levels is not None
    assert gathering.levels.is_in_file == (dims == 2)
    assert np.array_equal(labels, predictor.segment(prepared))

    shares = torch.softmax(torch.from_numpy(resampled_logits(predictor, prepared)), 0)
    # What was cropped away is background for certain.
    expected = np.stack([invert(item.numpy(), prepared.trail, float(index == 0)) for index, item in enumerate(shares)])
    assert np.abs(levels / LEVELS - expected).max() <= LARGEST_ERROR + 1e-5
    of_shares = -(shares * shares.log()).sum(0) / log(3)
    assert np.abs(doubt / LEVELS - invert(of_shares.numpy(), prepared.trail)).max() <= LARGEST_ERROR + 1e-5
    # The class of the label map has the highest level wherever there is one such.
    ordered = np.sort(levels.astype(int), axis=0)
    is_clear = ordered[-1] - ordered[-2] >= 1
    assert is_clear.mean() > 0.9
    assert np.array_equal(SCHEMA.decode_table()[levels.argmax(axis=0)][is_clear], labels[is_clear])
    sums = levels.astype(int).sum(axis=0)
    assert np.abs(sums - LEVELS).max() <= 1  # three numbers, each rounded by at most one half


def test_columns_give_what_the_whole_gives(tmp_path: Path) -> None:
    volume = toy_volume((30, 24, 26), (1.0, 1.5, 2.0))
    found = []
    for most in (None, 20_000):
        predictor = Predictor([toy_model()], device="cpu", precision="fp32", most_sums_bytes=most)
        labels, levels, doubt, gathering = gathered(predictor, predictor.prepare(volume), tmp_path)
        found.append((labels, levels.astype(int), doubt.astype(int), gathering.voxel_counts(), predictor.num_passes))
    assert found[1][4] > found[0][4]  # tiles that two columns share are predicted twice
    assert np.abs(found[0][1] - found[1][1]).max() <= 1
    assert np.abs(found[0][2] - found[1][2]).max() <= 1
    for one, other in zip(found[0][3], found[1][3], strict=True):
        assert one.expected == pytest.approx(other.expected, rel=1e-4)
        assert abs(one.low - other.low) <= 2
        assert abs(one.high - other.high) <= 2


def test_probabilities_of_regions_are_their_sigmoids(tmp_path: Path) -> None:
    crossing = LabelSchema(classes=(LabelClass(name="a", values=(1, 3)), LabelClass(name="b", values=(300, 3))))
    predictor = Predictor([toy_model(spacing=(2.0, 1.5, 1.0))], device="cpu", precision="fp32")
    prepared = predictor.prepare(toy_volume())
    trail, plan = prepared.trail, predictor.settings.preprocess
    logits = torch.randn(2, *trail.resampled_shape, generator=torch.Generator().manual_seed(0))
    gathering = Gathering(trail.geometry.shape, crossing, ALL, tmp_path)
    slabs = ((start, start + 1, logits[:, start : start + 1]) for start in range(logits.shape[1]))
    labels = labels_from_stream(slabs, 0, trail, plan, crossing, collector=gathering.of_stream(trail))
    whole = resample_image(
        logits.numpy(), trail.crop_shape, trail.planned_spacing_mm, trail.source_spacing_mm, order=plan.logits_order
    )
    shares = 1 / (1 + np.exp(-whole.astype(np.float64)))
    assert gathering.levels is not None
    assert gathering.entropy is not None
    levels = gathering.levels.array.transpose(0, 3, 2, 1)
    for index, item in enumerate(shares):
        assert np.abs(levels[index] / LEVELS - invert(item, trail)).max() <= LARGEST_ERROR + 1e-5
    # 127.5 is one half.
    is_in_a = np.isin(labels, (1, 3))
    assert np.array_equal(levels[0][is_in_a] >= 127, np.ones(is_in_a.sum(), bool))
    of_shares = -(shares * np.log2(shares) + (1 - shares) * np.log2(1 - shares)).sum(0) / 2
    assert np.abs(gathering.entropy.T / LEVELS - invert(of_shares, trail)).max() <= LARGEST_ERROR + 1e-5
    counts = gathering.voxel_counts()
    assert [item.high for item in counts] == [int((item > 0.05).sum()) for item in shares]
    assert [item.low for item in counts] == [int((item > 0.95).sum()) for item in shares]
    assert counts[0].expected == pytest.approx(shares[0].sum(), rel=1e-5)


def mean_of_members(seeds: tuple[int, ...], flips: list[tuple[int, ...]], image: torch.Tensor) -> torch.Tensor:
    """Softmax of every network and mirror image of one tile, averaged, by hand."""
    total = torch.zeros(3, *image.shape[1:])
    for seed in seeds:
        network = Predictor([toy_model(seed)], device="cpu", precision="fp32")._forward
        for flip in flips:
            axes = [axis + 2 for axis in flip]
            logits = network(image[None].flip(axes)).flip(axes)[0]
            total += torch.softmax(logits, 0)
    return total / (len(seeds) * len(flips))


@pytest.mark.parametrize(("seeds", "tta"), [((0, 1), "none"), ((3,), "full"), ((0, 1), "full"), ((3,), "interleaved")])
def test_uncertainty_is_the_entropy_of_the_mean_probability(seeds: tuple[int, ...], tta: str, tmp_path: Path) -> None:
    # One tile that is not resampled; of one tile, interleaved mirroring is the mean of four ways.
    volume = toy_volume((10, 10, 10), (1.0, 1.5, 2.0))
    models = [toy_model(seed) for seed in seeds]
    options = {"device": "cpu", "precision": "fp32", "tta": tta}
    plain = Predictor(models, **options)  # type: ignore[arg-type]
    predictor = Predictor(models, **options, uncertainty=True)  # type: ignore[arg-type]
    assert predictor.has_means
    prepared = predictor.prepare(volume)
    labels, levels, doubt, _ = gathered(predictor, prepared, tmp_path)
    # Asking for it changes neither labels nor probabilities.
    assert np.array_equal(labels, plain.segment(prepared))
    assert np.array_equal(levels, gathered(plain, prepared, tmp_path)[1])
    flips = {
        "none": [()],
        "full": [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)],
        "interleaved": [(), (0, 1), (0, 2), (1, 2)],
    }[tta]
    with torch.inference_mode():
        mean = mean_of_members(seeds, flips, torch.from_numpy(prepared.image))
    expected = invert((-(mean * mean.log()).sum(0) / log(3)).numpy(), prepared.trail)
    assert np.abs(doubt / LEVELS - expected).max() <= LARGEST_ERROR + 1e-4
    # Members that contradict each other are less sure together than the mean of their logits says.
    of_logits = entropy(torch.from_numpy(levels / LEVELS), is_regions=False).numpy()
    assert (doubt / LEVELS).mean() > of_logits.mean()


def test_16_bit_changes_probabilities_little(tmp_path: Path) -> None:
    volume = toy_volume((20, 22, 24), (1.0, 1.5, 2.0))
    found = []
    for precision in ("fp32", "bf16"):
        models = [toy_model(0), toy_model(1)]
        predictor = Predictor(models, device="cpu", precision=precision, uncertainty=True, tta="interleaved")
        found.append(gathered(predictor, predictor.prepare(volume), tmp_path))
    for number in (1, 2):
        off = np.abs(found[0][number].astype(int) - found[1][number].astype(int))
        assert 0 < off.max() <= 0.05 * LEVELS


def test_one_model_without_mirroring_needs_no_further_outputs() -> None:
    assert not Predictor([toy_model()], device="cpu", uncertainty=True).has_means
    assert Predictor([toy_model()], device="cpu", uncertainty=True, tta="full").has_means


def test_a_temperature_divides_logits_and_leaves_labels(tmp_path: Path) -> None:
    found = {}
    for temperature in (1.0, 4.0, (1.5, 4.0, 0.5)):
        predictor = Predictor([toy_model()], device="cpu", precision="fp32", temperature=temperature)
        prepared = predictor.prepare(toy_volume())
        found[temperature] = gathered(predictor, prepared, tmp_path)
    logits = resampled_logits(predictor, prepared)
    for temperature, divisor in ((4.0, 4.0), ((1.5, 4.0, 0.5), np.array([1.5, 4.0, 0.5])[logits.argmax(0)])):
        assert np.array_equal(found[1.0][0], found[temperature][0])
        shares = torch.softmax(torch.from_numpy(logits / divisor), 0)
        expected = invert(shares[1].numpy(), prepared.trail)
        assert np.abs(found[temperature][1][1] / LEVELS - expected).max() <= LARGEST_ERROR + 1e-5


def test_mirrored_sides_change_places_in_probabilities_too() -> None:
    settings = toy_model().card.settings
    sides = Sides(axis=2, mirror_pairs="swap", outputs=(0, 2, 1), labels=(0, 2, 1))
    mirrors = mirrors_of(settings.model_copy(update={"sides": sides}), copies=2)
    logits = torch.arange(6.0).reshape(1, 6, 1, 1, 1)
    assert mirrors.back(logits, (2,)).flatten().tolist() == [0, 2, 1, 3, 5, 4]


def test_an_interval_counts_voxels_that_are_right_and_wrong_together(tmp_path: Path) -> None:
    """Of probabilities .99, .9, .5, .1 and .01: one voxel for certain, four at most, the median two or three."""
    shares = np.array([0.99, 0.9, 0.5, 0.1, 0.01], np.float32)
    gathering = Gathering((5, 1, 1), LabelSchema(classes=(LabelClass(name="a", values=(1,)),)), ALL, tmp_path)
    gathering.take(slice(0, 1), torch.from_numpy(np.stack([1 - shares, shares])[:, None, None]))
    (counts,) = gathering.voxel_counts()
    assert (counts.low, counts.high) == (1, 4)
    assert counts.expected == pytest.approx(2.5)
    # That is what it means: one draw for all voxels, each of which is in the class where its probability is higher.
    draws = np.random.default_rng(0).random(20_000)
    volumes = (shares[:, None] > draws).sum(axis=0)
    assert np.quantile(volumes, 0.05) >= counts.low
    assert np.quantile(volumes, 0.95) <= counts.high
    assert volumes.mean() == pytest.approx(counts.expected, abs=0.05)


def test_entropy_goes_from_sure_to_anything() -> None:
    sure = torch.tensor([[1.0], [0.0], [0.0]])
    assert entropy(sure, is_regions=False).item() == 0
    assert entropy(torch.full((3, 1), 1 / 3), is_regions=False).item() == pytest.approx(1)
    assert entropy(torch.tensor([[0.5], [1.0]]), is_regions=True).item() == pytest.approx(0.5)


def test_an_ensemble_of_configurations_gives_what_it_votes_with(tmp_path: Path) -> None:
    with (tmp_path / "votes").open("w+b") as file:
        votes = Votes(SCHEMA, (2, 1, 1), file)
    votes._votes[:, 0, 0, :] = np.array([[0.2, 0.7], [0.5, 0.3]]) * CERTAIN
    gathering = Gathering((2, 1, 1), SCHEMA, ALL, tmp_path)
    votes.gather(gathering)
    assert gathering.levels is not None
    expected = np.array([[0.3, 0.0], [0.2, 0.7], [0.5, 0.3]])
    assert np.abs(gathering.levels.array[:, 0, 0] / LEVELS - expected).max() <= LARGEST_ERROR + 1e-4
    assert votes.labels()[:, 0, 0].tolist() == [300, 7]


@pytest.mark.parametrize("name", ["x.nii.gz", "x.nii"])
def test_fractions_come_back_from_their_file(tmp_path: Path, name: str) -> None:
    affine = np.array([[0.0, -0.9, 0.1, 10], [-0.8, 0.0, 0.0, 20], [0.0, 0.09, 2.5, -30], [0, 0, 0, 1]])
    geometry = Geometry((4, 5, 6), affine, sform_code=2, qform_code=0)
    levels = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 6)).astype(np.uint8)
    told: list[int] = []
    write_fractions(tmp_path / name, levels, geometry, "probability", {"volumes": ["a", "b", "c"]}, told.append)
    assert sum(told) == levels.size
    found = read_image(tmp_path / name, channels=3)
    assert np.abs(found.array - levels / LEVELS).max() < 1e-6
    np.testing.assert_allclose(found.geometry.affine, affine, atol=1e-6)
    assert (found.geometry.sform_code, found.geometry.qform_code) == (2, 0)
    assert read_comment(tmp_path / name) == {"volumes": ["a", "b", "c"]}
    header = nib.load(tmp_path / name).header
    assert header.get_intent() == ("estimate", (), "probability")
    assert header.get_data_dtype() == np.uint8
    write_fractions(tmp_path / "again" / name, levels, geometry, "probability", {"volumes": ["a", "b", "c"]})
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_scratch_file_holds_what_is_written_and_leaves_nothing(tmp_path: Path) -> None:
    scratch = Scratch((3, 1000), tmp_path, most_bytes=10)
    assert scratch.is_in_file
    assert not scratch.array.any()
    scratch.array[1, ::7] = 5
    scratch.written(2**27)
    assert np.flatnonzero(scratch.array).tolist() == list(range(1000, 2000, 7))
    assert list(tmp_path.iterdir()) == []
