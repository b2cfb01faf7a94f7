"""Memory of predicting one volume, by its length and by the number of classes.

    python scripts/bench_predict_memory.py IMAGE --out OUT [--side 256] [--lengths 100,200,400] [--axes 0,1,2]
        [--classes 3,40] [--patch 128] [--features 32,64,128,256,320,320] [--precision auto] [--tta none]
        [--change 1.0] [--skip-empty] [--wanted probabilities,uncertainty,statistics]

Volumes of SIDE x SIDE x LENGTH voxels are made of IMAGE by repeating it in mirror images, with each axis in turn as the
long one; networks have weights at random. Each prediction is a process of its own that reads the volume, prepares it,
predicts it and writes the label map. Its proportional set size is looked at many times a second; what `import torch`
takes is taken away, and so are the image as it was read, the prepared image and the label map. What is left must not
grow with the length. --change is the factor between the volume's spacing and that of the plan (2: the network sees
half as many voxels along each axis). Adds a run to OUT.json and OUT.md (tables alone), and prints the table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench_processes import GB, pss_bytes
from bench_volumes import make_volume

LOOK_INTERVAL_S = 0.05


def child(spec: dict[str, Any]) -> None:
    """Predict one volume; prints what `import torch` took, and what was in memory by right."""
    import torch

    baseline = pss_bytes("self")
    from autoseg.inference.gather import Wanted
    from autoseg.inference.predictor import Predictor
    from autoseg.pipeline.prediction import predict

    sizes: dict[str, int] = {}
    prepare = Predictor.prepare

    def noted(self: Predictor, volume: Any) -> Any:
        prepared = prepare(self, volume)
        sizes["image_bytes"], sizes["prepared_bytes"] = volume.array.nbytes, prepared.image.nbytes
        return prepared

    Predictor.prepare = noted  # type: ignore[method-assign]
    torch.set_num_threads(spec["threads"])
    started = time.monotonic()
    outcome = predict(
        Path(spec["model"]),
        [Path(spec["image"])],
        Path(spec["out"]),
        device="cpu",
        precision=spec["precision"],
        tta=spec["tta"],
        skip_empty=spec["skip_empty"],
        wanted=Wanted.of(spec["wanted"]),
        restart=True,
    )
    outcome.raise_failures()
    seconds = time.monotonic() - started
    print(json.dumps({"baseline_bytes": baseline, "seconds": seconds, **sizes}))


def measured(spec: dict[str, Any]) -> dict[str, Any]:
    """Run one prediction and look at it."""
    command = [sys.executable, __file__, "--child", json.dumps(spec)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, pss_bytes(process.pid))
        time.sleep(LOOK_INTERVAL_S)
    assert process.stdout is not None
    text = process.stdout.read()
    if process.returncode:
        sys.exit(f"a prediction failed: {spec}")
    return {"peak_bytes": peak, **json.loads(text.splitlines()[-1])}


def make_model(folder: Path, wanted: argparse.Namespace, num_classes: int) -> None:
    """A model with weights at random, for one channel of 1 mm."""
    from autoseg.domain.dataset import Channel, LabelClass, LabelSchema
    from autoseg.domain.plan import (
        ChannelNormalization,
        Configuration,
        InferencePlan,
        NetworkPlan,
        Plan,
        PreprocessPlan,
        TrainingPlan,
    )
    from autoseg.io.model import ModelCard, save_model
    from autoseg.network.unet import build

    features = tuple(int(word) for word in wanted.features.split(","))
    stages = len(features)
    part = Configuration(
        preprocess=PreprocessPlan(
            target_spacing=(wanted.change,) * 3, normalization=(ChannelNormalization(scheme="zscore"),)
        ),
        network=NetworkPlan(
            in_channels=1,
            num_classes=num_classes,
            patch_size=(wanted.patch,) * 3,
            features_per_stage=features,
            strides=((1, 1, 1), *((2, 2, 2),) * (stages - 1)),
            kernel_sizes=((3, 3, 3),) * stages,
            blocks_per_stage_encoder=(2,) * stages,
            blocks_per_stage_decoder=(2,) * (stages - 1),
        ),
        training=TrainingPlan(batch_size=2),
        inference=InferencePlan(),
    )
    classes = tuple(LabelClass(name=f"class {number}", values=(number,)) for number in range(1, num_classes))
    plan = Plan(
        dataset="volumes",
        preset="default",
        vram_gb=8,
        fingerprint_digest="0" * 12,
        channels=(Channel(name="CT"),),
        labels=LabelSchema(classes=classes),
        configurations={"3d_fullres": part},
    )
    card = ModelCard(plan=plan, configuration="3d_fullres", fold=0, digest=plan.digest())
    save_model(folder, build(part.network, seed=0).state_dict(), card)


def table(rows: list[dict[str, Any]]) -> str:
    """A line a volume."""
    from bench_lines import markdown

    head = [
        "classes",
        "voxels",
        "s",
        "peak GB",
        "import torch GB",
        "images and map GB",
        "the rest GB",
        "the rest, above 14 bytes a voxel, GB",
    ]
    lines = []
    for row in rows:
        own = row["image_bytes"] + row["prepared_bytes"] + row["label_bytes"]
        taken = row["peak_bytes"] - row["baseline_bytes"]
        sizes = (row["peak_bytes"], row["baseline_bytes"], own, taken - own, taken - 14 * row["voxels"])
        lines.append(
            [
                str(row["classes"]),
                "×".join(map(str, row["shape"])),
                f"{row['seconds']:.0f}",
                *(f"{size / GB:.2f}" for size in sizes),
            ]
        )
    return markdown(head, lines)


def report(runs: list[dict[str, Any]]) -> str:
    """A table for each run, under its settings."""
    return "\n\n".join(
        f"`{' '.join(f'--{key} {value}' for key, value in run['settings'].items())}`\n\n{table(run['results'])}"
        for run in runs
    )


def main() -> None:
    """Measure, write and print after each volume."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, help="without ending")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--lengths", default="100,200,400")
    parser.add_argument("--axes", default="0,1,2")
    parser.add_argument("--classes", default="3,40")
    parser.add_argument("--patch", type=int, default=128)
    parser.add_argument("--features", default="32,64,128,256,320,320")
    parser.add_argument("--change", type=float, default=1.0)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--tta", default="none")
    parser.add_argument("--skip-empty", action="store_true")
    parser.add_argument("--wanted", default="", help="what is written besides label maps")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.child:
        child(json.loads(wanted.child))
        return
    from autoseg import runtime

    rows: list[dict[str, Any]] = []
    file = wanted.out.with_suffix(".json")
    runs = json.loads(file.read_text())["runs"] if file.is_file() else []
    left_out = ("image", "out", "child", "axes", "lengths", "classes")
    given = {key: str(value) for key, value in vars(wanted).items() if key not in left_out}
    runs.append({"settings": given, "environment": runtime.environment(), "results": rows})
    with TemporaryDirectory() as name:
        folder = Path(name)
        for num_classes in (int(word) for word in wanted.classes.split(",")):
            make_model(folder / str(num_classes), wanted, num_classes)
            for axis, length in [(int(a), int(n)) for a in wanted.axes.split(",") for n in wanted.lengths.split(",")]:
                shape = tuple(length if other == axis else wanted.side for other in range(3))
                make_volume(wanted.image, shape, folder / "volume.nii.gz")
                spec = {
                    "image": str(folder / "volume.nii.gz"),
                    "model": str(folder / str(num_classes)),
                    "out": str(folder / "out"),
                    "precision": wanted.precision,
                    "tta": wanted.tta,
                    "skip_empty": wanted.skip_empty,
                    "wanted": wanted.wanted.split(","),
                    "threads": wanted.threads,
                }
                voxels = shape[0] * shape[1] * shape[2]
                facts = {"classes": num_classes, "shape": shape, "voxels": voxels, "label_bytes": voxels}
                rows.append(facts | measured(spec))
                file.write_text(json.dumps({"runs": runs}, indent=2) + "\n")
                wanted.out.with_suffix(".md").write_text(report(runs) + "\n")
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
