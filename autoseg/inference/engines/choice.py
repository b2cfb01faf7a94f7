"""Which engine runs the networks: the quickest that says what PyTorch says in float32, where finding out pays.

Trials are remembered beside the model, so that most predictions only look them up. A way of running the networks that
was not tried yet is tried when that takes a small part of the work ahead.

Source: docs/decisions/0035.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from autoseg import runtime
from autoseg.domain.plan import Configuration
from autoseg.errors import ModelError
from autoseg.inference.engines import ENGINES, Loaded, installed
from autoseg.inference.engines.base import Precision, Way, package_versions
from autoseg.inference.engines.parity import compare
from autoseg.inference.engines.trials import Trial, circumstances, recall, remember
from autoseg.inference.ladder import if_it_fits
from autoseg.io.model import Model

log = logging.getLogger("autoseg")

MOST_FRACTION = 0.1
"""Largest part of the work ahead that trying further ways may take."""

MIN_TILES = 50
"""Tiles ahead from which on anything is tried: the first pass of a way, one in float32 and their repetitions take the
time of about five."""

TIMED_S = 0.1
TIMED_CALLS = 3
"""A way is timed for about so long, at most so often; the quickest call counts, the one that others disturbed least."""

FIRST_PASS = 2.0
"""How much longer than the next ones the first pass of PyTorch takes at most: 1.2 to 1.4 times was seen."""

REFERENCE = Way("torch", "fp32")
"""What every other way is held against."""

_PASSES_OF_A_TRIAL = 3
_TILES_OF_THE_REFERENCE = 2
"""What they cost about, in passes and tiles of the quickest way so far."""


class _Tried(NamedTuple):
    trial: Trial
    loaded: Loaded | None = None


_Found = dict[Way, _Tried]


class Choosing:
    """Finds the way for models that predict together.

    Args:
        models: They are kept until the choice is made.
        settings: Of the models.
        base: What is used where no other way was found to be quicker.
        device: Where they run.
        precision: As asked for; "auto" leaves it open.
        batch: Tiles at a time.
        is_regions: Whether outputs are regions.
    """

    def __init__(
        self,
        models: Sequence[Model],
        settings: Configuration,
        base: Loaded,
        device: torch.device,
        precision: str,
        batch: int,
        *,
        is_regions: bool,
    ) -> None:
        self._models, self._settings, self._device, self._batch = models, settings, device, batch
        self._base, self._is_regions = base, is_regions
        self._ways = candidates(base.way, device, precision)

    def choose(self, tiles: Tensor, num_tiles: int) -> Loaded:
        """The quickest way for the work ahead.

        Args:
            tiles: (n, C, *patch) of a real image, as many as go through the networks at a time, or as there are.
            num_tiles: That will go through the networks, each mirror image of a tile counted.
        """
        folder = self._models[0].folder
        here = circumstances(self._models, self._device, self._batch, package_versions(tuple(ENGINES.values())))
        found: _Found = {trial.way: _Tried(trial) for trial in recall(folder, here)}
        untried = [way for way in self._ways if way not in found]
        if untried and num_tiles >= MIN_TILES:
            num_known = len(found)
            self._try_out(untried, found, tiles, num_tiles)
            if len(found) > num_known:
                remember(folder, here, [item.trial for item in found.values()])
        return self._take(self._quickest(found, num_tiles))

    def _quickest(self, found: _Found, num_tiles: int) -> _Tried | None:
        """Of the ways that may be used, those that met the check, the quickest; the base where it is as quick."""
        allowed = (self._base.way, REFERENCE, *self._ways)
        met = [found[way] for way in allowed if way in found and found[way].trial.is_met]
        return min(met, key=lambda item: item.trial.seconds(num_tiles), default=None)

    def _take(self, best: _Tried | None) -> Loaded:
        if best is None or best.trial.way == self._base.way:
            return self._base
        way = best.trial.way
        try:
            loaded = best.loaded or self._load(way)
        except ModelError as problem:
            log.warning("%s (going on with %s)", problem.message, self._base.way)
            return self._base
        loaded.keep()
        log.info("engine: %s, %.3f s a tile", way, best.trial.seconds_per_tile)
        return loaded

    def _load(self, way: Way) -> Loaded:
        return Loaded(self._models, self._settings, way, self._device, self._batch)

    def _try_out(self, untried: Sequence[Way], found: _Found, tiles: Tensor, num_tiles: int) -> None:
        """Try ways as long as it is worth it; what was found is added."""
        began = time.perf_counter()
        known = found.get(self._base.way)
        base = None
        if known is None:
            base = if_it_fits(partial(_timed, self._base, tiles[:1], is_rough=True))
            if base is None:
                # The tiles go through in smaller batches, and nothing is known of those.
                return
            tile_s = base[1]
        else:
            tile_s = known.trial.seconds_per_tile
        expected: Tensor | None = None
        for way in untried:
            if _is_pointless(way, found):
                continue
            quickest = self._quickest(found, num_tiles)
            ahead_s = tile_s * num_tiles if quickest is None else quickest.trial.seconds(num_tiles)
            pass_s = ahead_s / num_tiles * len(tiles)
            cost_s = ENGINES[way.engine].set_up_s * len(self._models) + _PASSES_OF_A_TRIAL * pass_s
            if expected is None and (self._base.way != REFERENCE or base is None):
                cost_s += _TILES_OF_THE_REFERENCE * tile_s
            if time.perf_counter() - began + cost_s > MOST_FRACTION * ahead_s:
                continue
            if expected is None:
                expected = if_it_fits(partial(self._reference, found, tiles[:1], base))
            if expected is None:
                # Not enough memory for float32.
                return
            tried = if_it_fits(partial(self._try, way, tiles, expected))
            if tried is None:
                continue
            found[way] = tried
            log.info("tried: %s", _words(tried.trial))
            self._drop_all_but_the_quickest(found, num_tiles)
        if base is not None:
            self._time_the_base_again(found, tiles, num_tiles)

    def _time_the_base_again(self, found: _Found, tiles: Tensor, num_tiles: int) -> None:
        """Where its first pass, which sets things up, does not decide."""
        best = self._quickest(found, num_tiles)
        if best is None or best.trial.way == self._base.way:
            return
        trial = found[self._base.way].trial
        if trial.seconds_per_tile > FIRST_PASS * best.trial.seconds_per_tile:
            return
        seconds = _timed(self._base, tiles)[1]
        found[self._base.way] = _Tried(trial.model_copy(update={"seconds_per_tile": seconds / len(tiles)}))

    def _drop_all_but_the_quickest(self, found: _Found, num_tiles: int) -> None:
        best = self._quickest(found, num_tiles)
        for way, item in found.items():
            if best is None or item.trial != best.trial:
                found[way] = _Tried(item.trial)

    def _reference(self, found: _Found, tiles: Tensor, base: tuple[Tensor, float] | None) -> Tensor:
        """Logits of PyTorch in float32; adds what that, and the base, take.

        Args:
            found: Is added to.
            tiles: (1, C, *patch).
            base: Of the base on it, from `_timed`; None where it was not timed yet.
        """
        base_logits, base_s = base or _timed(self._base, tiles, is_rough=True)
        if self._base.way == REFERENCE:
            logits, seconds, loaded = base_logits, base_s, self._base
        else:
            loaded = self._load(REFERENCE)
            logits, seconds = _timed(loaded, tiles, is_rough=True)
            trial = self._trial(self._base.way, 0.0, base_s, base_logits, logits)
            if found.setdefault(self._base.way, _Tried(trial, self._base)).trial == trial:
                log.info("tried: %s", _words(trial))
        # What is known from earlier is not so rough.
        found.setdefault(REFERENCE, _Tried(self._trial(REFERENCE, 0.0, seconds, logits, logits), loaded))
        return logits

    def _try(self, way: Way, tiles: Tensor, expected: Tensor) -> _Tried:
        started = time.perf_counter()
        try:
            loaded = self._load(way)
            set_up_s = time.perf_counter() - started if loaded.set_up_again_s is None else loaded.set_up_again_s
            logits, seconds = _timed(loaded, tiles)
        except ModelError as problem:
            return _Tried(Trial(engine=way.engine, precision=way.precision, failure=problem.message))
        trial = self._trial(way, set_up_s, seconds / len(tiles), logits[:1], expected)
        return _Tried(trial, loaded)

    def _trial(self, way: Way, set_up_s: float, seconds: float, logits: Tensor, expected: Tensor) -> Trial:
        parity = compare(logits, expected, is_regions=self._is_regions)
        return Trial(
            engine=way.engine,
            precision=way.precision,
            set_up_s=set_up_s,
            seconds_per_tile=seconds,
            same_labels=parity.same_labels,
            largest_difference=parity.largest_difference,
            mean_difference=parity.mean_difference,
            is_met=parity.is_met(way.precision),
        )


def candidates(base: Way, device: torch.device, precision: str) -> tuple[Way, ...]:
    """Ways that may be quicker than the one that is used so far, those first whose trial is cheap.

    Args:
        base: The one used so far.
        device: Where networks run.
        precision: As asked for; "auto" leaves open what the device does well, and float32.
    """
    quick = cast(Precision, runtime.pick_precision(precision, device))
    wanted: dict[Precision, None] = dict.fromkeys((quick, "fp32") if precision == "auto" else (quick,))
    engines = [ENGINES[name] for name in installed() if ENGINES[name].runs_on(device)]
    ways = [
        Way(engine.name, kind)
        for engine in sorted(engines, key=lambda engine: engine.set_up_s)
        for kind in wanted
        if kind in engine.precisions
    ]
    return tuple(way for way in ways if way not in (base, REFERENCE))


def _is_pointless(way: Way, found: _Found) -> bool:
    """Whether it cannot be the quickest: in float32, where less is exact enough."""
    return way.precision == "fp32" and any(
        item.trial.is_met and item.trial.precision != "fp32" for item in found.values()
    )


def _timed(loaded: Loaded, tiles: Tensor, *, is_rough: bool = False) -> tuple[Tensor, float]:
    """The logits, and seconds of a pass with the weighting of its outputs, as the window does it.

    The first pass sets things up and does not count, unless a rough figure is enough.
    """

    def run() -> Tensor:
        logits = loaded.forward(tiles)
        logits.to(torch.float32).mul(0.5)
        # Whatever computes on its own time has done so when a number is asked for.
        logits.flatten()[0].item()
        return logits

    with runtime.one_thread() if loaded.has_own_threads else nullcontext():
        started = time.perf_counter()
        logits = run()
        seconds = time.perf_counter() - started
        if not is_rough:
            seconds = min(runtime.seconds_per_call(run, seconds=TIMED_S, most=TIMED_CALLS, warm_up=0))
    return logits, seconds


def _words(trial: Trial) -> str:
    if trial.failure:
        return f"{trial.way}: {trial.failure}"
    verdict = "" if trial.is_met else ", too far off"
    return (
        f"{trial.way}: {trial.seconds_per_tile:.3f} s a tile, {trial.same_labels:.2%} of foreground labels as in "
        f"float32, probabilities within {trial.largest_difference:.1g}{verdict}"
    )
