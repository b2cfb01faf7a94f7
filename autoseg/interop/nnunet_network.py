"""From the arguments that nnU-Net builds a network with to ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import ValidationError

from autoseg.domain.network_plan import ActivationKind, BlockKind, NetworkPlan
from autoseg.domain.values import Value, validation_problems
from autoseg.interop.nnunet_plans import PLAIN, RESIDUAL, ForeignNetwork
from autoseg.network.norms import LEAKY_SLOPE, NORM_EPS

Rows = int | tuple[int | tuple[int, ...], ...]
"""One number for everything, or an entry a stage: a number for all axes, or one an axis."""

_ACTIVATIONS: dict[str, ActivationKind] = {"LeakyReLU": "leaky_relu", "ReLU": "relu", "GELU": "gelu", "SiLU": "silu"}

NormFound = Literal["instance", "batch"]


class _Arguments(Value):
    """What PlainConvUNet and ResidualEncoderUNet are built with; other arguments are refused by name."""

    n_stages: int
    features_per_stage: int | tuple[int, ...]
    conv_op: str
    kernel_sizes: Rows
    strides: Rows
    n_conv_per_stage: int | tuple[int, ...] | None = None
    n_blocks_per_stage: int | tuple[int, ...] | None = None
    n_conv_per_stage_decoder: int | tuple[int, ...]
    conv_bias: bool = False
    norm_op: str | None = None
    norm_op_kwargs: dict[str, Any] | None = None
    dropout_op: str | None = None
    dropout_op_kwargs: dict[str, Any] | None = None
    nonlin: str | None = None
    nonlin_kwargs: dict[str, Any] | None = None
    deep_supervision: bool = True
    nonlin_first: bool = False
    block: str | None = None
    bottleneck_channels: int | tuple[int | None, ...] | None = None
    stem_channels: int | None = None


def network_plan(
    foreign: ForeignNetwork,
    patch_size: tuple[int, ...],
    in_channels: int,
    num_classes: int,
    *,
    output: Literal["classes", "regions"],
    norm: NormFound,
    problems: list[str],
) -> NetworkPlan | None:
    """The network as autoseg plans it.

    Args:
        foreign: As nnU-Net plans it.
        patch_size: Of the configuration.
        in_channels: Of the image and, of a cascade, the previous stage.
        num_classes: Outputs.
        output: Of which kind they are.
        norm: Which normalisation the weights are of: some trainers change what the plans say.
        problems: Gets what cannot be represented, each in words.

    Returns:
        None where there were problems.
    """
    before = len(problems)
    kind = foreign.kind.rpartition(".")[2]
    if kind not in (PLAIN, RESIDUAL):
        problems.append(f"the network {foreign.kind!r} is not supported; {PLAIN} and {RESIDUAL} are")
        return None
    try:
        arguments = _Arguments.model_validate(foreign.arguments)
    except ValidationError as problem:
        problems += [f"{kind}: {line}" for line in validation_problems(problem)]
        return None
    dims, blocks = len(patch_size), arguments.n_conv_per_stage if kind == PLAIN else arguments.n_blocks_per_stage
    _check(arguments, kind, dims, problems)
    if blocks is None:
        problems.append(f"{kind} lacks {'n_conv_per_stage' if kind == PLAIN else 'n_blocks_per_stage'}")
    if len(problems) > before or blocks is None:
        return None
    encoder: BlockKind = "conv" if kind == PLAIN else "residual"
    stages = arguments.n_stages
    try:
        return NetworkPlan(
            in_channels=in_channels,
            num_classes=num_classes,
            output=output,
            patch_size=patch_size,
            features_per_stage=_each(arguments.features_per_stage, stages),
            strides=_rows(arguments.strides, stages, dims),
            kernel_sizes=_rows(arguments.kernel_sizes, stages, dims),
            blocks_per_stage_encoder=_each(blocks, stages),
            # nnU-Net lists the coarsest stage of the decoder first.
            blocks_per_stage_decoder=_each(arguments.n_conv_per_stage_decoder, stages - 1)[::-1],
            encoder_block=encoder,
            stem_channels=arguments.stem_channels,
            norm=norm,
            norm_eps=(arguments.norm_op_kwargs or {}).get("eps", NORM_EPS),
            activation=_ACTIVATIONS[_leaf(arguments.nonlin)],
            dropout=_dropout(arguments),
            has_conv_bias=arguments.conv_bias,
            has_up_bias=arguments.conv_bias,
        )
    except ValidationError as problem:
        problems += [f"{kind}: {line}" for line in validation_problems(problem)]
        return None


def _check(arguments: _Arguments, kind: str, dims: int, problems: list[str]) -> None:
    """Whatever of the arguments our network has not."""
    if _leaf(arguments.conv_op) != f"Conv{dims}d":
        problems.append(f"{kind}: conv_op {arguments.conv_op!r} does not fit a patch with {dims} axes")
    if _leaf(arguments.norm_op) not in (f"InstanceNorm{dims}d", f"BatchNorm{dims}d"):
        problems.append(f"{kind}: norm_op {arguments.norm_op!r} is not supported; instance and batch norm are")
    norm = arguments.norm_op_kwargs or {}
    if not norm.get("affine", _leaf(arguments.norm_op).startswith("Batch")):
        problems.append(f"{kind}: a norm without scale and shift (affine) is not supported")
    _refuse_others(f"{kind}: norm_op", norm, ("eps", "affine"), problems)
    activation, slope = _leaf(arguments.nonlin), (arguments.nonlin_kwargs or {})
    if activation not in _ACTIVATIONS:
        problems.append(f"{kind}: nonlin {arguments.nonlin!r} is not supported; {', '.join(_ACTIVATIONS)} are")
    if activation == "LeakyReLU" and slope.get("negative_slope", LEAKY_SLOPE) != LEAKY_SLOPE:
        problems.append(f"{kind}: a leaky ReLU of slope {slope['negative_slope']} is not supported; {LEAKY_SLOPE} is")
    _refuse_others(f"{kind}: nonlin", slope, ("inplace", "negative_slope"), problems)
    if arguments.nonlin_first:
        problems.append(f"{kind}: an activation in front of the norm (nonlin_first) is not supported")
    if arguments.block is not None and _leaf(arguments.block) != "BasicBlockD":
        problems.append(f"{kind}: blocks of kind {arguments.block!r} are not supported; BasicBlockD are")
    if arguments.bottleneck_channels not in (None, ()) and _leaf(arguments.block) == "BottleneckD":
        problems.append(f"{kind}: bottleneck_channels are not supported")


def _refuse_others(what: str, given: dict[str, Any], known: Sequence[str], problems: list[str]) -> None:
    problems += [f"{what} argument {name!r} is not known" for name in given if name not in known]


def _leaf(name: str | None) -> str:
    """The class's own name: "torch.nn.modules.conv.Conv3d" is Conv3d."""
    return (name or "none").rpartition(".")[2]


def _dropout(arguments: _Arguments) -> float:
    """Of whole channels; nothing of it is left in prediction."""
    return float((arguments.dropout_op_kwargs or {}).get("p", 0.0)) if arguments.dropout_op else 0.0


def _each(value: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else value


def _rows(value: Rows, stages: int, dims: int) -> tuple[tuple[int, ...], ...]:
    rows = (value,) * stages if isinstance(value, int) else value
    return tuple((row,) * dims if isinstance(row, int) else row for row in rows)
