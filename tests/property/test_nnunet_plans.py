"""Laws of the conversion of nnU-Net's plans."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from autoseg.domain.dataset import LabelClass, LabelSchema
from autoseg.interop.nnunet_configuration import Trained, convert_configuration
from autoseg.interop.nnunet_plans import ForeignPlans

LABELS = LabelSchema(classes=(LabelClass(name="a", values=(1,)), LabelClass(name="b", values=(2,))))
SPLINE = "resample_data_or_seg_to_shape"


@st.composite
def networks(draw: st.DrawFn) -> tuple[int, dict[str, Any], tuple[int, ...]]:
    """Axes, arguments, and a patch that the strides divide."""
    dims, stages = draw(st.sampled_from((2, 3))), draw(st.integers(2, 5))
    step = st.lists(st.sampled_from((1, 2)), min_size=dims, max_size=dims)
    strides = [[1] * dims, *draw(st.lists(step, min_size=stages - 1, max_size=stages - 1))]
    kernel = st.lists(st.sampled_from((1, 3)), min_size=dims, max_size=dims)
    patch = []
    for axis in range(dims):
        divisor = 1
        for row in strides:
            divisor *= row[axis]
        patch.append(divisor * draw(st.integers(1, 5)))
    arguments = {
        "n_stages": stages,
        "features_per_stage": draw(st.lists(st.integers(1, 64), min_size=stages, max_size=stages)),
        "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
        "kernel_sizes": draw(st.lists(kernel, min_size=stages, max_size=stages)),
        "strides": strides,
        "n_conv_per_stage": draw(st.lists(st.integers(1, 3), min_size=stages, max_size=stages)),
        "n_conv_per_stage_decoder": draw(st.lists(st.integers(1, 3), min_size=stages - 1, max_size=stages - 1)),
        "conv_bias": draw(st.booleans()),
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return dims, arguments, tuple(patch)


def foreign_plans(dims: int, arguments: dict[str, Any], patch: tuple[int, ...], reader: str, forward: Any) -> Any:
    kwargs = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    configuration = {
        "batch_size": 2,
        "patch_size": patch,
        "spacing": [1.0] * dims,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [True],
        "architecture": {"network_class_name": "x.PlainConvUNet", "arch_kwargs": arguments},
    }
    for name in ("data", "seg", "probabilities"):
        configuration |= {
            f"resampling_fn_{name}": SPLINE,
            f"resampling_fn_{name}_kwargs": kwargs | {"is_seg": name == "seg"},
        }
    return ForeignPlans.model_validate(
        {
            "dataset_name": "x",
            "image_reader_writer": reader,
            "transpose_forward": forward,
            "transpose_backward": [forward.index(axis) for axis in range(3)],
            "configurations": {"c": configuration, "d": {"inherits_from": "c", "batch_size": 7}},
        }
    )


@given(
    network=networks(),
    reader=st.sampled_from(("SimpleITKIO", "NibabelIO", "NibabelIOWithReorient", "SimpleITKIOWithReorient")),
    forward=st.sampled_from(list(permutations(range(3)))),
)
def test_conversion_keeps_what_it_gets(
    network: tuple[int, dict[str, Any], tuple[int, ...]], reader: str, forward: tuple[int, int, int]
) -> None:
    dims, arguments, patch = network
    plans = foreign_plans(dims, arguments, patch, reader, forward)
    problems: list[str] = []
    foreign = plans.configuration("d", Path("plans.json"))
    axes = tuple(range(dims))
    found = convert_configuration(plans, foreign, Trained(axes, "instance"), LABELS, 1, None, problems)
    assert problems == []
    assert found is not None
    assert found.training.batch_size == 7  # its own, the rest is inherited
    # nnU-Net reads axes in the reverse order of the file: transposing them is the file's order again.
    assert tuple(2 - axis for axis in found.preprocess.axis_order) == forward
    assert (found.preprocess.orientation == "RAS") == reader.endswith("WithReorient")
    made = found.network
    assert made.patch_size == patch
    assert made.features_per_stage == tuple(arguments["features_per_stage"])
    assert made.strides == tuple(map(tuple, arguments["strides"]))
    assert made.kernel_sizes == tuple(map(tuple, arguments["kernel_sizes"]))
    assert made.blocks_per_stage_encoder == tuple(arguments["n_conv_per_stage"])
    assert made.blocks_per_stage_decoder[::-1] == tuple(arguments["n_conv_per_stage_decoder"])
    assert made.has_conv_bias == made.has_up_bias == arguments["conv_bias"]
    assert made.num_classes == 3
    assert found.inference.mirror_axes == found.training.augmentation.mirror_axes == axes


@given(network=networks(), unknown=st.sampled_from(("norm_op", "nonlin", "conv_op")), name=st.text("xyz", min_size=1))
def test_unknown_layers_are_named(
    network: tuple[int, dict[str, Any], tuple[int, ...]], unknown: str, name: str
) -> None:
    dims, arguments, patch = network
    plans = foreign_plans(dims, arguments | {unknown: name}, patch, "SimpleITKIO", (0, 1, 2))
    problems: list[str] = []
    foreign = plans.configuration("c", Path("plans.json"))
    assert convert_configuration(plans, foreign, Trained((), "instance"), LABELS, 1, None, problems) is None
    assert any(unknown in problem and name in problem for problem in problems)
