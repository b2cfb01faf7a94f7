"""Names and colours of labels: in the header of a label map, and in the files that viewers read."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from autoseg.domain.dataset import LabelClass, LabelSchema
from autoseg.domain.geometry import Geometry
from autoseg.domain.label_table import PALETTE, Label, colour_of, label_table
from autoseg.io.images import read_labels, write_labels
from autoseg.io.label_names import read_label_names, write_bids_table, write_colour_table, write_itksnap
from autoseg.io.slicer import write_seg_nrrd

NAMED = LabelSchema(
    classes=(LabelClass(name="left <lung> & \u201ehilus\u201c", values=(7,)), LabelClass(name="rib", values=(3,)))
)
# Oblique, not a right-handed order, anisotropic.
AFFINE = np.array([[0.0, -0.9, 0.1, 10], [-0.8, 0.0, 0.0, 20], [0.0, 0.09, 2.5, -30], [0, 0, 0, 1]])
SHAPE = (5, 6, 7)


def classes(*values: tuple[int, ...]) -> tuple[LabelClass, ...]:
    return tuple(LabelClass(name="abcdef"[number], values=item) for number, item in enumerate(values))


def test_names_stand_by_value_and_colours_by_place() -> None:
    assert [(item.value, item.name, item.colour) for item in label_table(NAMED)] == [
        (3, "rib", PALETTE[0]),
        (7, NAMED.names[0], PALETTE[1]),
    ]


def test_values_of_regions_are_called_what_they_are_written_for() -> None:
    nested = LabelSchema(classes=classes((1, 2, 3), (2, 3), (3,)))
    assert {item.value: item.name for item in label_table(nested)} == {1: "a", 2: "b", 3: "c"}
    crossing = LabelSchema(classes=classes((1, 3), (300, 3)))
    assert {item.value: item.name for item in label_table(crossing)} == {1: "a", 3: "a + b", 300: "b"}
    ordered = LabelSchema(classes=classes((1, 2, 3), (2, 3), (3,)), regions_class_order=(1, 2, 3))
    assert {item.value: item.name for item in label_table(ordered)} == {1: "a", 2: "b", 3: "c"}


def test_every_written_value_has_a_name() -> None:
    for order in (None, (1, 3)):
        schema = LabelSchema(classes=classes((1, 2), (2, 3)), regions_class_order=order)
        written = set(np.unique(schema.decode_regions(np.arange(4)))) - {0}
        assert written <= {item.value for item in label_table(schema)}


def test_colours_are_those_of_the_page_and_differ() -> None:
    css = (Path(__file__).parents[2] / "autoseg/report/templates/check.css").read_text()
    of_page = re.findall(r"\.k(\d) \{ stroke: #([0-9a-f]{6}); \}", css)
    assert [f"{int(number)}{colour}" for number, colour in of_page] == [
        f"{number}{colour[0]:02x}{colour[1]:02x}{colour[2]:02x}" for number, colour in enumerate(PALETTE)
    ]
    assert len({colour_of(number) for number in range(300)}) > 295


@pytest.mark.parametrize("name", ["x.nii.gz", "x.nii"])
def test_a_label_map_names_its_labels_in_its_header(tmp_path: Path, name: str) -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:3] = 7
    geometry = Geometry(SHAPE, AFFINE, sform_code=2, qform_code=1, qform=np.diag([2.0, 2.0, 2.0, 1.0]))
    write_labels(tmp_path / name, labels, geometry, label_table(NAMED))
    assert read_label_names(tmp_path / name) == label_table(NAMED)
    found = nib.load(tmp_path / name)
    header = found.header
    assert header["intent_code"] == 1002
    assert (header["sform_code"], header["qform_code"]) == (2, 1)
    np.testing.assert_allclose(header.get_qform(), np.diag([2.0, 2.0, 2.0, 1.0]), atol=1e-6)
    np.testing.assert_allclose(header.get_sform(), AFFINE, atol=1e-6)
    assert np.array_equal(np.asarray(found.dataobj), labels)
    values, again = read_labels(tmp_path / name)
    assert np.array_equal(values, labels)
    np.testing.assert_allclose(again.affine, AFFINE, atol=1e-6)
    codes = [item.get_code() for item in header.extensions]
    assert codes == [6, 30]
    tree = ElementTree.fromstring(header.extensions[1].content.rstrip(b"\0"))
    rows = {int(row.get("Key", "")): row.text for row in tree.iter("Label")}
    assert rows == {0: "background", 3: "rib", 7: NAMED.names[0]}
    # As docs/reference/formats.md says to read it, without autoseg.
    comment = header.extensions[0].content.rstrip(b"\0")
    assert json.loads(comment)["labels"][1] == {"value": 7, "name": NAMED.names[0], "colour": list(PALETTE[1])}


def test_without_names_a_header_stays_as_it_was(tmp_path: Path) -> None:
    write_labels(tmp_path / "x.nii", np.zeros(SHAPE, np.uint8), Geometry(SHAPE, AFFINE))
    assert read_label_names(tmp_path / "x.nii") == ()
    assert (tmp_path / "x.nii").stat().st_size == 352 + 5 * 6 * 7


@pytest.mark.parametrize("is_2d", [False, True])
def test_a_slicer_segmentation_has_a_segment_for_each_label(tmp_path: Path, is_2d: bool) -> None:
    shape = (5, 6, 1) if is_2d else SHAPE
    labels = np.zeros(shape, np.uint16)
    labels[1:4, 2:6, 0] = 300
    affine = np.eye(4) if is_2d else AFFINE
    table = (Label(value=300, name="left lung", colour=(255, 0, 51)), Label(value=2, name="none", colour=(0, 0, 0)))
    write_seg_nrrd(tmp_path / "x.seg.nrrd", labels, Geometry(shape, affine, is_2d=is_2d), table)
    image = sitk.ReadImage(str(tmp_path / "x.seg.nrrd"))
    assert image.GetSize() == shape
    fields = {key: image.GetMetaData(key) for key in image.GetMetaDataKeys()}
    assert fields["Segmentation_MasterRepresentation"] == "Binary labelmap"
    assert fields["Segmentation_ReferenceImageExtentOffset"] == "0 0 0"
    assert fields["Segment0_Name"] == "left lung"
    assert fields["Segment0_LabelValue"] == "300"
    assert fields["Segment0_Layer"] == "0"
    assert fields["Segment0_Extent"] == "1 3 2 5 0 0"
    assert [float(number) for number in fields["Segment0_Color"].split()] == [1.0, 0.0, 0.2]
    assert fields["Segment1_Extent"] == "0 -1 0 -1 0 -1"
    # ITK's index (i, j, k) is the array's, and its world is ours with left and posterior turned.
    assert image.GetPixel(1, 2, 0) == 300
    assert image.GetPixel(0, 2, 0) == 0
    place = image.TransformIndexToPhysicalPoint((4, 5, shape[2] - 1))
    np.testing.assert_allclose(np.diag([-1, -1, 1]) @ place, (affine @ [4, 5, shape[2] - 1, 1])[:3], atol=1e-5)


def test_tables_of_viewers_hold_every_label(tmp_path: Path) -> None:
    table = (*label_table(NAMED), Label(value=9, name='a "b"\tc', colour=(1, 2, 3)))
    write_itksnap(tmp_path / "x.label.txt", table)
    rows = [line for line in (tmp_path / "x.label.txt").read_text().splitlines() if not line.startswith("#")]
    pattern = re.compile(r'\s*(\d+)\s+(\d+)\s+(\d+)\s+(\d+)\s+([\d.]+)\s+([01])\s+([01])\s+"([^"]*)"')
    found = [pattern.fullmatch(row) for row in rows]
    assert [(row[1], row[8]) for row in found if row] == [
        ("0", "Clear Label"),
        ("3", "rib"),
        ("7", NAMED.names[0]),
        ("9", "a 'b' c"),
    ]
    write_colour_table(tmp_path / "x.ctbl", table)
    rows = [line for line in (tmp_path / "x.ctbl").read_text().splitlines() if not line.startswith("#")]
    assert rows[1] == "3 rib 53 196 255 255"
    assert all(len(row.split()) == 6 for row in rows)
    write_bids_table(tmp_path / "x_dseg.tsv", table)
    assert (tmp_path / "x_dseg.tsv").read_text().splitlines()[2] == "3\trib\t#35c4ff"
