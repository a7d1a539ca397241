"""Every layout, as tiny trees with the files and names that the data sets really have."""

import pytest
from trees import described, image, mask

from dpdiff.data import scan, walk_images


@pytest.fixture
def mvtec(tmp_path):
    for category in ("screw", "bottle"):
        for i in (10, 2, 1):
            image(tmp_path / category / "train" / "good" / f"{i}.png")
        image(tmp_path / category / "test" / "good" / "000.png")
        image(tmp_path / category / "test" / "broken_large" / "000.png")
        mask(tmp_path / category / "ground_truth" / "broken_large" / "000_mask.png")
    (tmp_path / "license.txt").write_text("x")
    return tmp_path


def test_mvtec(mvtec):
    found = scan(mvtec)
    assert found.categories == ["bottle", "screw"]
    assert described(found.train, mvtec)[:3] == [
        (f"bottle/train/good/{i}.png", "bottle", "good", 0, None) for i in (1, 2, 10)
    ]
    assert described(found.test, mvtec)[2:] == [
        (
            "screw/test/broken_large/000.png",
            "screw",
            "broken_large",
            1,
            "screw/ground_truth/broken_large/000_mask.png",
        ),
        ("screw/test/good/000.png", "screw", "good", 0, None),
    ]


def test_names_of_folders_are_known_in_any_case(tmp_path):
    category = tmp_path / "bottle"
    image(category / "Train" / "Good" / "0.png")
    image(category / "TEST" / "Good" / "0.png")
    image(category / "TEST" / "broken" / "0.png")
    marked = mask(category / "Ground_Truth" / "Broken" / "0_mask.png")
    found = scan(tmp_path, need="train")
    assert [s.image.parent.parent.name for s in found.train] == ["Train"]
    assert [(s.kind, s.label, s.mask) for s in found.test] == [("broken", 1, marked), ("good", 0, None)]


def test_of_two_cases_of_a_name_the_usual_one_is_taken(mvtec):
    image(mvtec / "bottle" / "Train" / "good" / "0.png")
    image(mvtec / "bottle" / "Ground_Truth" / "broken_large" / "000_mask.png")
    found = scan(mvtec / "bottle")
    assert {s.image.parent.parent.name for s in found.train} == {"train"}
    assert found.test[0].mask == mvtec / "bottle" / "ground_truth" / "broken_large" / "000_mask.png"


def test_one_category_alone(mvtec):
    found = scan(mvtec / "bottle")
    assert found.categories == ["bottle"]
    assert (len(found.train), len(found.test)) == (3, 2)


def test_every_image_format_and_no_other_file(tmp_path):
    good = tmp_path / "c" / "train" / "good"
    for name in ("a.PNG", "b.jpeg", "c.bmp", "d.tif", "e.webp", "f.ppm", "g.gif"):
        image(good / name)
    for name in ("notes.txt", ".hidden.png", "._a.PNG", "Thumbs.db", "meta.json"):
        (good / name).write_bytes(b"x")
    image(good / "deeper" / "z.png")
    assert [s.image.name for s in scan(tmp_path).train] == ["a.PNG", "b.jpeg", "c.bmp", "d.tif", "z.png", "e.webp",
                                                           "f.ppm", "g.gif"]  # fmt: skip


def test_category_without_ground_truth_has_no_masks(mvtec):
    image(mvtec / "solar" / "train" / "good" / "0.png")
    image(mvtec / "solar" / "test" / "bad" / "0.png")
    assert [s.mask for s in scan(mvtec).test if s.category == "solar"] == [None]


def test_visa_converted(tmp_path):
    image(tmp_path / "1cls" / "candle" / "train" / "good" / "0000.JPG")
    image(tmp_path / "1cls" / "candle" / "test" / "bad" / "000.JPG")
    mask(tmp_path / "1cls" / "candle" / "ground_truth" / "bad" / "000.png")
    found = scan(tmp_path)
    assert found.categories == ["candle"]
    assert found.test[0].mask == tmp_path / "1cls" / "candle" / "ground_truth" / "bad" / "000.png"


def test_btad(tmp_path):
    image(tmp_path / "01" / "train" / "ok" / "0000.bmp")
    image(tmp_path / "01" / "test" / "ok" / "0000.bmp")
    image(tmp_path / "01" / "test" / "ko" / "0001.bmp")
    mask(tmp_path / "01" / "ground_truth" / "ko" / "0001.png")
    found = scan(tmp_path)
    assert described(found.test, tmp_path) == [
        ("01/test/ko/0001.bmp", "01", "ko", 1, "01/ground_truth/ko/0001.png"),
        ("01/test/ok/0000.bmp", "01", "good", 0, None),
    ]
    assert len(found.train) == 1


def test_mvtec_loco_has_a_folder_of_masks_per_image(tmp_path):
    category = tmp_path / "pushpins"
    image(category / "train" / "good" / "000.png")
    image(category / "validation" / "good" / "000.png")
    for kind in ("logical_anomalies", "structural_anomalies"):
        image(category / "test" / kind / "000.png")
        for i in range(2):
            mask(category / "ground_truth" / kind / "000" / f"00{i}.png")
    found = scan(tmp_path)
    assert len(found.train) == 1
    assert [s.mask for s in found.test] == [
        category / "ground_truth" / kind / "000" for kind in ("logical_anomalies", "structural_anomalies")
    ]


def test_mvtec_ad_2(tmp_path):
    category = tmp_path / "vial"
    image(category / "train" / "good" / "000_regular.png")
    image(category / "validation" / "good" / "000_regular.png")
    image(category / "test_public" / "good" / "000_regular.png")
    image(category / "test_public" / "bad" / "001_overexposed.png")
    mask(category / "test_public" / "ground_truth" / "bad" / "001_overexposed_mask.png")
    image(category / "test_private" / "000_regular.png")
    found = scan(tmp_path)
    assert described(found.test, category) == [
        ("test_public/bad/001_overexposed.png", "vial", "bad", 1,
         "test_public/ground_truth/bad/001_overexposed_mask.png"),
        ("test_public/good/000_regular.png", "vial", "good", 0, None),
    ]  # fmt: skip
    assert len(found.train) == 1


def test_mpdd(tmp_path):
    """Metal parts: as MVTec AD, with kinds of defect that differ between categories."""
    for category, kind in (("bracket_black", "hole"), ("connector", "parts_mismatch")):
        image(tmp_path / category / "train" / "good" / "000.png")
        image(tmp_path / category / "test" / "good" / "000.png")
        image(tmp_path / category / "test" / kind / "000.png")
        mask(tmp_path / category / "ground_truth" / kind / "000_mask.png")
    found = scan(tmp_path)
    assert found.categories == ["bracket_black", "connector"]
    assert [(s.category, s.kind, s.label, s.mask is None) for s in found.test] == [
        ("bracket_black", "good", 0, True),
        ("bracket_black", "hole", 1, False),
        ("connector", "good", 0, True),
        ("connector", "parts_mismatch", 1, False),
    ]


def test_bmad(tmp_path):
    brain = tmp_path / "Brain_AD"
    image(brain / "train" / "good" / "00003_60.png")
    image(brain / "valid" / "Ungood" / "img" / "1.png")
    image(brain / "test" / "good" / "img" / "00000_96.png")
    image(brain / "test" / "Ungood" / "img" / "00002_60.png")
    mask(brain / "test" / "Ungood" / "label" / "00002_60.png")
    assert described(scan(tmp_path).test, brain) == [
        ("test/good/img/00000_96.png", "Brain_AD", "good", 0, None),
        ("test/Ungood/img/00002_60.png", "Brain_AD", "Ungood", 1, "test/Ungood/label/00002_60.png"),
    ]


def test_manta_names_categories_by_their_domain(tmp_path):
    for category in ("agriculture/maize", "mechanics/nut"):
        image(tmp_path / category / "train" / "good" / "0.png")
        image(tmp_path / category / "test" / "ano" / "1.png")
        mask(tmp_path / category / "ground_truth" / "ano" / "1.png")
    found = scan(tmp_path)
    assert found.categories == ["agriculture/maize", "mechanics/nut"]
    assert all(s.mask for s in found.test)


def test_plain_folders(tmp_path):
    flat = tmp_path / "flat"
    image(flat / "2.png")
    image(flat / "10.png")
    found = scan(flat)
    assert found.categories == ["flat"]
    assert [s.image.name for s in found.train] == ["2.png", "10.png"]
    assert found.test == []

    nested = tmp_path / "nested"
    image(nested / "cat" / "a.png")
    image(nested / "dog" / "deep" / "b.png")
    found = scan(nested)
    assert [(s.category, s.kind, s.label) for s in found.train] == [("cat", "good", 0), ("dog", "good", 0)]
    image(nested / "train" / "c.png")  # a class of CIFAR-100
    assert scan(nested).categories == ["cat", "dog", "train"]
    image(nested / "loose.png")
    assert scan(nested).categories == ["cat", "dog", "nested", "train"]


@pytest.mark.parametrize(
    "name", ["NG", "ng", "bad", "Anomaly", "Masks", "ground_truth", "defects", "Defective", "defect_1"]
)
@pytest.mark.parametrize("place", ["{}", "audiojack/{}", "{}/deep"])
def test_a_folder_of_defects_or_masks_is_not_taken_for_good_images(tmp_path, name, place):
    image(tmp_path / "root" / "OK" / "0.png")
    folder = image(tmp_path / "root" / place.format(name) / "0.png").parent
    with pytest.raises(
        ValueError, match=rf"^{folder} seems to hold defective images or masks: expected the folder that"
    ):
        scan(tmp_path / "root")


def test_names_that_only_resemble_those_of_defects_are_plain(tmp_path):
    names = ["defect-free", "defect_free", "mask", "rings", "ngk", "badge", "good", "normal"]
    for name in names:
        image(tmp_path / "NG" / name / "0.png")  # nor does it matter what the folder that is given is called
    assert scan(tmp_path / "NG", need="train").categories == sorted(names)


def test_parts_of_a_data_set_that_hold_defects_are_not_taken_for_good_images(mvtec):
    with pytest.raises(
        ValueError, match=rf"^{mvtec}/bottle/test/broken_large may hold .*, as {mvtec}/bottle/ground_truth"
    ):
        scan(mvtec / "bottle" / "test")
    for root in ("train", "train/good", "test/good"):
        assert scan(mvtec / "bottle" / root, need="train").train


def test_order_is_that_of_names_not_of_the_disk(tmp_path):
    for name in ("b10", "B2", "a", "b1"):
        image(tmp_path / f"{name}.png")
    assert [s.image.stem for s in scan(tmp_path).train] == ["a", "b1", "B2", "b10"]


@pytest.mark.parametrize("categories", [[""], ["cat", "dog"]])
@pytest.mark.parametrize("test", ["test", "test_public"])
def test_split_without_kinds_is_trained_on_its_train_images_alone(tmp_path, categories, test):
    root = tmp_path / "pets"
    for category in categories:
        image(root / category / "train" / "0.png")
        image(root / category / test / "1.png")
    found = scan(root, need="train")
    assert found.categories == [category or "pets" for category in categories]
    assert [s.image for s in found.train] == [root / category / "train" / "0.png" for category in categories]
    assert found.test == []


@pytest.mark.parametrize("need", ["test", None])
@pytest.mark.parametrize("train", ["train", "train/good"])
def test_test_images_without_kinds_are_not_taken_for_good_or_defective(tmp_path, train, need):
    image(tmp_path / train / "0.png")
    image(tmp_path / "test" / "1.png")
    with pytest.raises(ValueError, match=r"lie loose in .*/test: expected test/good/\* and test/<kind>/\*"):
        scan(tmp_path, need=need)


def test_test_images_are_not_trained_on_for_want_of_others(tmp_path):
    image(tmp_path / "test" / "1.png")
    image(tmp_path / "train" / "batch" / "0.png")
    with pytest.raises(ValueError, match="no training images"):
        scan(tmp_path, need="train")


def test_a_folder_called_test_alone_is_plain(tmp_path):
    """LSUN's crops are distributed so."""
    image(tmp_path / "LSUN" / "test" / "0.png")
    assert len(scan(tmp_path / "LSUN").train) == 1


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    image(tmp_path / "elsewhere" / "0.png")
    root = tmp_path / "root"
    image(root / "a" / "0.png")
    for name in ("b", "c"):
        (root / name).symlink_to(tmp_path / "elsewhere")
    expected = [root / name / "0.png" for name in "abc"]
    assert list(walk_images(root)) == expected
    (root / "a" / "up").symlink_to("..")
    (root / "self").symlink_to("self")
    (root / "here").symlink_to(root)
    (tmp_path / "elsewhere" / "around").symlink_to(root / "b")
    assert list(walk_images(root)) == expected
    found = scan(root, need="train")
    assert [sample.image for sample in found.train] == expected and found.categories == ["a", "b", "c"]


def test_link_back_makes_no_categories(mvtec):
    (mvtec / "all").symlink_to(mvtec)
    (mvtec / "bottle" / "train" / "good" / "all").symlink_to(mvtec)
    found = scan(mvtec, need="train")
    assert found.categories == ["bottle", "screw"]
    assert len(found.train) == 6


@pytest.mark.parametrize("need", ["test", None])
def test_masks_that_fit_no_image_of_their_kind_are_named(mvtec, need):
    marked = mvtec / "screw" / "ground_truth" / "broken_large" / "000_mask.png"
    other = marked.rename(marked.with_name("000_gt.png"))
    expected = r"broken_large: expected a name like 000_mask\.\* or 000\.\*$"
    with pytest.raises(ValueError, match=rf"^mask {other} matches no image in .*/screw/test/{expected}"):
        scan(mvtec, need=need)
    assert len(scan(mvtec, need="train").train) == 6
    mask(marked)  # one that fits is enough: `check` tells which images lack one
    assert scan(mvtec, need=need).test


def test_what_is_no_data_set_is_refused_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        scan(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a file"):
        scan(image(tmp_path / "file" / "x.png"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        scan(tmp_path / "empty")
    with pytest.raises(ValueError, match="layout is 'imagenet': expected one of auto, mvtec"):
        scan(tmp_path, layout="imagenet")
    for layout in ("visa", "real-iad"):
        with pytest.raises(FileNotFoundError, match="lacks"):
            scan(tmp_path, layout=layout)


def test_category_without_training_images_is_named(mvtec):
    (mvtec / "zipper" / "train" / "good").mkdir(parents=True)
    assert scan(mvtec).categories == ["bottle", "screw", "zipper"]
    with pytest.raises(ValueError, match=r"category 'zipper' of .* has no training images$"):
        scan(mvtec, need="train")
    (mvtec / "cable" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"category 'cable' .* no training images \(and 1 more"):
        scan(mvtec, need="train")
    assert scan(mvtec, need="test").test


def test_empty_first_level_folder_of_a_plain_folder_is_named(tmp_path):
    image(tmp_path / "a" / "0.png")
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="category 'b'"):
        scan(tmp_path, need="train")


def test_folder_of_other_files_in_a_plain_folder_is_passed_by(tmp_path):
    image(tmp_path / "a" / "0.png")
    for file in ("notes/notes.txt", "docs/deep/list.csv"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    assert scan(tmp_path, need="train").categories == ["a"]


def test_need_of_test_images(tmp_path):
    image(tmp_path / "c" / "train" / "good" / "0.png")
    with pytest.raises(ValueError, match="no test image"):
        scan(tmp_path, need="test")
    image(tmp_path / "d" / "test" / "good" / "0.png")  # a category to test on alone
    assert len(scan(tmp_path, need="test").test) == 1
    with pytest.raises(ValueError, match="need is 'all': expected 'train'"):
        scan(tmp_path, need="all")
