"""The method in words for a paper, with this run's numbers, and the references that it needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from autoseg.domain.inference import DropSmall, DropUnlikely, KeepLargest, Rule, Threshold
from autoseg.domain.plan import AugmentationPlan, Configuration
from autoseg.evaluation.selection import Selection
from autoseg.report.collect import ConfigurationResult, RunResults, knows_patients

_SECONDS_PER_MINUTE = 60.0
_BYTES_PER_GB = 1e9

_OPTIMISERS = {
    "sgd": "stochastic gradient descent with Nesterov momentum",
    "adamw": "AdamW",
    "muon": "Muon (AdamW for parameters that are not kernels)",
}
_SCHEMES = {
    "ct": "clipping to the 0.5 and 99.5 percentiles of the foreground and scaling by its mean and standard deviation",
    "zscore": "subtraction of each image's mean and division by its standard deviation",
    "none": "no normalization of intensities",
    "rescale": "rescaling of each image to 0 ... 1",
    "rgb": "division by 255",
}


@dataclass(frozen=True, slots=True)
class Reference:
    """A work to cite.

    Attributes:
        key: By which the text names it.
        text: As in a list of references.
    """

    key: str
    text: str


REFERENCES = {
    item.key: item
    for item in (
        Reference(
            "nnU-Net",
            "Isensee F, Jaeger PF, Kohl SAA, Petersen J, Maier-Hein KH. nnU-Net: a self-configuring method for deep "
            "learning-based biomedical image segmentation. Nature Methods 18, 203–211 (2021).",
        ),
        Reference(
            "U-Net",
            "Ronneberger O, Fischer P, Brox T. U-Net: convolutional networks for biomedical image segmentation. "
            "MICCAI 2015, LNCS 9351, 234–241.",
        ),
        Reference(
            "3D U-Net",
            "Çiçek Ö, Abdulkadir A, Lienkamp SS, Brox T, Ronneberger O. 3D U-Net: learning dense volumetric "
            "segmentation from sparse annotation. MICCAI 2016, LNCS 9901, 424–432.",
        ),
        Reference(
            "PyTorch",
            "Paszke A, et al. PyTorch: an imperative style, high-performance deep learning library. NeurIPS 32 (2019).",
        ),
        Reference(
            "MONAI",
            "Cardoso MJ, et al. MONAI: an open-source framework for deep learning in healthcare. arXiv:2211.02701 "
            "(2022).",
        ),
        Reference(
            "Metrics Reloaded",
            "Maier-Hein L, Reinke A, et al. Metrics reloaded: recommendations for image analysis validation. "
            "Nature Methods 21, 195–212 (2024).",
        ),
        Reference(
            "surface Dice",
            "Nikolov S, et al. Clinically applicable segmentation of head and neck anatomy for radiotherapy: deep "
            "learning algorithm development and validation study. J Med Internet Res 23(7), e26151 (2021).",
        ),
        Reference(
            "bootstrap", "Efron B, Tibshirani RJ. An introduction to the bootstrap. Chapman & Hall, New York (1993)."
        ),
        Reference(
            "Wilcoxon", "Wilcoxon F. Individual comparisons by ranking methods. Biometrics Bulletin 1, 80–83 (1945)."
        ),
        Reference(
            "Holm",
            "Holm S. A simple sequentially rejective multiple test procedure. Scandinavian Journal of Statistics 6, "
            "65–70 (1979).",
        ),
        Reference(
            "temperature",
            "Guo C, Pleiss G, Sun Y, Weinberger KQ. On calibration of modern neural networks. ICML 2017, PMLR 70, "
            "1321–1330.",
        ),
        Reference(
            "Bland-Altman",
            "Bland JM, Altman DG. Statistical methods for assessing agreement between two methods of clinical "
            "measurement. Lancet 327, 307–310 (1986).",
        ),
        Reference(
            "Muon",
            "Jordan K, et al. Muon: an optimizer for hidden layers in neural networks. Blog, kellerjordan.github.io "
            "(2024).",
        ),
        Reference("AdamW", "Loshchilov I, Hutter F. Decoupled weight decay regularization. ICLR 2019."),
    )
}


@dataclass(frozen=True, slots=True)
class Method:
    """The method of one run.

    Attributes:
        paragraphs: With marks such as [1].
        references: In the order in which they are cited.
    """

    paragraphs: tuple[str, ...]
    references: tuple[Reference, ...]


class _Cite(Protocol):
    """Marks works as cited and gives their numbers in brackets."""

    def __call__(self, *keys: str) -> str: ...


def describe(results: RunResults, tolerance: str) -> Method:
    """Put the run into words.

    Args:
        results: Of the run.
        tolerance: Of the surface Dice, in words.
    """
    cited: list[str] = []

    def cite(*keys: str) -> str:
        for key in keys:
            if key not in cited:
                cited.append(key)
        return "[" + ", ".join(str(cited.index(key) + 1) for key in keys) + "]"

    trained = [item for item in results.summary.configurations if item.folds]
    paragraphs = [_network(results, trained, cite), _training(results, trained, cite)]
    if results.summary.best is not None:
        paragraphs += [_evaluation(results, tolerance, cite), *_outcome(results)]
    return Method(tuple(paragraphs), tuple(REFERENCES[key] for key in cited))


def _network(results: RunResults, trained: Sequence[ConfigurationResult], cite: _Cite) -> str:
    dataset, plan, summary = results.dataset, results.plan, results.summary
    names = [item.name for item in trained if item.name in plan.configurations]
    dims = [plan.configurations[name].network.dims for name in names]
    networks = cite("nnU-Net", "U-Net", "3D U-Net") if 3 in dims else cite("nnU-Net", "U-Net")
    channels = ", ".join(channel.name for channel in dataset.channels)
    text = (
        f"Segmentation models were trained with autoseg {summary.autoseg_version} (plan {summary.plan_digest}, preset "
        f"{plan.preset}), which configures U-Nets by the rules of nnU-Net {networks} on PyTorch {cite('PyTorch')} and "
        f"MONAI {cite('MONAI')}. The data set had {len(dataset.cases)} labelled cases ({channels}) with "
        f"{_count(len(plan.labels.names), 'class', 'classes')}: {', '.join(plan.labels.names)}."
    )
    return " ".join([text, *(_one_network(name, plan.configurations[name]) for name in names)])


def _one_network(name: str, one: Configuration) -> str:
    schemes = dict.fromkeys(_SCHEMES.get(item.scheme, item.scheme) for item in one.preprocess.normalization)
    network = one.network
    return (
        f"The {name} network had {_count(len(network.features_per_stage), 'stage', 'stages')} with "
        f"{'-'.join(map(str, network.features_per_stage))} channels and saw patches of {_by(network.patch_size)} "
        f"voxels of images resampled to {_by(one.preprocess.target_spacing)} mm, in batches of "
        f"{one.training.batch_size}; intensities were prepared by {' and '.join(schemes)}."
    )


def _training(results: RunResults, trained: Sequence[ConfigurationResult], cite: _Cite) -> str:
    """How configurations were trained: those that differ in nothing but their figures in one sentence."""
    alike: dict[str, dict[str, str]] = {}
    for item in trained:
        records = [fold.training for fold in item.folds if fold.training is not None]
        if not records or item.name not in results.plan.configurations:
            continue
        plan = results.plan.configurations[item.name].training
        optimiser = _OPTIMISERS.get(plan.optimiser, plan.optimiser)
        marks = {"muon": " " + cite("Muon", "AdamW"), "adamw": " " + cite("AdamW")} if plan.optimiser != "sgd" else {}
        steps = fmean(record.steps for record in records)
        minutes = fmean(record.seconds for record in records) / _SECONDS_PER_MINUTE
        memory = max(record.peak_memory_bytes for record in records) / _BYTES_PER_GB
        record = records[0]
        hardware = record.environment.get("cuda_devices") or [record.environment.get("cpu", "")]
        on = f"{record.device} ({hardware[0]})" if hardware[0] else record.device
        changes = _augmentations(plan.augmentation)
        how = (
            f"trained by {optimiser}{marks.get(plan.optimiser, '')} on the sum of Dice loss and cross-entropy, with a "
            f"learning rate that fell from {plan.learning_rate:g}{' and random ' + changes if changes else ''}, "
            f"on {on} in {record.precision} with seed {record.seed}"
        )
        alike.setdefault(how, {})[item.name] = (
            f"{_count(len(item.folds), 'fold', 'folds')} of {steps:,.0f} steps and {minutes:.1f} minutes on average, "
            f"with a peak memory of {memory:.1f} GB"
        )
    return " ".join(_trained(kind, figures) for kind, figures in alike.items())


def _trained(how: str, figures: dict[str, str]) -> str:
    """One sentence for configurations that were trained alike."""
    if len(figures) == 1:
        ((name, one),) = figures.items()
        return f"{name} was {how}, in {one}."
    each = "; ".join(f"{name} in {one}" for name, one in figures.items())
    return f"{_and(list(figures))} were {how}: {each}."


def _augmentations(plan: AugmentationPlan) -> str:
    """What is changed at random, in words."""
    chances = {
        "rotation": plan.rotation_probability,
        "scaling": plan.scaling_probability,
        "noise": plan.noise_probability,
        "blur": plan.blur_probability,
        "brightness": plan.brightness_probability,
        "contrast": plan.contrast_probability,
        "low resolution": plan.low_resolution_probability,
        "gamma": max(plan.gamma_probability, plan.gamma_inverted_probability),
        "mirroring": float(bool(plan.mirror_axes)),
    }
    return _and([name for name, chance in chances.items() if chance > 0])


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def _evaluation(results: RunResults, tolerance: str, cite: _Cite) -> str:
    summary = results.summary
    patients = "; all cases of a patient were in one fold" if knows_patients(results) else ""
    text = (
        f"Every case was predicted by models that had not been trained on it{patients}. Dice, surface Dice at "
        f"{tolerance} {cite('surface Dice')}, the 95 % Hausdorff distance and further metrics were computed per case "
        f"and class on the image's own grid, following {cite('Metrics Reloaded')}: distances are not defined where a "
        "class is missed, and such cases are counted apart. The mean foreground Dice is the mean over classes of the "
        "mean over the cases that contain the class."
    )
    if summary.statistics is not None:
        one = summary.statistics
        units = "patients" if knows_patients(results) else "cases"
        text += (
            f" Confidence intervals are {one.confidence:.0%} percentile bootstrap intervals over {one.num_patients} "
            f"{units} with {one.num_resamples:,} resamples {cite('bootstrap')}; configurations were compared by the "
            f"Wilcoxon signed-rank test {cite('Wilcoxon')} with the adjustment of Holm {cite('Holm')}."
        )
    if summary.selection is not None and summary.selection.calibrations:
        text += (
            f" Probabilities were calibrated by temperatures fitted on out-of-fold predictions {cite('temperature')}."
        )
    if summary.selection is not None:
        text += _chosen(summary.selection)
    text += f" Volumes were compared as proposed by Bland and Altman {cite('Bland-Altman')}."
    return text


def _chosen(selection: Selection) -> str:
    """How new images are predicted, and that this was decided on the cases that are scored."""
    members = selection.recipe.members
    if len(members) == 1:
        how = f"the mean logits of all folds of {members[0].configuration}"
    else:
        parts = _and([f"{item.configuration} ({item.weight:.2f})" for item in members])
        how = f"the weighted mean of the probabilities of {parts}, each by the mean logits of all its folds"
    number = len(selection.candidates)
    if number == 1 and not selection.recipe.postprocessing:
        return f" New images are predicted by {how}."
    return (
        f" New images are predicted by {how}. This was chosen among {_count(number, 'candidate', 'candidates')}, and "
        f"the post-processing among {len(selection.tried_rules)} rules, on the same out-of-fold predictions that are "
        "scored here, so that the figures are slightly in its favour."
    )


def _outcome(results: RunResults) -> Iterator[str]:
    """What came out, as one paragraph."""
    summary = results.summary
    best = next((item for item in summary.configurations if item.name == summary.best), None)
    if best is None or best.summary is None or best.summary.mean_foreground_dice is None:
        return
    chosen = summary.selection
    whole = best.summary if chosen is None else chosen.final
    name = best.name if chosen is None else chosen.choice
    span = whole.interval
    between = "" if span is None else f" (95 % confidence interval {span.low:.3f}–{span.high:.3f})"
    rules = () if chosen is None else tuple(_rule_in_words(rule) for rule in chosen.recipe.postprocessing)
    afterwards = f"; in post-processing, {'; '.join(rules)}" if rules else ""
    classes = ", ".join(
        f"{item.name} {item.metric('dice').mean:.3f}" for item in whole.classes if item.metric("dice").mean is not None
    )
    yield (
        f"Over {_count(whole.num_cases, 'held-out case', 'held-out cases')}, {name} reached a mean foreground Dice of "
        f"{whole.mean_foreground_dice:.3f}{between}{afterwards}. Mean Dice by class: {classes}."
    )


def _rule_in_words(rule: Rule) -> str:
    classes = " and ".join(rule.classes)
    if isinstance(rule, Threshold):
        return f"{classes} was given to voxels where its probability was at least {rule.min_probability:g}"
    if isinstance(rule, KeepLargest):
        if rule.count == 1:
            return f"the largest component of {classes} was kept"
        return f"the {rule.count} largest components of {classes} were kept"
    if isinstance(rule, DropSmall):
        return f"components of {classes} below {rule.min_ml:g} ml were removed"
    if isinstance(rule, DropUnlikely):
        return f"components of {classes} with a mean probability below {rule.min_mean:g} were removed"
    return f"holes of {classes} were filled"


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def _by(values: Sequence[float]) -> str:
    return " × ".join(f"{value:.4g}" for value in values)
