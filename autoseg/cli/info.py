"""`autoseg info`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoseg.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from autoseg.domain.network_plan import NetworkPlan
    from autoseg.io.dicom_stack import Series
    from autoseg.io.model import ModelCard
    from autoseg.io.run_folder import RunFolder

_NETWORK = "network"
"""Key of the summary of a network, which is shown as a table."""

_LARGE = 10
"""From here on one digit behind the point is enough."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("info")(info)


def info(
    what: Annotated[
        Path | None, typer.Argument(metavar="[RUN|MODEL|IMAGE]", help="Without it: versions and devices.")
    ] = None,
    json: options.Json = None,
) -> None:
    """Versions and devices; or what a run, a model (exported too), an image, a folder of DICOM series is."""
    from autoseg.cli.output import emit_json, stdout

    facts = _facts(what)
    if json is not None:
        emit_json(facts, json)
    if json == "-":
        return
    for line in _lines(facts):
        stdout.print(line, markup=False, soft_wrap=True)
    members = facts.get("configurations", {facts.get("configuration"): facts})
    for name, member in members.items():
        if _NETWORK in member:
            stdout.print(_network_table(name, member[_NETWORK]))


def _facts(what: Path | None) -> dict[str, Any]:
    from autoseg.errors import ConfigError
    from autoseg.io.run_folder import RunFolder, is_trained

    if what is None:
        from autoseg.runtime import environment

        return environment()
    if not what.exists():
        raise ConfigError(f"{what} does not exist")
    run = RunFolder(what)
    if what.suffix.lower() == ".zip" or (run.inference_file.is_file() and not run.plan_file.is_file()):
        return _exported_facts(what)
    if what.is_file():
        return _image_facts(what)
    if is_trained(what):
        return _model_facts(what)
    if not run.plan_file.is_file() and (facts := _dicom_facts(what)):
        return facts
    plan = run.read_plan()
    return {
        "run": str(what),
        "dataset": plan.dataset,
        "plan": plan.digest(),
        "preset": plan.preset,
        "configurations": {
            name: {
                "patch_size": item.network.patch_size,
                "batch_size": item.training.batch_size,
                "finished_folds": run.trained_folds(name),
                **_origin_facts(run, name),
                _NETWORK: _network_facts(item.network),
            }
            for name, item in plan.configurations.items()
        },
    }


def _origin_facts(run: RunFolder, name: str) -> dict[str, Any]:
    """Where the first finished fold of a configuration was imported from; empty where it was trained here."""
    from autoseg.errors import ModelError
    from autoseg.io.model import read_card

    for fold in run.trained_folds(name)[:1]:
        try:
            return _imported_facts(read_card(run.fold_folder(name, fold)))
        except ModelError:
            return {}
    return {}


def _imported_facts(card: ModelCard) -> dict[str, Any]:
    origin = card.provenance
    if "imported_from" not in origin:
        return {}
    known = ("imported_from", "trainer", "plans", "checkpoint", "epochs", "validation_mean_dice", "licence")
    return {"origin": {key: origin[key] for key in known if origin.get(key) not in (None, "")}}


def _image_facts(path: Path) -> dict[str, Any]:
    from autoseg.domain.geometry import degrees_off_axis, orientation_code
    from autoseg.io.images import read_header

    header = read_header(path)
    affine = header.geometry.affine
    return {
        "image": str(path),
        "shape": header.geometry.shape,
        "components": header.components,
        "spacing_mm": header.geometry.spacing_mm,
        "orientation": orientation_code(affine),
        "degrees_off_axis": round(degrees_off_axis(affine), 2),
        "affine": affine.tolist(),
    }


def _dicom_facts(folder: Path) -> dict[str, Any]:
    """The DICOM series of a folder: what each is, or why it is not read; empty when there is no DICOM at all."""
    from autoseg.io.dicom import find_series

    found = find_series(folder)
    if not (found.series or found.set_apart or found.unreadable):
        return {}
    facts: dict[str, Any] = {"folder": str(folder)}
    for number, series in enumerate(found.series, start=1):
        facts[f"series {number}"] = _series_facts(series, folder)
    if found.set_apart_in_words:
        facts["not taken for images"] = found.set_apart_in_words
    if found.unreadable:
        facts["unreadable"] = {str(file.relative_to(folder.absolute())): reason for file, reason in found.unreadable}
    return facts


def _series_facts(series: Series, folder: Path) -> dict[str, Any]:
    from autoseg.domain.geometry import degrees_off_axis, orientation_code
    from autoseg.errors import AutosegError
    from autoseg.io.dicom_stack import make_stack, parts_of

    first = series.first
    facts = {
        "name": series.name,
        "modality": first.modality,
        "uid": first.series_uid,
        "slices": len(series.frames),
        "first_file": str(first.path.relative_to(folder.absolute())),
    }
    parts = parts_of(series.frames)
    if parts:
        files = {part.name: part.frames[0].path.name for part in parts}
        return facts | {"volumes": files, "usable": "no: name one of these files to choose its volume"}
    try:
        geometry = make_stack(series.frames, folder).geometry
    except AutosegError as problem:
        return facts | {"usable": "no: " + problem.message.removeprefix(f"{folder}: ")}
    return facts | {
        "usable": "yes",
        "shape": geometry.shape,
        "spacing_mm": tuple(round(value, 6) for value in geometry.spacing_mm),
        "orientation": orientation_code(geometry.affine),
        "degrees_off_axis": round(degrees_off_axis(geometry.affine), 2),
    }


def _model_facts(folder: Path) -> dict[str, Any]:
    from autoseg.io.model import load_model

    card = load_model(folder).card
    return {
        "model": str(folder),
        "dataset": card.plan.dataset,
        "configuration": card.configuration,
        "fold": card.fold,
        "plan": card.plan.digest(),
        "channels": [channel.name for channel in card.plan.channels],
        "classes": list(card.plan.labels.names),
        "patch_size": card.settings.network.patch_size,
        "versions": card.versions,
        **_imported_facts(card),
        _NETWORK: _network_facts(card.settings.network),
    }


def _exported_facts(what: Path) -> dict[str, Any]:
    from autoseg.pipeline.exporting import opened
    from autoseg.pipeline.members import choose
    from autoseg.pipeline.model_card import in_words

    with opened(what) as folder:
        chosen = choose(folder)
    return {
        "exported": str(what),
        "dataset": chosen.cards[0].plan.dataset,
        "channels": [channel.name for channel in chosen.channels],
        "classes": list(chosen.labels.names),
        "postprocessing": [in_words(rule) for rule in chosen.recipe.postprocessing],
        "configurations": {
            item.member.configuration: {
                "folds": [model.card.fold for model in item.models],
                "weight": item.member.weight,
                "patch_size": item.models[0].card.settings.network.patch_size,
                "previous_stage": item.models[0].card.settings.previous_stage,
                **_imported_facts(item.models[0].card),
                _NETWORK: _network_facts(item.models[0].card.settings.network),
            }
            for item in chosen.members
        },
    }


def _network_facts(plan: NetworkPlan) -> dict[str, Any]:
    from autoseg.network.summary import summarise

    return summarise(plan).model_dump(mode="json")


def _network_table(name: str, summary: dict[str, Any]) -> Table:
    """Part by part, in the order of the data flow."""
    from rich.table import Table

    shown = Table(
        title=f"Network of {name}, for one patch of {_times(summary['patch_size'])}",
        caption="Activations: what training keeps for the backward pass, float32, one patch.",
    )
    shown.add_column("part")
    for title in ("size", "channels", "parameters", "GMAC", "activations (MB)"):
        shown.add_column(title, justify="right")
    for part in summary["parts"]:
        shown.add_row(part["name"], _times(part["size"]), str(part["channels"]), *_sums(part))
    shown.add_section()
    shown.add_row("all", "", "", *_sums(summary))
    return shown


def _times(sizes: list[int]) -> str:
    return " x ".join(map(str, sizes))


def _sums(counted: dict[str, Any]) -> tuple[str, str, str]:
    macs, memory = counted["macs"] / 1e9, counted["activation_bytes"] / 1e6
    return f"{counted['parameters']:,}", _rounded(macs), _rounded(memory)


def _rounded(value: float) -> str:
    """Three digits at least."""
    return f"{value:,.1f}" if value >= _LARGE else f"{value:.3g}"


def _lines(facts: dict[str, Any], indent: int = 0) -> list[str]:
    lines = []
    for key, value in facts.items():
        if key == _NETWORK:
            continue
        if isinstance(value, dict):
            lines += [" " * indent + f"{key}:", *_lines(value, indent + 2)]
        else:
            lines.append(" " * indent + f"{key}: {value}")
    return lines
