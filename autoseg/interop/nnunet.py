"""Trained nnU-Net v2 models become runs of autoseg.

Everything that makes a difference to predictions is read from the model's own files: the network from plans.json (the
trainer's name is only kept), the mirror axes from the checkpoint. What autoseg cannot do as nnU-Net does is refused
with the reason, all reasons at once.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import JsonValue, ValidationError

from autoseg.domain.dataset import Dataset
from autoseg.domain.fingerprint import Fingerprint
from autoseg.domain.plan import CASCADE, Configuration, Decision, Plan
from autoseg.domain.values import validation_problems
from autoseg.errors import AutosegError, ConfigError, ModelError
from autoseg.interop.archives import extract
from autoseg.interop.nnunet_configuration import Trained, convert_configuration
from autoseg.interop.nnunet_folders import (
    FINAL_CHECKPOINT,
    FINGERPRINT,
    FoldName,
    find_models,
    is_part_of_model,
    model_at,
)
from autoseg.interop.nnunet_members import Checkpoint, Member, read_member
from autoseg.interop.nnunet_weights import from_nnunet
from autoseg.io.files import atomic_path, file_digest
from autoseg.io.model import ModelCard, save_model
from autoseg.io.run_folder import RunFolder
from autoseg.network.unet import restore
from autoseg.planning.importing import import_fingerprint
from autoseg.runtime import versions

log = logging.getLogger("autoseg")

ORIGIN = "nnU-Net v2"
"""Provenance of an imported model: `imported_from`."""

_OUR_NAMES = {"3d_cascade_fullres": CASCADE}
"""Configurations that are called otherwise here."""

_USUAL_TRAINER = "nnUNetTrainer"
_USUAL_ENDING = ".nii.gz"


@dataclass(frozen=True, slots=True)
class Imported:
    """What became of a model.

    Attributes:
        run: The run folder.
        folds: Of each configuration, by our names.
        licence: Of the weights, as far as stated; else "".
    """

    run: Path
    folds: dict[str, tuple[FoldName, ...]]
    licence: str


def import_nnunet(source: Path, out: Path, checkpoint: str = FINAL_CHECKPOINT) -> Imported:
    """Make a run of trained nnU-Net v2 models.

    Args:
        source: A trained configuration's folder, one above that holds several of one data set, or a zip of either. Of
            a cascade, the folder of its previous stage is also looked for beside it.
        out: The run folder to make; it must not exist, or be empty. It is there whole or not at all.
        checkpoint: Name of the checkpoint in each fold.

    Raises:
        ConfigError: The source is not there, holds models that do not belong together, or `out` is taken.
        ModelError: The models are damaged, could do harm, or cannot be represented; all reasons are listed.
    """
    source, out = Path(source), Path(out)
    if not source.exists():
        raise ConfigError(f"{source} does not exist")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already", hint="Choose another folder for --out; nothing is overwritten.")
    if source.is_dir():
        return _import(source, out, checkpoint)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    # Beside the run and not where temporary files lie otherwise, which may be in memory.
    with tempfile.TemporaryDirectory(prefix=".tmp-import-", dir=out.absolute().parent) as scratch:
        extract(source, Path(scratch), lambda name: is_part_of_model(name, checkpoint))
        return _import(Path(scratch), out, checkpoint)


def _import(root: Path, out: Path, checkpoint: str) -> Imported:
    members = _members(root, checkpoint)
    plan, names = _plan(members)
    first = next(iter(members.values()))
    with atomic_path(out) as temporary:
        temporary.mkdir()
        run = RunFolder(temporary)
        run.write(run.dataset_file, _dataset(first))
        fingerprint = _fingerprint(first)
        if fingerprint is not None:
            run.write(run.fingerprint_file, fingerprint)
        run.write(run.plan_file, plan)
        for name, member in members.items():
            for fold, item in member.folds.items():
                _save(run.fold_folder(names[name], fold), plan, names[name], fold, member, item)
    _tell(plan, members.values())
    folds = {names[name]: tuple(member.folds) for name, member in members.items()}
    return Imported(out, folds, first.licence())


def _members(root: Path, checkpoint: str) -> dict[str, Member]:
    """The trained configurations by nnU-Net's names, previous stages of cascades in front of them."""
    found: dict[str, Member] = {}
    for folder in find_models(root, checkpoint):
        member = read_member(folder)
        if member.configuration in found:
            raise ConfigError(
                f"two folders hold the configuration {member.configuration}",
                problems=[str(found[member.configuration].folder.path), str(folder.path)],
                hint="Give one of them.",
            )
        found[member.configuration] = member
    for name, member in list(found.items()):
        previous = member.plans.configuration(name, member.folder.path).previous_stage
        if previous is None or previous in found:
            continue
        beside = model_at(member.folder.sibling(previous), checkpoint)
        if beside is None:
            raise ModelError(
                f"{name} is a cascade: it also needs {previous}, which is neither in {root} nor beside it",
                hint=f"Give a folder that holds both, or put {member.folder.sibling(previous).name} beside "
                f"{member.folder.path.name}.",
            )
        found = {previous: read_member(beside)} | found
    return found


def _plan(members: dict[str, Member]) -> tuple[Plan, dict[str, str]]:
    """The plan, and our names of the configurations."""
    names = {name: _OUR_NAMES.get(name, name) for name in members}
    first = next(iter(members.values()))
    problems: list[str] = []
    configurations: dict[str, Configuration] = {}
    for name, member in members.items():
        found: list[str] = list(member.problems)
        if (member.channels, member.labels) != (first.channels, first.labels):
            found.append("its channels or labels are not those of the other configurations")
        converted = _configuration(name, member, names, found)
        problems += [f"{name}: {problem}" for problem in found]
        if converted is not None:
            configurations[names[name]] = converted
    if problems:
        raise ModelError(
            f"the model in {first.folder.path} needs what autoseg does not have, so it would predict otherwise",
            problems=problems,
        )
    try:
        plan = Plan(
            dataset=first.plans.dataset_name,
            preset=f"{ORIGIN}: {first.plans.plans_name}",
            vram_gb=0.0,
            fingerprint_digest="" if (measured := _fingerprint(first)) is None else measured.digest(),
            channels=first.channels,
            labels=first.labels,
            configurations=configurations,
            decisions=tuple(_decision(names[name], member) for name, member in members.items()),
        )
    except ValidationError as problem:
        raise ModelError(
            f"the model in {first.folder.path} makes no plan", problems=validation_problems(problem)
        ) from None
    return plan, names


def _configuration(name: str, member: Member, names: dict[str, str], problems: list[str]) -> Configuration | None:
    try:
        foreign = member.plans.configuration(name, member.folder.path)
    except ModelError as problem:
        problems += problem.problems or [problem.message]
        return None
    if member.plans.label_manager != "LabelManager":
        problems.append(f"the label_manager {member.plans.label_manager!r} is not known; LabelManager is")
    previous = None if foreign.previous_stage is None else names[foreign.previous_stage]
    trained = Trained(member.mirror_axes, "batch" if member.has_batch_norm else "instance")
    return convert_configuration(
        member.plans, foreign, trained, member.labels, len(member.channels), previous, problems
    )


def _decision(name: str, member: Member) -> Decision:
    return Decision(
        configuration=name,
        topic="origin",
        rule=f"Everything as the plans of {ORIGIN} and the checkpoint say.",
        inputs=f"plans {member.plans.plans_name or '(no name)'} by {member.plans.planner or 'an unknown planner'}",
        result=f"imported, trained by {', '.join(sorted({item.trainer for item in member.folds.values()}))}",
        would_change="Another model.",
    )


def _dataset(member: Member) -> Dataset:
    ending = member.description.get("file_ending")
    return Dataset(
        name=member.plans.dataset_name,
        channels=member.channels,
        labels=member.labels,
        cases=(),
        file_ending=ending if isinstance(ending, str) else _USUAL_ENDING,
    )


def _fingerprint(member: Member) -> Fingerprint | None:
    """The measurements that came with the model; prediction does without."""
    path = member.folder.path / FINGERPRINT
    if not path.is_file():
        return None
    try:
        stated = member.description.get("numTraining")
        count = stated if isinstance(stated, int) else 0
        return import_fingerprint(path, member.channels, member.labels.num_classes, count)
    except AutosegError as problem:
        log.warning("%s is left out: %s", path.name, problem.message)
        return None


def _save(folder: Path, plan: Plan, configuration: str, fold: FoldName, member: Member, checkpoint: Checkpoint) -> None:
    """Write a fold's weights under our names; only if the network takes them."""
    try:
        weights = {name: tensor.to(torch.float32) for name, tensor in from_nnunet(checkpoint.weights).items()}
        restore(plan.configurations[configuration].network, weights)
    except ModelError as problem:
        raise ModelError(
            f"the weights in {checkpoint.path} are not those of the network in the plans: {problem.message}",
            problems=problem.problems,
            hint=f"The trainer {checkpoint.trainer or '(not named)'} may have built another network.",
        ) from None
    provenance: dict[str, JsonValue] = {
        "imported_from": ORIGIN,
        "dataset": member.plans.dataset_name,
        "configuration": checkpoint.configuration,
        "plans": member.plans.plans_name,
        "planner": member.plans.planner,
        "trainer": checkpoint.trainer,
        "image_reader_writer": member.plans.reader,
        "checkpoint": checkpoint.path.name,
        "checkpoint_sha256": file_digest(checkpoint.path),
        "licence": member.licence(),
        **checkpoint.facts,
    }
    card = ModelCard(
        plan=plan,
        configuration=configuration,
        fold=fold,
        digest=plan.digest(configuration),
        versions=versions(),
        provenance=provenance,
    )
    save_model(folder, weights, card)


def _tell(plan: Plan, members: Iterable[Member]) -> None:
    """What people should know of a model that they did not train themselves."""
    trainers = {item.trainer for member in members for item in member.folds.values()} - {_USUAL_TRAINER}
    if trainers:
        log.info(
            "trained by %s, which is not needed: the network is built from the plans, and the weights fit it",
            ", ".join(sorted(trainers)),
        )
    for name, configuration in plan.configurations.items():
        if configuration.previous_stage and any(rule.use_mask for rule in configuration.preprocess.normalization):
            log.warning(
                "%s: nnU-Net also takes mean and deviation from voxels outside the image's non-zero region that the "
                "previous stage labels; autoseg does not, so predictions may differ where there are such voxels",
                name,
            )
