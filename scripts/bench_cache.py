"""Ways to keep preprocessed cases: size, seconds to write, milliseconds to read a random patch.

Every way keeps the same arrays, the images of some cases of a run; patches are those of the run's plan, at the same
random places, and the files are in memory already. "raw" is the lower limit of reading, numpy's own memory map.

    python scripts/bench_cache.py RUN... --out FOLDER      (zarr is compared where it can be imported)
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench_lines import markdown
from numpy.typing import NDArray

from autoseg.io import store as store_module
from autoseg.io.chunks import chunk_shape
from autoseg.io.run_folder import RunFolder
from autoseg.io.store import CaseStore
from autoseg.pipeline.training import prepare

CONFIGURATION = "3d_fullres"
Image = NDArray[np.float32]
Reader = Callable[[tuple[slice, ...]], Image]


def size_of(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def raw(path: Path, image: Image, _: int) -> Callable[[], Reader]:
    np.save(path, image)
    return lambda: lambda box: np.array(np.load(path.with_suffix(".npy"), mmap_mode="r")[box])


def ours(path: Path, image: Image, edge: int) -> Callable[[], Reader]:
    store = CaseStore(path)

    def shape(sizes: Any, **_: Any) -> tuple[int, ...]:
        return tuple(-(-size // max(1, round(size / edge))) for size in sizes)

    kept, store_module.chunk_shape = store_module.chunk_shape, shape if edge else chunk_shape
    try:
        labels = np.zeros(image.shape[1:], np.int16)
        store.write("case", image, labels, {}, spacing_mm=(1, 1, 1), sources=[])
    finally:
        store_module.chunk_shape = kept

    def opened() -> Reader:
        case = store.open("case")
        return lambda box: case.read([part.start for part in box[1:]], [part.stop for part in box[1:]])[0]

    return opened


def blosc2_array(path: Path, image: Image, edge: int) -> Callable[[], Reader]:
    import blosc2

    parameters = {"codec": blosc2.Codec.LZ4, "clevel": 5, "nthreads": 1}
    chunks = (1, *(min(edge, size) for size in image.shape[1:]))
    path.mkdir()
    blosc2.asarray(image, chunks=chunks, urlpath=str(path / "a.b2nd"), mode="w", cparams=parameters)
    return lambda: lambda box: blosc2.open(str(path / "a.b2nd"), mode="r", mmap_mode="r", dparams={"nthreads": 1})[box]


def zarr_array(path: Path, image: Image, edge: int) -> Callable[[], Reader]:
    import zarr

    codec = zarr.codecs.BloscCodec(cname="lz4", clevel=5, shuffle="shuffle")
    chunks = (1, *(min(edge, size) for size in image.shape[1:]))
    array = zarr.create_array(store=str(path), shape=image.shape, chunks=chunks, dtype=image.dtype, compressors=codec)
    array[:] = image
    return lambda: lambda box: zarr.open_array(str(path), mode="r")[box]


WAYS: dict[str, tuple[Callable[[Path, Image, int], Callable[[], Reader]], int]] = {
    "raw": (raw, 0),
    "autoseg (Blosc2 chunks, checked)": (ours, 0),
    "the same, edge 16": (ours, 16),
    "the same, edge 64": (ours, 64),
    "Blosc2 array, edge 32": (blosc2_array, 32),
    "Zarr, edge 32": (zarr_array, 32),
}


def boxes(shape: tuple[int, ...], patch: tuple[int, ...], count: int) -> list[tuple[slice, ...]]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        starts = [int(rng.integers(0, max(0, size - edge) + 1)) for size, edge in zip(shape[1:], patch, strict=True)]
        stops = [min(start + edge, size) for start, edge, size in zip(starts, patch, shape[1:], strict=True)]
        found.append((slice(None), *map(slice, starts, stops)))
    return found


def measure(name: str, images: list[Image], patch: tuple[int, ...], folder: Path, count: int) -> dict[str, float]:
    way, edge = WAYS[name]
    size, written, reads, whole = 0, 0.0, list[float](), 0.0
    for number, image in enumerate(images):
        path = folder / f"{list(WAYS).index(name)}-{number}"
        started = time.perf_counter()
        opened = way(path, image, edge)
        written += time.perf_counter() - started
        size += size_of(path if path.exists() else path.with_suffix(".npy"))
        for box in boxes(image.shape, patch, count):
            started = time.perf_counter()
            found = opened()(box)
            reads.append(time.perf_counter() - started)
            assert np.array_equal(found, image[box])
        started = time.perf_counter()
        opened()(tuple(slice(0, length) for length in image.shape))
        whole += time.perf_counter() - started
    raw_bytes = sum(image.nbytes for image in images)
    return {
        "size": size / raw_bytes,
        "write_mb_s": raw_bytes / written / 1e6,
        "patch_ms": statistics.median(reads) * 1000,
        "whole_ms": whole / len(images) * 1000,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=4)
    parser.add_argument("--patches", type=int, default=50)
    wanted = parser.parse_args()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for path in wanted.runs:
        run = RunFolder(path)
        dataset, planned = run.read_dataset(), run.read_plan()
        store = prepare(run, dataset, planned, CONFIGURATION)
        images = []
        for case in dataset.cases[: wanted.cases]:
            kept = store.open(case.id)
            images.append(kept.read((0, 0, 0), kept.shape)[0])
        patch = tuple(planned.configurations[CONFIGURATION].network.patch_size)
        for name in WAYS:
            if name.startswith("Zarr") and importlib.util.find_spec("zarr") is None:
                continue
            folder = wanted.out / dataset.name / "ways"
            folder.mkdir(parents=True, exist_ok=True)
            result = measure(name, images, patch, folder, wanted.patches)
            found.setdefault(f"{dataset.name}, {'x'.join(map(str, patch))}", {})[name] = result
        (wanted.out / "cache.json").write_text(json.dumps(found, indent=2) + "\n")
    rows = [
        [
            name,
            way,
            f"{row['size']:.2f}",
            f"{row['write_mb_s']:.0f}",
            f"{row['patch_ms']:.2f}",
            f"{row['whole_ms']:.1f}",
        ]
        for name, ways in found.items()
        for way, row in ways.items()
    ]
    print(markdown(["set, patch", "way", "size", "write MB/s", "patch ms", "whole ms"], rows))


if __name__ == "__main__":
    main()
