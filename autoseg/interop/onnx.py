"""Models as ONNX files, each with a JSON card that has what is needed to run it without autoseg."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from autoseg import __version__
from autoseg.domain.dataset import Channel, LabelSchema
from autoseg.domain.plan import InferencePlan
from autoseg.domain.preprocess_plan import PreprocessPlan
from autoseg.domain.sides import Sides
from autoseg.domain.values import Value
from autoseg.errors import ConfigError
from autoseg.inference.fitting import common_settings
from autoseg.io.files import file_digest, write_bytes, write_text
from autoseg.io.model import Model
from autoseg.network.export import IMAGE, LOGITS, ONNX_OPSET, MeanOf, onnx_of
from autoseg.network.unet import restore

SCHEMA_VERSION = 1

ENDING = ".onnx"

_PACKAGES = ("onnx", "onnxscript")


class Member(Value):
    """One of the networks whose logits the file averages."""

    fold: int | Literal["all"]
    weights_sha256: str


class Output(Value):
    """What one output channel stands for.

    Attributes:
        name: "background", or that of the class or region.
        values: Label values that belong to it; of the background 0.
    """

    name: str
    values: tuple[int, ...]


class OnnxCard(Value):
    """What an ONNX file is, and all that running it takes.

    Attributes:
        schema_version: Of this card.
        made_by: Program and version.
        onnx_sha256: SHA-256 of the file beside the card.
        opset: Version of ONNX's operators.
        dataset: Name of the training data.
        plan_digest: Of the plan that the networks were trained by.
        configuration: Of the plan.
        members: Networks whose mean logits the file gives.
        input_name: Of the input, float32, (n, input channels, *patch_size) with any n.
        output_name: Of the output, float32, (n, outputs, *patch_size): logits.
        num_input_channels: Of the input: `channels` in order; of a cascade then, for each foreground class of the
            previous stage's label map, a channel with 1 where the map has it, else 0.
        patch_size: Voxels of a tile, in the network's axis order.
        activation: What makes probabilities of logits: "softmax" over the outputs, or a "sigmoid" each (regions).
        outputs: In order.
        channels: Of the image, in order.
        labels: Classes or regions; which value is written where regions overlap.
        preprocess: How an image becomes the input. Axes: reorient (`orientation`), then permute by `axis_order` from
            x, y, z; crop to voxels that are not 0; normalise each channel; resample to `target_spacing` (mm).
        inference: Tiles overlap by `overlap` of the patch, and are weighted by a Gaussian of `gaussian_sigma_fraction`
            of it; `mirror_axes` may be flipped at test time.
        sides: What mirroring from left to right does; None where no classes come in pairs.
        previous_stage: Of a cascade: the configuration whose label map is part of the input; else None.
    """

    schema_version: int = SCHEMA_VERSION
    made_by: str
    onnx_sha256: str
    opset: int = ONNX_OPSET
    dataset: str
    plan_digest: str
    configuration: str
    members: tuple[Member, ...]
    input_name: str = IMAGE
    output_name: str = LOGITS
    num_input_channels: int
    patch_size: tuple[int, ...]
    activation: Literal["softmax", "sigmoid"]
    outputs: tuple[Output, ...]
    channels: tuple[Channel, ...]
    labels: LabelSchema
    preprocess: PreprocessPlan
    inference: InferencePlan
    sides: Sides | None = None
    previous_stage: str | None = None


def require_onnx() -> None:
    """Say what to install.

    Raises:
        ConfigError: The packages that write ONNX are not installed.
    """
    lacking = [name for name in _PACKAGES if find_spec(name) is None]
    if lacking:
        raise ConfigError(
            f"writing ONNX needs {' and '.join(lacking)}, which {'is' if len(lacking) == 1 else 'are'} not installed",
            hint="Install what it needs with: pip install 'autoseg-unet[onnx]'",
        )


def card_path(path: Path) -> Path:
    """Where the card of an ONNX file lies: X.json beside X.onnx."""
    return path.with_suffix(".json")


def export_onnx(models: Sequence[Model], path: Path) -> OnnxCard:
    """Write models as one ONNX file that gives their mean logits, and the card beside it.

    Args:
        models: At least one, of one configuration.
        path: Ends in .onnx.

    Returns:
        The card.

    Raises:
        ConfigError: A package is missing, or the path has another ending.
        ModelError: The models do not belong together, or have no ONNX form.
    """
    require_onnx()
    if path.suffix != ENDING:
        raise ConfigError(f"{path} does not end in {ENDING}", hint=f"Write to {path.with_suffix(ENDING)}, for example.")
    settings = common_settings(models)
    network = MeanOf([restore(settings.network, model.weights) for model in models])
    write_bytes(path, onnx_of(network.eval(), settings.network))
    card = models[0].card
    labels = card.plan.labels
    outputs = [Output(name=item.name, values=item.values) for item in labels.classes]
    if not labels.has_regions:
        outputs.insert(0, Output(name="background", values=(0,)))
    written = OnnxCard(
        made_by=f"autoseg {__version__}",
        onnx_sha256=file_digest(path),
        dataset=card.plan.dataset,
        plan_digest=card.digest,
        configuration=card.configuration,
        members=tuple(Member(fold=item.card.fold, weights_sha256=item.card.weights_sha256) for item in models),
        num_input_channels=settings.network.in_channels,
        patch_size=settings.network.patch_size,
        activation="sigmoid" if labels.has_regions else "softmax",
        outputs=tuple(outputs),
        channels=card.plan.channels,
        labels=labels,
        preprocess=settings.preprocess,
        inference=settings.inference,
        sides=settings.sides,
        previous_stage=settings.previous_stage,
    )
    write_text(card_path(path), written.to_json())
    return written
