"""A MONAI bundle: what its configs/metadata.json and configs/inference.json say.

Source: the MONAI bundle specification; docs/decisions/0047.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from autoseg import __version__
from autoseg.domain.inference import DEFAULT_TTA
from autoseg.domain.plan import Configuration
from autoseg.domain.values import Value
from autoseg.io.model import ModelCard
from autoseg.runtime import versions

CONFIGS = "configs"
"""Folder of what MONAI reads."""

METADATA = "metadata.json"

INFERENCE = "inference.json"

LOGGING = "logging.conf"

SCHEMA = "https://project-monai.github.io/schema/meta_schema_20240725.json"
"""What `python -m monai.bundle verify_metadata` holds the metadata against."""

BUNDLE_VERSION = "1.0.0"
"""Of every bundle: another model is another bundle, and its weights are named by their SHA-256."""

PARTS = "autoseg.pipeline.bundle"
"""The module with the parts that `inference.json` names."""

_PACKAGE = "autoseg-unet"

_NOT_STATED = "Not stated."

_REFERENCES = (
    "Isensee, F., Jaeger, P. F., Kohl, S. A. A., Petersen, J., Maier-Hein, K. H.: nnU-Net: a self-configuring method "
    "for deep learning-based biomedical image segmentation. Nature Methods 18, 203-211 (2021).",
)

_INTENDED_USE = "Research. It is no medical device: look at every result that matters."

# What MONAI takes at the beginning of a text for an expression, a reference, or a piece of another file.
_SPECIAL = ("$", "@", "%")

LOGGING_CONF = """\
[loggers]
keys=root

[handlers]
keys=console

[formatters]
keys=line

[logger_root]
level=INFO
handlers=console

[handler_console]
class=StreamHandler
level=INFO
formatter=line
args=(sys.stdout,)

[formatter_line]
format=%(asctime)s - %(name)s - %(levelname)s - %(message)s
"""
"""Lines of the log, autoseg's own included, to the terminal."""


class TensorFormat(Value):
    """What a tensor holds, channels first; see "Tensor format specifiers" in MONAI's specification.

    Attributes:
        type: Always an image.
        format: "magnitude"; of outputs "labels" (the greatest channel wins), "classes" (they overlap) or
            "segmentation" (one channel of label values).
        modality: Of an image.
        num_channels: Number of channels.
        spatial_shape: Voxels; "*" is any number.
        dtype: As torch calls it.
        value_range: Lowest and highest value; () is not known.
        is_patch_data: Whether it is a part of an image.
        channel_def: What each channel, or each value of a segmentation, stands for.
    """

    type: Literal["image"] = "image"
    format: Literal["magnitude", "labels", "classes", "segmentation"]
    modality: str = "n/a"
    num_channels: int
    spatial_shape: tuple[int | str, ...]
    dtype: str = "float32"
    value_range: tuple[float, ...] = ()
    is_patch_data: bool
    channel_def: dict[str, str]


class NetworkFormat(Value):
    """What goes into a network, what comes out, and what becomes of that."""

    inputs: dict[str, TensorFormat]
    outputs: dict[str, TensorFormat]
    post_processed_outputs: dict[str, TensorFormat]


class BundleMetadata(Value):
    """All of metadata.json; see MONAI's specification.

    Attributes:
        schema_url: Written as `schema`.
        required_packages_version: What the bundle needs besides MONAI, each at least in this version.
        network_data_format: Of the first member, see `bundle_metadata`.
        weights_sha256: SHA-256 of every weight file by its place in the bundle. This key is our own.
    """

    schema_url: str = Field(default=SCHEMA, serialization_alias="schema")
    version: str = BUNDLE_VERSION
    changelog: dict[str, str]
    monai_version: str
    pytorch_version: str
    numpy_version: str
    required_packages_version: dict[str, str]
    name: str
    task: str
    description: str
    authors: str = _NOT_STATED
    copyright: str
    data_source: str
    data_type: str
    image_classes: str
    label_classes: str
    pred_classes: str
    intended_use: str = _INTENDED_USE
    references: tuple[str, ...] = _REFERENCES
    network_data_format: NetworkFormat
    weights_sha256: dict[str, str]

    def contents(self) -> dict[str, Any]:
        """What the file holds, with MONAI's names."""
        return self.model_dump(mode="json", by_alias=True)


def bundle_metadata(cards: Sequence[ModelCard], weights: dict[str, str], licence_file: str) -> BundleMetadata:
    """The metadata of a bundle.

    Args:
        cards: Of every model that gives results; the configuration of the first one is described in
            `network_data_format`.
        weights: SHA-256 of every weight file by its place in the bundle.
        licence_file: Its place in the bundle.
    """
    plan, found = cards[0].plan, versions()
    channels = ", ".join(channel.name for channel in plan.channels)
    classes = ", ".join(plan.labels.names)
    values = "; ".join(f"{', '.join(map(str, item.values))}: {item.name}" for item in plan.labels.classes)
    members = ", ".join(dict.fromkeys(card.configuration for card in cards))
    number = "1 U-Net" if len(cards) == 1 else f"{len(cards)} U-Nets"
    return BundleMetadata(
        changelog={BUNDLE_VERSION: f"exported by autoseg {__version__}"},
        monai_version=found["monai"],
        pytorch_version=_release(found["torch"]),
        numpy_version=found["numpy"],
        required_packages_version={_PACKAGE: _release(__version__)},
        name=literal(plan.dataset),
        task=f"Segmentation of {classes} in {channels}",
        description=f"{number} ({members}), trained by autoseg on the data set {plan.dataset}. Reading, preprocessing, "
        f"tiles, ensembling and post-processing are autoseg's, by the inferer; network_def is the mean of the networks "
        f"of {cards[0].configuration}, for tiles in the network's axis order.",
        copyright=f"See {licence_file}.",
        data_source=f"The data set {plan.dataset}",
        data_type="Whatever autoseg reads: NIfTI, DICOM series, NRRD, MetaImage, MGH, TIFF, PNG and others",
        image_classes=f"Channels, in this order: {channels}",
        label_classes=f"Label values: 0: background; {values}",
        pred_classes=f"Label values: 0: background; {values}",
        network_data_format=_network_format(cards[0]),
        weights_sha256=weights,
    )


def inference_config() -> dict[str, Any]:
    """The contents of inference.json: the parts that MONAI makes, with every setting as a key of its own.

    The keys are those that MONAI asks of a workflow for inference (`monai.bundle.properties.InferProperties`), and the
    options of `autoseg predict`.
    """
    settings = ("precision", "tta", "overlap", "skip_empty", "engine")
    return {
        "imports": ["$from autoseg.inference.engines import pick_device_for"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/eval'",
        "precision": "auto",
        "tta": DEFAULT_TTA,
        "overlap": None,
        "skip_empty": False,
        "engine": "auto",
        "restart": False,
        "device": "$pick_device_for(@engine, 'auto')",
        "network_def": {"_target_": f"{PARTS}.bundle_network", "bundle_root": "@bundle_root"},
        "inferer": {
            "_target_": f"{PARTS}.BundleInferer",
            "bundle_root": "@bundle_root",
            "device": "@device",
            **{name: f"@{name}" for name in settings},
        },
        "dataset": {"_target_": f"{PARTS}.BundleDataset", "data": "@dataset_dir", "bundle_root": "@bundle_root"},
        "evaluator": {
            "_target_": f"{PARTS}.BundleEvaluator",
            "dataset": "@dataset",
            "inferer": "@inferer",
            "output_dir": "@output_dir",
            "restart": "@restart",
        },
        "run": ["$@evaluator.run()"],
    }


def literal(text: str) -> str:
    """A text that MONAI's parser leaves alone: names in quotation marks where it would take them for something else."""
    return f"'{text}'" if text.startswith(_SPECIAL) else text


def _network_format(card: ModelCard) -> NetworkFormat:
    labels, settings = card.plan.labels, card.settings
    patch = settings.network.patch_size
    outputs = [item.name for item in labels.classes]
    if not labels.has_regions:
        outputs.insert(0, "background")
    inputs = TensorFormat(
        format="magnitude",
        modality=literal(", ".join(channel.name for channel in card.plan.channels)),
        num_channels=settings.network.in_channels,
        spatial_shape=patch,
        is_patch_data=True,
        channel_def=_numbered(_input_names(card, settings)),
    )
    logits = TensorFormat(
        format="classes" if labels.has_regions else "labels",
        num_channels=len(outputs),
        spatial_shape=patch,
        is_patch_data=True,
        channel_def=_numbered(outputs),
    )
    meanings: dict[str, list[str]] = {"0": ["background"]}
    for item in labels.classes:
        for value in item.values:
            meanings.setdefault(str(value), []).append(item.name)
    label_map = TensorFormat(
        format="segmentation",
        num_channels=1,
        spatial_shape=("*",) * 3,
        dtype="int32",
        value_range=(0, max(map(int, meanings))),
        is_patch_data=False,
        channel_def={value: literal(", ".join(names)) for value, names in meanings.items()},
    )
    return NetworkFormat(inputs={"image": inputs}, outputs={"pred": logits}, post_processed_outputs={"pred": label_map})


def _input_names(card: ModelCard, settings: Configuration) -> list[str]:
    """Channels of the image, and those of a cascade that the previous stage's label map becomes."""
    names = [f"{channel.name}, preprocessed" for channel in card.plan.channels]
    if settings.previous_stage is not None:
        names += [f"{item.name} by {settings.previous_stage}" for item in card.plan.labels.classes]
    return names


def _numbered(names: Sequence[str]) -> dict[str, str]:
    return {str(number): literal(name) for number, name in enumerate(names)}


def _release(version: str) -> str:
    """The version without what says how it was built: 2.8.0 of 2.8.0+cpu."""
    found = re.match(r"\d+(\.\d+)*", version)
    return found.group() if found else version
