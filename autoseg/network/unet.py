"""The U-Net, in 2D and 3D, built from a `NetworkPlan` alone.

The names of the modules are the names in weight files and stay as they are: `encoder.STAGE.BLOCK.conv` and `.norm`,
`decoder.LEVEL.up`, `decoder.LEVEL.blocks.BLOCK`, `heads.LEVEL`; stage and level 0 are the finest.

Source: Ronneberger et al. 2015 (the idea); Isensee et al. 2021, nnU-Net (layers, widths, deep supervision).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn

from autoseg.domain.plan import Ints, NetworkPlan
from autoseg.errors import ModelError
from autoseg.network.blocks import LEAKY_SLOPE, ConvStack, InstanceNorm, MaxPool, convolution, upsampling

_MOST_NAMED = 8


class EncoderStage(nn.Sequential):
    """The blocks of one resolution, with the step down into it."""

    def __init__(self, plan: NetworkPlan, stage: int) -> None:
        channels_in = plan.in_channels if stage == 0 else plan.features_per_stage[stage - 1]
        stride = plan.strides[stage]
        pooled = plan.downsampling == "max_pool" and prod(stride) > 1
        stack = ConvStack(
            plan.dims,
            plan.convs_per_stage_encoder[stage],
            channels_in,
            plan.features_per_stage[stage],
            plan.kernel_sizes[stage],
            None if pooled else stride,
        )
        super().__init__(*([MaxPool(plan.dims, stride)] if pooled else []), *stack)


class DecoderLevel(nn.Module):
    """One step up: upsample, join with the skip of this level, convolve."""

    def __init__(self, plan: NetworkPlan, level: int) -> None:
        super().__init__()
        features = plan.features_per_stage[level]
        self.up = upsampling(
            plan.upsampling, plan.dims, plan.features_per_stage[level + 1], features, plan.strides[level + 1]
        )
        self.blocks = ConvStack(
            plan.dims, plan.convs_per_stage_decoder[level], 2 * features, features, plan.kernel_sizes[level]
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """`x` from the level below, `skip` from the encoder; both are free for reuse afterwards."""
        joined = torch.cat((self.up(x), skip), dim=1)
        del x, skip
        decoded: Tensor = self.blocks(joined)
        return decoded


class UNet(nn.Module):
    """Encoder, decoder with concatenated skips, a 1x1 head at every decoder level.

    Attributes:
        plan: What it was built from.
        encoder: One entry a stage, finest first.
        decoder: One entry a level, finest first (one fewer than stages).
        heads: One a decoder level, finest first; a network of one stage has a single head on its encoder.
    """

    def __init__(self, plan: NetworkPlan) -> None:
        super().__init__()
        self.plan = plan
        levels = range(plan.num_stages - 1)
        self.encoder = nn.ModuleList(EncoderStage(plan, stage) for stage in range(plan.num_stages))
        self.decoder = nn.ModuleList(DecoderLevel(plan, level) for level in levels)
        self.heads = nn.ModuleList(
            convolution(plan.dims)(plan.features_per_stage[level], plan.num_classes, 1) for level in levels or (0,)
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits of an image of any size.

        Sizes that the strides do not divide are padded at the end of the axis with the edge value, and the padding is
        cut off the output.

        Args:
            x: (N, C, *spatial), spatial in network axis order.

        Returns:
            (N, K, *spatial). In training mode with deep supervision a list, finest first, one a decoder level; level l
            has ceil(size / product of the strides down to l) voxels an axis.
        """
        size = tuple(x.shape[2:])
        padding = [0 if index % 2 == 0 else pad for pad in reversed(self._missing(size)) for index in range(2)]
        if any(padding):
            x = nn.functional.pad(x, padding, mode="replicate")
        wants_all = self.training and self.plan.deep_supervision
        outputs = self._decode(self._encode(x), wants_all)
        for level, output in enumerate(outputs):
            outputs[level] = self._cut(output, size, level)
        return outputs if wants_all else outputs[0]

    def _encode(self, x: Tensor) -> list[Tensor]:
        features = []
        for stage in self.encoder:
            x = stage(x)
            features.append(x)
        return features

    def _decode(self, features: list[Tensor], wants_all: bool) -> list[Tensor]:
        """Logits, finest first: of every level, or of the finest only. Empties `features` as it goes."""
        x = features.pop()
        outputs: list[Tensor] = []
        if not features:
            outputs.append(self.heads[0](x))
        for level in reversed(range(len(self.decoder))):
            x = self.decoder[level](x, features.pop())
            if wants_all or level == 0:
                outputs.append(self.heads[level](x))
        outputs.reverse()
        return outputs

    def _missing(self, size: Ints) -> list[int]:
        return [-length % divisor for length, divisor in zip(size, self.plan.divisors, strict=True)]

    def _cut(self, output: Tensor, size: Ints, level: int) -> Tensor:
        for axis, length in enumerate(size):
            step = prod(stride[axis] for stride in self.plan.strides[: level + 1])
            output = output.narrow(axis + 2, 0, -(-length // step))
        return output


def build(plan: NetworkPlan, seed: int | None = None) -> UNet:
    """A network with fresh weights: He initialisation for leaky ReLU, biases 0, norms 1 and 0.

    Args:
        plan: The network.
        seed: Of the initial weights; the global random state is not touched. None leaves the convolutions zero, for
            weights that are loaded next.

    Source: He et al. 2015; nnU-Net v2 takes the same with slope 0.01.
    """
    with torch.device("meta"):
        network = UNet(plan)
    network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed or 0)
    for module in network.modules():
        if isinstance(module, InstanceNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            nn.init.zeros_(module.weight)
            if seed is not None:
                nn.init.kaiming_normal_(module.weight, a=LEAKY_SLOPE, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


def restore(plan: NetworkPlan, weights: Mapping[str, Tensor]) -> UNet:
    """A network with these weights, in evaluation mode.

    Args:
        plan: The network.
        weights: One tensor a parameter, by name; copied.

    Raises:
        ModelError: Tensors are missing, too many or of another shape; all are counted and the first few named.
    """
    network = build(plan)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != expected:
        problems = [
            f"{name}: got {found.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
            for name in sorted(expected.keys() | found.keys())
            if found.get(name) != expected.get(name)
        ]
        raise ModelError(
            f"{len(problems)} weight tensors do not fit the network of the plan",
            hint="The weights belong to another plan.",
            problems=problems[:_MOST_NAMED],
        )
    network.load_state_dict(dict(weights))
    return network.eval()
