"""The U-Net, in 2D and 3D, built from a `NetworkPlan` alone.

The names of the modules are the names in weight files and stay as they are: `stem`, `encoder.STAGE.BLOCK.conv` and
`.norm` (and what else a block has), `encoder.STAGE.down`, `middle`, `decoder.LEVEL.up`, `decoder.LEVEL.blocks.BLOCK`,
`heads.LEVEL`; stage and level 0 are the finest.

Source: Ronneberger et al. 2015 (the idea); Isensee et al. 2021, nnU-Net (layers, widths, deep supervision); Ho et al.
2020 and Rombach et al. 2022 (diffusion: skips a block, time step, attention, conditions).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autoseg.domain.network_plan import Ints, NetworkPlan
from autoseg.errors import ModelError
from autoseg.network.attention import NullCondition
from autoseg.network.blocks import ConvBlock, convolution, padded_convolution
from autoseg.network.embedding import ConditionEmbedding, TimeEmbedding
from autoseg.network.initialise import initialise
from autoseg.network.norms import activation, normalisation, normalise_and_activate, start_slope
from autoseg.network.stages import Cues, DecoderLevel, EncoderStage, Middle

_MOST_NAMED = 8


class NormHead(nn.Module):
    """Norm, activation, convolution; starts at zero, so that a fresh denoiser predicts no noise.

    Source: Ho et al. 2020, appendix B.
    """

    def __init__(self, plan: NetworkPlan, channels: int) -> None:
        super().__init__()
        self.norm = normalisation(plan, channels)
        # Without a norm the activation gets the decoder's output itself, which its backward pass needs as it was.
        self.activation = activation(plan, channels, overwrites=plan.norm != "none")
        self.conv = padded_convolution(plan.dims, channels, plan.num_classes, plan.kernel_sizes[0])

    def start(self, generator: torch.Generator) -> None:
        """The convolution to zero."""
        del generator
        for parameter in self.conv.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) to (N, K, *spatial)."""
        out: Tensor = self.conv(normalise_and_activate(x, self.norm, self.activation))
        return out


def _heads(plan: NetworkPlan) -> nn.ModuleList:
    """One at each decoder level that an output is asked of; a network of one stage has one on its encoder."""
    features = plan.decoder_features or plan.features_per_stage
    levels = range(max(plan.num_levels, 1) if plan.deep_supervision else 1)
    if plan.head == "norm_conv":
        return nn.ModuleList(NormHead(plan, features[level]) for level in levels)
    return nn.ModuleList(convolution(plan.dims)(features[level], plan.num_classes, 1) for level in levels)


def _stem(plan: NetworkPlan) -> ConvBlock | None:
    if not plan.has_stem:
        return None
    return ConvBlock(
        plan,
        plan.in_channels,
        plan.stem_features,
        plan.kernel_sizes[0],
        ends_with="conv" if plan.encoder_block == "preactivation" else "activation",
    )


class UNet(nn.Module):
    """Encoder, middle, decoder with skips, heads; and what takes the conditions, where there are any.

    Attributes:
        plan: What it was built from.
        stem: In front of the encoder, or None.
        encoder: One entry a stage, finest first.
        middle: On the coarsest stage, or None.
        decoder: One entry a level, finest first.
        heads: One a decoder level with deep supervision, else one; finest first.
    """

    def __init__(self, plan: NetworkPlan) -> None:
        super().__init__()
        self.plan = plan
        # Asked for in every pass; torch.compile reads plain attributes, not the plan's properties.
        self._steps = tuple(plan.divisors_at(stage) for stage in range(plan.num_stages))
        self._takes_context = plan.context_channels is not None
        self._num_skips = tuple(len(plan.skip_channels(level)) for level in range(plan.num_levels))
        self._add_conditions(plan)
        self.stem = _stem(plan)
        self.encoder = nn.ModuleList(EncoderStage(plan, stage) for stage in range(plan.num_stages))
        self.middle = Middle(plan) if plan.has_middle else None
        self.decoder = nn.ModuleList(DecoderLevel(plan, level) for level in range(plan.num_levels))
        self.heads = _heads(plan)

    def _add_conditions(self, plan: NetworkPlan) -> None:
        condition, width = plan.condition, plan.embedding_channels
        self.time_embedding: TimeEmbedding | None = None
        self.condition_embedding: ConditionEmbedding | None = None
        self.null_context: NullCondition | None = None
        if condition is not None:
            self.time_embedding = TimeEmbedding(
                plan.time_channels, width, order=condition.sinusoid, frequency_shift=condition.frequency_shift
            )
            if condition.vector_channels or condition.num_classes:
                self.condition_embedding = ConditionEmbedding(
                    width, condition.vector_channels, condition.num_classes, plan.has_null_condition
                )
        if plan.has_null_condition and plan.context_channels is not None:
            self.null_context = NullCondition(plan.context_channels)

    def forward(
        self,
        x: Tensor,
        time: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        vectors: Sequence[Tensor | None] = (),
        classes: Tensor | None = None,
        is_null: Tensor | None = None,
        skip_residuals: Sequence[Tensor] = (),
        middle_residual: Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """The output for an image of any size: logits, or what else the plan says.

        Sizes that the strides do not divide are padded at the end of the axis with the edge value, and the padding is
        cut off the output.

        Args:
            x: (N, C, *spatial), spatial in network axis order.
            time: (N,) time steps, where the plan has a condition.
            context: (N, L, D) condition sequence, where the plan has cross-attention; None for "none", where it has a
                null condition.
            context_mask: (N, L) bool, True where a token counts.
            vectors: (N, channels) each, one for each vector condition of the plan.
            classes: (N,) whole numbers, where the plan has classes.
            is_null: (N,) bool, True for samples that are to go without their conditions (but for the time step).
            skip_residuals: One for each skip, in the order in which the encoder makes them, finest first; added to it.
            middle_residual: Added to the coarsest features, after the middle block. With such residuals a ControlNet
                (Zhang et al. 2023) steers the network; their sizes are those of the padded image.

        Returns:
            (N, K, *spatial). In training mode with deep supervision a list, finest first, one a decoder level; level l
            has ceil(size / product of the strides down to l) voxels an axis.

        Raises:
            ValueError: A condition is missing, or given to a network that has none; or residuals are.
        """
        size = tuple(x.shape[2:])
        cues = self._cues(x.shape[0], time, (context, context_mask), (vectors, classes), is_null)
        padding = [0 if index % 2 == 0 else pad for pad in reversed(self._missing(size)) for index in range(2)]
        if any(padding):
            x = nn.functional.pad(x, padding, mode="replicate")
        x, skips = self._encode(x, cues)
        if skip_residuals:
            skips = _added(skips, skip_residuals)
        if self.middle is not None:
            x = self.middle(x, cues)
        if middle_residual is not None:
            x = x + middle_residual
        wants_all = self.training and self.plan.deep_supervision
        outputs = self._decode(x, skips, cues, wants_all)
        for level, output in enumerate(outputs):
            outputs[level] = self._cut(output, size, level)
        return outputs if wants_all else outputs[0]

    def _cues(
        self,
        batch_size: int,
        time: Tensor | None,
        sequence: tuple[Tensor | None, Tensor | None],
        others: tuple[Sequence[Tensor | None], Tensor | None],
        is_null: Tensor | None,
    ) -> Cues:
        context, mask = sequence
        vectors, classes = others
        _check_given("time", time is not None, self.time_embedding is not None)
        if vectors or classes is not None:
            _check_given("vectors or classes", True, self.condition_embedding is not None)
        if context is not None or self.null_context is None:
            _check_given("context", context is not None, self._takes_context)
        if is_null is not None:
            _check_given("is_null", True, self.plan.has_null_condition)
        embedding = None
        if self.time_embedding is not None and time is not None:
            embedding = self.time_embedding(time)
            if self.condition_embedding is not None:
                embedding = embedding + self.condition_embedding(vectors, classes, is_null)
        if self.null_context is not None:
            context, mask = self.null_context(context, mask, batch_size, is_null)
        return Cues(embedding, context, mask)

    def _encode(self, x: Tensor, cues: Cues) -> tuple[Tensor, list[Tensor]]:
        """The coarsest features and the skips, finest first."""
        skips: list[Tensor] = []
        if self.stem is not None:
            x = self.stem(x, cues.embedding)
        if self.plan.skips == "block":
            skips.append(x)
        for index, stage in enumerate(self.encoder):
            if self._recomputes(index):
                x, given = checkpoint(stage, x, cues, use_reentrant=False)
            else:
                x, given = stage(x, cues)
            skips += given
        if self.plan.skips == "stage":
            skips.pop()
        return x, skips

    def _decode(self, x: Tensor, skips: list[Tensor], cues: Cues, wants_all: bool) -> list[Tensor]:
        """Outputs, finest first: of every level, or of the finest only. Empties `skips` as it goes."""
        outputs: list[Tensor] = []
        if not self.decoder:
            outputs.append(self.heads[0](x))
        for level in reversed(range(len(self.decoder))):
            x = self._decode_level(level, x, [skips.pop() for _ in range(self._num_skips[level])], cues)
            if wants_all or level == 0:
                outputs.append(self.heads[level](x))
        outputs.reverse()
        return outputs

    def _decode_level(self, level: int, x: Tensor, skips: list[Tensor], cues: Cues) -> Tensor:
        module = self.decoder[level]
        if not self._recomputes(level):
            decoded: Tensor = module(x, skips, cues)
            return decoded

        def decode(x: Tensor, cues: Cues, *skips: Tensor) -> Tensor:
            # A list of its own each time: the level empties it.
            out: Tensor = module(x, list(skips), cues)
            return out

        again: Tensor = checkpoint(decode, x, cues, *skips, use_reentrant=False)
        return again

    def _recomputes(self, stage: int) -> bool:
        return stage in self.plan.checkpointed_stages and torch.is_grad_enabled()

    def _missing(self, size: Ints) -> list[int]:
        return [-length % divisor for length, divisor in zip(size, self._steps[-1], strict=True)]

    def _cut(self, output: Tensor, size: Ints, level: int) -> Tensor:
        for axis, (length, step) in enumerate(zip(size, self._steps[level], strict=True)):
            output = output.narrow(axis + 2, 0, -(-length // step))
        return output


def _added(skips: list[Tensor], residuals: Sequence[Tensor]) -> list[Tensor]:
    if len(residuals) != len(skips):
        raise ValueError(f"skip_residuals needs one for each of the {len(skips)} skips, got {len(residuals)}")
    return [skip + residual for skip, residual in zip(skips, residuals, strict=True)]


def _check_given(name: str, is_given: bool, is_planned: bool) -> None:
    if is_given and not is_planned:
        raise ValueError(f"{name} is given, but the network was planned without it: leave it out")
    if is_planned and not is_given:
        raise ValueError(f"{name} is missing: the network was planned with it")


def build(plan: NetworkPlan, seed: int | None = None) -> UNet:
    """A network with fresh weights (see `initialise`).

    A network too large for the machine can be built as ``UNet(plan)`` under ``torch.device("meta")``, without weights.

    Args:
        plan: The network.
        seed: Of the initial weights; the global random state is not touched. None leaves convolutions and linear
            layers zero, for weights that are loaded next.
    """
    with torch.device("meta"):
        network = UNet(plan)
    # As `to_empty`, which would load PyTorch's symbolic shapes for it, and those SymPy: a quarter of a second.
    network._apply(  # type: ignore[no-untyped-call]
        lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    )
    initialise(network, seed, start_slope(plan.activation))
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
