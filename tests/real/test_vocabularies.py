"""The vocabularies of ADE20K as class lists, from where they lie."""

from pipeline.data.label_maps import read_class_list


def test_ade20k(beside_data):
    objects = read_class_list(beside_data / "data/vocab/ade20k_objectInfo150.csv").concepts()
    assert list(objects) == list(range(1, 151))
    assert (objects[1], objects[2], objects[150]) == ("wall", "building", "flag")
    assert sorted(name for name in objects.values() if ";" in name) == [
        "screen;door;screen",
        "screen;silver;screen;projection;screen",
    ]
    parts = read_class_list(beside_data / "data/vocab/ade20k_partInfo36.txt").concepts()
    assert len(parts) == 36
    assert (parts[1], parts[14], parts[36]) == ("person head", "sofa back pillow", "bed other")
