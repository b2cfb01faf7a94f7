"""Images unlike those of the training: measured alike, summarised on the card, told with the numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

from autoseg.domain.fingerprint import LOOK_LEVELS, CaseStats, ChannelLook, Fingerprint
from autoseg.domain.geometry import Geometry, Volume
from autoseg.domain.layouts import load_dataset
from autoseg.domain.outside import LIMIT, OBLIQUE_SPREAD_DEGREES, outside
from autoseg.domain.preprocess_plan import ChannelNormalization, PreprocessPlan
from autoseg.domain.trained_on import SPACING_SPREAD, TrainedOn, scaled_quantiles, summarise
from autoseg.io.model import ModelCard
from autoseg.pipeline.tasks import Measuring
from autoseg.preprocessing.measure import measure_case, measure_image, merge
from autoseg.preprocessing.normalise import normalise

ZSCORE = ChannelNormalization(scheme="zscore")
CT = ChannelNormalization(scheme="ct", mean=0, std=100, lower=-200, upper=300)


def image(
    seed: int = 0,
    shape: tuple[int, int, int] = (40, 50, 30),
    spacing: tuple[float, float, float] = (1.0, 1.0, 2.0),
    degrees: float = 0.0,
    is_2d: bool = False,
) -> Volume:
    """Noise that is skewed, a little brighter in each case, on a grid that is turned about the last axis."""
    rng = np.random.default_rng(seed)
    values = rng.gamma(2.0, 50.0 + 5 * rng.random(), (1, *shape)).astype(np.float32) + 1
    turn = np.eye(4)
    angle = np.radians(degrees)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return Volume(values, Geometry(shape, turn @ np.diag([*spacing, 1.0]), is_2d=is_2d))


def fingerprint(volumes: list[Volume]) -> Fingerprint:
    cases = []
    for number, volume in enumerate(volumes):
        labels = np.zeros(volume.geometry.shape, np.int16)
        labels[2:5, 2:5] = 1
        cases.append(measure_case(volume, labels, f"case_{number}", 2))
    return merge(cases, ["MR"], 2)


def plan(rule: ChannelNormalization = ZSCORE, orientation: str = "RAS") -> PreprocessPlan:
    return PreprocessPlan(target_spacing=(1.0, 1.0, 1.0), normalization=(rule,), orientation=orientation)  # type: ignore[arg-type]


USUAL = [image(seed, (40 + seed, 50, 30)) for seed in range(6)]


def found_in(volume: Volume, known: TrainedOn | None = None, how: PreprocessPlan | None = None) -> dict[str, str]:
    """What is told of an image: messages by property."""
    known = known or summarise(fingerprint(USUAL), [ZSCORE])
    assert known is not None
    items = outside(known, measure_image(volume, "x"), how or plan(), ["MR"])
    return {item.what: item.message for item in items}


def test_images_like_those_of_the_training_are_not_told() -> None:
    assert found_in(image(77, (43, 50, 30))) == {}
    # Neither brightness nor the order of axes matters to a network that sees standardised images in one order.
    brighter = image(77)
    assert found_in(Volume(brighter.array * 1000, brighter.geometry)) == {}
    turned = Geometry((30, 50, 40), brighter.geometry.affine[:, [2, 1, 0, 3]])
    assert found_in(Volume(brighter.array.transpose(0, 3, 2, 1), turned)) == {}


@pytest.mark.parametrize(
    ("volume", "property_", "numbers"),
    [
        (image(1, spacing=(1.0, 1.0, 5.0)), "spacing", "voxels are 5 mm long from foot to head, in training 2"),
        (image(1, shape=(120, 50, 30)), "size", "120 mm from left to right, in training 40 to 45"),
        (image(1, shape=(10, 50, 30)), "size", "10 mm from left to right, in training 40 to 45"),
        (image(1, degrees=25), "orientation", "turned by 25 degrees, in training by at most 0"),
        (image(1, shape=(40, 50, 1), is_2d=True), "kind", "a picture, and training images were volumes"),
    ],
)
def test_what_is_unlike_is_told_with_the_numbers(volume: Volume, property_: str, numbers: str) -> None:
    assert numbers in found_in(volume)[property_]


def test_intensities_are_compared_as_the_network_sees_them() -> None:
    usual = image(1)
    inverted = Volume(usual.array.max() + 1 - usual.array, usual.geometry)
    assert "its intensities of MR are distributed otherwise" in found_in(inverted)["intensity"]
    ct = summarise(fingerprint(USUAL), [CT])
    assert found_in(usual, ct, plan(CT)) == {}
    assert "intensity" in found_in(Volume(usual.array + 1024, usual.geometry), ct, plan(CT))
    # Beyond the limits that CT is clipped to, nothing is seen.
    extreme = usual.array.copy()
    extreme[extreme > 300] = 30_000
    assert found_in(Volume(extreme, usual.geometry), ct, plan(CT)) == {}


def test_a_model_that_does_not_reorient_is_told_of_other_axes() -> None:
    flipped = image(1)
    other = Volume(flipped.array, Geometry(flipped.geometry.shape, flipped.geometry.affine @ np.diag([-1, 1, 1, 1.0])))
    assert found_in(other) == {}
    assert "axes point to LAS, in training to RAS" in found_in(other, how=plan(orientation="native"))["orientation"]


def test_a_distance_is_counted_in_spreads_beyond_the_range() -> None:
    known = summarise(fingerprint(USUAL), [ZSCORE])
    assert known is not None
    # All spacings are equal, so that the least spread counts. Fewer voxels keep the field of view.
    factor = np.exp(3.5 * SPACING_SPREAD.least)
    longer = image(1, (40, 50, 21), spacing=(1.0, 1.0, 2 * factor))
    (item,) = outside(known, measure_image(longer, "x"), plan(), ["MR"])
    assert item.what == "spacing"
    assert item.distance == 3.5
    factor = np.exp((LIMIT - 0.1) * SPACING_SPREAD.least)
    assert outside(known, measure_image(image(1, spacing=(1.0, 1.0, 2 * factor)), "x"), plan(), ["MR"]) == ()
    degrees = LIMIT * OBLIQUE_SPREAD_DEGREES
    assert outside(known, measure_image(image(1, degrees=degrees - 1), "x"), plan(), ["MR"]) == ()


def test_pictures_are_compared_in_pixels() -> None:
    pictures = [image(seed, (100 + seed, 80, 1), is_2d=True) for seed in range(6)]
    known = summarise(fingerprint(pictures), [ZSCORE])
    assert known is not None
    assert known.spacing_mm == ()
    assert found_in(image(9, (101, 80, 1), is_2d=True), known) == {}
    assert "measures 300 pixels from left to right" in found_in(image(9, (300, 80, 1), is_2d=True), known)["size"]
    assert "volume" in found_in(image(9), known)["kind"]
    # One slice with a place in the world is a picture too.
    assert found_in(image(9, (101, 80, 1), spacing=(9.0, 9.0, 9.0)), known) == {}


@pytest.mark.parametrize(
    "rule", [ZSCORE, CT, ChannelNormalization(scheme="rescale"), ChannelNormalization(scheme="rgb")]
)
def test_scaled_quantiles_are_those_of_the_scaled_image(rule: ChannelNormalization) -> None:
    volume = image(3, (40, 40, 40))
    volume.array[...] = np.minimum(volume.array, 255)
    look = measure_image(volume, "x").look
    assert look is not None
    assert look.channels[0] is not None
    scaled = volume.array[0].copy()
    normalise(scaled, rule)
    found = scaled_quantiles(look.channels[0], rule)
    assert np.allclose(found, np.quantile(scaled, LOOK_LEVELS), atol=1e-3)


def test_an_image_is_measured_alike_with_and_without_labels() -> None:
    volume = image(1)
    without = measure_image(volume, "case_0")
    labelled = fingerprint([volume]).cases[0]
    assert labelled.model_copy(update={"class_voxels": (), "intensities": ()}) == without
    assert without.look is not None
    assert without.look.orientation == "RAS"


def test_an_image_with_values_that_are_no_numbers_has_no_look() -> None:
    volume = image(1)
    volume.array[0, 0, 0, 0] = np.nan
    look = measure_image(volume, "x").look
    assert look is not None
    assert look.channels == (None,)
    assert found_in(volume) == {}


def test_looks_rename_no_fingerprint_and_older_ones_stay_valid() -> None:
    """What plans are named by is not touched: a run that is planned again keeps its models."""
    measured = fingerprint(USUAL)
    older = measured.model_copy(
        update={"cases": tuple(case.model_copy(update={"look": None}) for case in measured.cases)}
    )
    assert older.digest() == measured.digest()
    text = older.to_json()
    assert "look" not in text
    assert Fingerprint.from_json(text, "x") == older
    assert Fingerprint.from_json(measured.to_json(), "x") == measured
    known = summarise(older, [ZSCORE])
    assert known is not None
    # Without looks there is nothing to compare intensities and orientations with.
    assert set(found_in(image(1, spacing=(1.0, 1.0, 5.0), degrees=25), known)) == {"spacing", "size"}
    assert summarise(older.model_copy(update={"cases": ()}), [ZSCORE]) is None


def test_a_card_without_a_summary_is_written_as_before() -> None:
    from toy_models import toy_model

    card = toy_model().card
    assert "trained_on" not in json.loads(card.to_json())
    assert ModelCard.from_json(card.to_json(), "x") == card
    known = summarise(fingerprint(USUAL), [ZSCORE])
    with_summary = card.model_copy(update={"trained_on": known})
    assert ModelCard.from_json(with_summary.to_json(), "x").trained_on == known
    assert with_summary.digest == card.digest


def test_the_look_of_a_large_image_comes_from_some_of_its_voxels() -> None:
    shape = (200, 190, 20)
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape) + 1
    look = measure_image(Volume(values, Geometry(shape, np.eye(4))), "x").look
    assert look is not None
    channel = look.channels[0]
    assert isinstance(channel, ChannelLook)
    assert np.allclose(channel.quantiles, np.quantile(values, LOOK_LEVELS), rtol=0.02, atol=5000)


def test_a_case_record_of_an_older_version_is_read(tmp_path: Path) -> None:
    record = measure_image(image(1), "x")
    data = json.loads(record.to_json())
    del data["look"]
    assert CaseStats.from_json(json.dumps(data), tmp_path).look is None


@pytest.mark.data
def test_held_out_hippocampi_are_usual_and_other_sets_are_not(data_folder: Path) -> None:
    """The figures of decision 38, on some of its cases."""

    def cases(name: str, count: int) -> list[CaseStats]:
        dataset = load_dataset(data_folder / name)
        task = Measuring(labels=dataset.labels, num_channels=len(dataset.channels))
        return [task.run(case) for case in dataset.cases[:count]]

    own = cases("hippocampus", 60)
    known = summarise(merge(own[:40], ["MR"], 3), [ZSCORE])
    assert known is not None
    assert sum(bool(outside(known, case, plan(), ["MR"])) for case in own[40:]) <= 1
    for name in ("headneck_ct", "fetal_brain", "mouse_brain", "membrane"):
        assert all(outside(known, case, plan(), ["MR"]) for case in cases(name, 3)), name
