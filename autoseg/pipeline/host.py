"""The machine that a plan will run on: where it computes, how much memory it may take, how fast it is."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from math import floor

import torch

from autoseg import machine, runtime
from autoseg.config import CPU_PRESET, DEFAULT_PRESET, PlanSettings, TrainSettings
from autoseg.domain.fingerprint import Budget
from autoseg.planning.presets import PlannerRules
from autoseg.training.speed import measured_speed

log = logging.getLogger("autoseg")

GB = 1e9

HOST_MEMORY_FRACTION = 0.8
"""Part of the free memory of a computer without a GPU that a plan may take: the rest is the system's and other
programs'."""

SMALL_STEP_GB = 0.5
"""Budgets found by looking at the memory are rounded down to whole GB, or below 4 GB to this: looking again a little
later, when a few MB more are taken, must not give another plan."""

_SMALL_BELOW_GB = 4.0


@dataclass(frozen=True, slots=True)
class Target:
    """Where a training will compute.

    Attributes:
        device: Resolved.
        precision: Resolved.
    """

    device: torch.device
    precision: str

    @classmethod
    def of(cls, settings: TrainSettings) -> Target:
        """What these settings mean on this machine.

        Raises:
            ConfigError: The device or the precision is not possible here.
        """
        device = runtime.pick_device(settings.device)
        return cls(device, runtime.pick_precision(settings.precision, device))

    @property
    def preset(self) -> str:
        """The preset that suits it: without a GPU a plan for memory alone takes steps of many seconds."""
        return CPU_PRESET if self.device.type == "cpu" else DEFAULT_PRESET

    @property
    def name(self) -> str:
        """The device for a person."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else runtime.cpu_name()


def budget_of(settings: PlanSettings, rules: PlannerRules, target: Target, known_speed: float | None) -> Budget:
    """What a plan may use on this machine; what has to be measured for it is measured.

    Args:
        settings: What was asked for.
        rules: The preset.
        target: Where a training will compute.
        known_speed: Operations a second, where they were measured before; None measures them if the preset asks.
    """
    asked = settings.vram_gb
    # The only text that settings accept is "auto".
    vram_gb = _memory_here_gb(rules.default_vram_gb, target) if isinstance(asked, str) else asked
    speed = None
    if rules.default_step_seconds is not None:
        speed = known_speed or measured_speed(target.device, target.precision)
    return Budget(vram_gb=vram_gb, step_seconds=settings.step_seconds, flops_per_second=speed)


def _memory_here_gb(default_gb: float, target: Target) -> float:
    """What the card has free; without one the preset's own budget, or less where the computer has less.

    A plan for all the memory of a computer without a GPU would be far too slow to train there.
    """
    found = machine.device_memory_bytes(target.device)
    if found is None:
        log.warning("--vram auto: the memory of %s is not known; the preset's %g GB are taken", target.name, default_gb)
        return default_gb
    free_gb, total_gb = (value / GB for value in found)
    where = f"--vram auto: {target.name} has {free_gb:.1f} of {total_gb:.1f} GB free"
    if target.device.type == "cuda":
        taken = _rounded_down(free_gb)
        log.info("%s; planned for %g GB", where, taken)
        return taken
    taken = min(default_gb, _rounded_down(HOST_MEMORY_FRACTION * free_gb))
    log.info("%s; there is no CUDA device, so it is planned for %g GB (the preset's own: %g)", where, taken, default_gb)
    return taken


def _rounded_down(amount_gb: float) -> float:
    step = 1.0 if amount_gb >= _SMALL_BELOW_GB else SMALL_STEP_GB
    return max(floor(amount_gb / step) * step, SMALL_STEP_GB)
