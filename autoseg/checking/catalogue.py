"""The kinds of findings: their titles, and what they cost where the finding itself does not say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from autoseg.checking.facts import CaseFacts
from autoseg.checking.findings import FindingKind
from autoseg.checking.wording import share
from autoseg.domain.findings import Finding, Severity

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""The worst first."""

_LOST = "{cases} of {total} cases lost{with_share}"
_UNLIKE = "{cases} of {total} cases ({percent}) unlike the rest, perhaps learnt less well"
_NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of finding.

    Attributes:
        title: In a few words.
        cost: What findings of it cost: words with {cases}, {total}, {percent} (of cases), {voxels} (counted ones),
            {share} (of the labelled voxels); "" where each finding says it.
    """

    title: str
    cost: str = ""


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        # Layout
        "no-dataset": Kind("There is no such data set", "everything"),
        "no-description": Kind("No description", "everything"),
        "bad-description": Kind("Description that cannot be used"),
        "bad-splits": Kind("Folds that cannot be used"),
        "bad-id": Kind("Case ids that cannot be used", _LOST),
        "double-id": Kind("Case ids that occur twice", _LOST),
        "double-file": Kind("Several files for one place"),
        "no-cases": Kind("No labelled cases", "everything"),
        "no-images": Kind("No images", "everything"),
        "missing-image": Kind("Images that are not there", _LOST),
        "missing-label": Kind("Label maps that are not there", _LOST),
        "missing-channel": Kind("Channels that are not there", _LOST),
        "wrong-channels": Kind("Another number of image files than channels", _LOST),
        "channel-not-missing": Kind("Channels that are there and declared as missing", _LOST),
        "no-channel-number": Kind("Files without a channel number"),
        "no-label-named": Kind("Cases without labels", "nothing to learn from {cases} of {total} cases"),
        "count-differs": Kind("Another number of cases than stated"),
        "unknown-case": Kind("Names of cases that are not there"),
        "unknown-class": Kind("Names of classes that are not there"),
        "nothing-annotated": Kind("Cases in which nothing was annotated", _LOST),
        "class-never-annotated": Kind("Classes that were annotated nowhere"),
        # Files and grids
        "unreadable-image": Kind("Images that cannot be read", _LOST),
        "unreadable-labels": Kind("Label maps that cannot be read", _LOST),
        "too-large": Kind("Cases that do not fit into memory", _LOST),
        "bad-affine": Kind("Headers without a usable place in the world", _LOST),
        "channel-grid": Kind("Channels on different grids", _LOST),
        "label-grid": Kind("Label maps on another grid than the image", _LOST),
        "oblique": Kind("Axes that are far off the body's", _UNLIKE),
        "no-spacing": Kind("Stacks without a voxel size", "{cases} of {total} cases read as cubes of 1 mm"),
        "two-affines": Kind("Headers with two places", _NOTHING + " here; other programs may show labels elsewhere"),
        # Label values
        "undeclared-labels": Kind("Label values that are not declared", _LOST),
        "probability-map": Kind("Probabilities instead of labels", _LOST),
        "image-as-labels": Kind("Images in place of labels", _LOST),
        "labels-not-whole": Kind("Label values that are not whole", _LOST),
        "float-labels": Kind("Labels stored as floating-point numbers", _NOTHING),
        "label-gaps": Kind("Label values that are not consecutive"),
        "empty-labels": Kind("Label maps with background only", "no class to learn in {cases} of {total} cases"),
        "stray-labels": Kind("Labels of classes that were not annotated", "{voxels} voxels teach nothing"),
        "equal-labels": Kind("One label map for several images"),
        # Intensities
        "not-finite": Kind("NaN or infinite values", _LOST),
        "constant-image": Kind("Images of one value", "nothing to learn of a channel in {cases} of {total} cases"),
        "mixed-types": Kind("Two kinds of files"),
        "no-common-scale": Kind("Intensities without a common scale"),
        "other-scale": Kind("Images on another scale", _UNLIKE),
        "brightness-outlier": Kind("Images of another brightness", _UNLIKE),
        "two-kinds-of-images": Kind("Two kinds of images", "{cases} of {total} cases ({percent}) of the rarer kind"),
        "channels-swapped": Kind("Channels that look swapped", "two channels taught wrongly in {cases} of {total}"),
        "equal-channels": Kind("One image under two channels"),
        "grey-as-colour": Kind("Grey pictures stored as colour"),
        "ct-not-hu": Kind("CT that is not in Hounsfield units", "wrong scaling in {cases} of {total} cases"),
        "ct-no-intercept": Kind("CT without its intercept", "about 1,000 HU too bright in {cases} of {total} cases"),
        "ct-cut-off": Kind("CT without negative values", "air, lung and fat cannot be told apart"),
        "ct-padding": Kind("CT with padding below air", _NOTHING + ": clipped away"),
        "ct-very-bright": Kind("CT beyond 12 bits", _NOTHING + ": clipped away"),
        "pet-scale": Kind("PET that is not in uptake values", "another scale in {cases} of {total} cases"),
        # Sizes
        "size-outlier": Kind("Images of another size", _UNLIKE),
        "size-varies": Kind("Images of many sizes"),
        "spacing-outlier": Kind("Images of another voxel size", _UNLIKE),
        "spacing-varies": Kind("Images of many voxel sizes"),
        # Copies
        "duplicates": Kind("Copies of one image"),
        "near-duplicates": Kind("Near copies of one image"),
        # Classes
        "class-never-occurs": Kind("Classes without examples"),
        "rare-class": Kind("Rare classes"),
        "tiny-structures": Kind("Tiny structures"),
        "stray-islands": Kind("Stray islands", "{voxels} voxels, {voxel_share} of the labelled ones"),
        "volume-outlier": Kind("Structures of another size", "{cases} of {total} cases ({percent}) to look at"),
        "left-right-pairs": Kind("Left and right"),
        "sides-swapped": Kind("Left and right in each other's place", "left taught as right in {cases} of {total}"),
        "sides-mirrored": Kind("Left and right mirrored throughout", _NOTHING + ", as long as all images are alike"),
        # The set
        "few-cases": Kind("Few cases"),
        "patient-on-both-sides": Kind("Patients on both sides of a fold"),
        "several-cases-a-patient": Kind("Patients with several cases"),
    }
)


def title_of(code: str) -> str:
    """The title of a kind; of one that is not in the catalogue its name."""
    return KINDS[code].title if code in KINDS else code.replace("-", " ").capitalize()


class Costs:
    """Says what findings cost, from what was measured.

    Args:
        facts: Of the cases that are learnt from.
        total: How many cases there are, those included that could not even be opened.
    """

    def __init__(self, facts: Iterable[CaseFacts], total: int) -> None:
        self._voxels = {item.case: item.labels.foreground_voxels for item in facts if item.labels is not None}
        self._all_voxels = sum(self._voxels.values())
        self._total = total

    def of(self, code: str, findings: Sequence[Finding]) -> str:
        """What all of these findings of one kind cost together, in words; "" where nobody can say."""
        own = list(dict.fromkeys(item.cost for item in findings if item.cost))
        cases = {case for item in findings for case in item.all_cases}
        template = KINDS[code].cost if code in KINDS else ""
        if len(own) == 1 and len(findings) == 1:
            return own[0]
        if not template or (not cases and "{cases}" in template):
            return "; ".join(own)
        voxels = sum(item.voxels or 0 for item in findings)
        labelled = share(sum(self._voxels.get(case, 0) for case in cases), self._all_voxels)
        known = bool(cases) and cases <= set(self._voxels)
        return template.format(
            cases=len(cases),
            total=self._total,
            percent=share(len(cases), self._total),
            voxels=f"{voxels:,}",
            voxel_share=share(voxels, self._all_voxels),
            with_share=f", with {labelled} of the labelled voxels" if known and self._all_voxels else "",
        )

    def told(self, findings: Sequence[Finding]) -> tuple[Finding, ...]:
        """The findings, each with what it costs by itself."""
        return tuple(
            item if item.cost else item.model_copy(update={"cost": self.of(item.code, [item])}) for item in findings
        )

    def kinds(self, findings: Sequence[Finding]) -> tuple[FindingKind, ...]:
        """The findings by kind: the worst first, then those that concern most cases."""
        groups: dict[tuple[str, str], list[Finding]] = {}
        for item in findings:
            groups.setdefault((item.severity, item.code), []).append(item)
        out = []
        for (_, code), items in groups.items():
            cases = dict.fromkeys(case for item in items for case in item.all_cases)
            out.append(
                FindingKind(
                    severity=items[0].severity,
                    code=code,
                    title=title_of(code),
                    count=len(items),
                    cases=tuple(sorted(cases)),
                    message=items[0].message,
                    hint=items[0].hint if len({item.hint for item in items}) == 1 else "",
                    cost=self.of(code, items),
                )
            )
        return tuple(sorted(out, key=lambda kind: (SEVERITIES.index(kind.severity), -len(kind.cases), kind.code)))
