"""Laws that every member of the U-Net family keeps, and what single ones promise."""

from __future__ import annotations

import copy

import pytest
import torch
from network_family import FAMILY, awake, conditions, image, member
from torch import Tensor, nn

from autoseg.domain.network_plan import NetworkPlan
from autoseg.network.blocks import PreactivationBlock, ResidualBlock, Squeeze
from autoseg.network.norms import Norm
from autoseg.network.resampling import PixelShuffle, step_up
from autoseg.network.stages import StageShortcut
from autoseg.network.unet import UNet, build

CONDITIONED = sorted(name for name in FAMILY if member(name).condition is not None)


def outputs(network: UNet, batch: int = 2, **told: object) -> list[Tensor]:
    out = network(image(network.plan, batch=batch), **(conditions(network.plan, batch) | told))
    return out if isinstance(out, list) else [out]


def loss_of(network: UNet, **told: object) -> Tensor:
    return torch.stack([out.square().mean() for out in outputs(network, **told)]).sum()


@pytest.mark.parametrize("name", FAMILY)
def test_a_plan_comes_back_from_json(name: str) -> None:
    plan = member(name)
    assert NetworkPlan.from_json(plan.to_json(), "plan") == plan


@pytest.mark.parametrize("name", FAMILY)
def test_first_weights_come_from_the_seed_alone_and_from_no_stale_memory(name: str) -> None:
    plan = member(name, 2)
    state = torch.random.get_rng_state()
    first = build(plan, seed=5).state_dict()
    stale = [torch.full((50_000,), float("nan")) for _ in range(20)]
    del stale
    second, other = build(plan, seed=5).state_dict(), build(plan, seed=6).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("name", FAMILY)
def test_every_weight_learns(name: str) -> None:
    network = awake(build(member(name, 2), seed=1)).train()
    told: dict[str, object] = {}
    if network.plan.has_null_condition:
        told["is_null"] = torch.tensor([True, False])
    loss_of(network, **told).backward()
    learning = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    assert not [name for name, weight in learning.items() if weight.grad is None or not weight.grad.any()]


@pytest.mark.parametrize("name", FAMILY)
def test_prediction_in_bf16_is_close_to_float32(name: str) -> None:
    network = awake(build(member(name, 2), seed=1)).eval()
    quick = copy.deepcopy(network)
    for module in quick.modules():
        if not isinstance(module, Norm) and not list(module.children()):
            module.to(torch.bfloat16)
    told = conditions(network.plan)
    brief = {key: value.to(torch.bfloat16) if key == "context" else value for key, value in told.items()}
    x = image(network.plan)
    with torch.inference_mode():
        expected, got = network(x, **told), quick(x.to(torch.bfloat16), **brief).float()
    # bf16 has 8 bits; some 20 layers round.
    assert float((got - expected).norm() / expected.norm()) < 0.06


@pytest.mark.parametrize("name", CONDITIONED)
@pytest.mark.parametrize("dims", [2, 3])
def test_the_time_step_reaches_the_output(name: str, dims: int) -> None:
    network = awake(build(member(name, dims), seed=1)).eval()
    with torch.inference_mode():
        early, late = (outputs(network, time=torch.full((2,), step))[0] for step in (10.0, 900.0))
    assert float((early - late).norm() / early.norm()) > 1e-3


def test_a_null_condition_is_that_of_an_absent_one() -> None:
    network = awake(build(member("latent diffusion", 2), seed=1)).eval()
    plan, told = network.plan, conditions(member("latent diffusion", 2), 2)
    x = image(plan, batch=2)
    with torch.inference_mode():
        given = network(x, **told)
        mixed = network(x, **told, is_null=torch.tensor([False, True]))
        absent = network(x, time=told["time"])
        hidden = {**told, "context_mask": torch.zeros(2, 3, dtype=torch.bool), "vectors": [None]}
        masked = network(x, **hidden)
    torch.testing.assert_close(mixed[0], given[0])
    torch.testing.assert_close(mixed[1], absent[1])
    torch.testing.assert_close(masked, absent)
    assert (absent[0] - given[0]).abs().max() > 1e-3


def test_what_the_mask_hides_does_not_matter() -> None:
    network = awake(build(member("latent diffusion", 2), seed=1)).eval()
    told = conditions(network.plan)
    context = told["context"].clone()
    context[:, 2] = 99.0
    with torch.inference_mode():
        seen, changed = (
            network(image(network.plan), **(told | {"context": one})) for one in (told["context"], context)
        )
    torch.testing.assert_close(seen, changed)


@pytest.mark.parametrize(
    ("name", "told", "message"),
    [
        ("nnunet", {"time": torch.zeros(1)}, "time is given"),
        ("ddpm", {}, "time is missing"),
        ("ddpm", {"time": torch.zeros(1), "context": torch.zeros(1, 2, 3)}, "context is given"),
        ("ddpm", {"time": torch.zeros(1), "is_null": torch.ones(1, dtype=torch.bool)}, "is_null is given"),
        ("ddpm", {"time": torch.zeros(1), "classes": torch.zeros(1, dtype=torch.long)}, "classes is given"),
        ("nnunet", {"skip_residuals": [torch.zeros(1)]}, "each of the 2 skips, got 1"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(name: str, told: dict[str, object], message: str) -> None:
    network = build(member(name, 2), seed=1)
    with pytest.raises(ValueError, match=message):
        network(image(network.plan), **told)


def test_residuals_reach_every_skip_and_the_middle() -> None:
    network = awake(build(member("ddpm", 2), seed=1)).eval()
    plan, told = network.plan, conditions(member("ddpm", 2))
    x = image(plan)
    with torch.inference_mode():
        _, skips = network._encode(x, network._cues(1, told["time"], (None, None), ((), None), None))
        # Stem, then blocks and steps down: 1 + 1 (stage 0), 1 + 2 (stage 1), 1 + 1 (stage 2).
        assert [skip.shape[1] for skip in skips] == [4, 4, 4, 8, 8, 8, 16]
        plain = network(x, **told)
        none = [torch.zeros_like(skip) for skip in skips]
        assert torch.equal(network(x, **told, skip_residuals=none), plain)
        for index, skip in enumerate(skips):
            residuals = [*none[:index], torch.randn_like(skip), *none[index + 1 :]]
            assert not torch.equal(network(x, **told, skip_residuals=residuals), plain), index
        coarsest = torch.ones(1, 16, *plan.size_at(2))
        assert not torch.equal(network(x, **told, middle_residual=coarsest), plain)


@pytest.mark.parametrize("name", ["nnunet", "resenc", "latent diffusion", "ddpm, scale and shift"])
def test_checkpointed_stages_have_the_same_gradients(name: str) -> None:
    gradients = []
    for stages in ((), (0, 1, 2)):
        network = awake(build(member(name, 2, checkpointed_stages=stages), seed=1)).train()
        torch.manual_seed(0)
        loss_of(network).backward()
        gradients.append([weight.grad for weight in network.parameters()])
    for kept, again in zip(*gradients, strict=True):
        assert (kept is None) == (again is None)
        assert kept is None or again is None or torch.equal(kept, again)


def test_checkpointed_stages_keep_less() -> None:
    kept = []
    for stages in ((), (0, 1, 2)):
        network = build(member("nnunet", 2, checkpointed_stages=stages), seed=1).train()
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = loss_of(network)
        kept.append(sum(sizes.values()))
        del loss
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("nnunet", {}),
        pytest.param("latent diffusion", {}, marks=pytest.mark.slow),
        pytest.param("attending segmentation", {}, marks=pytest.mark.slow),
        pytest.param("resenc pooled, squeezed", {}, marks=pytest.mark.slow),
        pytest.param("adm", {}, marks=pytest.mark.slow),
    ],
)
def test_compiles_without_a_graph_break(name: str, changes: dict[str, object]) -> None:
    network = awake(build(member(name, 2, **changes), seed=1)).train()
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    told, x = conditions(network.plan, 2), image(network.plan, batch=2)
    expected, got = network(x, **told), compiled(x, **told)
    assert type(expected) is type(got)
    for one, other in zip(expected, got, strict=True):
        assert torch.equal(one, other)


def test_a_fresh_residual_block_is_its_shortcut() -> None:
    plan = member("resenc", 2)
    network = build(plan, seed=1)
    block = network.encoder[1].get_submodule("0")
    assert isinstance(block, ResidualBlock)
    x = image(plan, 4, 6).repeat(1, 4, 1, 1)
    pooled = nn.functional.avg_pool2d(x, 2)
    assert block.shortcut.conv is not None
    projected = nn.functional.instance_norm(nn.functional.conv2d(pooled, block.shortcut.conv.weight))
    expected = nn.functional.leaky_relu(projected, 0.01)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)
    assert block.shortcut.conv.bias is None


def test_a_fresh_preactivation_block_is_its_input_and_a_fresh_denoiser_says_nothing() -> None:
    network = build(member("ddpm", 2), seed=1)
    block = network.encoder[0].get_submodule("0")
    assert isinstance(block, PreactivationBlock)
    x = torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        assert torch.equal(block(x, torch.randn(1, network.plan.embedding_channels)), x)
        assert not outputs(network)[0].any()


def test_a_shortcut_around_a_stage_repeats_or_projects_its_input() -> None:
    plan = member("vnet of three channels", 2)
    same, wider = StageShortcut(plan, 2, 6), StageShortcut(plan, 4, 6)
    x = torch.rand(1, 2, 3, 3)
    assert torch.equal(same(x, torch.zeros(1, 6, 3, 3)), x.repeat(1, 3, 1, 1))
    assert same.conv is None
    assert wider.conv is not None


def test_squeeze_and_excitation_has_the_bottleneck_of_nnunets() -> None:
    # 16 times fewer, in steps of 8, at least 8.
    assert [Squeeze(2, count).first.get_parameter("weight").shape[0] for count in (16, 128, 320)] == [8, 8, 24]
    squeeze = Squeeze(3, 16)
    for weight in squeeze.parameters():
        nn.init.zeros_(weight)
    x = torch.randn(1, 16, 2, 3, 4)
    torch.testing.assert_close(squeeze(x), x / 2)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_fresh_pixel_shuffle_is_nearest_interpolation(dims: int, kernel: int) -> None:
    plan = member("nnunet", dims, upsampling="pixel_shuffle", upsampling_kernel=kernel)
    shuffle = build(plan, seed=1).decoder[1].up
    assert isinstance(shuffle, PixelShuffle)
    stride = plan.strides[2]
    with torch.no_grad():
        out = shuffle(torch.randn(1, 16, *(3, 4, 5)[:dims]))
    coarse = out[(..., *(slice(None, None, step) for step in stride))]
    scale = tuple(float(step) for step in stride)
    assert torch.equal(out, nn.functional.interpolate(coarse, scale_factor=scale, mode="nearest"))
    assert out.shape[2:] == tuple(size * step for size, step in zip((3, 4, 5), stride, strict=False))


def test_pixel_shuffle_deals_channels_as_pytorch_does() -> None:
    plan = member("nnunet", 2, upsampling="pixel_shuffle")
    shuffle = step_up(plan, 0)
    assert isinstance(shuffle, PixelShuffle)
    x = torch.randn(2, 8, 3, 5)
    torch.testing.assert_close(shuffle(x), nn.functional.pixel_shuffle(shuffle.conv(x), 2))


def test_a_larger_kernel_follows_the_interpolation_and_a_small_one_comes_first() -> None:
    x = torch.randn(1, 8, 4, 4)
    for kernel in (1, 3):
        up = step_up(member("nnunet", 2, upsampling="nearest", upsampling_kernel=kernel), 0)
        assert up is not None
        late = nn.functional.conv2d(
            nn.functional.interpolate(x, scale_factor=2.0),
            up.get_parameter("conv.weight"),
            up.get_parameter("conv.bias"),
            padding=kernel // 2,
        )
        torch.testing.assert_close(up(x), late)


@pytest.mark.parametrize("join", ["concatenate", "add", "gate"])
def test_the_decoder_needs_its_skips(join: str) -> None:
    network = awake(build(member("nnunet", 2, skip_join=join), seed=1)).eval()
    with torch.inference_mode():
        _, skips = network._encode(image(network.plan), network._cues(1, None, (None, None), ((), None), None))
        plain = network(image(network.plan))
        for index, skip in enumerate(skips):
            residuals = [-skip if place == index else torch.zeros_like(other) for place, other in enumerate(skips)]
            assert not torch.allclose(network(image(network.plan), skip_residuals=residuals), plain)


def test_without_deep_supervision_there_is_one_head() -> None:
    names = build(member("2015"), seed=1).state_dict()
    assert [name for name in names if name.startswith("heads")] == ["heads.0.weight", "heads.0.bias"]


def test_the_skips_of_a_block_are_as_wide_as_the_plan_says() -> None:
    for name in FAMILY:
        plan = member(name, 2)
        network = build(plan, seed=0)
        told = conditions(plan)
        cues = network._cues(
            1,
            told.get("time"),
            (told.get("context"), told.get("context_mask")),
            (told.get("vectors", ()), told.get("classes")),
            None,
        )
        with torch.inference_mode():
            _, skips = network._encode(image(plan), cues)
        planned = [count for level in range(plan.num_levels) for count in reversed(plan.skip_channels(level))]
        assert [skip.shape[1] for skip in skips] == planned, name


def test_eight_stages_are_one_network() -> None:
    deep = member(
        "nnunet",
        2,
        patch_size=(128, 128),
        features_per_stage=(2,) * 8,
        strides=((1, 1), *((2, 2),) * 7),
        blocks_per_stage_encoder=(1,) * 8,
        blocks_per_stage_decoder=(1,) * 7,
    )
    with torch.inference_mode():
        assert build(deep, seed=0).eval()(image(deep, 5, 3)).shape == (1, 2, 5, 3)


def test_a_diffusion_member_says_where_it_attends() -> None:
    plan = member("latent diffusion")
    assert plan.attention_stages == (1, 2)
    assert [plan.transformer_depth(stage) for stage in range(3)] == [1, 1, 2]
    assert plan.head_channels(1, 8) == 2
    assert member("attending segmentation").attention_stages == (2,)
