"""Probabilities of a made-up case, stored as a run stores them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from autoseg.domain.dataset import Case, LabelClass, LabelSchema
from autoseg.io.probabilities import LAST_CODE, ProbabilityStore, StoredProbabilities

CLASSES = LabelSchema(classes=(LabelClass(name="a", values=(3,)), LabelClass(name="b", values=(7,))))
REGIONS = LabelSchema(classes=(LabelClass(name="whole", values=(1, 2)), LabelClass(name="core", values=(2,))))
SHAPE = (9, 8, 7)
"""Z, Y, X."""


def logits_of(seed: int, schema: LabelSchema, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    return 2.0 * np.random.default_rng(seed).standard_normal((schema.num_outputs, *shape))


def shares(logits: np.ndarray, schema: LabelSchema, temperature: float = 1.0) -> np.ndarray:
    """Softmax or sigmoid, in float64."""
    if schema.has_regions:
        return 1 / (1 + np.exp(-logits / temperature))
    powers = np.exp(logits / temperature)
    return powers / powers.sum(0)


def store(folder: Path, logits: np.ndarray, schema: LabelSchema, case_id: str = "x") -> StoredProbabilities:
    folder.mkdir(parents=True, exist_ok=True)
    image = folder / f"{case_id}.image"
    image.write_bytes(b"an image")
    codes = np.round(np.arcsin(np.sqrt(shares(logits, schema))) * (2 / np.pi * LAST_CODE)).astype(np.uint8)
    kept = ProbabilityStore(folder, "0" * 64)
    kept.write(Case(id=case_id, images=(str(image),)), codes)
    return kept.open(case_id)
