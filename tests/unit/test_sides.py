"""Left/right pairs: declared or told by names, and what mirroring does to them in training and in prediction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from planning_cases import fingerprint_of, plan_of
from pydantic import ValidationError
from torch import Tensor

from autoseg.domain.dataset import IGNORE_INDEX, LabelClass, LabelSchema
from autoseg.domain.descriptions import DescriptionProblem, parse_labels
from autoseg.domain.layouts import load_dataset
from autoseg.domain.plan import AugmentationPlan, Configuration, Plan
from autoseg.domain.sides import Sides, swap_of
from autoseg.errors import ConfigError, DatasetError, PlanError
from autoseg.inference.tta import TileSwap, mirror_combinations, mirrored, with_mirroring
from autoseg.planning.overrides import apply_overrides
from autoseg.preprocessing.prepare import cache_digest
from autoseg.training.batches import Batch, BatchReader, assemble
from autoseg.training.cascade import PreviousReader
from autoseg.training.sampling import CasePool, Sampler

CPU = torch.device("cpu")


def schema(*names: str, regions: bool = False, **fields: object) -> LabelSchema:
    """Classes of one value each; as regions the last one joins all values."""
    classes = [LabelClass(name=name, values=(number,)) for number, name in enumerate(names, start=1)]
    if regions:
        classes.append(LabelClass(name="all", values=tuple(range(1, len(names) + 1))))
    return LabelSchema.model_validate({"classes": tuple(classes), **fields})


LUNGS = schema("left lung", "heart", "right lung", ignore=9)


# --- What is a pair ---------------------------------------------------------------------------------------------------


def test_declared_pairs_win_over_names() -> None:
    assert LUNGS.sided_pairs == (("left lung", "right lung"),)
    assert schema("left lung", "right lung", pairs=()).sided_pairs == ()
    assert schema("lunge li", "lunge re", pairs=(("lunge li", "lunge re"),)).sided_pairs == (("lunge li", "lunge re"),)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ((("left lung", "liver"),), "pairs names 'liver'; the classes are left lung, heart, right lung"),
        ((("left lung", "left lung"),), "'left lung' more than once"),
        ((("left lung", "heart"), ("heart", "right lung")), "'heart' more than once"),
    ],
)
def test_pairs_of_unknown_or_doubled_classes_are_refused(pairs: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        schema("left lung", "heart", "right lung", pairs=pairs)


def test_pairs_are_declared_in_somebodys_dataset_json() -> None:
    labels = {"background": 0, "a": 1, "b": 2}
    assert parse_labels({"labels": labels}).pairs is None
    assert parse_labels({"labels": labels, "pairs": [["a", "b"]]}).pairs == (("a", "b"),)
    for wrong in ("a", [["a"]], [["a", 1]], {"a": "b"}):
        with pytest.raises(DescriptionProblem, match="pairs must be a list such as"):
            parse_labels({"labels": labels, "pairs": wrong})


def test_pairs_are_declared_in_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "i.nii").touch()
    manifest = {
        "channels": ["T1"],
        "labels": [{"name": "a", "value": 1}, {"name": "b", "value": 2}],
        "pairs": [["a", "b"]],
        "cases": [{"id": "c", "image": "i.nii", "labels": "i.nii"}],
    }
    (tmp_path / "m.json").write_text(json.dumps(manifest))
    assert load_dataset(tmp_path / "m.json").labels.pairs == (("a", "b"),)
    (tmp_path / "m.json").write_text(json.dumps(manifest | {"pairs": [["a", "c"]]}))
    with pytest.raises(DatasetError, match="pairs names 'c'"):
        load_dataset(tmp_path / "m.json")


def test_labels_without_declared_pairs_are_written_as_ever() -> None:
    """Digests of models and names of caches made by older versions hold."""
    assert set(schema("a").model_dump()) == {"classes", "ignore"}
    assert "sides" not in _lungs_plan().configurations["2d"].model_copy(update={"sides": None}).model_dump()
    preprocess = _lungs_plan().configurations["2d"].preprocess
    assert cache_digest(preprocess, schema("a", "b")) == cache_digest(preprocess, schema("a", "b", pairs=(("a", "b"),)))


# --- What becomes of labels -------------------------------------------------------------------------------------------


def test_classes_change_places_and_the_others_stay() -> None:
    swap = swap_of(LUNGS)
    assert swap.labels == swap.outputs == (0, 3, 2, 1)
    sides = Sides(axis=0, mirror_pairs="swap", labels=swap.labels, outputs=swap.outputs)
    labels = np.array([[0, 1, 2], [3, IGNORE_INDEX, 1]], np.int16)
    np.testing.assert_array_equal(sides.swapped(labels), np.array([[0, 3, 2], [1, IGNORE_INDEX, 3]], np.int16))
    assert sides.swapped(labels).dtype == np.int16
    assert sides.swapped(np.array([0, 1, 3], np.uint8)).dtype == np.uint8


def test_values_of_regions_go_into_the_partners_of_their_regions() -> None:
    nested = LabelSchema(
        classes=(
            LabelClass(name="left kidney", values=(5, 2)),
            LabelClass(name="left cyst", values=(2,)),
            LabelClass(name="right kidney", values=(3, 4)),
            LabelClass(name="right cyst", values=(4,)),
        )
    )
    assert nested.label_values == (0, 2, 3, 4, 5)
    swap = swap_of(nested)
    assert swap.outputs == (2, 3, 0, 1)
    # 2 is a left cyst and becomes 4; 3, the right kidney without cyst, becomes 5.
    assert swap.labels == (0, 3, 4, 1, 2)
    table = nested.region_table()
    np.testing.assert_array_equal(table[:, list(swap.labels)], table[list(swap.outputs)])


def test_two_left_lobes_and_three_right_ones_are_still_lungs() -> None:
    lobes = LabelSchema(
        classes=(LabelClass(name="left lung", values=(1, 2)), LabelClass(name="right lung", values=(3, 4, 5)))
    )
    swap = swap_of(lobes)
    table = lobes.region_table()
    np.testing.assert_array_equal(table[:, list(swap.labels)], table[list(swap.outputs)])


def test_regions_without_a_mirror_image_cannot_be_swapped() -> None:
    odd = LabelSchema(
        classes=(
            LabelClass(name="left kidney", values=(1, 2)),
            LabelClass(name="right kidney", values=(3,)),
            LabelClass(name="left cyst", values=(2,)),
        )
    )
    assert "value 2 (left kidney and left cyst)" in swap_of(odd).problem


@pytest.mark.parametrize(
    ("names", "is_doubtful"),
    [
        (("left ventricle", "right ventricle"), True),
        (("heart_atrium_left", "heart_atrium_right"), True),
        (("liver left lobe", "liver right lobe"), True),
        (("Left-Lateral-Ventricle", "Right-Lateral-Ventricle"), False),
        (("lung_left", "lung_right"), False),
    ],
)
def test_parts_that_are_named_by_what_they_are_change_places_only_when_declared(
    names: tuple[str, str], is_doubtful: bool
) -> None:
    assert bool(swap_of(schema(*names)).problem) == is_doubtful
    assert not swap_of(schema(*names, pairs=(names,))).problem


# --- The plan ---------------------------------------------------------------------------------------------------------


def _lungs_plan(
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0), preset: str = "default", **fields: object
) -> Plan:
    labels = LUNGS.model_copy(update=fields)
    return plan_of(fingerprint_of([spacing] * 5, [(64, 64, 64)] * 5, num_foreground=3), preset, labels=labels)


# The coarsest axis goes first: X, from left to right, is the last, or the first where it is the coarsest.
@pytest.mark.parametrize(
    ("spacing", "axis_3d", "axis_2d"), [((3.0, 1.0, 1.0), 2, 1), ((1.0, 3.0, 1.0), 2, 1), ((1.0, 1.0, 3.0), 0, None)]
)
def test_the_axis_from_left_to_right_is_found(
    spacing: tuple[float, float, float], axis_3d: int, axis_2d: int | None
) -> None:
    parts = _lungs_plan(spacing).configurations
    assert parts["3d_fullres"].preprocess.axis_order[axis_3d] == 0
    assert parts["3d_fullres"].sides is not None
    assert parts["3d_fullres"].sides.axis == axis_3d
    assert getattr(parts["2d"].sides, "axis", None) == axis_2d


@pytest.mark.parametrize("way", ["leave_out", "swap", "naive"])
def test_one_setting_chooses_the_arm(way: str) -> None:
    plan = apply_overrides(_lungs_plan(), [("sides.mirror_pairs", way)])
    part = plan.configurations["3d_fullres"]
    assert part.mirrored((0, 1, 2)) == ((0, 1) if way == "leave_out" else (0, 1, 2))
    assert part.mirrored(()) == ()
    assert part.sides is not None
    assert part.sides.swaps((2,)) == (way == "swap")
    assert not part.sides.swaps((0, 1))
    assert (plan.digest() == _lungs_plan().digest()) == (way == "leave_out")


def test_the_setting_means_every_configuration_that_has_sides() -> None:
    plan = apply_overrides(_lungs_plan((1.0, 1.0, 3.0)), [("sides.mirror_pairs", "swap")])
    assert plan.configurations["3d_fullres"].mirrored((0, 1, 2)) == (0, 1, 2)
    assert plan.configurations["2d"].sides is None
    with pytest.raises(ConfigError, match="no left/right pairs"):
        apply_overrides(_lungs_plan(pairs=()), [("sides.mirror_pairs", "swap")])


@pytest.mark.parametrize("preset", ["nnunet", "nnunet-resenc-m", "nnunet-resenc-l", "nnunet-resenc-xl"])
def test_the_nnunet_presets_mirror_naively(preset: str) -> None:
    for part in _lungs_plan(preset=preset).configurations.values():
        assert part.sides is None or part.sides.mirror_pairs == "naive"
        axes = tuple(range(part.network.dims))
        assert part.mirrored(part.training.augmentation.mirror_axes) == axes
        assert part.mirrored(part.inference.mirror_axes) == axes


def test_without_pairs_nothing_is_known_of_sides() -> None:
    assert all(part.sides is None for part in _lungs_plan(pairs=()).configurations.values())


def test_doubtful_pairs_are_left_out_and_cannot_be_swapped_by_hand() -> None:
    fingerprint = fingerprint_of([(1.0, 1.0, 1.0)] * 5, [(64, 64, 64)] * 5, num_foreground=2)
    plan = plan_of(fingerprint, labels=schema("left ventricle", "right ventricle"))
    assert plan.configurations["3d_fullres"].mirrored((0, 1, 2)) == (0, 1)
    with pytest.raises(PlanError) as raised:
        apply_overrides(plan, [("sides.mirror_pairs", "swap")])
    assert "it is not known which labels change places" in str(raised.value.problems)
    reasons = next(item for item in plan.decisions if item.topic == "mirroring")
    assert "no mirror images of each other" in reasons.inputs
    assert '"pairs"' in reasons.would_change


def test_the_reasons_name_the_other_ways() -> None:
    reasons = {item.configuration: item for item in _lungs_plan().decisions if item.topic == "mirroring"}
    assert reasons["3d_fullres"].result == "along Z, Y"
    assert "left lung / right lung" in reasons["3d_fullres"].inputs
    assert "keep the label" not in reasons["3d_fullres"].inputs
    plan = plan_of(
        fingerprint_of([(1.0, 1.0, 1.0)] * 5, [(64, 64, 64)] * 5, num_foreground=3),
        labels=schema("left lung", "right lung", "right ventricles"),
    )
    (told,) = (item for item in plan.decisions if (item.topic, item.configuration) == ("mirroring", "3d_fullres"))
    assert "right ventricles would keep the label" in told.inputs
    assert reasons["3d_fullres"].would_change == "--set 3d_fullres.sides.mirror_pairs=swap or naive."


@pytest.mark.parametrize("way", ["leave_out", "swap"])
def test_in_native_orientation_the_axis_is_not_known(way: str) -> None:
    settings = [("sides.mirror_pairs", way), ("preprocess.orientation", "native")]
    with pytest.raises(PlanError) as raised:
        apply_overrides(_lungs_plan(), settings)
    assert "nobody knows which axis" in str(raised.value.problems)
    apply_overrides(_lungs_plan(), [("sides.mirror_pairs", "naive"), settings[1]])


@pytest.mark.parametrize(
    "wrong",
    [
        {"axis": 3},
        {"labels": (0, 1), "outputs": (0, 1)},
        {"labels": (1, 0, 2, 3)},
        {"outputs": (0, 2, 3, 1)},
        {"labels": (), "mirror_pairs": "naive"},
    ],
)
def test_sides_that_do_not_fit_are_refused(wrong: dict[str, object]) -> None:
    data = _lungs_plan().model_dump()
    data["configurations"]["3d_fullres"]["sides"] |= wrong
    with pytest.raises(ValidationError):
        Plan.model_validate(data)


def test_plans_of_older_versions_mirror_as_ever() -> None:
    data = _lungs_plan(preset="nnunet").model_dump(mode="json")
    for part in data["configurations"].values():
        del part["sides"]
    old = Plan.model_validate_json(json.dumps(data))
    assert old.configurations["3d_fullres"].mirrored((0, 1, 2)) == (0, 1, 2)
    assert old.to_json() == Plan.model_validate_json(old.to_json()).to_json()
    assert '"sides"' not in old.to_json()


# --- Training ---------------------------------------------------------------------------------------------------------

NEVER = AugmentationPlan().model_copy(
    update={name: 0.0 for name in AugmentationPlan.model_fields if name.endswith("_probability")}
)


class MarkedCase:
    """Labels at random, some ignored; the image tells the label of each voxel and its place from left to right."""

    channels = 2
    shape = (12, 12, 12)

    def __init__(self, axis: int, ignores: bool) -> None:
        rng = np.random.default_rng(0)
        low = IGNORE_INDEX if ignores else 0
        self.labels = rng.integers(low, 4, self.shape).astype(np.int16)
        place = np.arange(1, 13, dtype=np.float32).reshape([-1 if other == axis else 1 for other in range(3)])
        self.image = np.stack([self.labels.astype(np.float32), np.broadcast_to(place, self.shape)])

    @property
    def foreground(self) -> dict[int, NDArray[np.int32]]:
        return {label: np.argwhere(self.labels == label).astype(np.int32) for label in (1, 2, 3)}

    def read(self, start: Sequence[int], stop: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
        box = tuple(slice(low, high) for low, high in zip(start, stop, strict=True))
        return self.image[(slice(None), *box)].copy(), self.labels[box].copy()


class MarkedMap(MarkedCase):
    """What the previous stage predicted: the labels themselves."""

    def read(self, start: Sequence[int], stop: Sequence[int]) -> NDArray[np.uint8]:  # type: ignore[override]
        return super().read(start, stop)[1].astype(np.uint8)


class Store:
    def __init__(self, case: MarkedCase) -> None:
        self.case = case

    def open(self, case_id: str) -> MarkedCase:
        return self.case


def _batches(way: str, axis: int, dims: int = 3, previous: bool = False, plan: AugmentationPlan = NEVER) -> list[Batch]:
    """Eight batches of four patches, mirrored along every axis that the configuration mirrors."""
    swap = swap_of(LUNGS)
    sides = Sides(axis=axis, mirror_pairs=way, labels=swap.labels, outputs=swap.outputs)  # type: ignore[arg-type]
    drawn = plan.model_copy(update={"mirror_axes": sides.mirrored(tuple(range(dims)))})
    axis_of_case = axis + 3 - dims
    pool = CasePool(Store(MarkedCase(axis_of_case, ignores=not previous)))
    maps = None
    if previous:
        maps = PreviousReader(Store(MarkedMap(axis_of_case, ignores=False)), 4, drawn, 0, sides)  # type: ignore[arg-type]
    sampler = Sampler(("one",), (7, 8, 6) if dims == 3 else (1, 8, 6), 4, 1 / 3, 5)
    reader = BatchReader(sampler, pool, dims, drawn, 250, maps, sides)
    return [assemble(reader.read(step), CPU) for step in range(8)]


def _is_flipped(image: Tensor, axis: int) -> bool:
    places = image[1].amax([other for other in range(image.ndim - 1) if other != axis])
    inside = places[places > 0]  # beyond the case there are zeros
    steps = {float(after - before) for before, after in pairwise(inside)}
    assert steps in ({1.0}, {-1.0})
    return steps == {-1.0}


@pytest.mark.parametrize(("dims", "axis"), [(3, 0), (3, 1), (3, 2), (2, 0), (2, 1)])
@pytest.mark.parametrize("way", ["leave_out", "swap", "naive"])
def test_labels_of_a_mirrored_patch_change_places_exactly(way: str, dims: int, axis: int) -> None:
    """Every voxel's image value is the label it had; ignored voxels stay ignored."""
    table = torch.tensor([0, 3, 2, 1, IGNORE_INDEX])
    flips = []
    for batch in _batches(way, axis, dims):
        for image, labels in zip(batch.images, batch.labels, strict=True):
            before = image[0].long()
            is_flipped = _is_flipped(image, axis)
            expected = table[before] if is_flipped and way == "swap" else before
            assert torch.equal(labels.long(), expected)
            assert (labels == IGNORE_INDEX).any()
            flips.append(is_flipped)
    assert 0.2 < sum(flips) / len(flips) < 0.8 if way != "leave_out" else not any(flips)


def test_the_arms_show_the_same_patches() -> None:
    for swapped, naive in zip(_batches("swap", 2), _batches("naive", 2), strict=True):
        assert torch.equal(swapped.images, naive.images)
        assert not torch.equal(swapped.labels, naive.labels)


def test_the_map_of_a_cascade_changes_with_the_labels() -> None:
    for batch in _batches("swap", 1, previous=True):
        told = batch.images[:, 2:]
        assert told.shape[1] == 3
        for label in (1, 2, 3):
            assert torch.equal(told[:, label - 1] == 1, batch.labels == label)


def test_what_was_annotated_changes_with_the_labels() -> None:
    """A case in which the left lung alone was annotated shows, in the mirror, a right lung that was annotated."""
    swap = swap_of(LUNGS)
    sides = Sides(axis=2, mirror_pairs="swap", labels=swap.labels, outputs=swap.outputs)
    plan = NEVER.model_copy(update={"mirror_axes": (2,)})
    known = {"one": (True, False, False)}
    sampler = Sampler(("one",), (7, 8, 6), 4, 1 / 3, 5, annotated=known)
    reader = BatchReader(sampler, CasePool(Store(MarkedCase(2, False))), 3, plan, 250, None, sides)
    rows = set()
    for step in range(4):
        batch = assemble(reader.read(step), CPU)
        assert batch.annotated is not None
        for image, row in zip(batch.images, batch.annotated.tolist(), strict=True):
            assert row == ([False, False, True] if _is_flipped(image, 2) else [True, False, False])
            rows.add(tuple(row))
    assert len(rows) == 2
    regions = Sides(axis=0, mirror_pairs="swap", labels=(0, 2, 1), outputs=(1, 0, 2))
    assert regions.swapped_classes((True, False, True)) == (False, True, True)


def test_turned_patches_change_too() -> None:
    """Turning and swapping do not depend on each other's order: naming all labels anew before or after is the same."""
    turning = NEVER.model_copy(update={"rotation_probability": 1.0})
    table = torch.tensor([0, 3, 2, 1, IGNORE_INDEX])
    changed = 0
    for swapped, naive in zip(_batches("swap", 2, plan=turning), _batches("naive", 2, plan=turning), strict=True):
        for one, other in zip(swapped.labels.long(), naive.labels.long(), strict=True):
            assert torch.equal(one, other) or torch.equal(one, table[other])
            changed += not torch.equal(one, other)
    assert 4 < changed < 28


# --- Test-time mirroring ----------------------------------------------------------------------------------------------


def _sided(tiles: Tensor) -> Tensor:
    """Background, left, middle, right by brightness and by place along the last axis: left is where it begins."""
    brightness = tiles[:, :1]
    place = torch.linspace(-1, 1, tiles.shape[-1]).expand_as(brightness)
    return torch.cat([1 - brightness, brightness - place, 0.5 * brightness, brightness + place], dim=1)


def test_of_an_equivariant_network_mirroring_with_swaps_changes_nothing() -> None:
    """The network is symmetric about the middle: mirrored input gives mirrored output with left and right changed."""
    tiles = torch.rand((2, 1, 4, 5, 6), generator=torch.Generator().manual_seed(0))
    plain = _sided(tiles)
    swap = TileSwap(2, (0, 3, 2, 1))
    for axes in ((2,), (0, 2), (0, 1, 2)):
        torch.testing.assert_close(mirrored(_sided, axes, swap)(tiles), plain)
        naive = mirrored(_sided, axes)(tiles)
        # Naive averages over left and right, which are then alike.
        torch.testing.assert_close(naive[:, 1], naive[:, 3])
        assert not torch.allclose(naive, plain)
    torch.testing.assert_close(mirrored(_sided, (0, 1), swap)(tiles), plain)


def test_in_a_cascade_the_map_is_seen_in_the_mirror_too() -> None:
    seen = []

    def forward(tiles: Tensor) -> Tensor:
        seen.append(tiles.clone())
        return tiles[:, :1].expand(-1, 4, -1, -1, -1)

    labels = torch.arange(4.0).reshape(1, 1, 1, 1, 4)
    image = torch.rand((1, 1, 1, 1, 4), generator=torch.Generator().manual_seed(1))
    mirrored(forward, (1, 2), TileSwap(2, (0, 3, 2, 1), previous=(0, 3, 2, 1)))(torch.cat([image, labels], 1))
    maps = [tile[:, 1:].flatten().tolist() for tile in seen]
    assert maps == [[0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3, 0], [1, 2, 3, 0]]
    assert [flip for flip in mirror_combinations((1, 2)) if 2 in flip] == [(2,), (1, 2)]
    assert torch.equal(seen[2][:, :1], image.flip(-1))


@pytest.mark.parametrize(("way", "passes"), [("leave_out", 4), ("swap", 8), ("naive", 8)])
def test_a_configuration_mirrors_in_prediction_as_in_training(way: str, passes: int) -> None:
    plan = apply_overrides(_lungs_plan(), [("sides.mirror_pairs", way)])
    part: Configuration = plan.configurations["3d_fullres"]
    calls = []

    def forward(tiles: Tensor) -> Tensor:
        calls.append(1)
        return _sided(tiles)

    tiles = torch.rand((1, 1, 4, 5, 6), generator=torch.Generator().manual_seed(0))
    found = with_mirroring(forward, part)(tiles)
    assert len(calls) == passes
    assert torch.allclose(found, _sided(tiles)) == (way != "naive")
