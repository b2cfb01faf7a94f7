"""How deep the network is and where it halves, from voxel size and patch size alone.

Source: nnU-Net (Isensee et al. 2021, supplement 2.3): halve what is large enough, finest axes first, so that voxels
become isotropic on the way down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from autoseg.planning.presets import PlannerRules

Ints = tuple[int, ...]

_KERNEL = 3
_ALONE_FACTOR = 3
"""An axis that is halved alone must have this many times the smallest edge (instead of twice)."""


@dataclass(frozen=True, slots=True)
class Topology:
    """The shape of a U-Net.

    Attributes:
        patch_size: Voxels per axis, padded up to a multiple of the divisors.
        strides: Per stage, the step into it; the first is all ones.
        kernel_sizes: Per stage.
        num_halvings: Per axis, how many of the strides are 2.
    """

    patch_size: Ints
    strides: tuple[Ints, ...]
    kernel_sizes: tuple[Ints, ...]
    num_halvings: Ints

    @property
    def num_stages(self) -> int:
        """Resolution stages, the bottleneck included."""
        return len(self.strides)

    @property
    def divisors(self) -> Ints:
        """Per axis, what the patch must be divisible by."""
        return tuple(2**count for count in self.num_halvings)


def _axes_to_halve(size: Sequence[float], spacing: Sequence[float], rules: PlannerRules) -> list[int]:
    """The axes that the next step halves; none when the network is deep enough."""
    large = [axis for axis, edge in enumerate(size) if edge >= 2 * rules.smallest_edge]
    if not large:
        return []
    finest = min(spacing[axis] for axis in large)
    fine = [axis for axis in large if spacing[axis] / finest < rules.similar_spacing_ratio]
    if len(fine) == 1 and size[fine[0]] < _ALONE_FACTOR * rules.smallest_edge:
        return []
    return fine


def find_topology(spacing: Sequence[float], size: Sequence[float], rules: PlannerRules) -> Topology:
    """Depth, strides and kernels for a patch.

    Args:
        spacing: Millimetres per axis, above 0.
        size: Voxels per axis, above 0; may be fractional (a median), and is rounded up to what the strides divide.
        rules: `smallest_edge` and `similar_spacing_ratio` are used.
    """
    dims = len(spacing)
    now_spacing = [float(value) for value in spacing]
    now_size = [float(value) for value in size]
    strides: list[Ints] = [(1,) * dims]
    kernels: list[Ints] = []
    kernel = [1] * dims
    halvings = [0] * dims
    while axes := _axes_to_halve(now_size, now_spacing, rules):
        finest = min(now_spacing)
        # A coarse axis gets no kernel extent until the others have caught up with it; once it has, it keeps it.
        kernel = [
            _KERNEL if extent == _KERNEL or now / finest < rules.similar_spacing_ratio else 1
            for extent, now in zip(kernel, now_spacing, strict=True)
        ]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if axis in axes else 1 for axis in range(dims)))
        for axis in axes:
            halvings[axis] += 1
            now_spacing[axis] *= 2
            now_size[axis] = ceil(now_size[axis] / 2)
    kernels.append((_KERNEL,) * dims)
    patch = tuple(ceil(edge / 2**count) * 2**count for edge, count in zip(size, halvings, strict=True))
    return Topology(patch, tuple(strides), tuple(kernels), tuple(halvings))
