"""Every layout gives the same data set, and everything that is wrong with one is told at once."""

import json
from pathlib import Path
from typing import Any

import pytest

from autoseg.domain.dataset import Dataset
from autoseg.domain.layouts import load_dataset, resolve_dataset
from autoseg.errors import DatasetError

LABELS = {"background": 0, "tumour": 1, "cyst": 2}


def write(path: Path, content: Any = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def raw_layout(folder: Path, cases: tuple[str, ...] = ("a", "b"), channels: int = 1, **more: Any) -> Path:
    names = {str(number): f"ch{number}" for number in range(channels)}
    for case in cases:
        for number in range(channels):
            write(folder / "imagesTr" / f"{case}_{number:04d}.nii.gz")
        write(folder / "labelsTr" / f"{case}.nii.gz")
    write(folder / "dataset.json", {"channel_names": names, "labels": LABELS, "file_ending": ".nii.gz", **more})
    return folder


def codes(path: Path) -> list[tuple[str, str]]:
    return [(item.code, item.case) for item in resolve_dataset(path)[1]]


def test_nnunet_raw(tmp_path: Path) -> None:
    folder = raw_layout(tmp_path / "set", ("b", "a_1"), channels=2, numTraining=2, licence="kept and ignored")
    write(folder / "imagesTs" / "t_0000.nii.gz")
    write(folder / "imagesTs" / "t_0001.nii.gz")
    write(folder / "imagesTr" / "._b_0000.nii.gz")  # what macOS leaves behind
    for path in (folder, folder / "dataset.json", str(folder)):
        dataset = load_dataset(path)
        assert dataset.name == "set"
        assert [case.id for case in dataset.cases] == ["a_1", "b"]
        assert dataset.case("b").images == tuple(str(folder / f"imagesTr/b_000{number}.nii.gz") for number in (0, 1))
        assert dataset.case("b").labels == str(folder / "labelsTr/b.nii.gz")
        assert [case.id for case in dataset.test_cases] == ["t"]
        assert [channel.name for channel in dataset.channels] == ["ch0", "ch1"]
        assert dataset.labels.names == ("tumour", "cyst")
        assert dataset.file_ending == ".nii.gz"
        assert resolve_dataset(path)[1] == ()


def test_msd(tmp_path: Path) -> None:
    for case in ("x_2", "x_1"):
        write(tmp_path / f"imagesTr/{case}.nii.gz")
        write(tmp_path / f"labelsTr/{case}.nii.gz")
    write(tmp_path / "imagesTs/x_9.nii.gz")
    description = {
        "name": "MSD",
        "modality": {"1": "T2", "0": "FLAIR"},
        "labels": {"0": "background", "2": "cyst", "1": "tumour"},
        "training": [
            {"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in ("x_2", "x_1")
        ],
        "test": ["./imagesTs/x_9.nii.gz", "./imagesTs/gone.nii.gz"],
    }
    write(tmp_path / "dataset.json", description)
    dataset = load_dataset(tmp_path)
    assert [channel.name for channel in dataset.channels] == ["FLAIR", "T2"]
    assert [(item.name, item.values) for item in dataset.labels.classes] == [("tumour", (1,)), ("cyst", (2,))]
    assert [case.id for case in dataset.cases] == ["x_1", "x_2"]
    assert dataset.cases[0].images == (str(tmp_path / "imagesTr/x_1.nii.gz"),)
    assert [case.id for case in dataset.test_cases] == ["x_9"]


def test_msd_listing_with_nnunet_v1_file_names(tmp_path: Path) -> None:
    folder = raw_layout(tmp_path, ("x[1]",), channels=2)
    training = [{"image": "./imagesTr/x[1].nii.gz", "label": "./labelsTr/x[1].nii.gz"}]
    write(folder / "dataset.json", {"modality": {"0": "A", "1": "B"}, "labels": LABELS, "training": training})
    assert load_dataset(folder).cases[0].images == tuple(
        str(folder / f"imagesTr/x[1]_000{number}.nii.gz") for number in (0, 1)
    )


def test_channels_beyond_the_named_ones_are_left_out(tmp_path: Path) -> None:
    folder = raw_layout(tmp_path, channels=3)
    write(folder / "dataset_one.json", {"channel_names": {"0": "T1"}, "labels": LABELS, "file_ending": ".nii.gz"})
    assert [len(case.images) for case in load_dataset(folder / "dataset_one.json").cases] == [1, 1]
    assert [len(case.images) for case in load_dataset(folder).cases] == [3, 3]


def test_one_picture_may_hold_every_channel(tmp_path: Path) -> None:
    write(tmp_path / "imagesTr/a_0000.png")
    write(tmp_path / "labelsTr/a.png")
    write(
        tmp_path / "dataset.json",
        {"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": LABELS, "file_ending": ".png"},
    )
    dataset = load_dataset(tmp_path)
    assert dataset.cases[0].images == (str(tmp_path / "imagesTr/a_0000.png"),)
    assert dataset.file_ending == ".png"


def test_files_without_channel_numbers_are_cases(tmp_path: Path) -> None:
    for case in ("a", "b"):
        write(tmp_path / f"imagesTr/{case}.nrrd")
        write(tmp_path / f"labelsTr/{case}.nrrd")
    write(tmp_path / "dataset.json", {"channel_names": ["CT"], "labels": LABELS})
    assert [case.id for case in load_dataset(tmp_path).cases] == ["a", "b"]


def test_the_declared_ending_wins_and_others_are_taken_too(tmp_path: Path) -> None:
    folder = raw_layout(tmp_path, ("a",))
    write(folder / "imagesTr/a_0000.mha")
    write(folder / "imagesTr/b_0000.nrrd")
    write(folder / "labelsTr/b.nrrd")
    dataset = load_dataset(folder)
    assert dataset.case("a").images[0].endswith("a_0000.nii.gz")
    assert dataset.case("b").images[0].endswith("b_0000.nrrd")


def test_nnunet_dataset_object(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere/i.nii.gz")
    write(tmp_path / "elsewhere/l.nii.gz")
    write(
        tmp_path / "set/dataset.json",
        {
            "channel_names": {"0": "CT"},
            "labels": LABELS,
            "file_ending": ".nii.gz",
            "dataset": {"k": {"images": ["../elsewhere/i.nii.gz"], "label": "../elsewhere/l.nii.gz"}},
        },
    )
    case = load_dataset(tmp_path / "set").case("k")
    assert Path(case.images[0]).resolve() == (tmp_path / "elsewhere/i.nii.gz").resolve()
    assert case.labels is not None


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    folder = raw_layout(tmp_path, ("a", "b", "c"), channels=2, numTraining=3)
    (folder / "labelsTr/a.nii.gz").unlink()
    (folder / "imagesTr/b_0001.nii.gz").unlink()
    write(folder / "labelsTr/orphan.nii.gz")
    write(folder / "imagesTr/stray.nii.gz")
    assert sorted(codes(folder)) == [
        ("count-differs", ""),
        ("missing-channel", "b"),
        ("missing-image", "orphan"),
        ("missing-label", "a"),
        ("no-channel-number", ""),
    ]
    with pytest.raises(DatasetError) as caught:
        load_dataset(folder)
    assert caught.value.exit_code == 3
    assert len(caught.value.problems) == 2  # the warnings do not stop training
    assert "case a" in caught.value.problems[0] or "case a" in caught.value.problems[1]
    assert "_0001" in str(caught.value)


def test_an_msd_listing_of_absent_files_names_each(tmp_path: Path) -> None:
    training = [{"image": "i/a.nii.gz", "label": "l/a.nii.gz"}, {"image": "i/b.nii.gz"}, "c"]
    write(tmp_path / "dataset.json", {"modality": {"0": "CT"}, "labels": LABELS, "training": training})
    assert sorted(codes(tmp_path)) == [
        ("bad-description", ""),
        ("missing-image", "a"),
        ("missing-image", "b"),
        ("missing-label", "a"),
        ("missing-label", "b"),
    ]


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("{", "not readable JSON"),
        ([1], "must be a JSON object"),
        ({"labels": LABELS}, "names no channels"),
        ({"channel_names": {"1": "CT"}, "labels": LABELS}, "numbered 0 to 0"),
        ({"channel_names": {"0": "CT"}}, "names no labels"),
        ({"channel_names": {"0": "CT"}, "labels": {"background": 0}}, "at least one foreground class"),
        ({"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1, "b": 1}}, "label values must differ"),
        ({"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": "one"}}, "must be an integer"),
        ({"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": True}}, "must be an integer"),
        ({"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": -1}}, "above 0"),
        ({"channel_names": {"0": "CT"}, "labels": {"0": "x", "1": "a", "2": "a"}}, "same name"),
        ({"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": [0, 1]}}, "may not contain 0"),
    ],
)
def test_descriptions_that_make_no_sense(tmp_path: Path, description: Any, message: str) -> None:
    write(tmp_path / "dataset.json", description)
    with pytest.raises(DatasetError, match=message):
        load_dataset(tmp_path)


def test_no_data_set_says_what_one_is(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist"):
        load_dataset(tmp_path / "nowhere")
    write(tmp_path / "other.json", {})
    with pytest.raises(DatasetError, match=r"no dataset\.json \(it has other\.json"):
        load_dataset(tmp_path)
    with pytest.raises(DatasetError, match=r"neither a folder nor"):
        load_dataset(write(tmp_path / "x.txt"))
    write(tmp_path / "dataset.json", {"channel_names": ["CT"], "labels": LABELS})
    with pytest.raises(DatasetError, match="imagesTr: the folder does not exist"):
        load_dataset(tmp_path)


def test_a_description_alone_is_enough_to_plan_from_a_fingerprint(tmp_path: Path) -> None:
    write(tmp_path / "dataset.json", {"channel_names": ["CT"], "labels": LABELS, "numTraining": 9})
    dataset = load_dataset(tmp_path / "dataset.json", need_files=False)
    assert dataset.cases == ()
    assert dataset.labels.num_classes == 3
    with pytest.raises(DatasetError, match="names no labels"):
        load_dataset(write(tmp_path / "x.json", {"channel_names": ["CT"]}), need_files=False)


def test_regions_and_ignore(tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3], "ignore": 4}
    write(
        tmp_path / "dataset.json",
        {"channel_names": ["T1"], "labels": labels, "regions_class_order": [1, 2, 3]},
    )
    schema = load_dataset(tmp_path, need_files=False).labels
    assert schema.has_regions
    assert schema.ignore == 4
    assert [item.values for item in schema.classes] == [(1, 2, 3), (2, 3), (3,)]
    assert schema.regions_class_order == (1, 2, 3)
    write(
        tmp_path / "dataset.json",
        {"channel_names": ["T1"], "labels": labels, "regions_class_order": [2, 3, 3]},
    )
    assert load_dataset(tmp_path, need_files=False).labels.regions_class_order == (2, 3, 3)


def test_classes_annotated_in_a_case(tmp_path: Path) -> None:
    """A key of the description; cases that it does not list were annotated in full."""
    folder = raw_layout(tmp_path, ("a", "b", "c"), annotated={"b": ["cyst"], "c": ["cyst", "tumour"]})
    dataset = load_dataset(folder)
    assert [case.annotated for case in dataset.cases] == [None, ("cyst",), None]
    assert dataset.annotated_rows == {"b": (False, True)}
    assert Dataset.from_json(dataset.to_json(), "here") == dataset


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ({"b": ["cust"]}, ("unknown-class", "b")),
        ({"b": []}, ("nothing-annotated", "b")),
        ({"d": ["cyst"]}, ("unknown-case", "d")),
        ({"a": ["cyst"], "b": ["cyst"]}, ("class-never-annotated", "")),
        (["cyst"], ("bad-description", "")),
        ({"b": "cyst"}, ("bad-description", "")),
    ],
)
def test_annotations_that_mean_nothing_are_errors(tmp_path: Path, declared: Any, expected: tuple[str, str]) -> None:
    assert codes(raw_layout(tmp_path, ("a", "b"), annotated=declared)) == [expected]


def test_an_order_of_regions_that_cannot_be_is_told(tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 2], "left": [1], "right": [2]}
    for order, words in (
        (None, "regions_class_order"),
        ([1, 1], "needs one label value a region"),
        ([1, 2, 1], "none of its values"),
        ("1", "list of label values"),
    ):
        more = {} if order is None else {"regions_class_order": order}
        write(tmp_path / "dataset.json", {"channel_names": ["T1"], "labels": labels, **more})
        with pytest.raises(DatasetError, match=words):
            load_dataset(tmp_path, need_files=False)


# --- Manifests ------------------------------------------------------------------------------------------------------


def manifest(**more: Any) -> dict[str, Any]:
    return {
        "channels": ["T1", {"name": "T2"}],
        "labels": [{"name": "background", "value": 0}, {"name": "a", "value": 3}, {"name": "b", "values": [5]}],
        "cases": [
            {"id": "k2", "images": ["f/2a.nii.gz", "f/2b.nii.gz"], "labels": "f/2l.nii.gz", "patient": "p"},
            {"id": "k1", "image": "f/1.nii.gz", "labels": "f/1l.nii.gz", "patient": "p"},
            {"id": "t", "image": "f/1.nii.gz"},
        ],
        **more,
    }


def files(folder: Path) -> None:
    for name in ("1", "1l", "2a", "2b", "2l"):
        write(folder / f"f/{name}.nii.gz")


def test_json_manifest(tmp_path: Path) -> None:
    files(tmp_path)
    path = write(tmp_path / "knees.json", manifest(ignore=9))
    dataset = load_dataset(path)
    assert dataset.name == "knees"
    assert dataset.labels.declared_values == {0, 3, 5, 9}
    assert [(case.id, len(case.images), case.patient) for case in dataset.cases] == [("k1", 1, "p"), ("k2", 2, "p")]
    assert [case.id for case in dataset.test_cases] == ["t"]
    assert codes(path) == [("no-label-named", "t")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"casess": 1}, "casess"),
        ({"labels": [{"name": "a"}]}, '"value" or "values"'),
        ({"cases": [{"id": "x"}]}, '"image" or "images"'),
        ({"cases": [{"id": "x", "image": "i", "lable": "l"}]}, "lable"),
        ({"channels": []}, "at least one channel"),
    ],
)
def test_unknown_and_missing_keys_of_a_manifest_are_errors(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        load_dataset(write(tmp_path / "m.json", manifest(**change)))


def test_manifest_problems_are_collected(tmp_path: Path) -> None:
    files(tmp_path)
    cases = [
        {"id": "a", "image": "f/1.nii.gz", "labels": "f/1l.nii.gz"},
        {"id": "a", "image": "f/1.nii.gz", "labels": "f/1l.nii.gz"},
        {"id": "../b", "image": "f/1.nii.gz", "labels": "f/1l.nii.gz"},
        {"id": "c", "images": ["f/1.nii.gz"] * 3, "labels": "f/1l.nii.gz"},
        {"id": "d", "image": "f/none.nii.gz", "labels": "f/none.nii.gz"},
    ]
    path = write(tmp_path / "m.json", manifest(cases=cases))
    assert codes(path) == [
        ("bad-id", "../b"),
        ("double-id", "a"),
        ("wrong-channels", "c"),
        ("missing-image", "d"),
        ("missing-label", "d"),
    ]


@pytest.mark.parametrize("beside", ["cases.json", "dataset.json"])
@pytest.mark.parametrize("ours", [True, False])
def test_csv_manifest(tmp_path: Path, beside: str, ours: bool) -> None:
    files(tmp_path)
    description: dict[str, Any] = {"channel_names": {"0": "T1", "1": "T2"}, "labels": LABELS}
    if ours:
        description = {key: value for key, value in manifest().items() if key != "cases"}
    write(tmp_path / beside, description)
    path = write(
        tmp_path / "cases.csv",
        "id,image_0,image_1,label,patient\nk2,f/2a.nii.gz, f/2b.nii.gz ,f/2l.nii.gz,p7\nk1,f/1.nii.gz,f/1.nii.gz,,\n",
    )
    dataset = load_dataset(path)
    assert [(case.id, case.patient) for case in dataset.cases] == [("k2", "p7")]
    assert dataset.cases[0].images[1] == str(tmp_path / "f/2b.nii.gz")
    assert [case.id for case in dataset.test_cases] == ["k1"]
    assert dataset.labels.num_classes == 3


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "no rows"),
        ("id,image\n", "no rows"),
        ("id,image,lable\na,b,c\n", "unknown columns: lable"),
        ("image\nx\n", "no column id"),
        ("id,label\na,b\n", "either a column image"),
        ("id,image,image_0\na,b,c\n", "either a column image"),
        ("id,image_1\na,b\n", "numbered from 0"),
        ("id,image\na,\n", "line 2"),
        ("id,image\na,b,c\n", "line 2"),
    ],
)
def test_csv_tables_that_make_no_sense(tmp_path: Path, table: str, message: str) -> None:
    write(tmp_path / "dataset.json", {"channel_names": ["CT"], "labels": LABELS})
    with pytest.raises(DatasetError, match=message):
        load_dataset(write(tmp_path / "c.csv", table))


def test_a_table_without_a_description_says_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"neither c\.json nor dataset\.json") as caught:
        load_dataset(write(tmp_path / "c.csv", "id,image\na,b\n"))
    assert '"labels"' in caught.value.hint


# --- What comes beside the cases -----------------------------------------------------------------------------------


def test_splits_that_come_with_the_data_are_honoured(tmp_path: Path) -> None:
    folder = raw_layout(tmp_path)
    write(folder / "splits_final.json", [{"train": ["a"], "val": ["b"]}])
    splits = load_dataset(folder).splits
    assert splits is not None
    assert splits.folds[0].validation == ("b",)
    write(folder / "splits.json", {"rule": "ours", "folds": [{"train": ["b"], "validation": ["a"]}]})
    ours = load_dataset(folder).splits
    assert ours is not None
    assert ours.rule == "ours"


@pytest.mark.parametrize("content", ["{", [{"train": ["a"], "val": ["z"]}], [{"train": ["a"], "val": ["a"]}]])
def test_splits_that_do_not_fit_are_refused(tmp_path: Path, content: Any) -> None:
    folder = raw_layout(tmp_path)
    write(folder / "splits_final.json", content)
    assert codes(folder) == [("bad-splits", "")]
    with pytest.raises(DatasetError, match=r"splits_final\.json"):
        load_dataset(folder)


def test_a_resolved_data_set_is_a_data_set(tmp_path: Path) -> None:
    dataset = load_dataset(raw_layout(tmp_path / "set"))
    path = write(tmp_path / "run/dataset.json", dataset.to_json())
    assert load_dataset(path) == dataset
    assert Dataset.from_json(dataset.to_json(), "here") == dataset


def test_reading_needs_no_torch_and_no_image_library() -> None:
    import subprocess
    import sys

    code = (
        "import sys, autoseg.domain.layouts, autoseg.domain.splits;"
        "print([name for name in ('torch', 'nibabel', 'SimpleITK', 'typer') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_manifest_knows_regions_their_order_and_what_was_annotated(tmp_path: Path) -> None:
    for name in ("1", "2a", "2b", "1l", "2l"):
        write(tmp_path / f"f/{name}.nii.gz")
    content = manifest(
        labels=[{"name": "a", "values": [1, 2]}, {"name": "b", "value": 2}], regions_class_order=[1, 2], ignore=9
    )
    content["cases"][0]["annotated"] = ["b"]
    dataset = load_dataset(write(tmp_path / "m.json", content))
    assert dataset.labels.regions_class_order == (1, 2)
    assert dataset.labels.ignore == 9
    assert {case.id: case.annotated for case in dataset.cases} == {"k1": None, "k2": ("b",)}
    content["labels"] = [{"name": "a", "value": 1}, {"name": "b", "value": 2}]
    with pytest.raises(DatasetError, match="no class joins several"):
        load_dataset(write(tmp_path / "m.json", content))


def test_a_table_has_a_column_of_annotated_classes(tmp_path: Path) -> None:
    for name in ("i", "l"):
        write(tmp_path / f"{name}.nii.gz")
    labels = [{"name": "liver", "value": 1}, {"name": "left kidney", "value": 2}]
    write(tmp_path / "t.json", {"channels": ["CT"], "labels": labels})
    rows = [
        "id,image,label,annotated",
        "a,i.nii.gz,l.nii.gz,",
        "b,i.nii.gz,l.nii.gz,left kidney",
        "c,i.nii.gz,l.nii.gz,liver; left kidney",
    ]
    dataset = load_dataset(write(tmp_path / "t.csv", "\n".join(rows)))
    assert [case.annotated for case in dataset.cases] == [None, ("left kidney",), None]


def test_one_set_may_mix_file_endings(tmp_path: Path) -> None:
    folder = raw_layout(tmp_path, ("a",), channels=2)
    for name in ("imagesTr/b_0000.nrrd", "imagesTr/b_0001.mha", "labelsTr/b.nii", "imagesTs/t_0000.mgz"):
        write(folder / name)
    write(folder / "imagesTs/t_0001.nii.gz")
    dataset = load_dataset(folder)
    assert [Path(file).name for file in dataset.case("b").files] == ["b_0000.nrrd", "b_0001.mha", "b.nii"]
    assert [Path(file).name for file in dataset.test_cases[-1].images] == ["t_0000.mgz", "t_0001.nii.gz"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("imagesTr/b_0000.nrrd", "imagesTr/b_0000.mha", "labelsTr/b.nii"),
            "b_0000.mha and b_0000.nrrd claim to be channel 0",
        ),
        (("imagesTr/b_0000.nrrd", "labelsTr/b.nii", "labelsTr/b.mha"), "b.mha and b.nii claim to be the label map"),
    ],
)
def test_two_files_for_one_place_are_refused(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    folder = raw_layout(tmp_path, ("a",))
    for name in names:
        write(folder / name)
    with pytest.raises(DatasetError, match=message):
        load_dataset(folder)


def test_of_two_files_that_of_the_declared_ending_is_taken_with_a_warning(tmp_path: Path) -> None:
    folder = raw_layout(tmp_path, ("a",))
    write(folder / "imagesTr/a_0000.mha")
    dataset, findings = resolve_dataset(folder)
    assert dataset is not None
    assert dataset.cases[0].images[0].endswith("a_0000.nii.gz")
    assert [(item.code, item.severity, item.case) for item in findings] == [("double-file", "warning", "a")]


def test_listed_files_are_found_under_another_ending(tmp_path: Path) -> None:
    write(tmp_path / "imagesTr/a.nrrd")
    write(tmp_path / "labelsTr/a.mha")
    entries = [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}]
    write(tmp_path / "dataset.json", {"modality": {"0": "CT"}, "labels": LABELS, "training": entries})
    (case,) = load_dataset(tmp_path).cases
    assert [Path(file).name for file in case.files] == ["a.nrrd", "a.mha"]


def test_label_maps_that_are_not_written_are_predicted_in_a_format_that_is(tmp_path: Path) -> None:
    for ending, written in ((".mnc", ".nii.gz"), (".hdr", ".nii.gz"), (".mgz", ".mgz"), (".tif", ".tif")):
        folder = tmp_path / ending[1:]
        write(folder / f"imagesTr/a_0000{ending}")
        write(folder / f"labelsTr/a{ending}")
        write(folder / "dataset.json", {"channel_names": ["CT"], "labels": LABELS})
        assert load_dataset(folder).file_ending == written
