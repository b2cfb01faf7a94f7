"""Fingerprints for the planner's tests: written by hand, drawn by hypothesis, or read from the golden files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from autoseg.domain.dataset import Channel, LabelClass, LabelSchema
from autoseg.domain.fingerprint import Budget, ChannelIntensity, Fingerprint
from autoseg.domain.plan import Plan
from autoseg.planning.planner import make_plan
from autoseg.planning.presets import preset_rules

GOLDEN = Path(__file__).parent / "golden" / "nnunet"
INTENSITY = ChannelIntensity(
    mean=40.0, median=38.0, std=92.0, minimum=-1000.0, maximum=3000.0, percentile_00_5=-96.0, percentile_99_5=644.0
)


def schema(num_foreground: int = 1, ignore: int | None = None) -> LabelSchema:
    classes = tuple(LabelClass(name=f"class {value}", values=(value,)) for value in range(1, num_foreground + 1))
    return LabelSchema(classes=classes, ignore=ignore)


def fingerprint_of(
    spacings: Sequence[Sequence[float]],
    shapes: Sequence[Sequence[int]],
    *,
    channels: Sequence[str] = ("MRI",),
    num_foreground: int = 1,
    relative_size: float = 1.0,
) -> Fingerprint:
    return Fingerprint(
        channels=tuple(channels),
        num_classes=num_foreground + 1,
        num_training_cases=len(spacings),
        spacings_mm=tuple((z, y, x) for z, y, x in spacings),
        shapes=tuple((z, y, x) for z, y, x in shapes),
        median_relative_size_fraction=relative_size,
        intensities=(INTENSITY,) * len(channels),
    )


def plan_of(fingerprint: Fingerprint, preset: str = "default", vram_gb: float | None = None, **kwargs: Any) -> Plan:
    """A plan; `labels` may be given, and the other numbers of a `Budget`."""
    labels = kwargs.pop("labels", schema(fingerprint.num_classes - 1))
    channels = tuple(Channel(name=name) for name in fingerprint.channels)
    return make_plan(fingerprint, "test", labels, channels, preset_rules(preset), Budget(vram_gb=vram_gb, **kwargs))


def load_golden(name: str) -> dict[str, Any]:
    """nnU-Net's own fingerprint, its data set description, and the plans that it made of them."""
    golden: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())
    return golden


@st.composite
def fingerprints(draw: st.DrawFn, max_cases: int = 4) -> Fingerprint:
    """Data sets with spacings of 0.1 to 10 mm and 4 to 300 voxels an axis, alike or mixed, with 1 to 40 classes."""
    base = [draw(st.floats(0.1, 10.0)) for _ in range(3)]
    spread = draw(st.sampled_from([1.0, 1.0, 1.3, 3.0]))
    size = [draw(st.integers(4, 250)) for _ in range(3)]
    count = draw(st.integers(1, max_cases))
    spacings = [[value * draw(st.floats(1.0, spread)) for value in base] for _ in range(count)]
    shapes = [[max(1, round(value * draw(st.floats(0.8, 1.25)))) for value in size] for _ in range(count)]
    return fingerprint_of(spacings, shapes, num_foreground=draw(st.sampled_from([1, 1, 2, 7, 40])))
