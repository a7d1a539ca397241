"""What is read from image files, and what is told about those that can't be read."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dpdiff.data import AnomalyDataset, Sample, check, load_image, load_mask

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)


def save(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return path


def noise(path, size=(64, 64), **options):
    return save(path, RNG.integers(0, 256, (*size, 3), dtype=np.uint8), **options)


def test_colour_and_grey_keep_their_values(tmp_path):
    colour = load_image(save(tmp_path / "c.png", COLOURS))
    assert (colour.dtype, colour.shape, colour.is_contiguous()) == (torch.float32, (3, 5, 7), True)
    assert torch.equal(colour, torch.from_numpy(COLOURS).permute(2, 0, 1) / 255)
    grey = load_image(save(tmp_path / "g.bmp", GREY))
    assert torch.equal(grey, (torch.from_numpy(GREY) / 255).expand(3, -1, -1))


def test_modes_of_few_colours(tmp_path):
    for mode in ("1", "P"):
        path = tmp_path / f"{mode}.png"
        Image.fromarray(GREY).convert(mode).save(path)
        expected = np.array(Image.fromarray(GREY).convert(mode).convert("RGB"))
        assert torch.equal(load_image(path), torch.from_numpy(expected).permute(2, 0, 1) / 255)


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "x.jpg")
    assert (load_image(tmp_path / "x.jpg") > 0.98).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_not_cut_to_eight(tmp_path, suffix):
    deep = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)
    read = load_image(save(tmp_path / f"x.{suffix}", deep))
    assert torch.equal(read[0], torch.from_numpy(deep.astype(np.float32) / 65535))
    assert torch.equal(read[0], read[2])
    resized = load_image(tmp_path / f"x.{suffix}", 3)
    assert resized.shape == (3, 3, 3) and 0 < resized.min() < resized.max() < 1


@pytest.mark.parametrize(("scale", "divisor"), [(1, 1), (255, 255)])
def test_floating_point(tmp_path, scale, divisor):
    values = np.linspace(0, scale, 35, dtype=np.float32).reshape(5, 7)
    assert torch.equal(load_image(save(tmp_path / "x.tif", values))[0], torch.from_numpy(values / np.float32(divisor)))


@pytest.mark.parametrize("worst", [300.0, -1.0, float("nan"), float("inf")])
def test_floating_point_out_of_range_is_refused(tmp_path, worst):
    values = np.zeros((5, 7), np.float32)
    values[2, 3] = worst
    with pytest.raises(ValueError, match=r"x\.tif: its values run from"):
        load_image(save(tmp_path / "x.tif", values))


def test_transparency_shows_black(tmp_path):
    pixels = np.full((4, 4, 4), 255, np.uint8)
    pixels[:, :2, 3] = 0  # white there, but not to be seen
    pixels[0, 0, 3] = 51
    read = load_image(save(tmp_path / "x.png", pixels))
    assert (read[:, :, 2:] == 1).all() and (read[:, 1:, :2] == 0).all()
    assert read[:, 0, 0] == pytest.approx(0.2)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    save(tmp_path / "x.png", COLOURS, exif=exif)
    turned = torch.from_numpy(np.rot90(COLOURS, -1).copy()).permute(2, 0, 1) / 255
    assert torch.equal(load_image(tmp_path / "x.png"), turned)


XMP = (
    b'XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="6"/>'
    b"</rdf:RDF></x:xmpmeta>"
)


def turned(path, orientation, kind):
    """An image of 7 x 5 whose metadata say by ``orientation`` how to turn it; `kind` is where they stand."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    if kind == "exif":
        return save(path, COLOURS, exif=exif)
    content = save(path, COLOURS).read_bytes()
    name, data = (b"iTXt", XMP.replace(b"6", b"%d" % orientation)) if "xmp" in kind else (b"eXIf", exif.tobytes()[6:])
    chunk = struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    at = content.index(b"IDAT") - 4 if "before" in kind else len(content) - 12
    path.write_bytes(content[:at] + chunk + content[at:])
    return path


@pytest.mark.parametrize("orientation", [1, 3, 6, 8, 9])
@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        *((suffix, "exif") for suffix in ("jpg", "png", "tif", "webp")),
        *(("png", kind) for kind in ("xmp before pixels", "xmp behind pixels", "exif behind pixels")),
    ],
)
def test_masks_are_to_fit_images_as_they_are_seen(tmp_path, suffix, kind, orientation):
    image = turned(tmp_path / f"x.{suffix}", orientation, kind)
    size = (7, 5) if orientation in (6, 8) else (5, 7)
    assert load_image(image).shape[1:] == size
    masks = [save(tmp_path / f"{h}.png", np.zeros((h, w), np.uint8)) for h, w in (size, size[::-1])]
    problems = [check([Sample(image, "c", "bad", 1, mask)], on_error="skip")[1] for mask in masks]
    assert problems[0] == [] and "but its image" in problems[1][0]


@pytest.mark.parametrize("kind", ["exif", "xmp before pixels"])
def test_metadata_before_the_pixels_need_no_decoding(tmp_path, monkeypatch, kind):
    image = turned(tmp_path / "x.png", 6, kind)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert check([Sample(image, "c")])[1] == []


def test_resizing_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    assert (load_image(save(tmp_path / "x.png", stripes), 16) - 0.5).abs().max() < 0.1  # not all black


def test_masks(tmp_path):
    assert load_mask(save(tmp_path / "class.png", np.array([[0, 1], [3, 0]], np.uint8))).tolist() == [
        [False, True],
        [True, False],
    ]
    colour = np.zeros((1, 3, 4), np.uint8)
    colour[..., 3] = 255  # opaque, which marks nothing
    colour[0, 1, 2] = 9
    assert load_mask(save(tmp_path / "rgba.png", colour)).tolist() == [[False, True, False]]
    square = np.zeros((32, 32), np.uint8)
    square[8:24, 8:24] = 255
    assert load_mask(save(tmp_path / "x.jpg", square, quality=50)).sum() == 256
    assert torch.equal(load_mask(tmp_path / "x.jpg", 8), torch.from_numpy(square[2::4, 2::4] > 0))


@pytest.mark.parametrize("suffix", ["png", "gif", "tif"])
def test_of_masks_with_a_palette_the_colour_counts(tmp_path, suffix):
    for colours, expected in (
        ([255, 255, 255, 0, 0, 0], [True, False]),
        ([0, 0, 0, 128, 0, 0], [False, True]),
        ([0, 0, 0, 0, 0, 0], [False, True]),  # indices of classes alone
    ):
        palette = Image.new("P", (2, 1), 0)
        palette.putpalette(colours)
        palette.putpixel((1, 0), 1)
        palette.save(tmp_path / f"p.{suffix}")
        assert load_mask(tmp_path / f"p.{suffix}").tolist() == [expected]


@pytest.mark.parametrize("indices", [np.arange(4, dtype=np.uint8)[None], np.array([[0, 255]], np.uint8)])
def test_indices_without_a_palette_of_their_own_are_masks(tmp_path, indices):
    image = Image.new("P", indices.shape[::-1])
    image.putdata(indices.flatten().tolist())
    image.save(tmp_path / "p.png")
    assert load_mask(tmp_path / "p.png").tolist() == (indices > 0).tolist()


@pytest.mark.parametrize(
    ("mode", "black", "white"), [("CMYK", (0, 0, 0, 255), (0, 0, 0, 0)), ("YCbCr", (0, 128, 128), (255, 128, 128))]
)
@pytest.mark.parametrize("suffix", ["tif", "jpg"])
def test_masks_in_colours_whose_black_is_not_zero(tmp_path, mode, black, white, suffix):
    image = Image.new(mode, (32, 16), black)
    image.paste(white, (16, 0, 32, 16))
    image.save(tmp_path / f"x.{suffix}")
    marked = load_mask(tmp_path / f"x.{suffix}")
    assert not marked[:, :16].any() and marked[:, 16:].all()


def test_masks_of_a_folder_are_joined(tmp_path):
    for i in range(3):
        save(tmp_path / f"00{i}.png", (np.arange(6).reshape(2, 3) == i).astype(np.uint8) * 254)
    assert load_mask(tmp_path).tolist() == [[True, True, True], [False, False, False]]


def damaged(tmp_path):
    noise(tmp_path / "whole.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not an image")
    for suffix in ("png", "jpg", "bmp", "tif", "webp"):
        content = noise(tmp_path / f"cut.{suffix}").read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(content[: len(content) // 2])
    flipped = bytearray((tmp_path / "whole.png").read_bytes())
    flipped[len(flipped) // 2] ^= 0xFF
    (tmp_path / "flipped.png").write_bytes(flipped)
    return sorted(path for path in tmp_path.iterdir() if path.name != "whole.png")


def test_every_damaged_file_is_found_and_named(tmp_path):
    files = damaged(tmp_path)
    assert len(files) == 8
    for file in [*files, tmp_path / "missing.png"]:
        with pytest.raises(ValueError, match=f"cannot read image .*{file.name}: .+") as error:
            check([Sample(file, "c")])
        assert "\n" not in str(error.value)
        if file.name != "flipped.png":  # Pillow shows it as it is; only its check sum tells
            with pytest.raises(ValueError, match=f"cannot read image .*{file.name}"):
                load_image(file, 32)


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_with_a_thumbnail_is_told_from_its_beginning(tmp_path, progressive):
    """The end marker of the thumbnail in the header isn't that of the image, and image data may lie behind tables."""
    thumbnail = noise(tmp_path / "thumbnail.jpg", (16, 16)).read_bytes()
    exif = Image.Exif().tobytes() + thumbnail
    whole = noise(tmp_path / "x.jpg", exif=exif, progressive=progressive)
    sample, content = Sample(whole, "c"), whole.read_bytes()
    assert check([sample]) == ([sample], [])
    header_end = content.index(thumbnail) + len(thumbnail)
    for end in range(header_end, len(content) - 2, 97):
        whole.write_bytes(content[:end])
        assert check([sample], on_error="skip")[0] == []


def test_jpeg_without_image_data_is_found(tmp_path):
    content = noise(tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes(content[: content.index(b"\xff\xda")] + b"\xff\xd9")
    with pytest.raises(ValueError, match=r"cannot read image .*x\.jpg"):
        check([Sample(tmp_path / "x.jpg", "c")])


def test_whole_jpegs_are_not_decoded_for_the_check(tmp_path, monkeypatch):
    """Thousands of them are checked before training begins."""
    several = {"format": "MPO", "save_all": True, "append_images": [Image.fromarray(COLOURS)]}
    files = [noise(tmp_path / f"{i}.jpg", **o) for i, o in enumerate(({}, {"progressive": True}, several))]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert check([Sample(file, "c") for file in files])[1] == []


def test_damaged_files_are_skipped_by_choice(tmp_path):
    whole = Sample(tmp_path / "whole.png", "c")
    samples = [*(Sample(file, "c") for file in damaged(tmp_path)), whole]
    usable, problems = check(samples, on_error="skip")
    assert usable == [whole]
    assert [sample.image.name in problem for sample, problem in zip(samples, problems)] == [True] * 8
    with pytest.raises(ValueError, match=r"\(and 7 more such files\)$"):
        check(samples)
    with pytest.raises(ValueError, match="on_error"):
        check(samples, on_error="ignore")


@pytest.mark.parametrize("worst", [1020.0, -1.0, float("nan"), 70_000])
def test_values_out_of_range_are_found(tmp_path, worst):
    values = np.zeros((5, 7), np.int32 if type(worst) is int else np.float32)
    good = Sample(save(tmp_path / "good.tif", values), "c")
    values[2, 3] = worst
    bad = Sample(save(tmp_path / "bad.tif", values), "c")
    usable, problems = check([good, bad], on_error="skip")
    assert usable == [good] and "bad.tif: its values run from" in problems[0]
    marked = Sample(good.image, "c", "bad", 1, bad.image)  # of a mask any value will do
    assert check([marked])[1] == []


def test_whole_files_pass_in_every_format(tmp_path):
    files = [noise(tmp_path / f"x.{s}") for s in ("png", "jpg", "bmp", "tif", "webp", "gif", "ppm")]
    (tmp_path / "x.jpg").write_bytes((tmp_path / "x.jpg").read_bytes() + b"\0" * 100)  # cameras pad
    samples = [Sample(file, "c") for file in files]
    assert check(samples) == (samples, [])


def test_mask_of_another_size_is_named_with_both_sizes(tmp_path):
    image, mask = noise(tmp_path / "x.png", (48, 64)), save(tmp_path / "x_mask.png", np.zeros((64, 48), np.uint8))
    with pytest.raises(ValueError, match=r"mask .*x_mask\.png is 48 x 64 but its image .*x\.png is 64 x 48"):
        check([Sample(image, "c", "bad", 1, mask)])


def test_damaged_mask_is_named(tmp_path):
    (tmp_path / "x_mask.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"cannot read mask .*x_mask\.png: it is not an image"):
        check([Sample(noise(tmp_path / "x.png"), "c", "bad", 1, tmp_path / "x_mask.png")])


def test_missing_mask_among_others_is_named(tmp_path):
    image = noise(tmp_path / "x.png", (8, 8))
    marked = Sample(image, "c", "bad", 1, save(tmp_path / "m.png", np.zeros((8, 8), np.uint8)))
    unmarked = Sample(image, "c", "bad", 1)
    assert check([unmarked, Sample(image, "other")])[1] == []  # a category that has no masks at all
    with pytest.raises(ValueError, match="has no mask, but others of category 'c' have one"):
        check([marked, unmarked])


def test_dataset_items_collate(tmp_path):
    image = noise(tmp_path / "x.png", (20, 30))
    marked = np.zeros((20, 30), np.uint8)
    marked[:10] = 1
    samples = [
        Sample(image, "b"),
        Sample(image, "a", "bad", 1, save(tmp_path / "m.png", marked)),
        Sample(image, "a", "bad", 1),
    ]
    batch = next(iter(DataLoader(AnomalyDataset(samples, 16, ["a", "b"]), batch_size=3)))
    assert (batch["image"].shape, batch["image"].dtype) == ((3, 3, 16, 16), torch.float32)
    assert (batch["mask"].shape, batch["mask"].dtype) == ((3, 16, 16), torch.bool)
    assert batch["mask"].flatten(1).sum(1).tolist() == [0, 128, 0]
    assert batch["has_mask"].tolist() == [True, True, False]
    assert batch["label"].tolist() == [0, 1, 1]
    assert batch["category"].tolist() == [1, 0, 0]
    assert batch["path"] == [str(image)] * 3


def test_dataset_refuses_what_it_cannot_number_or_read(tmp_path):
    with pytest.raises(ValueError, match="categories lacks 'b'"):
        AnomalyDataset([Sample(tmp_path / "x.png", "b")], 16, ["a"])
    with pytest.raises(ValueError, match="image_size"):
        AnomalyDataset([], 0)
    with pytest.raises(ValueError, match=r"cannot read image .*x\.png"):
        AnomalyDataset([Sample(tmp_path / "x.png", "b")], 16)[0]
