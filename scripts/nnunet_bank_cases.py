"""Data sets for `nnunet_bank.py`: what a planner sees of them, made up after real ones, or drawn at random.

Every case is what nnU-Net itself keeps: the description (`dataset.json`) and the fingerprint, in its order z, y, x.
Nothing here belongs to anybody: sizes and spacings are those that are published for such sets, rounded and scattered.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

Case = dict[str, Any]
Triple = tuple[float, float, float]

THICKNESS_OF_A_PICTURE_MM = 999.0
"""What nnU-Net's readers of 2D pictures give the axis that is not there."""

NAMES_WITH_A_MEANING = ("CT", "ct", "noNorm", "rescale_to_0_1", "rgb_to_0_1", "zscore")


def intensities(rng: random.Random, num_channels: int) -> dict[str, dict[str, float]]:
    """Foreground intensities of each channel."""
    out = {}
    for channel in range(num_channels):
        low, mean, high = sorted(round(rng.uniform(-1000, 3000), 3) for _ in range(3))
        std = round(rng.uniform(1, 500), 3)
        out[str(channel)] = {
            "max": high + 10,
            "mean": mean,
            "median": mean - 1,
            "min": low - 10,
            "percentile_00_5": low,
            "percentile_99_5": high,
            "std": std,
        }
    return out


def describe(
    channels: Sequence[str], num_foreground: int, num_training: int, *, ignore: bool = False, regions: bool = False
) -> dict[str, Any]:
    """A `dataset.json`."""
    labels: dict[str, Any] = {"background": 0}
    if regions:
        labels |= {f"region {n}": list(range(n, num_foreground + 1)) for n in range(1, num_foreground + 1)}
    else:
        labels |= {f"class {n}": n for n in range(1, num_foreground + 1)}
    if ignore:
        labels["ignore"] = num_foreground + 1
    found: dict[str, Any] = {
        "channel_names": {str(number): name for number, name in enumerate(channels)},
        "labels": labels,
        "numTraining": num_training,
        "file_ending": ".nii.gz",
    }
    if regions:
        found["regions_class_order"] = list(range(1, num_foreground + 1))
    return found


def build(
    name: str,
    spacing: Triple,
    shape: tuple[int, int, int],
    *,
    cases: int = 20,
    channels: Sequence[str] = ("MRI",),
    classes: int = 2,
    spread: float = 0.0,
    scatter: float = 0.1,
    relative: float = 1.0,
    training: int | None = None,
    vram: float | None = None,
    mixed: Sequence[Triple] = (),
    ignore: bool = False,
    regions: bool = False,
) -> Case:
    """A made-up data set.

    Args:
        name: Of the case; also the seed.
        spacing: Millimetres, z, y, x.
        shape: Voxels, z, y, x.
        cases: How many were measured.
        channels: Names.
        classes: Foreground classes.
        spread: Relative scatter of the spacings.
        scatter: Relative scatter of the shapes.
        relative: Median part of the voxels that cropping leaves.
        training: Cases as the description counts them; else as many as were measured.
        vram: Memory target in GB; else the planner's own.
        mixed: Spacings that cases take in turn instead.
        ignore: Whether there is an ignore label.
        regions: Whether classes are regions of several labels.
    """
    rng = random.Random(name)
    spacings, shapes = [], []
    for number in range(cases):
        middle = mixed[number % len(mixed)] if mixed else spacing
        row = [round(value * rng.uniform(1 - spread, 1 + spread), 6) if spread else value for value in middle]
        size = [edge if edge == 1 else max(1, round(edge * rng.uniform(1 - scatter, 1 + scatter))) for edge in shape]
        spacings.append(row)
        shapes.append(size)
    return {
        "name": name,
        "vram_gb": vram,
        "dataset": describe(channels, classes, cases if training is None else training, ignore=ignore, regions=regions),
        "fingerprint": {
            "foreground_intensity_properties_per_channel": intensities(rng, len(channels)),
            "median_relative_size_after_cropping": relative,
            "shapes_after_crop": shapes,
            "spacings": spacings,
        },
    }


def like_public_sets() -> Iterator[Case]:
    """After the Medical Segmentation Decathlon and other public volumes."""
    four = ("FLAIR", "T1w", "t1gd", "T2w")
    yield build("brain tumour MR", (1.0, 1.0, 1.0), (138, 170, 138), channels=four, classes=3, relative=0.36)
    yield build("brain tumour MR, regions", (1.0,) * 3, (138, 170, 138), channels=four, classes=3, regions=True)
    yield build("heart MR", (1.37, 1.25, 1.25), (115, 320, 232), cases=20, classes=1)
    yield build("liver CT", (1.0, 0.77, 0.77), (432, 512, 512), channels=("CT",), spread=0.25, training=131)
    yield build("hippocampus MR", (1.0, 1.0, 1.0), (36, 50, 35), training=260)
    yield build("prostate MR", (3.6, 0.625, 0.625), (20, 320, 319), cases=32, channels=("T2", "ADC"), spread=0.05)
    yield build("lung CT", (1.245, 0.79, 0.79), (252, 512, 512), cases=30, channels=("CT",), classes=1, spread=0.3)
    yield build("pancreas CT", (2.5, 0.8, 0.8), (93, 512, 512), cases=30, channels=("CT",), spread=0.2, training=282)
    yield build("hepatic vessel CT", (5.0, 0.8, 0.8), (49, 512, 512), channels=("CT",), spread=0.3, training=303)
    yield build("spleen CT", (5.0, 0.79, 0.79), (90, 512, 512), channels=("CT",), classes=1, spread=0.3, training=41)
    yield build("colon CT", (5.0, 0.78, 0.78), (95, 512, 512), channels=("CT",), classes=1, spread=0.3, training=126)
    yield build("cardiac cine MR", (10.0, 1.56, 1.56), (9, 256, 216), classes=3, spread=0.3, training=200)
    yield build("kidney CT", (3.0, 0.78, 0.78), (107, 512, 512), channels=("CT",), classes=3, spread=0.4, training=210)
    yield build("abdomen CT, 13 organs", (3.0, 0.76, 0.76), (148, 512, 512), channels=("CT",), classes=13, training=30)
    yield build("abdomen CT and MR, 15 organs", (5.0, 0.68, 0.68), (104, 768, 768), classes=15, spread=0.4)
    yield build("whole body CT, 104 classes", (1.5,) * 3, (280, 280, 260), channels=("CT",), classes=104, training=1000)
    yield build("whole body CT, 117 classes", (1.5,) * 3, (307, 303, 271), channels=("CT",), classes=117, training=900)
    yield build(
        "whole body PET/CT", (3.0, 2.04, 2.04), (326, 400, 400), channels=("CT", "PET"), classes=1, training=900
    )
    yield build("stroke MR", (1.0, 1.0, 1.0), (189, 233, 197), channels=("T1",), classes=1, relative=0.74, training=655)
    yield build("stroke DWI", (2.0, 2.0, 2.0), (73, 112, 112), channels=("DWI", "ADC", "FLAIR"), classes=1)
    yield build("multiple sclerosis", (3.0, 0.5, 0.5), (48, 480, 416), channels=("FLAIR", "T1", "T2"), classes=1)
    yield build("knee MR", (0.7, 0.36, 0.36), (160, 384, 384), classes=4)
    yield build("vertebrae CT", (1.0, 0.5, 0.5), (512, 600, 300), channels=("CT",), classes=25, spread=0.4)
    yield build("head and neck CT", (2.5, 0.98, 0.98), (160, 512, 512), channels=("CT",), classes=30, training=42)
    yield build("teeth CBCT", (0.3,) * 3, (170, 400, 400), channels=("CBCT",), classes=42, spread=0.2)
    yield build("fetal brain MR", (0.5,) * 3, (131, 166, 123), classes=7, relative=0.25, training=80)
    yield build("breast MR", (2.0, 0.78, 0.78), (90, 448, 448), channels=[f"phase {n}" for n in range(6)], classes=1)
    yield build("prostate, mixed scanners", (3, 1, 1), (24, 320, 320), mixed=[(3.0, 0.6, 0.6), (1.25, 1.25, 1.25)])
    yield build("angiography, 14 vessels", (0.6, 0.3, 0.3), (140, 400, 380), classes=14, training=125)
    yield build("lung airways CT", (0.7, 0.75, 0.75), (600, 512, 512), channels=("CT",), classes=1, training=299)
    yield build("ultrasound 3D", (0.3, 0.4, 0.35), (208, 176, 224), channels=("US",), classes=1)


def like_microscopy() -> Iterator[Case]:
    """Electron and light microscopy, small animals, very small and very large voxels."""
    yield build("EM mitochondria, 30 nm slices", (3e-5, 8e-6, 8e-6), (400, 4096, 4096), cases=2, classes=1)
    yield build("EM membranes, isotropic", (8e-6,) * 3, (520, 520, 520), cases=4, classes=1)
    yield build("light sheet nuclei", (2.0, 0.4, 0.4), (60, 1024, 1024), cases=8, classes=2)
    yield build("mouse CT", (0.14,) * 3, (420, 200, 200), cases=40, channels=("CT",), classes=6)
    yield build("mouse brain MR", (0.15000000596, 0.14999999106, 0.14999999106), (84, 132, 96), cases=6, classes=40)
    yield build("zebrafish, anisotropic", (5.0, 0.5, 0.5), (30, 700, 500), cases=5, channels=("noNorm",), classes=3)
    yield build("cell tracking", (1.0, 0.125, 0.125), (35, 992, 832), cases=3, classes=2)
    yield build("plant tomography", (0.05, 0.05, 0.05), (1200, 900, 900), cases=3, classes=4)
    yield build("earth core, metres", (1000.0, 250.0, 250.0), (40, 300, 300), cases=3, classes=3)


def pictures() -> Iterator[Case]:
    """2D: pictures as nnU-Net's readers give them, and single slices."""
    flat, rgb = THICKNESS_OF_A_PICTURE_MM, ("rgb_to_0_1",) * 3
    yield build("retina RGB", (flat, 1.0, 1.0), (1, 584, 565), channels=rgb, classes=1, scatter=0)
    yield build("skin RGB", (flat, 1.0, 1.0), (1, 767, 1022), channels=rgb, classes=1, training=2000, scatter=0.4)
    yield build("histology RGB", (flat, 1.0, 1.0), (1, 1000, 1000), channels=("R", "G", "B"), classes=5, scatter=0)
    yield build("chest X-ray", (flat, 1.0, 1.0), (1, 2048, 2500), channels=("X-ray",), classes=5, training=247)
    yield build("nuclei pictures", (flat, 1.0, 1.0), (1, 256, 320), channels=("grey",), classes=1, training=670)
    yield build("satellite, 8 bands", (flat, 1.0, 1.0), (1, 512, 512), channels=["nonorm"] * 8, classes=10)
    yield build("tall and narrow pictures", (flat, 1.0, 1.0), (1, 3000, 96), channels=("OCT",), classes=3)
    yield build("tiny pictures", (flat, 1.0, 1.0), (1, 28, 28), classes=1, training=500)
    yield build("pictures with spacing", (flat, 0.3, 0.3), (1, 700, 500), classes=2, spread=0.1)
    yield build("single slices, thick", (8.0, 1.4, 1.4), (1, 256, 256), classes=3, training=300)
    yield build("single slices, as fine as pixels", (1.0, 1.0, 1.0), (1, 320, 320), classes=1)
    yield build("single slices, finer than pixels", (0.5, 1.0, 1.0), (1, 320, 320), classes=1)
    yield build("single columns", (1.0, 1.0, 3.0), (200, 240, 1), classes=1)
    yield build("pictures, 2 GB", (flat, 1.0, 1.0), (1, 1024, 1360), classes=2, vram=2)
    yield build("pictures, 80 GB", (flat, 1.0, 1.0), (1, 4000, 3000), channels=rgb, classes=20, vram=80)


def at_the_edges() -> Iterator[Case]:
    """What is rare: tiny, huge, thin, tied, many channels or classes, odd numbers, other budgets."""
    yield build("tiny cubes", (1.0,) * 3, (8, 8, 8), scatter=0)
    yield build("smaller than a kernel", (1.0,) * 3, (3, 3, 3), scatter=0)
    yield build("just deep enough", (1.0,) * 3, (12, 8, 7), scatter=0)
    yield build("two slices", (5.0, 1.0, 1.0), (2, 256, 256), scatter=0)
    yield build("three slices, fine", (0.8, 1.0, 1.0), (3, 400, 400), scatter=0)
    yield build("one row", (1.0, 1.0, 4.0), (64, 1, 64), scatter=0)
    yield build("needles", (1.0, 1.0, 1.0), (16, 16, 1500), scatter=0)
    yield build("plates", (1.0, 1.0, 1.0), (1000, 12, 1000), scatter=0)
    yield build("odd sizes", (0.9, 1.1, 1.3), (101, 77, 59), cases=2, scatter=0)
    yield build("one case", (1.0, 0.7, 0.7), (100, 333, 257), cases=1)
    yield build("even number of cases, half sizes", (1.0,) * 3, (50, 60, 70), cases=2, scatter=0.3)
    yield build("huge CT", (0.5, 0.5, 0.5), (1800, 1024, 1024), cases=4, channels=("CT",), classes=2, scatter=0)
    yield build("huge CT, 80 GB", (0.5,) * 3, (1800, 1024, 1024), cases=4, channels=("CT",), vram=80)
    yield build("ties in all axes", (1.0,) * 3, (192, 192, 192), scatter=0, vram=4)
    yield build("ties, 11 GB", (1.0,) * 3, (256, 256, 256), scatter=0, vram=11)
    yield build("ties in two axes", (2.0, 2.0, 1.0), (128, 128, 256), scatter=0, vram=6)
    yield build("exactly 3 times as coarse", (3.0, 1.0, 1.0), (30, 200, 200), scatter=0)
    yield build("just over 3 times as coarse", (3.0001, 1.0, 1.0), (30, 200, 200), scatter=0)
    yield build("exactly twice as coarse", (2.0, 1.0, 1.0), (64, 256, 256), scatter=0)
    yield build("coarse, but long", (4.0, 1.0, 1.0), (150, 200, 200), scatter=0)
    yield build("coarse axis in the middle", (0.8, 5.0, 0.8), (300, 20, 300), spread=0.4)
    yield build("coarse axis last", (0.8, 0.8, 6.0), (300, 300, 20), spread=0.4)
    yield build("10th percentile finer than the plane", (4, 1, 1), (10, 64, 64), mixed=[(0.5, 1, 1), *[(4, 1, 1)] * 4])
    yield build("extremely coarse", (50.0, 0.2, 0.2), (12, 1500, 1500), scatter=0)
    yield build("extremely fine axis", (0.01, 1.0, 1.0), (5000, 64, 64), scatter=0, cases=3)
    yield build("mixed spacings", (1.0,) * 3, (90, 180, 180), spread=0.7, cases=25, scatter=0.5)
    yield build("seventh digit", (0.7, 0.6999999, 0.7000001), (128, 160, 160), scatter=0)
    yield build("fractional, repeating", (1 / 3, 2 / 3, 2 / 7), (210, 111, 243), cases=7)
    yield build("120 classes", (1.0, 1.0, 1.0), (180, 200, 160), classes=120)
    yield build("120 classes, 4 GB", (1.0, 1.0, 1.0), (180, 200, 160), classes=120, vram=4)
    yield build("12 channels", (1.2, 0.9, 0.9), (90, 200, 180), channels=[f"map {n}" for n in range(12)], classes=3)
    yield build("every kind of channel", (1.0,) * 3, (90, 90, 90), channels=NAMES_WITH_A_MEANING, relative=0.5)
    yield build("same names", (1.0,) * 3, (90, 90, 90), channels=("T1", "T1"), relative=0.7499999)
    yield build("cropped to exactly three quarters", (1.0,) * 3, (90, 90, 90), relative=0.75)
    yield build("ignore label", (1.0, 0.8, 0.8), (120, 300, 300), classes=4, ignore=True, training=600)
    yield build("ignore label, regions", (1.0, 0.8, 0.8), (120, 300, 300), classes=3, ignore=True, regions=True)
    yield build("many small cases", (1.0,) * 3, (40, 48, 40), cases=30, training=5000)
    yield build("batch by voxels", (1.0,) * 3, (40, 48, 40), cases=4, training=4)
    yield build("description counts fewer", (1.0, 0.6, 0.6), (50, 300, 300), cases=20, training=2)


def beyond_the_edges() -> Iterator[Case]:
    """Where nnU-Net's planners stop with an error, do not stop, or come near it."""
    cube = (1.0, 1.0, 1.0)
    yield build("one row, large planes", cube, (1200, 1, 1200), scatter=0)
    yield build("two slices, huge planes", cube, (2, 6000, 6000), cases=2, scatter=0)
    yield build("two thick slices, huge planes", (5.0, 1.0, 1.0), (2, 6000, 6000), cases=2, scatter=0)
    yield build("fine slices, 119 classes", (0.5, 1.0, 1.0), (1, 3000, 3000), classes=119, scatter=0)
    yield build("half of them too thin", cube, (1, 300, 300), cases=4, mixed=[cube, (0.2, 1.0, 1.0)], scatter=0)
    yield build("a line of 60,000 voxels", cube, (2, 2, 60000), cases=2, scatter=0)
    yield build("a wire of 70,000 fine voxels", (1e-5, 1.0, 1.0), (70000, 8, 8), cases=2, scatter=0)
    yield build("a film of 20,000 pictures", (0.003, 1.0, 1.0), (20000, 64, 64), cases=2, scatter=0)


BUDGETS_GB = (2.0, 3.5, 4.0, 6.0, 8.0, 11.0, 12.0, 16.0, 24.0, 40.0, 48.0, 80.0)


def over_budgets() -> Iterator[Case]:
    """The same few data sets with budgets of 2 to 80 GB."""
    for vram in BUDGETS_GB:
        yield build(f"CT at {vram:g} GB", (2.0, 0.8, 0.8), (130, 512, 512), cases=5, channels=("CT",), vram=vram)
        yield build(f"MR at {vram:g} GB", (1.0, 0.9, 1.1), (160, 240, 200), cases=5, classes=8, vram=vram)


def shipped_cases() -> Iterator[Case]:
    """The bank."""
    for group in (like_public_sets, like_microscopy, pictures, at_the_edges, beyond_the_edges, over_budgets):
        yield from group()


# --- random ----------------------------------------------------------------------------------------------------------
def random_spacing(rng: random.Random) -> Triple:
    """From isotropic to extremely anisotropic, in round numbers and odd ones, with and without ties."""
    scale = rng.choice([1.0, 1.0, 1.0, 0.01, 1e-5, 100.0, rng.uniform(0.1, 10)])
    kind = rng.randrange(6)
    if kind == 0:
        values = [1.0, 1.0, 1.0]
    elif kind == 1:
        values = [rng.choice([2.0, 3.0, 3.0000001, 4.0, 5.0, 8.0, 20.0, 100.0]), 1.0, 1.0]
    elif kind == 2:
        values = [rng.choice([0.5, 1.0, 1.5, 2.0, 3.0, 6.0]) for _ in range(3)]
    elif kind == 3:
        values = [2 ** rng.uniform(-3, 3) for _ in range(3)]
    elif kind == 4:
        values = [1 + rng.uniform(-1e-6, 1e-6) for _ in range(3)]
    else:
        values = [round(rng.uniform(0.2, 6.0), 2) for _ in range(3)]
    rng.shuffle(values)
    return (values[0] * scale, values[1] * scale, values[2] * scale)


def random_shape(rng: random.Random) -> tuple[int, int, int]:
    """From single voxels to thousands of them."""
    kind = rng.randrange(6)
    if kind == 0:
        edge = rng.choice([8, 16, 64, 96, 100, 128, 192, 256])
        return (edge, edge, edge)
    if kind == 1:
        return (1, rng.randint(16, 3000), rng.randint(16, 3000))
    if kind == 2:
        return (rng.randint(1, 20), rng.randint(1, 20), rng.randint(1, 20))
    if kind == 3:
        return (rng.randint(2, 60), rng.randint(64, 768), rng.randint(64, 768))
    size = [round(2 ** rng.uniform(2, 9.5)) for _ in range(3)]
    return (size[0], size[1], size[2])


def random_cases(count: int, seed: int) -> Iterator[Case]:
    """Data sets drawn at random, the extremes among them."""
    rng = random.Random(seed)
    for number in range(count):
        shape = random_shape(rng)
        spacing = random_spacing(rng)
        if shape[0] == 1 and rng.random() < 0.7:
            spacing = (THICKNESS_OF_A_PICTURE_MM, spacing[1], spacing[2])
        num_cases = rng.choice([1, 2, 3, 4, 9])
        classes = rng.choice([1, 1, 2, 3, 7, 14, 40, 119])
        yield build(
            f"random {seed} {number}",
            spacing,
            shape,
            cases=num_cases,
            channels=[rng.choice(["MRI", *NAMES_WITH_A_MEANING]) for _ in range(rng.choice([1, 1, 2, 4, 9]))],
            classes=classes,
            spread=rng.choice([0.0, 0.0, 0.05, 0.5]),
            scatter=rng.choice([0.0, 0.0, 0.1, 0.4]),
            relative=rng.choice([1.0, 0.75, 0.7499, 0.3, rng.random()]),
            training=rng.choice([None, 1, 50, 1000]),
            vram=rng.choice([None, None, 2.0, 80.0, round(rng.uniform(2, 80), 1)]),
            ignore=rng.random() < 0.1,
            regions=classes < 8 and rng.random() < 0.1,
        )
