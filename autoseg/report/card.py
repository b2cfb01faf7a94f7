"""The model card: what the models of a run are, what they were trained on and how good they are, as Markdown."""

from __future__ import annotations

import re

from jinja2 import Environment, PackageLoader, StrictUndefined

from autoseg.report import wording
from autoseg.report.collect import RunResults
from autoseg.report.facts import data_facts, provenance, total_training
from autoseg.report.findings import NUM_SHOWN, find
from autoseg.report.method import describe

_MARKS = re.compile(r"([\\`*_{}\[\]<>#|])")


def model_card(results: RunResults) -> str:
    """The card. Names from the data set cannot change its structure."""
    environment = Environment(
        loader=PackageLoader("autoseg.report", "templates"),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": wording.number, "plain": plain, "gigabytes": wording.gigabytes}
    summary = results.summary
    tolerance = wording.tolerance_in_words(summary.tolerance_mm)
    best = next((item for item in summary.configurations if item.name == summary.best), None)
    scored = best.summary if best is not None else None
    whole = summary.selection.final if summary.selection is not None else scored
    seconds, peak = total_training(results)
    return environment.get_template("card.md.j2").render(
        summary=summary,
        dataset=results.dataset,
        plan=results.plan,
        best=best,
        whole=whole,
        findings=find(results)[:NUM_SHOWN],
        data_facts=tuple(data_facts(results)),
        provenance=tuple(provenance(results)),
        tolerance=tolerance,
        method=describe(results, tolerance),
        hours=seconds / 3600,
        peak_bytes=peak,
    )


def plain(text: object) -> str:
    """A text whose marks mean nothing in Markdown, on one line."""
    return _MARKS.sub(r"\\\1", " ".join(str(text).split()))
