"""A data set of blobs and a tiny plan, for tests of training. Run as a program it trains one fold:

python toy_training.py FOLD_FOLDER STORE_FOLDER NUM_EPOCHS

Started as one of several processes it takes part in that training.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from autoseg.compute import Processes, joined
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
from autoseg.io.store import CaseStore, foreground_locations
from autoseg.training import orders
from autoseg.training.following import follow
from autoseg.training.records import TrainSettings
from autoseg.training.trainer import train_fold

SHAPE = (18, 20, 16)
PATCH = (16, 16, 16)
NUM_CASES = 5


def toy_plan(dims: int = 3, num_classes: int = 3, **training: object) -> Plan:
    network = NetworkPlan(
        in_channels=1,
        num_classes=num_classes,
        patch_size=PATCH[:dims],
        features_per_stage=(4, 8, 8),
        strides=((1,) * dims, (2,) * dims, (2,) * dims),
        kernel_sizes=((3,) * dims,) * 3,
        blocks_per_stage_encoder=(1, 1, 1),
        blocks_per_stage_decoder=(1, 1),
    )
    fields = {"batch_size": 3, "steps_per_epoch": 6, "validation_steps_per_epoch": 1, **training}
    augmentation = {"mirror_axes": tuple(range(dims)), "rotation_degrees": (30.0,) * (3 if dims == 3 else 1)}
    part = Configuration(
        preprocess=PreprocessPlan(target_spacing=(1.0,) * dims, normalization=(ChannelNormalization(scheme="zscore"),)),
        network=network,
        training=TrainingPlan.model_validate({"augmentation": augmentation, **fields}),
        inference=InferencePlan(mirror_axes=tuple(range(dims))),
    )
    classes = tuple(LabelClass(name=f"blob {index}", values=(index,)) for index in range(1, num_classes))
    return Plan(
        dataset="blobs",
        preset="default",
        vram_gb=8,
        fingerprint_digest="0",
        channels=(Channel(name="MR"),),
        labels=LabelSchema(classes=classes),
        configurations={"3d_fullres" if dims == 3 else "2d": part},
    )


def toy_case(number: int, shape: tuple[int, int, int] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """Two bright balls of different brightness in noise, and their labels."""
    rng = np.random.default_rng(number)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    labels = np.zeros(shape, np.int16)
    for label in (1, 2):
        centre = rng.uniform(4, np.asarray(shape) - 4)
        labels[((grid - centre) ** 2).sum(-1) < 16] = label
    image = (labels + 0.3 * rng.standard_normal(shape)).astype(np.float32)
    return image[None], labels


def fill_store(folder: Path, num_cases: int = NUM_CASES) -> CaseStore:
    store = CaseStore(folder)
    for number in range(num_cases):
        image, labels = toy_case(number)
        places = foreground_locations(labels, 3, np.random.default_rng(0))
        store.write(f"case_{number}", image, labels, places, spacing_mm=(1.0, 1.0, 1.0), sources=())
    return store


def train_toy(folder: Path, store: CaseStore, settings: TrainSettings, plan: Plan | None = None, **more: object):
    torch.set_num_threads(1)
    ids = store.ids()
    plan = plan or toy_plan()
    name = plan.default_configuration
    return train_fold(folder, plan, name, 0, store, ids[:-1], ids[-1:], settings, **more)


def train_toy_together(
    processes: Processes, folder: Path, store: CaseStore, settings: TrainSettings, plan: Plan | None = None
) -> None:
    """As `train_toy`, in each of several processes."""
    if processes.is_main:
        with orders.leading(processes):
            train_toy(folder, store, settings, plan, processes=processes)
        return
    plan = plan or toy_plan()
    follow(plan, plan.default_configuration, store, store.ids()[:-1], settings, processes)


def main() -> None:
    folder, store, num_epochs = Path(sys.argv[1]), CaseStore(Path(sys.argv[2])), int(sys.argv[3])
    settings = TrainSettings(num_epochs=num_epochs, device="cpu", precision="fp32", checkpoint_interval_s=0.0)
    torch.set_num_threads(1)
    with joined(torch.device("cpu")) as processes:
        train_toy_together(processes, folder, store, settings, toy_plan(ema_decay=0.9))


if __name__ == "__main__":
    main()
