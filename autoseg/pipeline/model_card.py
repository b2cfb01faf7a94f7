"""The card of an exported model: what it is, what it was trained on and how well it did, in Markdown for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from autoseg.domain.inference import DropSmall, DropUnlikely, FillHoles, KeepLargest, Member, Rule, Threshold
from autoseg.evaluation.crossval import FoldEvaluation
from autoseg.io.files import read_json
from autoseg.io.model import ModelCard
from autoseg.pipeline.members import Chosen, ChosenModel
from autoseg.training.records import VALIDATION_FOLDER, VALIDATION_SUMMARY_FILE

_TRAINED = {
    "trained_by": "program",
    "imported_from": "imported from",
    "trainer": "trainer",
    "epochs": "epochs",
    "steps": "steps",
    "num_training_cases": "training cases",
    "validation_mean_dice": "validation Dice as stated",
}
"""What of the provenance is shown, and how it is called."""

_NO_LICENCE = "Not stated. Ask whoever trained it before you use it."

_LIMITS = """\
It was trained and scored on images of one data set. On other scanners, protocols, fields of view, patients or diseases
it may fail without a sign. It is no medical device: look at every result that matters."""

INTRODUCTION = (
    "A U-Net for the segmentation of images, made by autoseg. Weights are safetensors, everything else is JSON; "
    "nothing in this folder can run code."
)
"""What a folder is that holds a model and nothing else."""

USE = """\
```
autoseg predict THIS_FOLDER images/ --out predictions/
```

```python
from autoseg import Predictor

Predictor("THIS_FOLDER")("image.nii.gz").save("labels.nii.gz")
```"""
"""How such a folder is used."""


def model_card(chosen: Chosen, introduction: str = INTRODUCTION, use: str = USE) -> str:
    """Markdown about what predicts.

    Args:
        chosen: The members; validation scores are looked for beside their weights.
        introduction: What the folder is.
        use: How it is used.
    """
    plan = chosen.cards[0].plan
    names = ", ".join(chosen.labels.names)
    channels = ", ".join(channel.name for channel in chosen.channels)
    sections = [
        f"# {plan.dataset}: {names} in {channels}",
        introduction,
        "## Use",
        use,
        "## Input and output",
        _inputs(chosen),
        "## Members",
        _members(chosen),
        *_afterwards(chosen.recipe.postprocessing),
        "## Training",
        _training(chosen),
        "## Validation",
        _validation(chosen),
        "## Licence",
        licence(chosen.cards),
        "## Limits",
        _LIMITS,
    ]
    return "\n\n".join(sections) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _inputs(chosen: Chosen) -> str:
    channels = _table(
        ("channel", "name", "may be missing"),
        [(number, item.name, "yes" if item.may_be_missing else "no") for number, item in enumerate(chosen.channels)],
    )
    classes = _table(
        ("class", "label values"),
        [(item.name, ", ".join(map(str, item.values))) for item in chosen.labels.classes],
    )
    return f"{channels}\n\n{classes}\n\nLabel maps lie on the grid of the image; everything else is 0."


def _members(chosen: Chosen) -> str:
    rows = []
    for item in chosen.members:
        settings = item.models[0].card.settings
        rows.append(
            (
                item.member.configuration,
                ", ".join(str(model.card.fold) for model in item.models),
                f"{item.member.weight:g}",
                _temperatures(item.member),
                " × ".join(map(str, settings.network.patch_size)),
                " × ".join(f"{value:.3g}" for value in settings.preprocess.target_spacing),
                settings.previous_stage or "",
            )
        )
    header = ("configuration", "folds", "weight", "temperature", "patch", "spacing in mm", "previous stage")
    return _table(header, rows)


def _temperatures(member: Member) -> str:
    named = member.class_temperatures
    if not named:
        return f"{member.temperature:g}"
    return ", ".join([*(f"{name} {value:g}" for name, value in named.items()), f"others {member.temperature:g}"])


def _afterwards(rules: Sequence[Rule]) -> list[str]:
    if not rules:
        return []
    return ["## Post-processing", "\n".join(f"{number}. {in_words(rule)}" for number, rule in enumerate(rules, 1))]


def in_words(rule: Rule) -> str:
    """A post-processing rule as a sentence."""
    if isinstance(rule, Threshold):
        return (
            f"Give {' and '.join(rule.classes)} to voxels where the probability is at least {rule.min_probability:g}."
        )
    what = " and ".join(rule.classes) + (" together" if rule.joined else "")
    neighbours = f"(neighbours: {rule.connectivity})"
    if isinstance(rule, KeepLargest):
        kept = "largest component" if rule.count == 1 else f"{rule.count} largest components"
        return f"Keep the {kept} of {what} {neighbours}."
    if isinstance(rule, DropSmall):
        return f"Drop components of {what} below {rule.min_ml:g} ml {neighbours}."
    if isinstance(rule, DropUnlikely):
        return f"Drop components of {what} with a mean probability below {rule.min_mean:g} {neighbours}."
    assert isinstance(rule, FillHoles)
    limit = "" if rule.max_ml is None else f" up to {rule.max_ml:g} ml"
    return f"Fill holes{limit} in {what} {neighbours}."


def _training(chosen: Chosen) -> str:
    rows = []
    for card in chosen.cards:
        known = {name: card.provenance.get(key) for key, name in _TRAINED.items()}
        facts = "; ".join(f"{name} {value}" for name, value in known.items() if value not in (None, ""))
        rows.append((card.configuration, card.fold, facts, card.digest, card.weights_sha256[:12]))
    return _table(("configuration", "fold", "training", "plan", "weights (SHA-256)"), rows)


def _validation(chosen: Chosen) -> str:
    scores = [(model, scored) for item in chosen.members for model in item.models for scored in _scored(model)]
    if not scores:
        return "No scores are beside these weights."
    rows = []
    for model, scored in scores:
        summary = scored.evaluation.summary
        dice = [item.metric("dice").mean for item in summary.classes]
        mean = summary.mean_foreground_dice
        figures = ["–" if value is None else f"{value:.4f}" for value in (mean, *dice)]
        rows.append((model.card.configuration, model.card.fold, summary.num_cases, *figures))
    header = ("configuration", "fold", "cases", "mean Dice", *chosen.labels.names)
    return (
        "Dice of each fold on its own validation cases, which it has not seen. Mean foreground Dice is the mean over "
        "classes of the mean over the cases that contain the class. The members together are not scored here.\n\n"
        + _table(header, rows)
    )


def _scored(model: ChosenModel) -> Iterator[FoldEvaluation]:
    path = model.folder / VALIDATION_FOLDER / VALIDATION_SUMMARY_FILE
    if not path.is_file():
        return
    try:
        scored = FoldEvaluation.model_validate(read_json(path))
    except ValidationError:
        # Of another version: a card does without.
        return
    if scored.weights_sha256 == model.card.weights_sha256:
        yield scored


def licence(cards: Sequence[ModelCard]) -> str:
    """The licences that the models state, or that they state none."""
    stated = {str(card.provenance["licence"]).strip() for card in cards if card.provenance.get("licence")}
    return "\n\n".join(sorted(stated)) if stated else _NO_LICENCE
