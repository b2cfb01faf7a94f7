"""Which models predict: one model, the folds of a configuration, or what `inference.json` says."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autoseg.domain.dataset import Channel, LabelSchema
from autoseg.domain.inference import InferenceRecipe, Member, members_problems, rules_problems
from autoseg.domain.values import digest_of
from autoseg.errors import ConfigError, ModelError
from autoseg.inference.deciding import Criteria
from autoseg.inference.segmenter import Segmenter, WeightedStages
from autoseg.inference.settings import PredictionSettings
from autoseg.inference.stages import load_stages
from autoseg.io.model import Model, ModelCard, load_model, read_card
from autoseg.io.run_folder import RunFolder, is_trained
from autoseg.pipeline.cascade import previous_folders, warn_of_other_weights

log = logging.getLogger("autoseg")


@dataclass(frozen=True, slots=True)
class ChosenModel:
    """A model on the disk whose weights are not read yet."""

    folder: Path
    card: ModelCard

    @property
    def identity(self) -> tuple[str, str]:
        """What makes it another model: its plan and its weights."""
        return self.card.digest, self.card.weights_sha256


@dataclass(frozen=True, slots=True)
class ChosenMember:
    """One configuration with its folds.

    Attributes:
        member: Weight and temperatures.
        models: Its folds.
        previous: Of a cascade: the folds of its previous stage.
    """

    member: Member
    models: tuple[ChosenModel, ...]
    previous: tuple[ChosenModel, ...] = ()


@dataclass(frozen=True, slots=True)
class Chosen:
    """What predicts, before any weights are read.

    Attributes:
        recipe: As `inference.json` has it; made up where there is none.
        members: In its order.
    """

    recipe: InferenceRecipe
    members: tuple[ChosenMember, ...]

    @property
    def cards(self) -> tuple[ModelCard, ...]:
        """Of every model that gives results, previous stages not counted."""
        return tuple(model.card for member in self.members for model in member.models)

    @property
    def labels(self) -> LabelSchema:
        """Of all members."""
        return self.cards[0].plan.labels

    @property
    def channels(self) -> tuple[Channel, ...]:
        """Of all members."""
        return self.cards[0].plan.channels

    def digest(self) -> str:
        """Names what predicts: another model, weight or rule gives another name."""
        is_alone = len(self.members) == 1
        # One member decides by its logits alone, unless a rule asks how probable labels are.
        has_shares = not is_alone or Criteria.of(self.recipe.postprocessing, self.labels) is not None
        total = sum(chosen.member.weight for chosen in self.members)
        members = [
            {
                "models": [model.identity for model in chosen.models],
                "previous": [model.identity for model in chosen.previous],
                "weight": 1.0 if is_alone else chosen.member.weight / total,
                # One number where all classes have the same, as before there were several.
                "temperature": chosen.member.temperatures(self.labels) if has_shares else 1.0,
            }
            for chosen in self.members
        ]
        rules = [rule.model_dump(mode="json") for rule in self.recipe.postprocessing]
        return digest_of({"members": members, "rules": rules})

    def load(
        self,
        settings: PredictionSettings,
        device: str,
        scratch: Path | None = None,
        *,
        uncertainty: bool = False,
        num_volumes: int = 1,
    ) -> Segmenter:
        """Read the weights and put the networks on their device.

        Args:
            settings: Of all members.
            device: See `runtime.pick_device`.
            scratch: See `Segmenter`.
            uncertainty: Whether the folds of a single configuration tell their mean probabilities, see `Predictor`.
            num_volumes: See `Predictor`.

        Raises:
            ConfigError: A setting is not possible.
            ModelError: A model is damaged, or they do not belong together.
            DeviceMemoryError: The device has too little memory for the networks.
        """
        members = []
        for chosen in self.members:
            models, previous = (
                tuple(load_model(model.folder) for model in group) for group in (chosen.models, chosen.previous)
            )
            temperature = chosen.member.temperatures(self.labels)
            tells_means = uncertainty and len(self.members) == 1
            stages = load_stages(
                models,
                previous or None,
                settings,
                device,
                uncertainty=tells_means,
                temperature=temperature,
                num_volumes=num_volumes,
            )
            members.append(WeightedStages(stages, chosen.member.weight, temperature))
        return Segmenter(members, self.recipe.postprocessing, scratch)


def choose(path: Path, configuration: str | None = None, folds: str | None = None) -> Chosen:
    """Find the models of a run, of an exported model or of a fold folder.

    A run or an exported model with an `inference.json` predicts as that says, unless a configuration or folds are
    named; a run without one by every finished fold of its default configuration.

    Args:
        path: The folder.
        configuration: Its name; None chooses.
        folds: Numbers separated by commas, or "all"; None takes every finished one.

    Raises:
        ModelError: Nothing trained is there, or not what was asked for.
        ConfigError: A configuration or fold was named for a single model, or `inference.json` is not valid.
    """
    if not path.is_dir():
        raise ModelError(
            f"{path} is not a folder",
            hint="Give a run folder, one of its models/CONFIG/fold_K, or what `autoseg export` has made.",
        )
    if is_trained(path):
        if configuration is not None or folds is not None:
            raise ConfigError(f"{path} is one model: --config and --fold choose among those of a run")
        card = read_card(path)
        recipe = InferenceRecipe(members=(Member(configuration=card.configuration, folds=(card.fold,)),))
        return _checked(recipe, [_with_previous(recipe.members[0], [ChosenModel(path, card)])], path)
    run = RunFolder(path)
    is_named = configuration is not None or folds is not None
    recipe_there = None if is_named else run.read_inference()
    if is_named and run.inference_file.is_file():
        log.info("%s is not used, because --config or --fold says what predicts", run.inference_file)
    if recipe_there is None:
        name = _trained_configuration(run, configuration)
        models = _models(run, name, tuple(folds.split(",")) if folds else ())
        member = Member(configuration=name, folds=tuple(model.card.fold for model in models))
        return _checked(InferenceRecipe(members=(member,)), [_with_previous(member, models)], path)
    members = [
        _with_previous(member, _models(run, member.configuration, tuple(map(str, member.folds))))
        for member in recipe_there.members
    ]
    return _checked(recipe_there, members, run.inference_file)


def load_models(path: Path, configuration: str | None, folds: str | None) -> tuple[Model, ...]:
    """The models of one configuration of a run, or of a fold folder; `inference.json` is not looked at.

    Raises:
        ModelError: Nothing trained is there, or not what was asked for.
        ConfigError: A configuration or fold was named for a single model.
    """
    if path.is_dir() and not is_trained(path) and configuration is None:
        configuration = _trained_configuration(RunFolder(path), None)
    (member,) = choose(path, configuration, folds).members
    return tuple(load_model(model.folder) for model in member.models)


def _checked(recipe: InferenceRecipe, members: Sequence[ChosenMember], where: Path) -> Chosen:
    """Refuse members that do not belong together, and rules that do not fit them."""
    chosen = Chosen(recipe, tuple(members))
    for card in chosen.cards:
        if (card.plan.labels, card.plan.channels) != (chosen.labels, chosen.channels):
            raise ModelError(
                f"{card.configuration} fold {card.fold} in {where} has other labels or channels than the first member",
                hint="The members of an ensemble are configurations of one plan.",
            )
    problems = members_problems(recipe.members, chosen.labels)
    if problems:
        raise ConfigError(f"the members in {where} do not fit the labels of the models", problems=problems)
    problems = rules_problems(recipe.postprocessing, chosen.labels)
    if problems:
        raise ConfigError(f"the rules in {where} do not fit the labels of the models", problems=problems)
    return chosen


def _with_previous(member: Member, models: Sequence[ChosenModel]) -> ChosenMember:
    folders = previous_folders(models[0].card, models[0].folder)
    previous = tuple(ChosenModel(folder, read_card(folder)) for folder in folders)
    warn_of_other_weights([model.card for model in models], [model.card for model in previous])
    return ChosenMember(member, tuple(models), previous)


def _models(run: RunFolder, name: str, wanted: tuple[str, ...]) -> tuple[ChosenModel, ...]:
    """Folds of a configuration; () stands for every finished one."""
    finished = tuple(map(str, run.trained_folds(name)))
    missing = [fold for fold in wanted or ("",)[: not finished] if fold not in finished]
    if missing:
        fold = f" --fold {missing[0]}" if missing[0] else ""
        raise ModelError(
            f"{name} has no finished fold {', '.join(missing)}; finished are {', '.join(finished) or 'none'}",
            hint=f"Train it with: autoseg train {run.root} --config {name}{fold}",
        )
    folders = [run.fold_folder(name, fold) for fold in wanted or finished]
    return tuple(ChosenModel(folder, read_card(folder)) for folder in folders)


def _trained_configuration(run_folder: RunFolder, wanted: str | None) -> str:
    trained = run_folder.trained_configurations()
    if not trained:
        raise ModelError(
            f"{run_folder.root} holds no trained model", hint=f"Train one with: autoseg train {run_folder.root}"
        )
    if wanted in trained:
        return str(wanted)
    if wanted is None and len(trained) == 1:
        return trained[0]
    name = wanted or run_folder.read_plan().default_configuration
    if name in trained:
        return name
    raise ModelError(f"{name} is not trained; trained are {', '.join(trained)}", hint="Choose one with --config.")
