import pytest
import torch

from autoseg.domain.network_plan import NetworkPlan
from autoseg.errors import ModelError
from autoseg.network.norms import InstanceNorm
from autoseg.network.unet import build, restore


def network_plan(dims: int = 3, stages: int = 3, **changes: object) -> NetworkPlan:
    settings: dict[str, object] = {
        "in_channels": 1,
        "num_classes": 3,
        "patch_size": (8,) * dims,
        "features_per_stage": tuple(4 * 2**stage for stage in range(stages)),
        "strides": ((1,) * dims, *((2,) * dims for _ in range(stages - 1))),
        "kernel_sizes": ((3,) * dims,) * stages,
        "blocks_per_stage_encoder": (2,) * stages,
        "blocks_per_stage_decoder": (2,) * (stages - 1),
    }
    return NetworkPlan.model_validate(settings | changes)


def random_input(plan: NetworkPlan, *size: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, plan.in_channels, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("downsampling", ["strided", "max_pool"])
@pytest.mark.parametrize("upsampling", ["transposed", "linear"])
def test_any_size_comes_back_with_the_same_size(dims: int, downsampling: str, upsampling: str) -> None:
    plan = network_plan(dims, downsampling=downsampling, upsampling=upsampling)
    network = build(plan, seed=1).eval()
    with torch.inference_mode():
        for size in ((1, 1, 1), (8, 8, 8), (7, 13, 2), (5, 1, 9)):
            assert network(random_input(plan, *size[:dims])).shape == (1, 3, *size[:dims])


def test_an_odd_size_equals_the_image_padded_with_its_edge() -> None:
    plan = network_plan()
    network = build(plan, seed=1).eval()
    image = random_input(plan, 5, 8, 7)
    padded = torch.nn.functional.pad(image, (0, 1, 0, 0, 0, 3), mode="replicate")
    with torch.inference_mode():
        assert torch.equal(network(image), network(padded)[:, :, :5, :, :7])


def test_training_gives_an_output_a_decoder_level_finest_first() -> None:
    plan = network_plan(stages=4, patch_size=(16, 16, 16), strides=((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2)))
    network = build(plan, seed=1).train()
    outputs = network(random_input(plan, 16, 16, 16))
    assert [tuple(output.shape[2:]) for output in outputs] == [(16, 16, 16), (16, 8, 8), (8, 4, 4)]
    finest = outputs[0]
    with torch.inference_mode():
        assert torch.equal(network.eval()(random_input(plan, 16, 16, 16)), finest)


def test_without_deep_supervision_training_gives_one_tensor() -> None:
    plan = network_plan(deep_supervision=False)
    assert build(plan, seed=1).train()(random_input(plan, 8, 8, 8)).shape == (1, 3, 8, 8, 8)


def test_every_parameter_learns_but_those_behind_unused_heads() -> None:
    plan = network_plan()
    network = build(plan, seed=1).train()
    loss = sum(output.square().mean() for output in network(random_input(plan, 8, 8, 8)))
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name


def test_a_network_of_one_stage_has_no_decoder() -> None:
    plan = network_plan(stages=1)
    network = build(plan, seed=1)
    assert len(network.decoder) == 0
    assert network.eval()(random_input(plan, 3, 4, 5)).shape == (1, 3, 3, 4, 5)


def test_initial_weights_come_from_the_seed_alone() -> None:
    plan = network_plan()
    state = torch.random.get_rng_state()
    first, second, other = (build(plan, seed=seed).state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["encoder.0.0.conv.weight"], other["encoder.0.0.conv.weight"])


def test_initial_weights_keep_the_variance_of_a_leaky_relu_network() -> None:
    weight = build(network_plan(features_per_stage=(32, 64, 64)), seed=0).state_dict()["encoder.1.0.conv.weight"]
    expected = (2 / (1 + 0.01**2) / (32 * 27)) ** 0.5
    assert abs(float(weight.mean())) < 0.05 * expected
    assert float(weight.std()) == pytest.approx(expected, rel=0.02)


def test_instance_norm_equals_torch_and_takes_single_voxels() -> None:
    norm = InstanceNorm(3)
    torch.nn.init.uniform_(norm.weight, generator=torch.Generator().manual_seed(0))
    torch.nn.init.uniform_(norm.bias, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(2)) * 7 + 100
    expected = torch.nn.functional.instance_norm(x, weight=norm.weight, bias=norm.bias)
    torch.testing.assert_close(norm(x), expected, atol=1e-5, rtol=1e-5)
    single = norm(torch.full((1, 3, 1, 1, 1), 9.0))
    torch.testing.assert_close(single.flatten(), norm.bias, atol=1e-3, rtol=0)


def test_names_of_the_weights_are_stable() -> None:
    names = list(build(network_plan(stages=2)).state_dict())
    assert names[:4] == [f"encoder.0.0.{part}" for part in ("conv.weight", "conv.bias", "norm.weight", "norm.bias")]
    assert "decoder.0.up.weight" in names
    assert "decoder.0.blocks.1.norm.bias" in names
    assert names[-2:] == ["heads.0.weight", "heads.0.bias"]


def test_weights_of_another_plan_are_refused_with_their_names() -> None:
    weights = build(network_plan(), seed=0).state_dict()
    with pytest.raises(ModelError, match=r"decoder.0.blocks.0.conv.bias: got \(4,\), expected \(6,\)"):
        restore(network_plan(features_per_stage=(6, 8, 16)), weights)
    del weights["heads.0.bias"]
    with pytest.raises(ModelError, match=r"heads.0.bias: got nothing"):
        restore(network_plan(), weights)


def test_restored_weights_are_a_copy_in_evaluation_mode() -> None:
    plan = network_plan()
    weights = build(plan, seed=3).state_dict()
    network = restore(plan, weights)
    assert not network.training
    weights["heads.0.bias"].add_(1)
    assert not torch.equal(network.state_dict()["heads.0.bias"], weights["heads.0.bias"])
