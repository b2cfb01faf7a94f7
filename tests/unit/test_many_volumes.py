"""A folder of many volumes: nothing twice, nothing by half, parts that fit together, failures that stop nothing."""

import errno
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_models import toy_volume
from toy_runs import toy_run, write_fold, write_images

from autoseg.cli.app import main
from autoseg.domain.dataset import Case
from autoseg.domain.inference import InferenceRecipe, KeepLargest, Member
from autoseg.errors import AutosegError, ConfigError, DatasetError
from autoseg.inference.outcome import PredictionOutcome
from autoseg.inference.segmenter import Segmenter
from autoseg.io.images import read_labels, write_image
from autoseg.io.run_folder import RunFolder
from autoseg.pipeline.prediction import predict
from autoseg.pipeline.shards import Shard


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return toy_run(tmp_path / "run", {"3d_fullres": (0,)})


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return write_images(tmp_path / "in", 4)


def go(run: RunFolder, images: Sequence[Path], out: Path, **options: object) -> PredictionOutcome:
    return predict(run.root, images, out, device="cpu", precision="fp32", **options)  # type: ignore[arg-type]


def names(paths: Sequence[Path]) -> list[str]:
    return [path.name.split(".")[0] for path in paths]


def test_what_is_finished_and_whole_is_not_done_again(
    run: RunFolder, images: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    first = go(run, images[:3], out)
    assert names(first.written) == ["case_00", "case_01", "case_02"]
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in first.written}
    with caplog.at_level("INFO", "autoseg"):
        second = go(run, images, out)
    assert names(second.written) == ["case_03"]
    assert names(second.skipped) == ["case_00", "case_01", "case_02"]
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in second.skipped} == before
    told = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert told == [f"3 of 4 cases are finished in {out} and skipped (--restart does them again)"]
    again = go(run, images, out, restart=True)
    assert (names(again.written), again.skipped) == (["case_00", "case_01", "case_02", "case_03"], ())
    assert {path.name: path.read_bytes() for path in again.written[:3]} == {k: v[0] for k, v in before.items()}


def test_the_networks_are_not_even_loaded_when_all_is_finished(
    run: RunFolder, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(run, images, tmp_path / "out")
    monkeypatch.setattr("autoseg.pipeline.members.load_model", None)
    assert len(go(run, images, tmp_path / "out").skipped) == 4


def cut_short(out: Path, image: Path, run: RunFolder) -> None:
    path = out / "case_01.nii.gz"
    path.write_bytes(path.read_bytes()[:-20])


def replaced_by_as_many_bytes(out: Path, image: Path, run: RunFolder) -> None:
    path = out / "case_01.nii.gz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def gone(out: Path, image: Path, run: RunFolder) -> None:
    (out / "case_01.nii.gz").unlink()


def image_changed(out: Path, image: Path, run: RunFolder) -> None:
    write_images(image.parent / "other", 3)
    # As many bytes or not, at the same second or not: the time says it.
    shutil.copy(image.parent / "other" / "case_02.nii.gz", image)
    os.utime(image, ns=(0, image.stat().st_mtime_ns + 1))


def record_of_another_version(out: Path, image: Path, run: RunFolder) -> None:
    path = out / ".autoseg" / "case_01.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"surplus": 1}))


@pytest.mark.parametrize(
    "change", [cut_short, replaced_by_as_many_bytes, gone, image_changed, record_of_another_version]
)
def test_a_case_is_done_again_when_anything_of_it_changed(
    run: RunFolder, images: list[Path], tmp_path: Path, change: object
) -> None:
    out = tmp_path / "out"
    go(run, images, out)
    whole = (out / "case_01.nii.gz").read_bytes()
    change(out, images[1], run)  # type: ignore[operator]
    outcome = go(run, images, out)
    assert names(outcome.written) == ["case_01"]
    if change is not image_changed:
        assert (out / "case_01.nii.gz").read_bytes() == whole
    assert go(run, images, out).written == ()


def test_other_models_settings_and_rules_are_done_again(run: RunFolder, images: list[Path], tmp_path: Path) -> None:
    out, two = tmp_path / "out", images[:2]
    go(run, two, out)
    assert len(go(run, two, out, tta="full").written) == 2
    assert len(go(run, two, out, tta="full").skipped) == 2
    write_fold(run, "3d_fullres", 0, seed=99)
    assert len(go(run, two, out, tta="full").written) == 2
    recipe = InferenceRecipe(
        members=(Member(configuration="3d_fullres"),), postprocessing=(KeepLargest(classes=("low",)),)
    )
    run.write(run.inference_file, recipe)
    assert len(go(run, two, out, tta="full").written) == 2
    assert len(go(run, two, out, tta="full").skipped) == 2


def test_shards_are_disjoint_complete_and_balanced_whatever_is_done(run: RunFolder, tmp_path: Path) -> None:
    images, out = write_images(tmp_path / "many", 7), tmp_path / "out"
    parts = [names(go(run, images, out, shard=f"{number}/3").written) for number in (1, 2, 3)]
    assert sorted(map(len, parts)) == [2, 2, 3]
    assert sorted(name for part in parts for name in part) == [f"case_{number:02d}" for number in range(7)]
    # The parts are the same when some of it is done.
    assert [names(go(run, images, out, shard=f"{number}/3").skipped) for number in (1, 2, 3)] == parts
    assert go(run, images, out, shard="9/9").written == ()


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/2", "1/2/3"])
def test_a_part_that_is_none_is_wrong_usage(text: str, run: RunFolder, images: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--shard needs I/N"):
        Shard.parse(text)
    words = ["predict", str(run.root), str(images[0]), "--out", str(tmp_path / "out"), "--shard", text]
    assert main(words) == 2
    assert not (tmp_path / "out").exists()


def test_leftovers_of_dead_processes_are_removed_and_those_of_living_ones_stay(
    run: RunFolder, images: list[Path], tmp_path: Path
) -> None:
    from autoseg.io.files import _temporary_name

    out = tmp_path / "out"
    (out / ".autoseg").mkdir(parents=True)
    mine = _temporary_name(out / "case_09.nii.gz")
    dead = [folder / mine.name.replace(f"-{os.getpid()}-", "-999999999-") for folder in (out, out / ".autoseg")]
    for path in (mine, *dead):
        path.write_bytes(b"half")
    go(run, images[:1], out)
    assert mine.exists()
    assert not any(path.exists() for path in dead)
    assert sorted(path.name for path in out.glob("*.nii.gz") if not path.name.startswith(".")) == ["case_00.nii.gz"]


def test_a_full_disk_stops_with_what_is_missing_and_the_same_command_goes_on(
    run: RunFolder, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autoseg.inference import cases

    write = cases.write_labels

    def full(path: Path, *rest: object) -> None:
        if path.name.startswith("case_01"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(cases, "write_labels", full)
    outcome = go(run, images, tmp_path / "out")
    assert outcome.stopped == "the disk is full"
    # Those that were in work beside it may still end.
    assert outcome.num_untried >= 1
    with pytest.raises(ConfigError, match="the disk is full") as stopped:
        outcome.raise_failures()
    assert stopped.value.exit_code == 2
    monkeypatch.setattr(cases, "write_labels", write)
    after = go(run, images, tmp_path / "out")
    assert names(after.skipped) == names(outcome.written)
    assert len(after.skipped) + len(after.written) == 4


def test_a_bug_in_one_case_is_told_and_the_others_are_done(
    run: RunFolder,
    images: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    read = Segmenter.read

    def odd(self: Segmenter, case: Case, *more: Any) -> object:
        if case.id == "case_01":
            raise ValueError("nobody foresaw this")
        return read(self, case, *more)

    monkeypatch.setattr(Segmenter, "read", odd)
    outcome = go(run, images, tmp_path / "out")
    assert names(outcome.written) == ["case_00", "case_02", "case_03"]
    assert outcome.failures == ("case_01: ValueError: nobody foresaw this",)
    assert "Traceback" in caplog.text
    with pytest.raises(AutosegError, match=r"1 of 4 cases .*bug") as failed:
        outcome.raise_failures()
    assert failed.value.exit_code == 1


def test_a_bug_in_every_case_stops_after_three(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("always")

    monkeypatch.setattr(Segmenter, "segment", broken)
    outcome = go(run, write_images(tmp_path / "many", 8), tmp_path / "out")
    assert (len(outcome.failures), outcome.num_untried) == (3, 5)
    with pytest.raises(AutosegError, match="3 cases in a row"):
        outcome.raise_failures()


def test_unreadable_images_are_counted_beside_what_was_skipped(
    run: RunFolder, images: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    go(run, images[:2], out)
    images[2].write_bytes(b"no image")
    outcome = go(run, images, out)
    assert (len(outcome.written), len(outcome.skipped), len(outcome.failures)) == (1, 2, 1)
    with pytest.raises(DatasetError, match="1 of 4 cases could not be segmented") as failed:
        outcome.raise_failures()
    assert failed.value.problems[0].startswith("case_02: ")
    # What failed is tried again.
    assert len(go(run, images, out).failures) == 1


def test_the_voxels_of_a_detached_header_count_too(run: RunFolder, tmp_path: Path) -> None:
    volume, out = toy_volume(), tmp_path / "out"
    image = tmp_path / "in" / "scan.mhd"
    write_image(image, volume.array[0], volume.geometry)
    (path,) = go(run, [image], out).written
    (voxels,) = [item for item in out.iterdir() if item.suffix in (".raw", ".zraw")]
    assert go(run, [image], out).written == ()
    voxels.write_bytes(voxels.read_bytes()[:-1])
    assert go(run, [image], out).written == (path,)
    assert go(run, [image], out).written == ()


def test_records_say_what_was_made_of_what(run: RunFolder, images: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    go(run, images[:1], out)
    record = json.loads((out / ".autoseg" / "case_00.json").read_text())
    assert record["schema_version"] == 1
    assert record["inputs"] == [
        {"name": "case_00.nii.gz", "size": images[0].stat().st_size, "modified_ns": images[0].stat().st_mtime_ns}
    ]
    assert [item["name"] for item in record["outputs"]] == ["case_00.nii.gz"]
    labels, _ = read_labels(out / "case_00.nii.gz")
    assert set(np.unique(labels)) <= {0, 7, 300}
