#!/usr/bin/env python3
"""A bank of fingerprints of every kind of data set, planned by nnU-Net v2's four planners and by autoseg.

In the environment of nnU-Net (see `nnunet_oracle.py`), which must not contain autoseg:

    oracle/bin/python scripts/nnunet_bank.py make --out tests/golden/nnunet_bank
    oracle/bin/python scripts/nnunet_bank.py make --random 1000 --seed 1 --out random

In autoseg's environment, which must not contain nnU-Net:

    python scripts/nnunet_bank.py compare tests/golden/nnunet_bank random --json planner-bank.json

`make` writes one file a planner, a line a case: the data set's description, the fingerprint, the memory target and what
nnU-Net planned, or the error it stopped with. nnU-Net's networks are built without weights (torch's meta device), which
makes its own planners, otherwise untouched, quick enough for thousands of cases.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Case = dict[str, Any]
"""A line of cases.jsonl: "name", "vram_gb" (None: the planner's own), nnU-Net's "dataset" and "fingerprint"."""

PLANNERS = {
    "nnunet": ("default_experiment_planner", "ExperimentPlanner"),
    "nnunet-resenc-m": ("residual_unets.residual_encoder_unet_planners", "nnUNetPlannerResEncM"),
    "nnunet-resenc-l": ("residual_unets.residual_encoder_unet_planners", "nnUNetPlannerResEncL"),
    "nnunet-resenc-xl": ("residual_unets.residual_encoder_unet_planners", "nnUNetPlannerResEncXL"),
}
"""nnU-Net's planners by the names of autoseg's presets."""

NAMES = {"2d": "2d", "3d_fullres": "3d_fullres", "3d_lowres": "3d_lowres", "3d_cascade_fullres": "3d_cascade"}
"""nnU-Net's configurations and ours."""

SCHEMES = {
    "zscore": "ZScoreNormalization",
    "ct": "CTNormalization",
    "none": "NoNormalization",
    "rescale": "RescaleTo01Normalization",
    "rgb": "RGBTo01Normalization",
}
TIME_LIMIT_S = 300
"""A planner that takes longer is stopped, and that is what is recorded."""

_DATASET = "Dataset001_bank"


# --- make, with nnU-Net ----------------------------------------------------------------------------------------------
def load_planners(home: Path) -> dict[str, type]:
    """Import nnU-Net's planners with its folders below `home`, and let them build networks without weights."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[variable] = str(home / variable)
        (home / variable / _DATASET).mkdir(parents=True)
    import importlib

    import torch

    def without_weights(planner: type) -> type:
        estimate = planner.static_estimate_VRAM_usage

        def quick(*args: Any, **kwargs: Any) -> Any:
            with torch.device("meta"):
                return estimate(*args, **kwargs)

        return type(planner.__name__, (planner,), {"static_estimate_VRAM_usage": staticmethod(quick)})

    root = "nnunetv2.experiment_planning.experiment_planners"
    return {
        preset: without_weights(getattr(importlib.import_module(f"{root}.{module}"), name))
        for preset, (module, name) in PLANNERS.items()
    }


def golden_configuration(configuration: dict[str, Any]) -> dict[str, Any]:
    """What autoseg must reproduce of one of nnU-Net's configurations."""
    if "inherits_from" in configuration:
        return {"inherits_from": configuration["inherits_from"], "previous_stage": configuration["previous_stage"]}
    architecture = configuration["architecture"]
    network = architecture["arch_kwargs"]
    keys = ("spacing", "patch_size", "batch_size", "batch_dice", "normalization_schemes", "use_mask_for_norm")
    return {
        **{key: configuration[key] for key in keys},
        "network": architecture["network_class_name"].rpartition(".")[2],
        **{key: network[key] for key in ("n_stages", "features_per_stage", "kernel_sizes", "strides")},
        "blocks_encoder": network.get("n_blocks_per_stage", network.get("n_conv_per_stage")),
        "blocks_decoder": network["n_conv_per_stage_decoder"],
    }


class TooSlow(Exception):
    """The planner did not come to an end in time."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Stop the block with `TooSlow` after so many seconds."""

    def stop(*_: Any) -> None:
        raise TooSlow(f"no plan after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def plan_with_nnunet(planner: type, case: Case, home: Path, seconds: int) -> dict[str, Any]:
    """nnU-Net's plan of one case, or its error."""
    raw, preprocessed = home / "nnUNet_raw" / _DATASET, home / "nnUNet_preprocessed" / _DATASET
    for item in preprocessed.iterdir():
        item.unlink()  # an old plan would be merged into the new one
    listed = {"dataset": {"case": {"images": ["case_0000.nii.gz"], "label": "case.nii.gz"}}}
    reader = {"overwrite_image_reader_writer": "SimpleITKIO"}
    (raw / "dataset.json").write_text(json.dumps({**case["dataset"], **listed, **reader}))
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(case["fingerprint"]))
    target = {} if case["vram_gb"] is None else {"gpu_memory_target_in_gb": case["vram_gb"]}
    silent = contextlib.redirect_stdout(io.StringIO())
    with silent, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with time_limit(seconds):
                plans = planner(_DATASET, **target).plan_experiment()
        except Exception as problem:  # whatever nnU-Net stops with is what is recorded
            return {"error": f"{type(problem).__name__}: {problem}"[:200]}
    return {
        "transpose_forward": plans["transpose_forward"],
        "configurations": {NAMES[k]: golden_configuration(item) for k, item in plans["configurations"].items()},
    }


def make(args: argparse.Namespace) -> None:
    """Plan every case with nnU-Net's four planners."""
    from nnunet_bank_cases import random_cases, shipped_cases

    cases = list(random_cases(args.random, args.seed)) if args.random else list(shipped_cases())
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix="nnunet_bank_"))
    try:
        planners = load_planners(home)
        (out / "cases.jsonl").write_text("".join(json.dumps(case, separators=(",", ":")) + "\n" for case in cases))
        for preset, planner in planners.items():
            lines = []
            for number, case in enumerate(cases):
                found = plan_with_nnunet(planner, case, home, args.seconds)
                lines.append(json.dumps({"name": case["name"], **found}, separators=(",", ":")) + "\n")
                if number % 50 == 0:
                    print(f"{preset}: {number}/{len(cases)}", file=sys.stderr, flush=True)
            (out / f"{preset}.jsonl").write_text("".join(lines))
    finally:
        shutil.rmtree(home)


# --- compare, with autoseg -------------------------------------------------------------------------------------------
def read_bank(folder: Path, preset: str) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Each case with what nnU-Net made of it."""
    cases = [json.loads(line) for line in (folder / "cases.jsonl").read_text().splitlines()]
    plans = [json.loads(line) for line in (folder / f"{preset}.jsonl").read_text().splitlines()]
    for case, plan in zip(cases, plans, strict=True):
        assert case["name"] == plan["name"]
        yield case, plan


def plan_with_autoseg(case: Case, preset: str) -> Any:
    """autoseg's plan of one case, from nnU-Net's own files."""
    from autoseg.domain.descriptions import parse_channels, parse_labels
    from autoseg.domain.fingerprint import Budget
    from autoseg.planning.importing import import_fingerprint
    from autoseg.planning.planner import make_plan
    from autoseg.planning.presets import preset_rules

    channels, labels = parse_channels(case["dataset"]), parse_labels(case["dataset"])
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(case["fingerprint"]))
        file.flush()
        fingerprint = import_fingerprint(Path(file.name), channels, labels.num_classes, case["dataset"]["numTraining"])
    return make_plan(fingerprint, case["name"], labels, channels, preset_rules(preset), Budget(vram_gb=case["vram_gb"]))


def as_nnunet(configuration: Any) -> dict[str, Any]:
    """One of autoseg's configurations in the form of `golden_configuration`."""
    preprocess, network, training = configuration.preprocess, configuration.network, configuration.training
    return {
        "spacing": list(preprocess.target_spacing),
        "patch_size": list(network.patch_size),
        "batch_size": training.batch_size,
        "batch_dice": training.batch_dice,
        "normalization_schemes": [SCHEMES[item.scheme] for item in preprocess.normalization],
        "use_mask_for_norm": [item.use_mask for item in preprocess.normalization],
        "network": {"conv": "PlainConvUNet", "residual": "ResidualEncoderUNet"}[network.encoder_block],
        "n_stages": network.num_stages,
        "features_per_stage": list(network.features_per_stage),
        "kernel_sizes": [list(row) for row in network.kernel_sizes],
        "strides": [list(row) for row in network.strides],
        "blocks_encoder": list(network.blocks_per_stage_encoder),
        "blocks_decoder": list(network.blocks_per_stage_decoder),
    }


def plan_differences(plan: Any, golden: dict[str, Any]) -> list[str]:
    """Every way in which autoseg's plan is not nnU-Net's."""
    found, expected = plan.configurations, golden["configurations"]
    if set(found) != set(expected):
        return [f"configurations {sorted(found)}, nnU-Net {sorted(expected)}"]
    problems = []
    for name, wanted in expected.items():
        order = [2 - axis for axis in found[name].preprocess.axis_order]
        if order != golden["transpose_forward"]:
            problems.append(f"{name}: axes {order}, nnU-Net {golden['transpose_forward']}")
        ours = as_nnunet(found[name])
        if "inherits_from" in wanted:
            if found[name].previous_stage != NAMES[wanted["previous_stage"]]:
                problems.append(f"{name}: previous stage {found[name].previous_stage}")
        elif found[name].previous_stage is not None:
            problems.append(f"{name}: previous stage {found[name].previous_stage}, nnU-Net has none")
        parent = expected[NAMES[wanted["inherits_from"]]] if "inherits_from" in wanted else wanted
        problems.extend(f"{name}: {key} {ours[key]}, nnU-Net {parent[key]}" for key in ours if ours[key] != parent[key])
    return problems


def compare_case(case: Case, golden: dict[str, Any], preset: str) -> tuple[str, list[str]]:
    """What autoseg makes of a case beside what nnU-Net made of it.

    Returns:
        "equal" or "different" with the differences; where nnU-Net stopped with an error, "planned" or "refused" with
        both outcomes in words.
    """
    from autoseg.errors import PlanError

    try:
        plan = plan_with_autoseg(case, preset)
    except PlanError as problem:
        if "error" in golden:
            return "refused", [f"nnU-Net: {golden['error']}; autoseg: {problem.message}"]
        return "different", [f"autoseg refuses: {problem.message}"]
    if "error" in golden:
        patches = {name: item.network.patch_size for name, item in plan.configurations.items()}
        return "planned", [f"nnU-Net: {golden['error']}; autoseg plans {patches}"]
    problems = plan_differences(plan, golden)
    return ("different" if problems else "equal"), problems


def compare(args: argparse.Namespace) -> int:
    """Compare autoseg's plans with the stored ones; the exit status is the number of different ones, 100 at most."""
    result: dict[str, dict[str, dict[str, int]]] = {}
    num_different = 0
    for folder in map(Path, args.folders):
        for preset in (name for name in PLANNERS if (folder / f"{name}.jsonl").is_file()):
            counts = dict.fromkeys(("equal", "different", "refused", "planned"), 0)
            for case, golden in read_bank(folder, preset):
                outcome, words = compare_case(case, golden, preset)
                counts[outcome] += 1
                if outcome == "different" or (args.verbose and words):
                    print(f"{folder.name} {preset} {case['name']}: {outcome}: {'; '.join(words)}")
            result.setdefault(folder.name, {})[preset] = counts
            num_different += counts["different"]
            print(f"{folder.name}, {preset}: {counts}")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    return min(num_different, 100)


# --- main ------------------------------------------------------------------------------------------------------------
def main(words: Sequence[str] | None = None) -> int:
    """Read the command line and run one subcommand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("make", help="plan the bank with nnU-Net")
    sub.add_argument("--out", required=True, help="folder for cases.jsonl and a file a planner")
    sub.add_argument("--random", type=int, default=0, metavar="N", help="N random cases instead of the bank")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--seconds", type=int, default=TIME_LIMIT_S, help="longest time for a plan")
    sub = commands.add_parser("compare", help="plan the same with autoseg and compare")
    sub.add_argument("folders", nargs="+")
    sub.add_argument("--verbose", action="store_true", help="also tell what becomes of cases where nnU-Net fails")
    sub.add_argument("--json", help="write the counts here")
    args = parser.parse_args(words)
    if args.command == "compare":
        return compare(args)
    make(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
