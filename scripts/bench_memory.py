"""Predicted memory of a training step against the measured peak.

    python scripts/bench_memory.py fit docs/benchmarks/memory.json      measures six plans and fits the constants
    python scripts/bench_memory.py verify docs/benchmarks/memory.json   measures twelve others against the constants
                                                                        that stand in autoseg/planning/memory.py

Each measurement is a process of its own that imports autoseg and then does two steps (`autoseg.training.trial`): on the
CPU the growth of its PSS, under the allocator settings of training. It is repeated, because where glibc's heap leaves
gaps is partly a matter of chance, and the median counts. `verify` ends with exit code 1 if a plan is off by more than
15 %. `table FILE` prints the tables of docs/benchmarks/memory.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from autoseg import runtime
from autoseg.domain.network_plan import NetworkPlan
from autoseg.domain.plan import AugmentationPlan, TrainingPlan
from autoseg.planning import memory
from autoseg.planning.memory import Overheads
from autoseg.training.trial import TrialRequest, run_trial

TOLERANCE = 0.15
RESIDUAL_BLOCKS = (1, 3, 4, 6, 6, 6, 6, 6)  # nnU-Net's residual encoder

# Feature maps that are made and dropped at the start of the backward pass, read off the sequence of operations: in
# float32 the gradient and its successor and half a map of conversions of layout; in bf16 the gradient, its copy in
# channels last, the product with the input and the gradient of the input.
FINEST_MAPS = {"fp32": 2.5, "bf16": 4.0}


@dataclass(frozen=True)
class Case:
    """A plan to measure.

    `first_halved` is the stage whose step is the first to halve the first axis (anisotropic images).
    """

    name: str
    patch: tuple[int, ...]
    stages: int
    batch: int
    precision: str
    channels: int = 1
    classes: int = 2
    residual: bool = False
    first_halved: int = 1

    def network(self) -> NetworkPlan:
        dims, most = len(self.patch), 512 if len(self.patch) == 2 else 320
        strides = [(1,) * dims]
        kernels = []
        for stage in range(1, self.stages):
            lags = dims == 3 and stage < self.first_halved
            strides.append((1, 2, 2) if lags else (2,) * dims)
            kernels.append((1, 3, 3) if lags else (3,) * dims)
        kernels.append((3,) * dims)
        encoder = RESIDUAL_BLOCKS[: self.stages] if self.residual else (2,) * self.stages
        return NetworkPlan(
            in_channels=self.channels,
            num_classes=self.classes,
            patch_size=self.patch,
            features_per_stage=tuple(min(32 * 2**stage, most) for stage in range(self.stages)),
            strides=tuple(strides),
            kernel_sizes=tuple(kernels),
            encoder_block="residual" if self.residual else "conv",
            blocks_per_stage_encoder=encoder,
            blocks_per_stage_decoder=(1 if self.residual else 2,) * (self.stages - 1),
        )

    def training(self) -> TrainingPlan:
        dims = len(self.patch)
        degrees = (30.0,) * (3 if dims == 3 else 1)
        augmentation = AugmentationPlan(mirror_axes=tuple(range(dims)), rotation_degrees=degrees)
        return TrainingPlan(batch_size=self.batch, batch_dice=dims == 2, augmentation=augmentation)


FITTED = (
    Case("hippocampus 3d_fullres", (40, 56, 40), 4, 7, "bf16", classes=3),
    Case("headneck_ct 3d_fullres, 1 GB", (64, 64, 64), 5, 2, "fp32", classes=10),
    Case("few voxels 3d", (16, 16, 16), 3, 2, "fp32"),
    Case("cardiac MR 2d", (320, 256), 7, 10, "bf16", classes=4),
    Case("residual CT 3d_fullres", (64, 80, 64), 5, 2, "bf16", residual=True),
    Case("residual MR 2d", (192, 192), 6, 8, "fp32", channels=2, residual=True),
)

VERIFIED = (
    Case("hippocampus 3d_fullres", (40, 56, 40), 4, 9, "fp32", classes=3),
    Case("hippocampus 2d", (56, 40), 4, 366, "bf16", classes=3),
    Case("CT 3d_fullres, 8 GB", (128, 128, 128), 6, 2, "bf16"),
    Case("prostate 3d_fullres", (16, 192, 160), 6, 2, "bf16", channels=2, classes=3, first_halved=3),
    Case("brain tumour 3d_fullres", (80, 96, 80), 5, 2, "fp32", channels=4, classes=4),
    Case("many organs 3d_lowres", (64, 64, 64), 5, 2, "bf16", classes=30),
    Case("residual hippocampus 3d", (40, 56, 40), 4, 4, "fp32", classes=3, residual=True),
    Case("residual CT 3d_fullres", (96, 96, 96), 5, 2, "bf16", residual=True),
    Case("residual knee MR 3d", (24, 128, 128), 6, 2, "bf16", classes=5, residual=True, first_halved=3),
    Case("residual membrane 2d", (256, 256), 7, 12, "bf16", residual=True),
    Case("microscopy 2d", (512, 512), 8, 4, "fp32"),
    Case("histology 2d", (384, 320), 7, 5, "bf16", channels=3, classes=5),
)


def measured(case: Case, repeats: int, device: str = "cpu") -> dict[str, Any]:
    """The plan, and the peak of its training step in so many fresh processes."""
    request = TrialRequest(
        network=case.network(),
        training=case.training(),
        device=device,
        precision=case.precision,
        seconds=0,
        max_steps=1,
    )
    results = [run_trial(request, time_limit_s=1800) for _ in range(repeats)]
    peaks = [result.memory_bytes for result in results if result.memory_bytes is not None]
    if len(peaks) != repeats:
        raise SystemExit(f"{case.name}: {results}")
    return {
        "name": case.name,
        "dims": len(case.patch),
        "encoder": "residual" if case.residual else "plain",
        "patch_size": list(case.patch),
        "features": list(case.network().features_per_stage),
        "batch_size": case.batch,
        "channels": case.channels,
        "classes": case.classes,
        "precision": case.precision,
        "num_threads": results[0].num_threads,
        "measured_bytes": median(peaks),
        "measured_runs_bytes": peaks,
    }


def predicted(case: Case, constants: Overheads | None = None, device: str = "cpu") -> dict[str, int]:
    kind = device.partition(":")[0]
    return memory.training_memory(
        case.network(), case.training(), case.precision, kind, constants=constants
    ).model_dump()


def fitted_constants(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """One base for all and a scatter for each precision, with the smallest squared relative errors."""
    precisions = sorted(FINEST_MAPS)
    left, right = [], []
    for case, row in zip(FITTED, rows, strict=True):

        def total(scatter: float, case: Case = case) -> int:
            return predicted(case, Overheads(0.0, FINEST_MAPS[case.precision], scatter))["total"]

        weight = 1 / row["measured_bytes"]
        slope = total(1.0) - total(0.0)
        left.append([weight] + [weight * slope * (case.precision == name) for name in precisions])
        right.append(weight * (row["measured_bytes"] - total(0.0)))
    base, *scatters = (float(value) for value in np.linalg.lstsq(np.array(left), np.array(right), rcond=None)[0])
    return {
        name: {"base_bytes": round(base, -5), "finest_maps": FINEST_MAPS[name], "scatter": round(scatter, 3)}
        for name, scatter in zip(precisions, scatters, strict=True)
    }


def with_errors(
    case: Case, row: dict[str, Any], constants: Overheads | None = None, device: str = "cpu"
) -> dict[str, Any]:
    found = predicted(case, constants, device)
    return {**row, "predicted": found, "error": found["total"] / row["measured_bytes"] - 1}


def fit(file: Path, repeats: int, reuse: bool) -> int:
    """On the CPU: elsewhere the constants are not fitted."""
    known = json.loads(file.read_text())["fit"]["rows"] if reuse else []
    kept = {row["name"]: row for row in known}
    rows = [kept.get(case.name) or measured(case, repeats) for case in FITTED]
    constants = fitted_constants(rows)
    rows = [
        with_errors(case, row, Overheads(**constants[case.precision])) for case, row in zip(FITTED, rows, strict=True)
    ]
    write(file, {"fit": {"constants": constants, "rows": rows, "environment": runtime.environment()}})
    print(json.dumps(constants, indent=2))
    print(table(rows))
    return 0


def verify(file: Path, repeats: int, device: str) -> int:
    frozen = {name: vars_of(memory.overheads("cpu", name)) for name in FINEST_MAPS}
    if json.loads(file.read_text())["fit"]["constants"] != frozen:
        raise SystemExit(
            f"the constants in autoseg/planning/memory.py are not those that {file} was fitted to: {frozen}"
        )
    rows = []
    for case in VERIFIED:
        rows.append(with_errors(case, measured(case, repeats, device), device=device))
        print(f"{case.name} {case.precision}: {rows[-1]['error']:+.1%}", flush=True)
    worst = max(abs(row["error"]) for row in rows)
    part = "verify" if device == "cpu" else f"verify {device}"
    write(file, {part: {"worst_error": worst, "rows": rows, "environment": runtime.environment()}})
    print(table(rows))
    return 0 if worst <= TOLERANCE else 1


def vars_of(constants: Overheads) -> dict[str, float]:
    return {name: getattr(constants, name) for name in ("base_bytes", "finest_maps", "scatter")}


def write(file: Path, part: dict[str, Any]) -> None:
    """Replace one part of the file."""
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**content, **part}, indent=2) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| plan | encoder | patch | batch | precision | measured, median (lowest to highest) | predicted | off by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        runs = [peak / 1e9 for peak in row["measured_runs_bytes"]]
        lines.append(
            f"| {row['name']} | {row['encoder']} | {'×'.join(map(str, row['patch_size']))} | {row['batch_size']} | "
            f"{row['precision']} | {row['measured_bytes'] / 1e9:.2f} GB ({min(runs):.2f} to {max(runs):.2f}) | "
            f"{row['predicted']['total'] / 1e9:.2f} GB | {row['error']:+.1%} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("fit", "verify", "table"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--reuse", action="store_true", help="fit: measure only plans that FILE does not hold yet")
    parser.add_argument("--device", default="cpu", help="verify: where; on CUDA torch counts what it gives out")
    arguments = parser.parse_args()
    if arguments.command == "table":
        content = json.loads(arguments.file.read_text())
        print("\n\n".join(table(content[part]["rows"]) for part in content))
        return 0
    if arguments.command == "fit":
        return fit(arguments.file, arguments.repeats, arguments.reuse)
    return verify(arguments.file, arguments.repeats, arguments.device)


if __name__ == "__main__":
    sys.exit(main())
