"""Weights of nnU-Net's networks under our names.

The library (dynamic-network-architectures) lists the coarsest decoder stage first, and many tensors twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from autoseg.interop.renaming import Rule, count_of, rename

_ORIGIN = "a PlainConvUNet or ResidualEncoderUNet of nnU-Net"
_ALIAS = re.compile(r"decoder\.encoder\..*|.*\.all_modules\..*")


def from_nnunet(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a PlainConvUNet or a ResidualEncoderUNet under our names.

    Args:
        weights: The state of the network; names that repeat others are left out.

    Returns:
        What `network.unet.restore` takes with the plan of the same network.

    Raises:
        ModelError: The weights are not those of such a network.
    """
    single = {name: tensor for name, tensor in weights.items() if not _ALIAS.fullmatch(name)}
    coarsest = count_of(single, r"decoder\.transpconvs\.(\d+)\.", _ORIGIN) - 1

    def level(match: re.Match[str]) -> int:
        return coarsest - int(match["index"])

    encoder, decoder = r"encoder\.stages\.(?P<stage>\d+)\.", r"decoder\.{}\.(?P<index>\d+)\."
    leaf = r"(?P<part>conv|norm)\.(?P<leaf>weight|bias|running_mean|running_var)"
    rules: tuple[Rule, ...] = (
        (re.compile(rf"encoder\.stem\.convs\.0\.{leaf}"), lambda m: f"stem.{m['part']}.{m['leaf']}"),
        (
            re.compile(rf"{encoder}0\.convs\.(?P<block>\d+)\.{leaf}"),
            lambda m: f"encoder.{m['stage']}.{m['block']}.{m['part']}.{m['leaf']}",
        ),
        (
            re.compile(rf"{encoder}blocks\.(?P<block>\d+)\.conv(?P<half>[12])\.{leaf}"),
            lambda m: f"encoder.{m['stage']}.{m['block']}.{m['part']}{m['half']}.{m['leaf']}",
        ),
        (
            re.compile(rf"{encoder}blocks\.(?P<block>\d+)\.skip\.[01]\.{leaf}"),
            lambda m: f"encoder.{m['stage']}.{m['block']}.shortcut.{m['part']}.{m['leaf']}",
        ),
        (
            re.compile(decoder.format("transpconvs") + r"(?P<leaf>weight|bias)"),
            lambda m: f"decoder.{level(m)}.up.{m['leaf']}",
        ),
        (
            re.compile(decoder.format("seg_layers") + r"(?P<leaf>weight|bias)"),
            lambda m: f"heads.{level(m)}.{m['leaf']}",
        ),
        (
            re.compile(decoder.format("stages") + rf"convs\.(?P<block>\d+)\.{leaf}"),
            lambda m: f"decoder.{level(m)}.blocks.{m['block']}.{m['part']}.{m['leaf']}",
        ),
    )
    return rename(single, rules, _ORIGIN)
