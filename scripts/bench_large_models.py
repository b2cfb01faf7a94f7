"""The models of `bench_large_volumes.py`: nnU-Net's folders, what they are like, and autoseg's runs of them."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Models:
    """nnU-Net's model folders and autoseg's runs of them, by number of classes; made when asked for."""

    def __init__(self, wanted: argparse.Namespace) -> None:
        self._wanted = wanted
        self._configuration = wanted.model.name.rpartition("__")[2]

    def _call(self, *words: str) -> str:
        python = str(self._wanted.nnunet / "python")
        script = str(Path(__file__).with_name("nnunet_untrained.py"))
        return subprocess.run([python, script, *words], stdout=subprocess.PIPE, text=True, check=True).stdout

    def folder(self, classes: int) -> Path:
        """nnU-Net's model."""
        wanted = self._wanted
        own = len(json.loads((wanted.model / "dataset.json").read_text())["labels"])
        if classes == own and wanted.weights == "trained" and not wanted.patch:
            return Path(wanted.model)
        made = Path(wanted.work / f"model of {classes}")
        if not (made / "fold_0" / "checkpoint_final.pth").is_file():
            shutil.rmtree(made, ignore_errors=True)
            words = ["make", str(wanted.model), str(made), "--classes", str(classes), "--weights", wanted.weights]
            for name in ("features", "patch"):
                value = getattr(wanted, name)
                words += [f"--{name}", value] if value else []
            self._call(*words, "--fold", wanted.fold)
        return made

    def fold(self, classes: int) -> str:
        """The fold that predicts."""
        return str(self._wanted.fold) if self.folder(classes) == self._wanted.model else "0"

    def plan(self, classes: int) -> Row:
        """The configuration in nnU-Net's plans."""
        plans = json.loads((self.folder(classes) / "plans.json").read_text())
        part: Row = plans["configurations"][self._configuration]
        return part | {"transpose_backward": plans["transpose_backward"]}

    def words(self, classes: int) -> str:
        """What a network is like."""
        part = self.plan(classes)
        widths = part["architecture"]["arch_kwargs"]["features_per_stage"]
        patch = "×".join(map(str, part["patch_size"]))
        is_own = self.folder(classes) == self._wanted.model
        return f"{classes} classes, {'–'.join(map(str, widths))} features, patch {patch}, " + (
            "trained"
            if is_own
            else "trained, further classes never win"
            if self._wanted.weights == "trained"
            else "weights at random"
        )

    def timings(self, classes: int, threads: int) -> Row:
        """Seconds of a tile and of a resampled voxel."""
        text = self._call("time", str(self.folder(classes)), "--fold", self.fold(classes), "--threads", str(threads))
        found: Row = json.loads(text.splitlines()[-1])
        return found

    def spacing(self, classes: int) -> tuple[float, ...]:
        """Of a volume's voxels along the file's axes."""
        part = self.plan(classes)
        of_images = [part["spacing"][axis] for axis in part["transpose_backward"]]
        return tuple(mm / self._wanted.change for mm in reversed(of_images))

    def run(self, classes: int) -> Path:
        """The run that autoseg imports."""
        run = Path(self._wanted.work / f"run of {classes}")
        if not run.exists():
            words = [self._wanted.python, "-m", "autoseg", "import", "nnunet", str(self.folder(classes))]
            subprocess.run([*words, "--out", str(run)], check=True)
        return run
