"""Left and right by name, and what the planner makes of it."""

import pytest
from planning_cases import fingerprint_of, plan_of

from autoseg.domain.dataset import LabelClass, LabelSchema
from autoseg.domain.laterality import left_right_pairs


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (("RightParotid", "LeftParotid", "Mandible"), (("LeftParotid", "RightParotid"),)),
        (("Right External Capsule", "left external capsule"), (("left external capsule", "Right External Capsule"),)),
        (("lh_cortex", "rh_cortex", "brainstem"), (("lh_cortex", "rh_cortex"),)),
        (("kidney_l", "kidney_r"), (("kidney_l", "kidney_r"),)),
        (("Anterior", "Posterior"), ()),
        (("left ventricle", "myocardium"), ()),
        (("upper lobe left", "lower lobe right"), ()),
        (("Left-Hippocampus", "Right-Hippocampus"), (("Left-Hippocampus", "Right-Hippocampus"),)),
        (("ctx-rh-insula", "ctx-lh-insula"), (("ctx-lh-insula", "ctx-rh-insula"),)),
        (("lh.hippocampus", "rh.hippocampus"), (("lh.hippocampus", "rh.hippocampus"),)),
        (("L_Hippocampus", "R_Hippocampus"), (("L_Hippocampus", "R_Hippocampus"),)),
        (("KidneyR", "KidneyL"), (("KidneyL", "KidneyR"),)),
        (("hippocampus (left)", "hippocampus (right)"), (("hippocampus (left)", "hippocampus (right)"),)),
        (("rib_left_1", "rib_left_2", "rib_right_2"), (("rib_left_2", "rib_right_2"),)),
        (("L", "R"), (("L", "R"),)),
        (("L1", "R1", "vertebra_L2", "vertebra_R2"), ()),
        (("L4_L5", "R4_R5"), ()),
        (("Leber", "Reber"), ()),
        (("left lung", "Left Lung", "right lung"), ()),
        (("left é", "right è"), ()),
    ],
)
def test_pairs_differ_in_the_side_alone(names: tuple[str, ...], pairs: tuple[tuple[str, str], ...]) -> None:
    assert left_right_pairs(names) == pairs


SIDED = LabelSchema(classes=(LabelClass(name="left lung", values=(1,)), LabelClass(name="right lung", values=(2,))))


# The coarsest axis goes first, so the left-right axis (X) is the last, or the first where X is the coarsest.
@pytest.mark.parametrize(
    ("spacing", "mirrored_3d", "mirrored_2d"),
    [((3.0, 1.0, 1.0), (0, 1), (0,)), ((1.0, 3.0, 1.0), (0, 1), (0,)), ((1.0, 1.0, 3.0), (1, 2), (0, 1))],
)
def test_left_stays_left_where_classes_come_in_pairs(
    spacing: tuple[float, float, float], mirrored_3d: tuple[int, ...], mirrored_2d: tuple[int, ...]
) -> None:
    fingerprint = fingerprint_of([spacing] * 5, [(64, 64, 64)] * 5, num_foreground=2)
    for preset, expected in (("default", (mirrored_3d, mirrored_2d)), ("nnunet", ((0, 1, 2), (0, 1)))):
        plan = plan_of(fingerprint, preset, labels=SIDED)
        for name, axes in zip(("3d_fullres", "2d"), expected, strict=True):
            part = plan.configurations[name]
            assert part.mirrored(part.training.augmentation.mirror_axes) == axes
            assert part.mirrored(part.inference.mirror_axes) == axes


def test_without_pairs_every_axis_is_mirrored() -> None:
    plan = plan_of(fingerprint_of([(1.0, 1.0, 1.0)] * 5, [(64, 64, 64)] * 5, num_foreground=2))
    assert plan.configurations["3d_fullres"].training.augmentation.mirror_axes == (0, 1, 2)
