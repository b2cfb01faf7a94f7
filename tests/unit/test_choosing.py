"""How a training computes is settled once, by rules and by timing; what was settled is used again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from math import inf, prod

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
from toy_training import toy_plan

from autoseg import runtime
from autoseg.domain.network_plan import NetworkPlan
from autoseg.errors import ConfigError
from autoseg.training import choosing, compiling
from autoseg.training.batches import Batch
from autoseg.training.choosing import choices_of, precision_of, quicker_precision, quickest, small_patch
from autoseg.training.learner import Learner
from autoseg.training.records import Choices, Compile, RunRecord, TrainSettings
from autoseg.training.speed import made_up_batch, made_up_regions

CPU = torch.device("cpu")
PART = toy_plan().configurations["3d_fullres"]
LONG_S, SHORT_S = 1e6, 60.0


def record(**fields: object) -> RunRecord:
    """Of a first start on a CPU in fp32."""
    known = {
        "configuration": "3d_fullres",
        "fold": 0,
        "plan_digest": "",
        "seed": 0,
        "num_epochs": 1,
        "time_budget_s": None,
        "device": "cpu",
        "precision": "fp32",
        "status": "running",
        "num_training_cases": 1,
        "num_validation_cases": 1,
    }
    return RunRecord.model_validate({**known, **fields})


# --- Precision -------------------------------------------------------------------------------------------------------


@pytest.fixture
def never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(*_: object) -> str:
        raise AssertionError("it was timed")

    monkeypatch.setattr(choosing, "quicker_precision", timed)


@pytest.mark.usefixtures("never_timed")
@pytest.mark.parametrize(("is_quick", "expected"), [(True, "bf16"), (False, "fp32")])
def test_flags_that_tell_need_no_timing(monkeypatch: pytest.MonkeyPatch, is_quick: bool, expected: str) -> None:
    monkeypatch.setattr(runtime, "_cpu_flags", lambda: frozenset({"fpu", "avx512_bf16"} if is_quick else {"fpu"}))
    assert precision_of(PART, TrainSettings(), None, CPU) == expected


@pytest.mark.usefixtures("never_timed")
def test_what_is_asked_for_or_was_chosen_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_cpu_flags", frozenset)
    assert precision_of(PART, TrainSettings(precision="bf16"), record(), CPU) == "bf16"
    assert precision_of(PART, TrainSettings(), record(precision="bf16"), CPU) == "bf16"
    assert precision_of(PART, TrainSettings(), record(device="cuda", precision="fp16"), torch.device("mps")) == "fp32"
    with pytest.raises(ConfigError):
        precision_of(PART, TrainSettings(precision="fp16"), None, CPU)


@pytest.mark.parametrize(("budget_s", "expected"), [(None, choosing.PROBE_S), (60.0, 0.6), (1e5, choosing.PROBE_S)])
def test_a_short_budget_has_little_time_for_timing(
    monkeypatch: pytest.MonkeyPatch, budget_s: float | None, expected: float
) -> None:
    given: list[float] = []

    def timed(part: object, seconds: float) -> str:
        given.append(seconds)
        return "bf16"

    monkeypatch.setattr(runtime, "_cpu_flags", frozenset)
    monkeypatch.setattr(choosing, "quicker_precision", timed)
    assert precision_of(PART, TrainSettings(time_budget_s=budget_s), None, CPU) == "bf16"
    assert given == [pytest.approx(expected)]


class Stopwatch:
    """In the place of `seconds_per_call`: steps of a precision take what a table says.

    Args:
        first: Seconds of the first step, by precision in the order in which they are tried.
        later: Of those after it.
    """

    def __init__(self, first: tuple[float, float], later: tuple[float, float]) -> None:
        self.first, self.later = (
            dict(zip(("fp32", "bf16"), first, strict=True)),
            dict(zip(("fp32", "bf16"), later, strict=True)),
        )
        self.calls: list[tuple[str, int]] = []

    def __call__(self, call: Callable[[], str], *, seconds: float, most: int, warm_up: int) -> tuple[float, ...]:
        assert warm_up == 0
        precision = call()
        self.calls.append((precision, most))
        return (self.first[precision],) if most == 1 else (9.0, self.later[precision], 8.0)


@pytest.mark.parametrize(
    ("first", "later", "expected", "num_calls"),
    [
        ((0.3, 0.4), (0.2, 0.1), "bf16", 4),
        ((0.3, 0.1), (0.1, 0.2), "fp32", 4),
        ((0.3, 0.3), (0.2, 0.199), "fp32", 4),  # less than two percent is noise
        ((0.1, 3.0), (0.2, 0.1), "fp32", 3),  # emulated: no second step is tried
    ],
)
def test_the_quicker_precision_by_its_quickest_later_step(
    monkeypatch: pytest.MonkeyPatch,
    first: tuple[float, float],
    later: tuple[float, float],
    expected: str,
    num_calls: int,
) -> None:
    watch = Stopwatch(first, later)
    monkeypatch.setattr(choosing, "_probe", lambda part, precision: lambda: precision)
    monkeypatch.setattr(runtime, "seconds_per_call", watch)
    assert quicker_precision(PART, 1.0) == expected
    assert len(watch.calls) == num_calls


@pytest.mark.parametrize("plan", [toy_plan(), toy_plan(dims=2)])
def test_real_steps_are_timed(plan: object) -> None:
    (part,) = plan.configurations.values()  # type: ignore[attr-defined]
    assert quicker_precision(part, 0.0) in ("fp32", "bf16")


@pytest.mark.parametrize(
    ("patch", "strides"),
    [
        ((40, 56, 40), ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))),
        ((28, 256, 224), ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2))),
        ((512, 512), ((1, 1), *((2, 2),) * 7)),
        ((16, 16, 16), ((1, 1, 1), (2, 2, 2))),
    ],
)
def test_the_probe_has_a_small_patch_that_the_network_takes(
    patch: tuple[int, ...], strides: tuple[tuple[int, ...], ...]
) -> None:
    num, dims = len(strides), len(patch)
    network = NetworkPlan(
        in_channels=1,
        num_classes=2,
        patch_size=patch,
        features_per_stage=(4,) * num,
        strides=strides,
        kernel_sizes=((3,) * dims,) * num,
        blocks_per_stage_encoder=(1,) * num,
        blocks_per_stage_decoder=(1,) * (num - 1),
    )
    small = small_patch(network)
    assert all(length % step == 0 for length, step in zip(small, network.divisors, strict=True))
    assert all(length <= whole for length, whole in zip(small, patch, strict=True))
    assert prod(small) <= max(4 * choosing.PROBE_VOXELS, prod(network.divisors))


# --- Layout and compiler ---------------------------------------------------------------------------------------------

EAGER, LAST = Choices(layout="contiguous"), Choices(layout="channels_last")


def compiled(choices: Choices) -> Choices:
    return choices.model_copy(update={"is_compiled": True})


@pytest.mark.parametrize(
    ("table", "asked", "left_s", "expected"),
    [
        # (contiguous, channels last, contiguous compiled, channels last compiled)
        ((1.0, 0.9, 0.5, 0.4), "auto", LONG_S, compiled(LAST)),
        ((1.0, 1.1, 0.5, 0.4), "auto", LONG_S, compiled(EAGER)),
        ((1.0, 0.9, 0.5, 0.4), "auto", SHORT_S, LAST),
        ((1.0, 0.9, 0.5, 0.4), "never", LONG_S, LAST),
        ((1.0, 0.99, 0.985, 0.5), "auto", LONG_S, EAGER),  # two percent or less is noise
        ((1.0, 0.9, 0.5, 1.5), "always", SHORT_S, compiled(LAST)),
        ((1.0, 0.9, 0.5, inf), "always", LONG_S, LAST),  # cannot be compiled
        ((1.0, 0.9, 0.5, inf), "auto", LONG_S, LAST),
        ((1.0, 1.5, inf, 0.1), "auto", LONG_S, EAGER),
    ],
)
def test_the_quickest_way_is_taken(table: tuple[float, ...], asked: Compile, left_s: float, expected: Choices) -> None:
    ways = [EAGER, LAST, compiled(EAGER), compiled(LAST)]
    timed: list[Choices] = []

    def watch(choices: Choices) -> float:
        timed.append(choices)
        return table[ways.index(choices)]

    found = quickest(EAGER, asked, watch, lambda step_s: left_s)
    assert found.model_copy(update={"timings_s": {}}) == expected
    assert len(timed) <= 3, "only the better layout is compiled"
    finite = [value for value in (table[ways.index(choices)] for choices in timed) if value < inf]
    assert sorted(found.timings_s.values()) == sorted(finite)
    assert any(choices.is_compiled for choices in timed) == (asked == "always" or (asked, left_s) == ("auto", LONG_S))


def test_whether_a_training_is_long_is_judged_by_the_best_step() -> None:
    asked: list[float] = []

    def left_s(step_s: float) -> float:
        asked.append(step_s)
        return 0.0

    quickest(EAGER, "auto", lambda choices: 0.5 if choices == LAST else 1.0, left_s)
    assert asked == [0.5]


def learner(precision: str = "fp32", choices: Choices | None = None) -> Learner:
    return Learner(PART.network, PART.training, device=CPU, precision=precision, seed=0, choices=choices)


def never_left(step_s: float) -> float:
    raise AssertionError("nothing was to be timed")


@pytest.mark.parametrize(("precision", "layout"), [("bf16", "channels_last"), ("fp32", "contiguous")])
def test_on_a_cpu_rules_decide(precision: str, layout: str) -> None:
    one = learner(precision)
    found = choices_of(PART, TrainSettings(), None, one, 3, never_left)
    assert found == Choices(layout=layout)  # type: ignore[arg-type]
    assert one.choices == found


def test_what_was_chosen_is_used_again() -> None:
    before = Choices(layout="channels_last", micro_batch=2, timings_s={"channels_last": 0.5})
    one = learner()
    assert choices_of(PART, TrainSettings(), record(choices=before), one, 3, never_left) == before
    assert one.choices == before
    assert one._passes.layout == "channels_last"
    assert one.gradients.micro_batch == 2


@pytest.mark.parametrize(
    "other",
    [{"device": "cuda"}, {"precision": "bf16"}, {"choices": None}],
)
def test_what_was_chosen_elsewhere_is_not(other: dict[str, object]) -> None:
    before = record(**{"choices": LAST, **other})
    assert choices_of(PART, TrainSettings(), before, learner(), 3, never_left) == EAGER


@pytest.mark.parametrize("asked", ["always", "never"])
def test_the_compiler_is_asked_for_or_refused(monkeypatch: pytest.MonkeyPatch, asked: Compile) -> None:
    monkeypatch.setattr(torch, "compile", Compiled)
    before = record(choices=Choices(is_compiled=asked == "never"))
    for stored in (None, before):
        found = choices_of(PART, TrainSettings(compile=asked), stored, learner(), 3, never_left)
        assert found.is_compiled == (asked == "always")


class Gpu:
    """A device that is called a GPU and is the CPU."""

    type = "cuda"


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Learner:
    """A learner on it; the compiler does nothing, and each way is timed with a single step."""
    one = learner()
    object.__setattr__(one.compute, "device", Gpu())
    made = made_up_batch(PART.network, 3, PART.network.patch_size, CPU)
    monkeypatch.setattr(choosing, "made_up_batch", lambda *_: made)
    monkeypatch.setattr(choosing, "TIMED_S", 0.0)
    monkeypatch.setattr(torch, "compile", Compiled)
    return one


def test_a_gpu_is_timed_with_the_learner_that_will_train(on_gpu: Learner) -> None:
    """What it has learned stays as it is."""
    before = {name: tensor.clone() for name, tensor in on_gpu.state().items()}
    found = choices_of(PART, TrainSettings(), None, on_gpu, 3, lambda step_s: LONG_S)
    assert {"contiguous", "channels_last"} <= found.timings_s.keys()
    assert any("compiled" in name for name in found.timings_s)
    assert on_gpu.choices == found
    after = on_gpu.state()
    assert after.keys() == before.keys(), "no momentum yet"
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert all(weight.grad is None for weight in on_gpu.network.parameters())


def test_timing_finds_a_batch_that_does_not_fit(on_gpu: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    run = compiling.Forward.__call__

    def limited(forward: compiling.Forward, images: Tensor) -> object:
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(forward, images)

    monkeypatch.setattr(compiling.Forward, "__call__", limited)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    on_gpu.gradients.lowers_micro_batch = True
    found = choices_of(PART, TrainSettings(), None, on_gpu, 3, lambda step_s: SHORT_S)
    assert found.micro_batch == on_gpu.choices.micro_batch == 2


def test_a_gpu_whose_compiler_fails_goes_without(
    on_gpu: Learner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", broken(InvalidCxxCompiler()))
    found = choices_of(PART, TrainSettings(compile="always"), None, on_gpu, 3, lambda step_s: LONG_S)
    assert not found.is_compiled
    assert found.timings_s.keys() == {"contiguous", "channels_last"}
    assert caplog.text.count("cannot be compiled") == 1


class Compiled(nn.Module):
    """In the place of a compiled network."""

    def __init__(self, network: nn.Module, dynamic: bool) -> None:
        super().__init__()
        assert not dynamic
        self.network = network
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.network(images)
        return out


def broken(problem: Exception) -> Callable[..., Callable[[Tensor], Tensor]]:
    """A compiler whose networks fail."""

    def compile_(network: nn.Module, dynamic: bool) -> Callable[[Tensor], Tensor]:
        def run(images: Tensor) -> Tensor:
            raise problem

        return run

    return compile_


# --- The compiler ----------------------------------------------------------------------------------------------------


def batch() -> Batch:
    return made_up_batch(PART.network, 3, PART.network.patch_size, CPU)


@pytest.mark.parametrize(
    "problem",
    [InvalidCxxCompiler(), TorchDynamoException("no triton"), CppCompileError(["g++"], "cc1plus: out of disk")],
)
def test_a_compiler_that_fails_is_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, problem: Exception
) -> None:
    expected = learner()
    outcome = expected.step(batch(), 0.1, 0)
    monkeypatch.setattr(torch, "compile", broken(problem))
    one = learner(choices=Choices(is_compiled=True))
    assert one.step(batch(), 0.1, 0) == outcome
    assert not one.choices.is_compiled
    reason = str(problem).strip().splitlines()[0]
    assert f"runs as it stands: {reason}" in caplog.text
    other = expected.state()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.state().items())


def test_other_errors_of_a_compiled_network_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", broken(RuntimeError("sizes differ")))
    with pytest.raises(RuntimeError, match="sizes differ"):
        learner(choices=Choices(is_compiled=True)).step(batch(), 0.1, 0)


def test_weights_of_a_compiled_network_keep_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", Compiled)
    plain, one = learner(), learner(choices=Choices(is_compiled=True))
    for each in (plain, one):
        each.step(batch(), 0.1, 0)
    assert one._passes.forward._run.calls == 1  # type: ignore[attr-defined]
    assert one.state().keys() == plain.state().keys()
    assert one.weights.keys() == plain.weights.keys()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's compiler loads parts of torch that are to go
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_learns_the_same() -> None:
    """In bf16, whose backward pass of the norm is our own."""
    plain = learner("bf16")
    one = learner("bf16", Choices(layout="channels_last", is_compiled=True))
    for number in range(3):
        expected, found = (each.step(batch(), 0.1, number) for each in (plain, one))
        assert found.loss == pytest.approx(expected.loss, rel=1e-2)
        assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=0.1)
    assert one.choices.is_compiled


def test_made_up_regions_hold_one_value_each() -> None:
    network = PART.network.model_copy(update={"output": "regions"})
    table = made_up_regions(network)
    assert table is not None
    assert table.tolist() == [[column == row + 1 for column in range(4)] for row in range(3)]
    assert made_up_regions(PART.network) is None
    labels = made_up_batch(network, 2, (8, 8, 8), CPU).labels
    assert labels.unique().tolist() == [0, 1, 2, 3]
