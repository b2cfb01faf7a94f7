"""nnU-Net v2's `plans.json`, of every version of its format, as values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, Field, ValidationError

from autoseg.domain.values import Value, validation_problems
from autoseg.errors import ModelError
from autoseg.io.files import read_json

PLAIN, RESIDUAL = "PlainConvUNet", "ResidualEncoderUNet"


class _Foreign(Value):
    """Keys that prediction does not need are nnU-Net's own business."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="ignore", populate_by_name=True)


class ForeignNetwork(_Foreign):
    """The network of a configuration.

    Attributes:
        kind: The class, such as "dynamic_network_architectures.architectures.unet.PlainConvUNet".
        arguments: What it is built with.
    """

    kind: str = Field(alias="network_class_name")
    arguments: dict[str, Any] = Field(alias="arch_kwargs")


class ForeignConfiguration(_Foreign):
    """A configuration, with what it inherits.

    Attributes:
        preprocessor: The class that prepares images.
        patch_size: Two or three entries.
        spacing: Target spacing after the transposition, as many entries.
        normalization: The class that scales each channel.
        use_mask: Of each channel, whether its mean and deviation are those of the non-zero region.
        previous_stage: Of a cascade.
    """

    preprocessor: str = Field(default="DefaultPreprocessor", alias="preprocessor_name")
    batch_size: int
    batch_dice: bool = False
    patch_size: tuple[int, ...]
    spacing: tuple[float, ...]
    normalization: tuple[str, ...] = Field(alias="normalization_schemes")
    use_mask: tuple[bool | None, ...] = Field(alias="use_mask_for_norm")
    resampling_fn_data: str
    resampling_fn_data_kwargs: dict[str, Any]
    resampling_fn_seg: str
    resampling_fn_seg_kwargs: dict[str, Any]
    resampling_fn_probabilities: str
    resampling_fn_probabilities_kwargs: dict[str, Any]
    architecture: ForeignNetwork
    previous_stage: str | None = None


class ForeignPlans(_Foreign):
    """The plans of a data set.

    Attributes:
        reader: The class that reads images.
        transpose_forward: Axis a of the prepared image is axis ``transpose_forward[a]`` of the image as read.
        intensities: Of the foreground, by the channel's number.
        configurations: By name, as they stand in the file.
    """

    dataset_name: str
    plans_name: str = ""
    planner: str = Field(default="", alias="experiment_planner_used")
    label_manager: str = "LabelManager"
    reader: str = Field(alias="image_reader_writer")
    transpose_forward: tuple[int, int, int]
    transpose_backward: tuple[int, int, int]
    intensities: dict[str, dict[str, Any]] = Field(
        default_factory=dict, alias="foreground_intensity_properties_per_channel"
    )
    configurations: dict[str, dict[str, Any]]

    def configuration(self, name: str, where: Path) -> ForeignConfiguration:
        """One configuration, with what it inherits from others and, of an older format, its network.

        Args:
            name: Of the configuration.
            where: The file, for messages.

        Raises:
            ModelError: There is none of this name, it inherits from itself, or entries are missing or of another type.
        """
        resolved = _inherited(self.configurations, name, where)
        try:
            return ForeignConfiguration.model_validate(_with_architecture(resolved, name, where))
        except ValidationError as problem:
            raise ModelError(
                f"the configuration {name} in {where} cannot be understood", problems=validation_problems(problem)
            ) from None


def read_plans(path: Path) -> ForeignPlans:
    """Read plans.json.

    Raises:
        ModelError: It is not readable, or entries are missing or of another type.
    """
    data = read_json(path, ModelError)
    if isinstance(data, dict) and "foreground_intensity_properties_by_modality" in data:  # the name of older versions
        older = data["foreground_intensity_properties_by_modality"]
        data = {"foreground_intensity_properties_per_channel": older} | data
    try:
        return ForeignPlans.model_validate(data)
    except ValidationError as problem:
        raise ModelError(
            f"{path} cannot be understood as plans of nnU-Net v2", problems=validation_problems(problem)
        ) from None


def _inherited(configurations: Mapping[str, Mapping[str, Any]], name: str, where: Path) -> dict[str, Any]:
    chain: list[str] = []
    following: Any = name
    while following is not None:
        if following in chain:
            raise ModelError(f"{where}: the configuration {name} inherits from itself ({' from '.join(chain)})")
        if following not in configurations:
            raise ModelError(
                f"{where} has no configuration {following!r}; there are {', '.join(configurations)}",
                hint="The plans may be those of another model.",
            )
        chain.append(following)
        following = configurations[following].get("inherits_from")
    resolved: dict[str, Any] = {}
    for item in reversed(chain):
        resolved |= configurations[item]
    return resolved


def _with_architecture(data: dict[str, Any], name: str, where: Path) -> dict[str, Any]:
    """The configuration with its network as newer versions of nnU-Net write it.

    Source: nnU-Net 2.8.1, its own conversion of older plans.
    """
    if "architecture" in data or "UNet_class_name" not in data:
        return data
    kind = data["UNet_class_name"]
    blocks = {PLAIN: "n_conv_per_stage", RESIDUAL: "n_blocks_per_stage"}.get(kind)
    if blocks is None:
        raise ModelError(f"the network {kind!r} of {name} in {where} is not supported; {PLAIN} and {RESIDUAL} are")
    try:
        counts = data["n_conv_per_stage_encoder"]
        base, widest = data["UNet_base_num_features"], data["unet_max_num_features"]
        arguments = {
            "n_stages": len(counts),
            "features_per_stage": [min(base * 2**stage, widest) for stage in range(len(counts))],
            "kernel_sizes": data["conv_kernel_sizes"],
            "strides": data["pool_op_kernel_sizes"],
            blocks: counts,
            "n_conv_per_stage_decoder": data["n_conv_per_stage_decoder"],
        }
        dims = len(data["patch_size"])
    except (KeyError, TypeError) as problem:
        raise ModelError(f"the configuration {name} in {where} lacks parts of its network: {problem}") from None
    arguments |= {
        "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return data | {"architecture": {"network_class_name": kind, "arch_kwargs": arguments}}
