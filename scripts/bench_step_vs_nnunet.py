#!/usr/bin/env python3
"""Time one training step of nnU-Net v2 and of autoseg, side by side, on this machine.

Both sides get the same plan (nnU-Net's own for the data set, from tests/golden/nnunet), random data of the plan's
shape, and run a whole step: forward, deep-supervision Dice + cross-entropy, backward, gradient clipping, optimiser.
nnU-Net's side runs nnU-Net's own classes and its own ``train_step``; autoseg's learns as the preset of --recipe says.
Loading and augmentation are no part of these steps. A third process does nothing but what a step's batch needs before
it is learned: reading from memory and augmenting, both in the same thread.

The two sides live in two environments (for nnU-Net's see scripts/nnunet_oracle.py). A parent, in either of them,
starts one process a side, lets them warm up, and then alternates between them, changing the order each round, so that
a disturbance of the machine meets both:

    python scripts/bench_step_vs_nnunet.py --python-nnunet ORACLE/bin/python --python-autoseg python --rounds 5

With one of the two options only that side is timed. The JSON on standard output has the seconds of every step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def read_plan(args: argparse.Namespace) -> dict:
    """Return one configuration of a golden plan, with the numbers of channels and classes."""
    golden = json.loads(Path(args.plan).read_text())
    plan = dict(golden["plans"][args.configuration])
    plan["channels"] = len(golden["dataset"]["channel_names"])
    plan["labels"] = golden["dataset"]["labels"]
    return plan


# --- nnU-Net's side --------------------------------------------------------------------------------------------------
def nnunet_step(args: argparse.Namespace) -> tuple[Callable[[], None], dict]:
    """Return a function that runs one training step of nnU-Net on random data, and facts about it."""
    from types import SimpleNamespace

    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    plan = read_plan(args)
    dimension = len(plan["patch_size"])
    keys = ("n_stages", "features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage", "n_conv_per_stage_decoder")
    architecture = {key: plan[key] for key in keys} | {
        "conv_op": f"torch.nn.modules.conv.Conv{dimension}d",
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimension}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    configuration = SimpleNamespace(
        network_arch_class_name="dynamic_network_architectures.architectures.unet.PlainConvUNet",
        network_arch_init_kwargs=architecture,
        network_arch_init_kwargs_req_import=["conv_op", "norm_op", "dropout_op", "nonlin"],
        batch_dice=plan["batch_dice"],
        pool_op_kernel_sizes=plan["strides"],
    )

    class Stepper(nnUNetTrainer):
        """nnU-Net's trainer without folders and data: network, loss, optimiser and step only."""

        def __init__(self) -> None:
            self.device, self.is_ddp, self.local_rank = torch.device(args.device), False, 0
            self.grad_scaler = torch.GradScaler("cuda") if args.device == "cuda" else None
            self.initial_lr, self.weight_decay, self.num_epochs = 1e-2, 3e-5, 1000
            self.enable_deep_supervision = True
            self.configuration_manager = configuration
            self.label_manager = LabelManager(plan["labels"], regions_class_order=None)
            heads = self.label_manager.num_segmentation_heads
            self.network = self.build_network_architecture(None, configuration, plan["channels"], heads, True)
            self.network.to(self.device).train()
            if self._do_i_compile():
                self.network = torch.compile(self.network)
            self.optimizer, self.lr_scheduler = self.configure_optimizers()
            self.loss = self._build_loss()

        def print_to_log_file(self, *words: Any, **_: Any) -> None:
            print(*words, file=sys.stderr)

    stepper = Stepper()
    size, patch = plan["batch_size"], plan["patch_size"]
    targets = []
    for scale in stepper._get_deep_supervision_scales():
        shape = [round(edge * factor) for edge, factor in zip(patch, scale, strict=True)]
        targets.append(torch.randint(len(plan["labels"]), (size, 1, *shape)).to(torch.int16))
    batch = {"data": torch.randn(size, plan["channels"], *patch), "target": targets}

    def step() -> None:
        stepper.train_step(batch)  # ends with loss.cpu(), so it waits for the device

    return step, {"precision": "fp16" if args.device == "cuda" else "fp32", "torch": torch.__version__}


# --- autoseg's side --------------------------------------------------------------------------------------------------
def autoseg_step(args: argparse.Namespace) -> tuple[Callable[[], None], dict]:
    """Return a function that runs one training step of autoseg on random data, and facts about it."""
    import torch

    from autoseg import runtime
    from autoseg.training.batches import Batch
    from autoseg.training.learner import Learner

    runtime.configure_allocator()
    device = runtime.pick_device(args.device)
    precision = runtime.pick_precision(args.precision, device)
    network, training = autoseg_plan(args)
    learner = Learner(network, training, device=device, precision=precision, seed=0)
    size, patch = training.batch_size, network.patch_size
    images = torch.randn(size, network.in_channels, *patch)
    labels = torch.randint(network.num_classes, (size, *patch)).to(torch.int16)
    done = 0

    def step() -> None:
        nonlocal done
        learner.step(Batch(images.to(device), labels.to(device), ("random",) * size), training.learning_rate, done)
        done += 1  # the step read its loss, so it waited for the device

    return step, {"precision": precision, "optimiser": training.optimiser, "torch": torch.__version__}


def augmentation_step(args: argparse.Namespace) -> tuple[Callable[[], None], dict]:
    """Return a function that reads and augments one batch as in a training, and facts about it."""
    from itertools import count

    import torch

    from autoseg import runtime
    from autoseg.training.batches import assemble
    from autoseg.training.trial import TrialRequest, made_up_reader

    runtime.configure_allocator()
    device = runtime.pick_device(args.device)
    network, training = autoseg_plan(args)
    reader = made_up_reader(TrialRequest(network=network, training=training))
    numbers = count()

    def step() -> None:
        assemble(reader.read(next(numbers)), device)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step, {"torch": torch.__version__}


def autoseg_plan(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return the plan's network, and its training by the recipe of a preset."""
    from autoseg.domain.network_plan import NetworkPlan
    from autoseg.domain.plan import TrainingPlan
    from autoseg.planning.presets import preset_rules

    plan = read_plan(args)
    network = NetworkPlan(
        in_channels=plan["channels"],
        num_classes=len(plan["labels"]),
        blocks_per_stage_encoder=tuple(plan["n_conv_per_stage"]),
        blocks_per_stage_decoder=tuple(plan["n_conv_per_stage_decoder"]),
        **{key: as_tuple(plan[key]) for key in ("patch_size", "features_per_stage", "strides", "kernel_sizes")},
    )
    recipe = preset_rules(args.recipe).training.model_dump()
    axes = tuple(range(network.dims))
    training = TrainingPlan(batch_size=plan["batch_size"], batch_dice=plan["batch_dice"], **recipe)
    augmentation = training.augmentation.model_copy(update={"mirror_axes": axes})
    return network, training.model_copy(update={"augmentation": augmentation})


def as_tuple(value: Any) -> Any:
    """Return nested lists as nested tuples."""
    return tuple(as_tuple(part) for part in value) if isinstance(value, list) else value


# --- child and parent ------------------------------------------------------------------------------------------------
def child(args: argparse.Namespace) -> None:
    """Serve one side: tell facts, then for each number read run that many steps and answer with their seconds."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to standard error
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    steps = {"nnunet": nnunet_step, "autoseg": autoseg_step, "augmentation": augmentation_step}
    step, facts = steps[args.child](args)
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
        print(json.dumps(seconds), file=answers, flush=True)


def start(side: str, python: str, args: argparse.Namespace) -> subprocess.Popen:
    """Start the process of one side."""
    command = [python, str(Path(__file__).resolve()), "--child", side]
    for name in ("plan", "configuration", "threads", "device", "precision", "recipe"):
        command += [f"--{name}", str(getattr(args, name))]
    path = os.pathsep.join([str(ROOT)] + ([os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []))
    environment = os.environ | ({"PYTHONPATH": path} if side != "nnunet" else {})
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def answer(side: str, process: subprocess.Popen) -> Any:
    """Read one line of JSON from one side."""
    line = process.stdout.readline()
    if not line:
        sys.exit(f"the {side} side ended with status {process.wait()}")
    return json.loads(line)


def ask(side: str, process: subprocess.Popen, steps: int) -> list[float]:
    """Let one side run some steps; return their seconds."""
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    return answer(side, process)


def parent(args: argparse.Namespace) -> dict:
    """Alternate both sides in one run; return the seconds of each step and the medians."""
    ours = args.python_autoseg
    given = {"nnunet": args.python_nnunet, "autoseg": ours, "augmentation": ours}
    processes = {side: start(side, python, args) for side, python in given.items() if python}
    seconds: dict[str, list[list[float]]] = {side: [] for side in processes}
    facts = {}
    try:
        for side, process in processes.items():
            facts[side] = answer(side, process)
        for side, process in processes.items():
            ask(side, process, args.warm_up)
        for number in range(args.rounds):
            order = list(processes.items())
            for side, process in order if number % 2 == 0 else reversed(order):
                seconds[side].append(ask(side, process, args.steps))
    finally:
        for process in processes.values():
            process.stdin.close()
            process.wait()
    result: dict[str, Any] = {
        "plan": Path(args.plan).stem,
        "configuration": args.configuration,
        "device": args.device,
        "threads": args.threads,
        "rounds": args.rounds,
        "steps_per_round": args.steps,
    }
    medians = {side: [statistics.median(part) for part in parts] for side, parts in seconds.items()}
    for side, parts in seconds.items():
        result[side] = facts[side] | {
            "median_seconds_per_step": round(statistics.median(medians[side]), 4),
            "seconds": [[round(value, 4) for value in part] for part in parts],
        }
    for name, (part, whole) in {
        "autoseg_over_nnunet": ("autoseg", "nnunet"),
        "augmentation_over_autoseg": ("augmentation", "autoseg"),
    }.items():
        if part in medians and whole in medians:
            ratios = sorted(a / b for a, b in zip(medians[part], medians[whole], strict=True))
            result[name] = {
                "median": round(statistics.median(ratios), 3),
                "lowest": round(ratios[0], 3),
                "highest": round(ratios[-1], 3),
            }
    return result


def main() -> None:
    """Read the command line; be the parent or one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python-nnunet", help="python of the environment that has nnunetv2")
    parser.add_argument("--python-autoseg", help="python of the environment that has autoseg's dependencies")
    parser.add_argument("--plan", default=str(ROOT / "tests" / "golden" / "nnunet" / "hippocampus.json"))
    parser.add_argument("--configuration", default="3d_fullres")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="steps a side in each round")
    parser.add_argument("--warm-up", type=int, default=2, help="steps a side before the first round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="auto", help="precision of autoseg's side (nnU-Net has no choice)")
    parser.add_argument("--recipe", default="default", help="preset by which autoseg's side learns")
    parser.add_argument("--child", choices=("nnunet", "autoseg", "augmentation"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
    elif args.python_nnunet or args.python_autoseg:
        print(json.dumps(parent(args), indent=1))
    else:
        parser.error("give --python-nnunet, --python-autoseg or both")


if __name__ == "__main__":
    main()
