"""A bundle in the hands of MONAI's command line: the files of `autoseg predict`, byte for byte."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from toy_runs import toy_run, write_images

from autoseg.cli.app import main
from autoseg.domain.inference import InferenceRecipe, KeepLargest, Member


@pytest.mark.slow
def test_monais_command_line_writes_what_predict_writes(tmp_path: Path) -> None:
    pytest.importorskip("fire", reason="the extra [bundle] is not installed")
    run = toy_run(tmp_path / "run", {"3d_cascade": (0, 1), "3d_lowres": (0, 1), "2d": (0,)}, has_cascade=True)
    members = (Member(configuration="3d_cascade", weight=2.0), Member(configuration="2d", temperature=0.3))
    rules = (KeepLargest(classes=("low", "high"), joined=True),)
    run.write(run.inference_file, InferenceRecipe(members=members, postprocessing=rules))
    images = write_images(tmp_path / "in", 2)[0].parent
    bundle, expected, out = (tmp_path / name for name in ("bundle", "expected", "out"))
    assert main(["predict", str(run.root), str(images), "--out", str(expected), "--device", "cpu"]) == 0
    assert main(["export", str(run.root), "--out", str(bundle), "--format", "bundle"]) == 0
    settings = {
        "config_file": bundle / "configs" / "inference.json",
        "bundle_root": bundle,
        "dataset_dir": images,
        "output_dir": out,
        "device": "cpu",
    }
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "monai.bundle", "run", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "case_01 is done" in done.stdout
    found, wanted = ({path.name: path.read_bytes() for path in folder.glob("*.nii.gz")} for folder in (out, expected))
    assert len(wanted) == 2
    assert found == wanted
