"""From the functions that nnU-Net's plans name for resampling, and their arguments, to ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoseg.domain.preprocess_plan import NEVER_SEPARATE
from autoseg.interop.nnunet_plans import ForeignConfiguration
from autoseg.preprocessing.resample import SEPARATE_AXIS_RATIO

SPLINE, TORCH, NONE = "resample_data_or_seg_to_shape", "resample_torch_fornnunet", "no_resampling_hack"
"""The functions of nnU-Net 2.8.1; all versions since 2.0 have the first."""

ALWAYS_SEPARATE = 0.0
"""A `separate_axis_ratio` that every image exceeds which has a single coarsest axis."""

_ARGUMENTS: dict[str, dict[str, Any]] = {
    SPLINE: {
        "is_seg": False,
        "order": 3,
        "order_z": 0,
        "force_separate_z": False,
        "separate_z_anisotropy_threshold": SEPARATE_AXIS_RATIO,
    },
    TORCH: {
        "is_seg": False,
        "num_threads": 4,
        "device": "cpu",
        "memefficient_seg_resampling": False,
        "force_separate_z": None,
        "separate_z_anisotropy_threshold": SEPARATE_AXIS_RATIO,
        "mode": "linear",
        "aniso_axis_mode": "nearest-exact",
    },
    NONE: {},
}
"""Their arguments, with what holds where the plans leave one out. Source: nnU-Net 2.8.1."""

_TORCH_ORDERS = {"linear": 1, "nearest-exact": 0}
"""Torch's modes that sample where splines do; its "nearest" samples elsewhere."""


@dataclass(frozen=True, slots=True)
class _Rule:
    """Spline order, that along a coarse axis, and when an axis counts as coarse; no order: nothing is resampled."""

    order: int | None = None
    coarse_order: int = 0
    separate_axis_ratio: float = SEPARATE_AXIS_RATIO


def resampling_fields(foreign: ForeignConfiguration, problems: list[str]) -> dict[str, Any]:
    """What a `PreprocessPlan` says about resampling.

    Labels are resampled for training and, of a cascade, for what its network sees of the previous stage.

    Args:
        foreign: The configuration.
        problems: Gets what cannot be represented, each in words.

    Returns:
        Fields of the plan; to be left alone where there were problems.
    """
    images = _rule("data", foreign.resampling_fn_data, foreign.resampling_fn_data_kwargs, (0, 1, 3), problems)
    logits = _rule(
        "probabilities",
        foreign.resampling_fn_probabilities,
        foreign.resampling_fn_probabilities_kwargs,
        (0, 1),
        problems,
    )
    labels = _label_rule(foreign, problems)
    if images.order is None:
        return {"resamples": False}
    if logits.order is None:
        problems.append(
            f"resampling_fn_probabilities is {NONE}, but images are resampled: predictions would not fit their images"
        )
    ratio = images.separate_axis_ratio
    fields: dict[str, Any] = {
        "image_order": images.order,
        "image_coarse_order": images.coarse_order,
        "separate_axis_ratio": ratio,
        "label_order": 1 if labels.order is None else labels.order,
        "logits_order": 1 if logits.order is None else logits.order,
        "logits_coarse_order": logits.coarse_order,
    }
    if fields["label_order"] >= 1:  # of order 0 there is nothing to decide
        # Source: nnU-Net 2.8.1 with batchgenerators 0.25.5; decision 46.
        fields["label_decision"] = "largest"
    for name, rule in (("label", labels), ("logits", logits)):
        if rule.separate_axis_ratio != ratio:
            fields[f"{name}_separate_axis_ratio"] = rule.separate_axis_ratio
    return fields


def _label_rule(foreign: ForeignConfiguration, problems: list[str]) -> _Rule:
    """The rule for label maps; without a previous stage predictions do not need it, and it may be another one."""
    name = foreign.resampling_fn_seg
    rule = _rule("seg", name, foreign.resampling_fn_seg_kwargs, (0, 1, 3), problems)
    is_ours = name != TORCH and rule.coarse_order == 0 and rule.order in (None, 0, 1)
    if is_ours or foreign.previous_stage is None:
        return rule if is_ours else _Rule(order=1, separate_axis_ratio=rule.separate_axis_ratio)
    problems.append(
        f"resampling_fn_seg: what a cascade sees of its previous stage cannot be resampled by {name} with "
        f"{foreign.resampling_fn_seg_kwargs}"
    )
    return _Rule()


def _rule(what: str, name: str, given: Mapping[str, Any], orders: tuple[int, ...], problems: list[str]) -> _Rule:
    key = f"resampling_fn_{what}"
    if name not in _ARGUMENTS:
        problems.append(f"{key} {name!r} is not known; {', '.join(_ARGUMENTS)} are")
        return _Rule()
    problems += [f"{key} {name} has an unknown argument {item!r}" for item in given if item not in _ARGUMENTS[name]]
    if name == NONE:
        return _Rule()
    arguments = _ARGUMENTS[name] | dict(given)
    if bool(arguments["is_seg"]) != (what == "seg"):
        problems.append(f"{key} {name}: is_seg is {arguments['is_seg']!r}")
    if name == TORCH and arguments["mode"] != "linear":
        problems.append(f"{key} {name}: mode {arguments['mode']!r} is not supported; 'linear' is")
    order = arguments["order"] if name == SPLINE else 1
    coarse = arguments["order_z"] if name == SPLINE else _TORCH_ORDERS.get(arguments["aniso_axis_mode"])
    for argument, value in (("order", order), ("order along a coarse axis", coarse)):
        if value not in orders:
            problems.append(f"{key} {name}: {argument} {value} is not supported; {', '.join(map(str, orders))} are")
    ratio, force = arguments["separate_z_anisotropy_threshold"], arguments["force_separate_z"]
    if force not in (None, True, False) or isinstance(ratio, bool) or not isinstance(ratio, int | float):
        problems.append(f"{key} {name}: force_separate_z {force!r} with a threshold of {ratio!r} is not understood")
        return _Rule()
    if force is not None:
        ratio = ALWAYS_SEPARATE if force else NEVER_SEPARATE
    return _Rule(order, 0 if coarse is None else coarse, float(ratio))
