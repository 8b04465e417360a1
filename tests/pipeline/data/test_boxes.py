"""Boxes as people write them: a CSV, Pascal VOC, ImageNet; in the image that a network sees."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.data.boxes import Box, by_image, placed, read_boxes
from pipeline.data.decode import Geometry
from pipeline.errors import MicrotomeError

XML = """<annotation><folder>f</folder><filename>a.jpg</filename><source><database>{database}</database></source>
<size><width>200</width><height>100</height><depth>3</depth></size>
<object><name>cat</name><pose>Left</pose><bndbox><xmin>1</xmin><ymin>11</ymin><xmax>50</xmax><ymax>20</ymax></bndbox>
<part><name>head</name><bndbox><xmin>9</xmin><ymin>9</ymin><xmax>10</xmax><ymax>10</ymax></bndbox></part></object>
<object><name>dog</name><bndbox><xmax>200</xmax><xmin>100</xmin><ymax>100</ymax><ymin>1</ymin></bndbox></object>
</annotation>"""


def table(folder: Path, text: str) -> Path:
    path = folder / "boxes.csv"
    path.write_text("path,class,xmin,ymin,xmax,ymax\n" + text)
    return path


def refused(call, *said: str) -> None:
    with pytest.raises(MicrotomeError) as error:
        call()
    for each in said:
        assert each in str(error.value)


def test_a_table(tmp_path: Path) -> None:
    first, second = read_boxes(table(tmp_path, "a/b.png,cat,0,1,2.5,3\na/b.png,1,4,5,6,7\n"))
    assert (first.image, first.name, first.edges, first.size) == ("a/b.png", "cat", (0, 1, 2.5, 3), None)
    assert (second.name, second.edges) == ("1", (4, 5, 6, 7))


def test_voc_counts_pixels_from_1_and_imagenet_gives_edges(tmp_path: Path) -> None:
    (tmp_path / "n01").mkdir()
    (tmp_path / "n01" / "a.xml").write_text(XML.format(database="The VOC2007 Database"))
    found = read_boxes(tmp_path)
    assert [(each.image, each.name, each.edges, each.size) for each in found] == [
        ("n01/a", "cat", (0, 10, 50, 20), (100, 200)),
        ("n01/a", "dog", (99, 0, 200, 100), (100, 200)),
    ]
    (tmp_path / "n01" / "a.xml").write_text(XML.format(database="ILSVRC_2014"))
    assert [each.edges for each in read_boxes(tmp_path)] == [(1, 11, 50, 20), (100, 1, 200, 100)]


def test_files_that_are_not_understood(tmp_path: Path) -> None:
    refused(lambda: read_boxes(table(tmp_path, "")), "no boxes")
    refused(lambda: read_boxes(table(tmp_path, "a,cat,0,0,x,3\n")), "line 2", "xmax is 'x'")
    refused(lambda: read_boxes(table(tmp_path, "a,cat,0,0,nan,3\n")), "xmax is 'nan'")
    refused(lambda: read_boxes(table(tmp_path, "a,cat,3,0,3,3\n")), "line 2", "no area")
    refused(lambda: read_boxes(tmp_path / "none.csv"), "cannot read")
    (tmp_path / "empty").mkdir()
    refused(lambda: read_boxes(tmp_path / "empty"), "no XML files")
    file = tmp_path / "empty" / "a.xml"
    file.write_text("<annotation><object><name>cat</name>")
    refused(lambda: read_boxes(file.parent), "a.xml", "cannot be read as XML")
    file.write_text(XML.replace("<name>dog</name>", ""))
    refused(lambda: read_boxes(file.parent), "a.xml", "lacks <name>")
    file.write_text('<!DOCTYPE a [<!ENTITY b "c">]>' + XML)
    refused(lambda: read_boxes(file.parent), "defines entities")


def test_images_are_named_by_paths_or_by_ends_that_are_their_own() -> None:
    def box(image: str, name: str = "cat") -> Box:
        return Box(image, name, (0, 0, 1, 1), None, "line 2")

    ids = ["train/n01/a.JPEG", "train/n01/b.JPEG", "val/n02/b.JPEG", "c.png"]
    classes = ["dog", "cat"]
    for image in ("train/n01/a.JPEG", "train/n01/a", "n01/a.JPEG", "n01/a", "a.JPEG", "a"):
        assert list(by_image([box(image)], ids, classes, {})) == ["train/n01/a.JPEG"], image
    assert by_image([box("c"), box("elsewhere")], ids, classes, {})["c.png"][0][0] == 1
    assert by_image([box("c", "n99")], ids, classes, {"n99": "dog"})["c.png"][0][0] == 0
    refused(lambda: by_image([box("b")], ids, classes, {}), "'b' may be 'train/n01/b.JPEG' or 'val/n02/b.JPEG'")
    refused(lambda: by_image([box("z")], ids, classes, {}), "no box is of an image", "'z'")
    refused(lambda: by_image([box("a", "cats")], ids, classes, {}), "line 2", "'cats' is no class", "nearest: cat")
    refused(lambda: by_image([box("a")], ids, classes, {"cat": "dgo"}), "class_of: 'cat' is 'dgo'", "nearest: dog")


def test_boxes_go_where_their_pixels_go() -> None:
    box = Box("a", "cat", (20, 10, 60, 90), None, "line 2")
    assert placed(box, (100, 200), Geometry()) == (20, 10, 60, 90)
    assert placed(box, (100, 200), Geometry(resize=50)) == (10, 5, 30, 45)
    assert placed(box, (100, 200), Geometry(resize=(100, 100))) == (10, 10, 30, 90)
    # 100 x 50 after the resize, of which the columns 25 to 75 stay.
    assert placed(box, (100, 200), Geometry(resize=50, crop=50)) == (0, 5, 5, 45)
    assert placed(Box("a", "cat", (0, 0, 40, 40), None, ""), (100, 200), Geometry(resize=50, crop=50)) is None


def test_boxes_that_do_not_fit_their_image() -> None:
    outside = Box("a", "cat", (20, 10, 201, 90), None, "line 2")
    refused(lambda: placed(outside, (100, 200), Geometry()), "line 2", "(20, 10, 201, 90) lies outside", "200 x 100")
    other = Box("a", "cat", (20, 10, 60, 90), (200, 100), "a.xml")
    refused(lambda: placed(other, (100, 200), Geometry()), "a.xml", "100 x 200 pixels", "200 x 100")
