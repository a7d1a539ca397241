"""Data sets whose lists say what is trained on, as tiny trees with the files and names that they really have."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from trees import described, image, mask

from dpdiff.data import scan


def visa_original(root: Path) -> Path:
    rows = []
    for i, split in enumerate(("train", "train", "test")):
        path = f"pcb1/Data/Images/Normal/000{i}.JPG"
        image(root / path)
        rows.append(("pcb1", split, "normal", path, ""))
    image(root / "pcb1/Data/Images/Anomaly/000.JPG")
    mask(root / "pcb1/Data/Masks/Anomaly/000.png")
    rows.append(("pcb1", "test", "anomaly", "pcb1/Data/Images/Anomaly/000.JPG", "pcb1/Data/Masks/Anomaly/000.png"))
    (root / "split_csv").mkdir()
    with (root / "split_csv" / "1cls.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("object", "split", "label", "image", "mask"), *rows])
    return root


def test_visa_as_published(tmp_path):
    found = scan(visa_original(tmp_path))
    assert found.categories == ["pcb1"]
    assert [s.image.name for s in found.train] == ["0000.JPG", "0001.JPG"]
    assert described(found.test, tmp_path) == [
        ("pcb1/Data/Images/Normal/0002.JPG", "pcb1", "good", 0, None),
        ("pcb1/Data/Images/Anomaly/000.JPG", "pcb1", "anomaly", 1, "pcb1/Data/Masks/Anomaly/000.png"),
    ]


def test_visa_without_its_split_is_not_taken_for_good_images(tmp_path):
    (visa_original(tmp_path) / "split_csv" / "1cls.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks split_csv/1cls\.csv"):
        scan(tmp_path)


def test_a_row_of_visa_without_all_columns_is_named(tmp_path):
    split = visa_original(tmp_path) / "split_csv" / "1cls.csv"
    with split.open("a") as file:
        file.write("pcb1,train\n")
    with pytest.raises(ValueError, match=r"1cls\.csv, line 6, lacks columns: expected object, split, label"):
        scan(tmp_path)


def test_the_folders_around_and_in_visa_are_not_taken_for_good_images(tmp_path):
    visa = visa_original(tmp_path / "data" / "VisA")
    for root in (visa / "pcb1", tmp_path / "data"):
        with pytest.raises(
            FileNotFoundError, match=rf"{root} lacks split_csv/1cls\.csv, .*; give {visa}, which has it$"
        ):
            scan(root)
    (visa / "split_csv" / "1cls.csv").unlink()
    for root in (visa / "pcb1", tmp_path / "data"):
        with pytest.raises(FileNotFoundError, match=r"lacks split_csv/1cls\.csv, which says what to train on$"):
            scan(root)


def test_images_in_folders_named_as_those_of_visa_may_all_be_good(tmp_path):
    image(tmp_path / "site" / "Data" / "Images" / "0.png")
    assert scan(tmp_path, need="train").categories == ["site"]


def real_iad(root: Path, lists: str, images: str, category: str = "audiojack") -> Path:
    good = [f"OK/S000{i}/{category}_000{i}_OK_C1_2023.jpg" for i in range(3)]
    bad = f"NG/QS/S0001/{category}_0001_NG_QS_C1_2023"
    unseen = f"NG/QS/S0001/{category}_0001_NG_QS_C2_2023.jpg"
    for path in (*good, bad + ".jpg", unseen):
        image(root / images / category / path)
    mask(root / images / category / f"{bad}.png")

    def entry(path, kind="OK", marked=None):
        return {"category": category, "anomaly_class": kind, "image_path": path, "mask_path": marked}

    content = {
        "meta": {"normal_class": "OK", "prefix": f"{category}/"},
        "train": [entry(good[0]), entry(good[1])],
        "test": [entry(good[2]), entry(bad + ".jpg", "QS", bad + ".png"), entry(unseen, "QS")],
    }
    for variant in (lists, f"{lists}_sv"):
        file = root / "realiad_jsons" / variant / f"{category}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        # The single-view lists beside them must not be the ones that are read.
        file.write_text(json.dumps(content if variant == lists else content | {"train": []}))
    return root


@pytest.mark.parametrize(
    ("lists", "images"),
    [
        ("realiad_jsons", "realiad_1024"),
        (".", "realiad_512"),
        ("Real-IAD_Variety_jsons", "realiadvariety_raw/audiojack"),
    ],
)
def test_real_iad(tmp_path, lists, images):
    found = scan(real_iad(tmp_path, lists, images))
    assert found.categories == ["audiojack"]
    assert [s.image.parent.name for s in found.train] == ["S0000", "S0001"]
    assert [(s.image.stem.split("_", 1)[1], s.kind, s.label, s.mask is None) for s in found.test] == [
        ("0001_NG_QS_C2_2023", "good", 0, True),  # the view that doesn't show the defect
        ("0002_OK_C1_2023", "good", 0, True),
        ("0001_NG_QS_C1_2023", "QS", 1, False),
    ]
    assert found.test[-1].mask.is_file()


def test_real_iad_takes_the_largest_resolution(tmp_path):
    for images in ("realiad_256", "realiad_1024", "realiad_512"):
        real_iad(tmp_path, "realiad_jsons", images)
    assert all("realiad_1024" in s.image.parts for s in scan(tmp_path).train)


def test_real_iad_refuses_paths_that_lead_outside(tmp_path):
    file = real_iad(tmp_path, "realiad_jsons", "realiad_1024") / "realiad_jsons" / "realiad_jsons" / "audiojack.json"
    content = json.loads(file.read_text())
    content["test"][0]["image_path"] = "../../../secret.jpg"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="lies outside"):
        scan(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"train": []}', '{"train": [{}], "test": []}'])
def test_real_iad_list_that_is_none_is_named(tmp_path, content):
    file = real_iad(tmp_path, "realiad_jsons", "realiad_1024") / "realiad_jsons" / "realiad_jsons" / "audiojack.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"audiojack\.json is not a Real-IAD list"):
        scan(tmp_path)


def test_real_iad_without_its_lists_is_not_taken_for_good_images(tmp_path):
    shutil.rmtree(real_iad(tmp_path, "realiad_jsons", "realiad_1024") / "realiad_jsons")
    with pytest.raises(ValueError, match="audiojack/NG/QS/S0001 seems to hold defective images"):
        scan(tmp_path / "realiad_1024")


def test_json_files_of_other_kinds_do_not_make_real_iad(tmp_path):
    image(tmp_path / "cat" / "0.png")
    for content in ('{"images": [], "annotations": []}', "[]", "{", "\x00"):
        (tmp_path / "json").mkdir(exist_ok=True)
        (tmp_path / "json" / "annotations.json").write_text(content)
        assert scan(tmp_path, need="train").categories == ["cat"]
