"""What a user gets from the wheel is what lies in the source tree, and works without the source tree."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a program without the caller's Python path; returns its output, or fails with it."""
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME"}}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (path,) = out.glob("autoseg_unet-*.whl")
    return path


@pytest.fixture(scope="module")
def packed(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def source_files(folder: str) -> set[str]:
    files = (ROOT / folder).rglob("*")
    return {
        p.relative_to(ROOT).as_posix()
        for p in files
        if p.is_file() and "__pycache__" not in p.parts and p.suffix not in {".pyc", ".tmp"}
    }


def test_wheel_carries_every_file_of_the_package(packed):
    assert source_files("autoseg") <= packed


def test_wheel_carries_the_configs_inside_the_package(packed):
    configs = source_files("configs")
    assert {"configs/default.yaml", "configs/quick.yaml"} <= configs
    assert {f"autoseg/{name}" for name in configs} <= packed


def test_wheel_carries_the_demo_data(packed):
    names = {name for name in packed if name.startswith("autoseg/demo_data/")}
    assert any(name.endswith("dataset.json") for name in names)
    assert any(name.endswith(".nii.gz") for name in names)


def test_wheel_carries_vendored_files_with_their_licences(packed):
    vendored = {Path(name).name.lower() for name in packed if name.startswith("autoseg/report/vendor/")}
    assert any(name.endswith((".js", ".js.gz")) for name in vendored)
    assert any("license" in name or "licence" in name for name in vendored)


def test_wheel_carries_nothing_else(packed):
    assert {name.split("/")[0] for name in packed if not name.startswith("autoseg_unet-")} == {"autoseg"}


def test_wheel_carries_licence_and_command(wheel, packed):
    entry_points = next(name for name in packed if name.endswith(".dist-info/entry_points.txt"))
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in packed)
    with zipfile.ZipFile(wheel) as archive:
        assert "autoseg = autoseg.cli:main" in archive.read(entry_points).decode()


def test_every_direct_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {normalise(line.split("==")[0]) for line in lines if "==" in line and not line.startswith("#")}
    assert {normalise(re.split(r"[<>=!~\[; ]", name)[0]) for name in wanted} <= pinned
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9A-Za-z.!]+", line) for line in lines if line and line[0] != "#")


def normalise(name: str) -> str:
    """Source: the Python packaging user guide, "Names and normalization"."""
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.slow
def test_installed_wheel_plans_and_knows_its_demo(wheel, tmp_path):
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False, symlinks=os.name != "nt")
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=tmp_path)
    purelib = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # Lends the dependencies of this environment; the .pth of an editable autoseg there is not followed.
    (purelib / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    found = run(python, "-c", "import autoseg; print(autoseg.__file__)", cwd=tmp_path).strip()
    assert Path(found).is_relative_to(environment)

    num_cases = 20
    dataset = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "anterior": 1, "posterior": 2},
        "numTraining": num_cases,
        "file_ending": ".nii.gz",
    }
    intensities = {"max": 900.0, "mean": 300.0, "median": 290.0, "min": 5.0, "percentile_00_5": 40.0}
    fingerprint = {  # as nnU-Net v2 writes it, z, y, x
        "spacings": [[1.0, 1.0, 1.0]] * num_cases,
        "shapes_after_crop": [[36, 50, 35]] * num_cases,
        "median_relative_size_after_cropping": 1.0,
        "foreground_intensity_properties_per_channel": {"0": {**intensities, "percentile_99_5": 700.0, "std": 90.0}},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    (tmp_path / "dataset_fingerprint.json").write_text(json.dumps(fingerprint), encoding="utf-8")
    autoseg = scripts / "autoseg"
    options = ["--preset", "nnunet", "--fingerprint", "dataset_fingerprint.json", "--out", "run"]
    run(autoseg, "plan", "dataset.json", *options, cwd=tmp_path)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
    assert {"2d", "3d_fullres"} <= set(plan["configurations"])
    assert "OUT" in run(autoseg, "demo", "--help", cwd=tmp_path)
