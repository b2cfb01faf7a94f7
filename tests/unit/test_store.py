from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

from autoseg.errors import DatasetError
from autoseg.io import cached
from autoseg.io import store as store_module
from autoseg.io.cached import Source
from autoseg.io.chunks import ChunkedArray, Damaged, chunk_shape, pack
from autoseg.io.store import CaseHeader, CaseStore, foreground_locations


@pytest.fixture
def arrays() -> tuple[NDArray[np.float32], NDArray[np.int16]]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 6, 7, 8)).astype(np.float32), rng.integers(-1, 3, (6, 7, 8)).astype(np.int16)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "image.nii.gz"
    path.write_bytes(b"0123456789")
    return path


def write(store: CaseStore, case_id: str, arrays: tuple[NDArray[np.float32], NDArray[np.int16]], *files: Path) -> None:
    image, labels = arrays
    foreground = foreground_locations(labels, 3, np.random.default_rng(0))
    sources = [Source.of(file) for file in files]
    store.write(case_id, image, labels, foreground, spacing_mm=(3.0, 1.0, 1.5), sources=sources)


def test_what_is_read_is_what_was_written(
    tmp_path: Path, arrays: tuple[NDArray[np.float32], NDArray[np.int16]]
) -> None:
    store = CaseStore(tmp_path / "cache")
    write(store, "a", arrays)
    case = store.open("a")
    assert (case.id, case.channels, case.shape, case.spacing_mm) == ("a", 2, (6, 7, 8), (3.0, 1.0, 1.5))
    image, labels = case.read((1, 0, 3), (4, 7, 5))
    assert np.array_equal(image, arrays[0][:, 1:4, 0:7, 3:5])
    assert np.array_equal(labels, arrays[1][1:4, 0:7, 3:5])
    image[:] = 0
    labels[:] = 0
    assert np.array_equal(case.read((0, 0, 0), case.shape)[0], arrays[0]), "reads are copies"
    assert list(case.foreground) == [0, 1, 2]
    for index in (1, 2):
        assert (arrays[1][tuple(case.foreground[index].T)] == index).all()


def test_labels_of_ten_and_more_classes_come_back_in_order(tmp_path: Path) -> None:
    labels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    store = CaseStore(tmp_path)
    foreground = foreground_locations(labels, 24, np.random.default_rng(0))
    store.write("a", np.zeros((1, 2, 3, 4), np.float32), labels, foreground, spacing_mm=(1.0, 1.0, 1.0), sources=())
    assert list(store.open("a").foreground) == list(range(1, 24))


@pytest.mark.parametrize("box", [((0, 0, 0), (7, 1, 1)), ((-1, 0, 0), (1, 1, 1)), ((2, 2, 2), (2, 3, 3))])
def test_a_box_outside_is_refused(
    tmp_path: Path,
    arrays: tuple[NDArray[np.float32], NDArray[np.int16]],
    box: tuple[tuple[int, int, int], tuple[int, int, int]],
) -> None:
    store = CaseStore(tmp_path)
    write(store, "a", arrays)
    with pytest.raises(ValueError, match="not inside"):
        store.open("a").read(*box)


def test_the_same_case_gives_the_same_bytes(
    tmp_path: Path, arrays: tuple[NDArray[np.float32], NDArray[np.int16]], source: Path
) -> None:
    store = CaseStore(tmp_path / "cache")
    write(store, "a", arrays, source)
    first = store.path("a").read_bytes()
    write(store, "a", arrays, source)
    assert store.path("a").read_bytes() == first


@pytest.mark.parametrize("case_id", ["a", "a/b", "..", ".tmp-1-x", "Patient 7", "ünï", "50%", "con:1"])
def test_any_id_is_a_file_in_the_folder(
    tmp_path: Path, arrays: tuple[NDArray[np.float32], NDArray[np.int16]], case_id: str
) -> None:
    store = CaseStore(tmp_path / "cache")
    write(store, case_id, arrays)
    assert store.path(case_id).parent == store.folder
    assert store.ids() == (case_id,)
    assert store.open(case_id).id == case_id


def test_current_only_while_the_sources_keep_their_content(
    tmp_path: Path, arrays: tuple[NDArray[np.float32], NDArray[np.int16]], source: Path
) -> None:
    store = CaseStore(tmp_path / "cache")
    assert not store.is_current("a", [source])
    write(store, "a", arrays, source)
    assert store.is_current("a", [source])
    assert not store.is_current("a", [source, source]), "another number of files"
    status = source.stat()
    source.touch()
    assert store.is_current("a", [source]), "touched, same content"
    source.write_bytes(b"012345678X")
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not store.is_current("a", [source]), "same size and modification time, other content"
    source.unlink()
    assert not store.is_current("a", [source])


def test_a_data_set_may_move(
    tmp_path: Path, arrays: tuple[NDArray[np.float32], NDArray[np.int16]], source: Path
) -> None:
    store = CaseStore(tmp_path / "cache")
    write(store, "a", arrays, source)
    moved = source.rename(tmp_path / "elsewhere.nii.gz")
    assert store.is_current("a", [moved])


def test_unchanged_files_are_not_hashed(
    tmp_path: Path,
    arrays: tuple[NDArray[np.float32], NDArray[np.int16]],
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = CaseStore(tmp_path / "cache")
    write(store, "a", arrays, source)

    def fail(path: Path) -> str:
        raise AssertionError(f"{path} was hashed")

    monkeypatch.setattr(cached, "content_digest", fail)
    assert store.is_current("a", [source])


def test_broken_foreign_and_old_files_are_not_current_and_say_so(
    tmp_path: Path, arrays: tuple[NDArray[np.float32], NDArray[np.int16]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CaseStore(tmp_path)
    write(store, "a", arrays)
    whole = store.path("a").read_bytes()
    for broken in (whole[:-5], whole[:40], b"", b"not safetensors at all"):
        store.path("a").write_bytes(broken)
        assert not store.is_current("a", [])
        with pytest.raises(DatasetError, match="cached case"):
            store.open("a")
    save_file({"image": arrays[0]}, store.path("a"))
    assert not store.is_current("a", [])
    monkeypatch.setattr(CaseHeader, "VERSION", CaseHeader.VERSION + 1)
    store.path("a").write_bytes(whole)
    assert not store.is_current("a", [])


def test_a_damaged_byte_is_found_wherever_it_is_and_never_read(
    tmp_path: Path, arrays: tuple[NDArray[np.float32], NDArray[np.int16]]
) -> None:
    store = CaseStore(tmp_path)
    write(store, "a", arrays)
    whole, rng, refused = store.path("a").read_bytes(), np.random.default_rng(0), 0
    for place in rng.integers(0, len(whole), 400):
        damaged = bytearray(whole)
        damaged[place] ^= int(rng.integers(1, 256))
        store.path("a").write_bytes(damaged)
        try:
            case = store.open("a")
            image, labels = case.read((0, 0, 0), case.shape)
        except DatasetError as problem:
            assert str(store.path("a")) in problem.message  # noqa: PT017
            refused += 1
            continue
        # White space around the header and the order of its keys say nothing.
        assert np.array_equal(image, arrays[0])
        assert np.array_equal(labels, arrays[1])
        assert all((arrays[1][tuple(positions.T)] == index).all() for index, positions in case.foreground.items())
    assert refused > 380


def test_a_file_cut_anywhere_is_refused(tmp_path: Path, arrays: tuple[NDArray[np.float32], NDArray[np.int16]]) -> None:
    store = CaseStore(tmp_path)
    write(store, "a", arrays)
    whole = store.path("a").read_bytes()
    for length in range(0, len(whole), 41):
        store.path("a").write_bytes(whole[:length])
        with pytest.raises(DatasetError, match=r"a\.safetensors"):
            store.open("a")


def test_a_case_that_is_damaged_inside_is_deleted_and_made_anew(
    tmp_path: Path, arrays: tuple[NDArray[np.float32], NDArray[np.int16]]
) -> None:
    store = CaseStore(tmp_path)
    write(store, "a", arrays)
    whole = bytearray(store.path("a").read_bytes())
    # The image's only chunk comes first after the header.
    whole[int.from_bytes(whole[:8], "little") + 8 + 100] ^= 1
    store.path("a").write_bytes(whole)
    case = store.open("a")
    with pytest.raises(DatasetError, match=r"a\.safetensors is damaged and was deleted: chunk 0 of 2") as refused:
        case.read((0, 0, 0), case.shape)
    assert "made anew" in refused.value.hint
    assert not store.path("a").exists()
    write(store, "a", arrays)
    with pytest.raises(DatasetError, match="damaged"):
        case.read((0, 0, 0), case.shape)
    assert store.path("a").exists(), "what another process made anew is not deleted"
    assert np.array_equal(store.open("a").read((0, 0, 0), case.shape)[0], arrays[0])


def test_a_chunk_that_promises_another_size_is_refused() -> None:
    values = np.arange(64, dtype=np.int16)
    layout, packed, table = pack(values, (64,))
    longer = layout.model_copy(update={"shape": (32,), "chunk": (32,)})
    with pytest.raises(Damaged, match="another size"):
        ChunkedArray(longer, table, lambda start, stop: packed[start:stop]).whole()
    with pytest.raises(Damaged, match="table"):
        ChunkedArray(layout.model_copy(update={"chunk": (32,)}), table, lambda start, stop: packed[start:stop])


@given(data=st.data())
def test_a_box_of_chunks_is_the_box_of_the_array(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    chunk = data.draw(st.tuples(*(st.integers(1, 10) for _ in shape)))
    start = data.draw(st.tuples(*(st.integers(0, size - 1) for size in shape)))
    stop = data.draw(st.tuples(*(st.integers(low + 1, size) for low, size in zip(start, shape, strict=True))))
    dtype = data.draw(st.sampled_from([np.float32, np.int16, np.int32, np.uint8]))
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    layout, packed, table = pack(array, chunk)
    opened = ChunkedArray(layout, table, lambda low, high: packed[low:high])
    found = opened.read(start, stop)
    assert found.dtype == dtype
    assert np.array_equal(found, array[tuple(slice(low, high) for low, high in zip(start, stop, strict=True))])


def test_a_read_costs_what_it_reads() -> None:
    array = np.random.default_rng(0).normal(size=(96, 96, 96)).astype(np.float32)
    layout, packed, table = pack(array, chunk_shape(array.shape, in_slices=False))
    fetched = []

    def fetch(start: int, stop: int) -> NDArray[np.uint8]:
        fetched.append(stop - start)
        return packed[start:stop]

    ChunkedArray(layout, table, fetch).read((40, 40, 40), (60, 60, 60))
    assert len(fetched) == 1
    assert sum(fetched) < packed.size / 20


@pytest.mark.parametrize(
    ("shape", "in_slices", "expected"),
    [
        ((128, 128, 128), False, (32, 32, 32)),
        ((35, 51, 40), False, (35, 26, 40)),
        ((1, 512, 1024), False, (1, 171, 171)),
        ((60, 512, 512), True, (1, 171, 171)),
        ((3, 3, 3), False, (3, 3, 3)),
    ],
)
def test_chunks_follow_what_is_read(
    shape: tuple[int, int, int], in_slices: bool, expected: tuple[int, int, int]
) -> None:
    assert chunk_shape(shape, in_slices=in_slices) == expected


def test_a_failed_write_leaves_the_old_case_and_no_rest(
    tmp_path: Path, arrays: tuple[NDArray[np.float32], NDArray[np.int16]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CaseStore(tmp_path)
    write(store, "a", arrays)
    before = store.path("a").read_bytes()

    def half(path: Path, *_: object) -> None:
        path.write_bytes(before[:20])
        raise OSError("No space left on device")

    monkeypatch.setattr(cached, "_write", half)
    with pytest.raises(OSError, match="No space"):
        write(store, "a", arrays)
    assert store.path("a").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [store.path("a").name]


def test_half_written_files_are_no_cases(tmp_path: Path, arrays: tuple[NDArray[np.float32], NDArray[np.int16]]) -> None:
    store = CaseStore(tmp_path)
    write(store, "b", arrays)
    (tmp_path / ".tmp-99-a.safetensors").write_bytes(b"half")
    assert store.ids() == ("b",)


def test_shapes_must_agree(tmp_path: Path, arrays: tuple[NDArray[np.float32], NDArray[np.int16]]) -> None:
    with pytest.raises(ValueError, match="do not agree"):
        write(CaseStore(tmp_path), "a", (arrays[0], arrays[1][1:]))


def test_locations_are_all_of_a_small_class_and_a_part_of_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MIN_LOCATIONS", 50)
    labels = np.zeros((20, 30, 40), np.int16)
    labels[:10] = 1
    labels[15, :5, :6] = 2
    labels[19, 0, 0] = -1
    found = foreground_locations(labels, 5, np.random.default_rng(3))
    assert list(found) == [0, 1, 2]
    assert len(found[1]) == 120, "one per cent of 12,000"
    assert len(np.unique(found[1], axis=0)) == 120, "without replacement"
    assert (labels[tuple(found[1].T)] == 1).all()
    assert np.array_equal(found[2], np.argwhere(labels == 2))
    assert len(found[0]) == 240, "one per cent of 23,999 voxels that somebody annotated"
    assert (labels[tuple(found[0].T)] >= 0).all()
    again = foreground_locations(labels, 5, np.random.default_rng(3))
    assert np.array_equal(found[1], again[1])
