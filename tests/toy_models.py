"""A model and a volume small enough to predict in a moment, with weights at random."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from autoseg.domain.dataset import Channel, LabelClass, LabelSchema
from autoseg.domain.geometry import Geometry, Volume
from autoseg.domain.plan import (
    ChannelNormalization,
    Configuration,
    InferencePlan,
    NetworkPlan,
    Plan,
    PreprocessPlan,
    TrainingPlan,
)
from autoseg.inference.predictor import Predictor
from autoseg.io.model import Model, ModelCard
from autoseg.network.unet import build
from autoseg.preprocessing.resample import resample_image
from autoseg.preprocessing.transform import Prepared

SCHEMA = LabelSchema(classes=(LabelClass(name="low", values=(7,)), LabelClass(name="high", values=(300,))))


def toy_model(seed: int = 0, dims: int = 3, spacing: tuple[float, ...] = (2.0, 1.5, 1.0), **network: object) -> Model:
    settings: dict[str, object] = {
        "in_channels": 1,
        "num_classes": 3,
        "patch_size": (8,) * dims,
        "features_per_stage": (3, 6),
        "strides": ((1,) * dims, (2,) * dims),
        "kernel_sizes": ((3,) * dims,) * 2,
        "blocks_per_stage_encoder": (1, 1),
        "blocks_per_stage_decoder": (1,),
    }
    configuration = Configuration(
        preprocess=PreprocessPlan(
            target_spacing=spacing[-dims:], normalization=(ChannelNormalization(scheme="zscore"),)
        ),
        network=NetworkPlan.model_validate(settings | network),
        training=TrainingPlan(batch_size=2, augmentation={"mirror_axes": tuple(range(dims))}),  # type: ignore[arg-type]
        inference=InferencePlan(mirror_axes=tuple(range(dims))),
    )
    plan = Plan(
        dataset="toy",
        preset="default",
        vram_gb=8,
        fingerprint_digest="0" * 12,
        channels=(Channel(name="MR"),),
        labels=SCHEMA,
        configurations={"3d_fullres": configuration},
    )
    weights = build(configuration.network, seed=seed).state_dict()
    return Model(weights, ModelCard(plan=plan, configuration="3d_fullres", fold=0, digest=plan.digest()))


def toy_volume(shape: tuple[int, int, int] = (13, 18, 9), spacing: tuple[float, ...] = (1.3, 1.0, 3.0)) -> Volume:
    rng = np.random.default_rng(0)
    array = np.zeros((1, *shape), np.float32)
    # A border of zeros is cropped away, and a smooth image keeps class regions larger than a voxel.
    inner = tuple(slice(1, size - 1) if size > 4 else slice(None) for size in shape)
    array[(0, *inner)] = rng.normal(size=array[(0, *inner)].shape) + 5
    affine = np.diag([-spacing[0], spacing[1], -spacing[2], 1.0])
    return Volume(array, Geometry(shape, affine))


def logits_of_the_crop(predictor: Predictor, prepared: Prepared) -> NDArray[np.float32]:
    """(K, *crop) logits on the grid of the cropped image, all at once."""
    with torch.inference_mode():
        axis, stream = predictor.logits(prepared)
        logits = torch.cat([slab.clone() for _, _, slab in stream], dim=axis + 1).numpy()
    trail, order = prepared.trail, predictor.settings.preprocess.logits_order
    return resample_image(logits, trail.crop_shape, trail.planned_spacing_mm, trail.source_spacing_mm, order=order)
