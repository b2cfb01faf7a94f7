"""Weights of MONAI's U-Nets under our names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from autoseg.interop.renaming import Rule, count_of, rename

_LEAF = r"(?P<leaf>weight|bias)"


def from_monai_dynunet(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a DynUNet without residual blocks under our names.

    Its decoder convolutions have the kernels of the stage below: a plan can say so only where neighbouring stages have
    the same kernel, as in isotropic plans.

    Args:
        weights: The state of the network; names that repeat others are left out.

    Returns:
        What `network.unet.restore` takes with the plan of the same network.

    Raises:
        ModelError: The weights are not those of such a network.
    """
    origin = "MONAI's DynUNet without residual blocks"
    single = {name: tensor for name, tensor in weights.items() if not name.startswith("skip_layers.")}
    coarsest = count_of(single, r"upsamples\.(\d+)\.", origin) - 1
    layer = rf"(?P<part>conv|norm)(?P<half>[12])\.(?:conv\.)?{_LEAF}"
    number = r"(?P<index>\d+)"

    def block(match: re.Match[str]) -> str:
        return f"{int(match['half']) - 1}.{match['part']}.{match['leaf']}"

    def level(match: re.Match[str]) -> int:
        return coarsest - int(match["index"])

    rules: tuple[Rule, ...] = (
        (re.compile(rf"input_block\.{layer}"), lambda m: f"encoder.0.{block(m)}"),
        (re.compile(rf"downsamples\.{number}\.{layer}"), lambda m: f"encoder.{int(m['index']) + 1}.{block(m)}"),
        (re.compile(rf"bottleneck\.{layer}"), lambda m: f"encoder.{coarsest + 1}.{block(m)}"),
        (
            re.compile(rf"upsamples\.{number}\.transp_conv\.conv\.{_LEAF}"),
            lambda m: f"decoder.{level(m)}.up.{m['leaf']}",
        ),
        (
            re.compile(rf"upsamples\.{number}\.conv_block\.{layer}"),
            lambda m: f"decoder.{level(m)}.blocks.{block(m)}",
        ),
        (re.compile(rf"output_block\.conv\.conv\.{_LEAF}"), lambda m: f"heads.0.{m['leaf']}"),
        (
            re.compile(rf"deep_supervision_heads\.{number}\.conv\.conv\.{_LEAF}"),
            lambda m: f"heads.{int(m['index']) + 1}.{m['leaf']}",
        ),
    )
    return rename(single, rules, origin)


def from_monai_diffusion(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a DiffusionModelUNet under our names.

    Args:
        weights: The state of the network.

    Returns:
        What `network.unet.restore` takes with the plan of the same network.

    Raises:
        ModelError: The weights are not those of such a network.
    """
    origin = "MONAI's DiffusionModelUNet"
    coarsest = count_of(weights, r"up_blocks\.(\d+)\.", origin) - 1
    number, inner = r"(?P<index>\d+)", r"(?P<block>\d+)"

    def level(match: re.Match[str]) -> int:
        return coarsest - int(match["index"])

    rules: tuple[Rule, ...] = (
        (re.compile(rf"conv_in\.conv\.{_LEAF}"), lambda m: f"stem.conv.{m['leaf']}"),
        (re.compile(rf"time_embed\.0\.{_LEAF}"), lambda m: f"time_embedding.mlp.first.{m['leaf']}"),
        (re.compile(rf"time_embed\.2\.{_LEAF}"), lambda m: f"time_embedding.mlp.second.{m['leaf']}"),
        (re.compile(r"class_embedding\.weight"), lambda _: "condition_embedding.classes.weight"),
        (re.compile(rf"out\.0\.{_LEAF}"), lambda m: f"heads.0.norm.{m['leaf']}"),
        (re.compile(rf"out\.2\.conv\.{_LEAF}"), lambda m: f"heads.0.conv.{m['leaf']}"),
        (
            re.compile(rf"down_blocks\.{number}\.downsampler\.op\.conv\.{_LEAF}"),
            lambda m: f"encoder.{int(m['index']) + 1}.down.{m['leaf']}",
        ),
        (
            re.compile(rf"up_blocks\.{number}\.upsampler\.postconv\.conv\.{_LEAF}"),
            lambda m: f"decoder.{level(m) - 1}.up.conv.{m['leaf']}",
        ),
        *_inside(rf"down_blocks\.{number}\.resnets\.{inner}", lambda m: f"encoder.{m['index']}.{m['block']}"),
        *_inside(rf"down_blocks\.{number}\.downsampler", lambda m: f"encoder.{int(m['index']) + 1}.down"),
        *_inside(
            rf"down_blocks\.{number}\.attentions\.{inner}",
            lambda m: f"encoder.{m['index']}.attentions.{m['block']}",
        ),
        *_inside(r"middle_block\.resnet_1", lambda _: "middle.first"),
        *_inside(r"middle_block\.attention", lambda _: "middle.attention"),
        *_inside(r"middle_block\.resnet_2", lambda _: "middle.second"),
        *_inside(rf"up_blocks\.{number}\.resnets\.{inner}", lambda m: f"decoder.{level(m)}.blocks.{m['block']}"),
        *_inside(rf"up_blocks\.{number}\.upsampler", lambda m: f"decoder.{level(m) - 1}.up"),
        *_inside(rf"up_blocks\.{number}\.attentions\.{inner}", lambda m: f"decoder.{level(m)}.attentions.{m['block']}"),
    )
    return rename(weights, rules, origin)


_PARTS = {
    # A residual block.
    r"norm(?P<half>[12])": "norm{half}",
    r"conv(?P<half>[12])\.conv": "conv{half}",
    r"time_emb_proj": "projection.linear",
    r"skip_connection\.conv": "shortcut.conv",
    # Attention of both kinds.
    r"norm": "norm",
    r"attn\.qkv": "attention.qkv",
    r"attn\.to_q": "attention.qkv#0",
    r"attn\.to_k": "attention.qkv#1",
    r"attn\.to_v": "attention.qkv#2",
    r"attn\.out_proj": "attention.proj",
    r"proj_(?P<end>in|out)\.conv": "proj_{end}",
    # A layer of a transformer.
    r"transformer_blocks\.(?P<layer>\d+)\.norm1": "layers.{layer}.norm_self",
    r"transformer_blocks\.(?P<layer>\d+)\.norm2": "layers.{layer}.norm_cross",
    r"transformer_blocks\.(?P<layer>\d+)\.norm3": "layers.{layer}.norm_feed",
    r"transformer_blocks\.(?P<layer>\d+)\.attn1\.qkv": "layers.{layer}.self_attention.qkv",
    r"transformer_blocks\.(?P<layer>\d+)\.attn1\.to_q": "layers.{layer}.self_attention.qkv#0",
    r"transformer_blocks\.(?P<layer>\d+)\.attn1\.to_k": "layers.{layer}.self_attention.qkv#1",
    r"transformer_blocks\.(?P<layer>\d+)\.attn1\.to_v": "layers.{layer}.self_attention.qkv#2",
    r"transformer_blocks\.(?P<layer>\d+)\.attn1\.out_proj": "layers.{layer}.self_attention.proj",
    r"transformer_blocks\.(?P<layer>\d+)\.attn2\.to_q": "layers.{layer}.cross_attention.query",
    r"transformer_blocks\.(?P<layer>\d+)\.attn2\.to_k": "layers.{layer}.cross_attention.key_value#0",
    r"transformer_blocks\.(?P<layer>\d+)\.attn2\.to_v": "layers.{layer}.cross_attention.key_value#1",
    r"transformer_blocks\.(?P<layer>\d+)\.attn2\.out_proj": "layers.{layer}.cross_attention.proj",
    r"transformer_blocks\.(?P<layer>\d+)\.ff\.linear1": "layers.{layer}.feed_forward.gate",
    r"transformer_blocks\.(?P<layer>\d+)\.ff\.linear2": "layers.{layer}.feed_forward.proj",
}
"""The parts of a residual block, of attention and of a transformer: MONAI's name, ours."""


def _inside(prefix: str, ours: Callable[[re.Match[str]], str]) -> tuple[Rule, ...]:
    """The rules for all parts of the module that a prefix finds and that is `ours` with us."""

    def rule(theirs: str, part: str) -> Rule:
        def replace(match: re.Match[str]) -> str:
            name, _, index = part.format(**match.groupdict()).partition("#")
            whole = f"{ours(match)}.{name}.{match['leaf']}"
            return f"{whole}#{index}" if index else whole

        return re.compile(rf"{prefix}\.{theirs}\.{_LEAF}"), replace

    return tuple(rule(theirs, part) for theirs, part in _PARTS.items())
