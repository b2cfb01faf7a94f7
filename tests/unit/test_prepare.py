from __future__ import annotations

import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from autoseg.domain.dataset import Case, LabelClass, LabelSchema
from autoseg.domain.geometry import Volume
from autoseg.domain.plan import ChannelNormalization, PreprocessPlan
from autoseg.errors import DatasetError
from autoseg.io.images import read_case, read_labels
from autoseg.io.store import CaseStore
from autoseg.preprocessing import prepare as prepare_module
from autoseg.preprocessing.prepare import cache_digest, prepare_case
from autoseg.preprocessing.transform import apply

SCHEMA = LabelSchema(classes=(LabelClass(name="a", values=(4,)), LabelClass(name="b", values=(9,))), ignore=200)
PLAN = PreprocessPlan(
    axis_order=(0, 2, 1),
    target_spacing=(2.2, 1.0, 1.3),
    normalization=(ChannelNormalization(scheme="zscore"), ChannelNormalization(scheme="rescale")),
)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    rng = np.random.default_rng(5)
    affine = np.array([[-2.0, 0, 0, 9], [0, 0, 1.1, -3], [0, 1.2, 0, 4], [0, 0, 0, 1]])
    paths = [tmp_path / f"case_000{channel}.nii.gz" for channel in range(2)]
    for path in paths:
        nib.save(nib.Nifti1Image(rng.normal(100, 20, (9, 12, 11)).astype(np.float32), affine), path)
    labels = rng.choice(np.array([0, 4, 9, 200], np.uint8), (9, 12, 11))
    nib.save(nib.Nifti1Image(labels, affine), tmp_path / "labels.nii.gz")
    return Case(id="case", images=tuple(map(str, paths)), labels=str(tmp_path / "labels.nii.gz"))


def test_cached_arrays_equal_those_of_prediction_bit_for_bit(case: Case, tmp_path: Path) -> None:
    store = CaseStore(tmp_path / "cache")
    assert prepare_case(case, PLAN, SCHEMA, store)
    stored = store.open("case")
    image, labels = stored.read((0, 0, 0), stored.shape)
    volume = read_case(case, 2)
    predicted = apply(volume, PLAN)
    assert np.array_equal(image, predicted.image)
    assert stored.spacing_mm == predicted.trail.target_spacing
    assert case.labels is not None
    values, _ = read_labels(case.labels, volume.geometry)
    trained = apply(volume, PLAN, SCHEMA.encode(values), SCHEMA.num_classes)
    assert trained.labels is not None
    assert np.array_equal(labels, trained.labels)
    assert np.array_equal(trained.image, predicted.image), "labels do not change the image"


def test_a_current_case_is_not_done_again_and_a_changed_one_is(case: Case, tmp_path: Path) -> None:
    store = CaseStore(tmp_path / "cache")
    assert prepare_case(case, PLAN, SCHEMA, store)
    first = store.path("case").read_bytes()
    assert not prepare_case(case, PLAN, SCHEMA, store)
    store.path("case").unlink()
    assert prepare_case(case, PLAN, SCHEMA, store)
    assert store.path("case").read_bytes() == first, "the same bytes whenever it is made"
    image = nib.load(case.images[0])
    changed = np.asarray(image.dataobj) + np.arange(11, dtype=np.float32)
    nib.save(nib.Nifti1Image(changed, image.affine), case.images[0])
    assert prepare_case(case, PLAN, SCHEMA, store)
    assert store.path("case").read_bytes() != first


def test_two_that_want_the_same_case_prepare_it_once(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that share a run did the same work twice, into temporary files whose names could be the same."""
    store = CaseStore(tmp_path / "cache")
    reads = []

    def counted_read(wanted: Case, num_channels: int) -> Volume:
        reads.append(wanted.id)
        return read_case(wanted, num_channels)

    monkeypatch.setattr(prepare_module, "read_case", counted_read)
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: prepare_case(case, PLAN, SCHEMA, store), range(4)))
    assert sorted(done) == [False, False, False, True]
    assert reads == ["case"]
    assert [path.name for path in store.folder.iterdir()] == ["case.safetensors"], "no lock is left behind"


def test_a_case_that_another_process_prepares_is_waited_for(case: Case, tmp_path: Path) -> None:
    store = CaseStore(tmp_path / "cache")
    other = CaseStore(tmp_path / "other")
    assert prepare_case(case, PLAN, SCHEMA, other)
    code = (
        "import sys, time; from pathlib import Path; from autoseg.io.files import Lock\n"
        "made, wanted = map(Path, sys.argv[1:])\n"
        "with Lock(wanted.with_name('.lock-' + wanted.name), 'case'):\n"
        "    print(flush=True); sys.stdin.readline(); made.rename(wanted)\n"
    )
    command = [sys.executable, "-c", code, str(other.path("case")), str(store.path("case"))]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner,
        ThreadPoolExecutor(1) as pool,
    ):
        assert owner.stdin is not None
        assert owner.stdout is not None
        owner.stdout.readline()
        waiting = pool.submit(prepare_case, case, PLAN, SCHEMA, store)
        try:
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.3)
        finally:
            owner.stdin.write(b"\n")
            owner.stdin.close()
        assert waiting.result(timeout=30) is False
    assert [path.name for path in store.folder.iterdir()] == ["case.safetensors"]


def test_the_lock_of_a_process_that_died_stops_nobody(case: Case, tmp_path: Path) -> None:
    store = CaseStore(tmp_path / "cache")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    store.folder.mkdir()
    lock = store.folder / ".lock-case.safetensors"
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": dead.pid}))
    assert prepare_case(case, PLAN, SCHEMA, store)
    assert not lock.exists()


def test_the_digest_names_plan_labels_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = {
        cache_digest(PLAN, SCHEMA),
        cache_digest(PLAN.model_copy(update={"image_order": 1}), SCHEMA),
        cache_digest(PLAN, SCHEMA.model_copy(update={"ignore": None})),
    }
    monkeypatch.setattr(prepare_module, "PREPROCESSING_VERSION", 99)
    digests.add(cache_digest(PLAN, SCHEMA))
    assert len(digests) == 4


def test_errors_name_the_case(case: Case, tmp_path: Path) -> None:
    store = CaseStore(tmp_path / "cache")
    with pytest.raises(DatasetError, match="case: there is no label"):
        prepare_case(case.model_copy(update={"labels": None}), PLAN, SCHEMA, store)
    with pytest.raises(DatasetError, match="case"):
        prepare_case(case.model_copy(update={"labels": str(tmp_path / "none.nii.gz")}), PLAN, SCHEMA, store)
    fewer = LabelSchema(classes=SCHEMA.classes[:1], ignore=200)
    with pytest.raises(DatasetError, match=r"case: undeclared label values \[9\]"):
        prepare_case(case, PLAN, fewer, store)
    image = nib.load(case.images[1])
    values = np.asarray(image.dataobj).copy()
    values[0, 0, 0] = np.nan
    nib.save(nib.Nifti1Image(values, image.affine), case.images[1])
    with pytest.raises(DatasetError, match="case: channel 1 holds 1 values"):
        prepare_case(case, PLAN, SCHEMA, store)
    assert store.ids() == ()
    assert not list(store.folder.glob(".*")), "failing leaves no lock behind"
