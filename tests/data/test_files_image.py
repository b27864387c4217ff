import shutil
import struct
import zlib

import datasets
import numpy as np
import pytest
from PIL import Image

from effjax.data.files import read_data
from effjax.data.image_files import image_data
from effjax.tasks.image import image_task


def picture(path, mode="RGB", size=(5, 4), value=None, **options):
    """One picture of a constant value, ``size`` as (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    depth = len(Image.new(mode, (1, 1)).getbands())
    value = value if value is not None else (7,) * depth if depth > 1 else 7
    Image.new(mode, size, value).save(path, **options)
    return path


def png16(path, values):
    """A PNG of 16 bits per channel, written by hand, for Pillow writes none in colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def folder(path, classes=("cat", "dog"), each=4, **options):
    for number, name in enumerate(classes):
        for index in range(each):
            picture(path / name / f"{index}.png", **({"value": (10 * number, index, 0)} | options))
    return path


def test_class_folders(tmp_path):
    folder(tmp_path / "pets")
    (tmp_path / "pets/cat/.DS_Store").write_bytes(b"x")
    (tmp_path / "pets/notes.txt").write_text("x")
    data = image_data(tmp_path / "pets", split=0.25)
    assert data.classes == ("cat", "dog")
    assert (data.name, data.modality) == ("pets", "image")
    assert data.splits["train"]["image"].shape == (6, 4, 5, 3)
    assert data.splits["test"]["label"].tolist() == [0, 1]
    for columns in data.splits.values():
        assert columns["image"].dtype == np.uint8
        np.testing.assert_array_equal(columns["image"][:, 0, 0, 0], 10 * columns["label"])
    assert data.facts.sizes == "Images of 4 x 5 pixels and 3 channels."
    assert data.facts.classes == {"cat": (3, 1), "dog": (3, 1)}
    assert "Not read: 1 files that are no pictures, such as 'notes.txt'." in data.facts.notes
    task = image_task(data, "mlp")
    assert len(task.test["label"]) == 2


def test_folders_of_splits_nested_and_in_jpeg(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for index in range(count):
            picture(tmp_path / split / "10" / "deep" / f"{index}.jpg", "L")
            picture(tmp_path / split / "9" / f"{index}.JPEG", "L")
    data = image_data(tmp_path)
    assert data.classes == ("9", "10")  # by number
    assert data.facts.rows == {"train": 6, "test": 4}
    assert data.splits["train"]["image"].shape == (6, 4, 5, 1)
    assert data.facts.split == "The rows of 'validation' (4), as stored, are tested on."
    picture(tmp_path / "extra" / "9" / "0.png", "L")
    with pytest.raises(ValueError, match=r"others that are no split, \['extra'\]"):
        image_data(tmp_path)


def test_another_folder_to_test_on(tmp_path):
    data = image_data(folder(tmp_path / "a"), test=folder(tmp_path / "b", each=1))
    assert data.facts.rows == {"train": 8, "test": 2}
    with pytest.raises(ValueError, match=r"classes \['cow'\] do not occur in the training rows"):
        image_data(tmp_path / "a", test=folder(tmp_path / "c", classes=("cat", "cow")))


def test_pictures_of_unlike_sizes(tmp_path):
    folder(tmp_path)
    picture(tmp_path / "cat/wide.png", size=(9, 4))
    with pytest.raises(ValueError, match=r"2 sizes: 4 x 5 \(8\), 4 x 9 \(1\) .*size=\(4, 5\) to resize them all"):
        image_data(tmp_path)
    data = image_data(tmp_path, size=(2, 3))
    assert data.splits["train"]["image"].shape[1:] == (2, 3, 3)
    assert "Every picture was resized to 2 x 3 (bilinear)." in data.facts.notes
    for size in (0, (1, 2, 3), (0, 4), "8x8"):
        with pytest.raises((ValueError, TypeError), match="size="):
            image_data(tmp_path, size=size)


def test_grey_among_colour(tmp_path):
    folder(tmp_path)
    picture(tmp_path / "cat/grey.png", "L")
    with pytest.raises(ValueError, match=r"8 colour, 1 grey. Give channels=3 or channels=1"):
        image_data(tmp_path)
    colour = image_data(tmp_path, channels=3).splits
    images = np.concatenate([colour["train"]["image"], colour["test"]["image"]])
    assert (images == 7).all((1, 2, 3)).sum() == 1  # the grey one
    assert image_data(tmp_path, channels=1).splits["train"]["image"].shape[3] == 1


def test_transparency(tmp_path):
    folder(tmp_path / "opaque", mode="RGBA", value=(1, 2, 3, 255))
    assert image_data(tmp_path / "opaque").splits["train"]["image"][0, 0, 0].tolist() == [1, 2, 3]
    folder(tmp_path / "clear", mode="RGBA", value=(1, 2, 3, 0))
    with pytest.raises(ValueError, match=r"0.png is transparent in places. Give alpha='white', 'black' or 'keep'"):
        image_data(tmp_path / "clear")
    for alpha, pixel in (("white", [255] * 3), ("black", [0] * 3), ("keep", [1, 2, 3, 0])):
        data = image_data(tmp_path / "clear", alpha=alpha)
        assert data.splits["train"]["image"][0, 0, 0].tolist() == pixel
    folder(tmp_path / "palette", mode="P", value=0, transparency=0)
    with pytest.raises(ValueError, match="transparent"):
        image_data(tmp_path / "palette")


def test_16_bits(tmp_path):
    for name in ("a", "b"):
        for index in range(2):
            png16(tmp_path / "grey" / name / f"{index}.png", np.array([[[0], [65535]], [[257], [300]]]))
            png16(tmp_path / "colour" / name / f"{index}.png", np.full((2, 2, 3), 300))
    with pytest.raises(ValueError, match=r"0.png has 16 bits per pixel. Give scale16=True"):
        image_data(tmp_path / "grey")
    images = image_data(tmp_path / "grey", scale16=True).splits["train"]["image"]
    assert images.dtype == np.float32
    np.testing.assert_allclose(images[0, :, :, 0], [[0, 1], [257 / 65535, 300 / 65535]], rtol=1e-6)
    folder(tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"scale16=True, but the pictures have 8 bits. Leave it out"):
        image_data(tmp_path / "narrow", scale16=True)
    with pytest.raises(ValueError, match=r"scale16=True, but the array is uint8, not uint16"):
        image_data(save(tmp_path / "a.npz", np.zeros((4, 2, 2), np.uint8)), scale16=True)
    with pytest.raises(ValueError, match="16 bits per colour, which Pillow cuts to 8"):
        image_data(tmp_path / "colour", scale16=True)


def test_a_photograph_is_turned_as_its_orientation_says(tmp_path):
    for name in ("a", "b"):
        for index in range(2):
            path = tmp_path / name / f"{index}.jpg"
            path.parent.mkdir(exist_ok=True)
            exif = Image.Exif()
            exif[0x0112] = 6  # turn by 90 degrees
            Image.new("RGB", (6, 3)).save(path, exif=exif)
    assert image_data(tmp_path).splits["train"]["image"].shape[1:] == (6, 3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "cat/bad.png").write_bytes(b"no picture"), "bad.png is not a readable picture"),
        (lambda root: picture(root / "loose.png"), "loose.png lies beside the class folders, without a class"),
        (lambda root: picture(root / "cow/0.png"), "class 'cow' has one row only"),
        (lambda root: picture(root / "cat/cmyk.jpg", "CMYK"), "has the colour space CMYK"),
        (
            lambda root: Image.new("L", (5, 4)).save(
                root / "cat/moving.gif", save_all=True, append_images=[Image.new("L", (5, 4), 9)]
            ),
            "moving.gif has 2 frames",
        ),
    ],
)
def test_refused_pictures(tmp_path, change, message):
    change(folder(tmp_path))
    with pytest.raises(ValueError, match=message):
        image_data(tmp_path)


def test_refused_folders(tmp_path):
    with pytest.raises(ValueError, match=r"holds no pictures in class folders .*found nothing"):
        image_data(tmp_path)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"found \['cat'\]. Expected FOLDER/CLASS/picture.png"):
        image_data(tmp_path)
    folder(tmp_path, classes=("cat",))
    with pytest.raises(ValueError, match="every row is of class 'cat'"):
        image_data(tmp_path)
    with pytest.raises(ValueError, match=r"is one picture; give the folder of class folders"):
        image_data(tmp_path / "cat/0.png")
    with pytest.raises(FileNotFoundError, match="is not a file or folder"):
        image_data(tmp_path / "dog")


def save(path, image, label=None, **more):
    label = np.arange(len(image)) % 2 if label is None else label
    np.savez(path, image=image, label=label, **more)
    return path


def test_arrays(tmp_path):
    values = np.arange(8 * 6, dtype=np.uint8).reshape(8, 2, 3)
    data = image_data(save(tmp_path / "a.npz", values, extra=np.zeros(8)), split=0.25)
    together = np.concatenate([data.splits["train"]["image"], data.splits["test"]["image"]])
    assert sorted(together.reshape(8, 6).tolist()) == values.reshape(8, 6).tolist()
    assert data.facts.notes == ("Not read: the columns 'extra'.",)
    np.savez(tmp_path / "b.npz", pictures=values.astype(np.int64), kind=np.array(["x", "y"] * 4))
    data = image_data(tmp_path / "b.npz", image="pictures", label="kind")
    assert data.splits["train"]["image"].dtype == np.uint8
    assert data.classes == ("x", "y")
    floats = image_data(save(tmp_path / "c.npz", np.full((8, 2, 2, 3), 0.5))).splits["train"]["image"]
    assert (floats.dtype, floats.max()) == (np.float32, 0.5)
    scaled = image_data(save(tmp_path / "d.npz", np.full((8, 2, 2), 65535, np.uint16)), scale16=True, channels=3)
    assert (scaled.splits["train"]["image"] == 1).all()
    assert scaled.splits["train"]["image"].shape[1:] == (2, 2, 3)
    assert image_data(tmp_path / "a.npz", size=(4, 4)).splits["train"]["image"].shape[1:] == (4, 4, 1)


def test_arrays_as_keras_saves_them(tmp_path):
    arrays = {
        "x_train": np.zeros((6, 2, 2), np.uint8),
        "y_train": np.array([[0], [1]] * 3),
        "x_test": np.ones((2, 2, 2), np.uint8),
        "y_test": np.array([[1], [0]]),
    }
    np.savez(tmp_path / "mnist.npz", **arrays)
    data = image_data(tmp_path / "mnist.npz")
    assert data.facts.rows == {"train": 6, "test": 2}
    assert data.splits["test"]["label"].tolist() == [1, 0]
    np.savez(tmp_path / "more.npz", **arrays, x_extra=np.zeros(3))
    with pytest.raises(ValueError, match=r"'x_extra'.* must hold exactly"):
        image_data(tmp_path / "more.npz")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 2, 2), np.uint16), r"uint16 from 0 to 0; expected 0\.\.255\. Give scale16=True"),
        (np.full((4, 2, 2), 256), r"int64 from 256 to 256; expected 0\.\.255"),
        (np.full((4, 2, 2), -1), r"from -1 to -1; expected 0\.\.255"),
        (np.full((4, 2, 2), 255.0), r"floats from 255 to 255; expected \[0, 1\]\. Divide 0\.\.255 by 255"),
        (np.full((4, 2, 2), np.nan), "floats from nan to nan"),
        (np.zeros((4, 3, 8, 8), np.uint8), r"Channels come last: array\.transpose\(0, 2, 3, 1\)"),
        (np.zeros((4, 9), np.uint8), r"has shape \[4, 9\]; expected \[n, height, width\]"),
        (np.zeros((4, 2, 2, 4), np.uint8), "its 4 channels hold transparency. Give alpha='keep'"),
        (np.zeros((4, 0, 2), np.uint8), "no pixels"),
        (np.array([None] * 4), "Pickled objects are never loaded"),
    ],
)
def test_refused_arrays(tmp_path, image, message):
    with pytest.raises(ValueError, match=message):
        image_data(save(tmp_path / "a.npz", image))


def test_refused_names(tmp_path):
    with pytest.raises(ValueError, match=r"image='pic' is not a column of .* It has: 'image', 'label'"):
        image_data(save(tmp_path / "a.npz", np.zeros((4, 2, 2), np.uint8)), image="pic")
    with pytest.raises(ValueError, match=r"columns differ in length: {'image': 4, 'label': 3}"):
        image_data(save(tmp_path / "a.npz", np.zeros((4, 2, 2), np.uint8), np.zeros(3)))


def test_a_table_of_paths(tmp_path):
    folder(tmp_path)
    rows = [f"{name}/{index}.png,{name}" for name in ("cat", "dog") for index in range(4)]
    (tmp_path / "list.csv").write_text("\n".join(["file_name,label", *rows]))
    by_table, by_folder = image_data(tmp_path / "list.csv", split=0.25), image_data(tmp_path, split=0.25)
    for name, columns in by_folder.splits.items():
        np.testing.assert_array_equal(by_table.splits[name]["image"], columns["image"])
    assert by_table.facts.fingerprint == by_folder.facts.fingerprint
    (tmp_path / "list.csv").write_text("\n".join(["file_name,label", "cat/none.png,cat", *rows]))
    with pytest.raises(ValueError, match=r"none.png is not a readable picture .*No such file"):
        image_data(tmp_path / "list.csv")


def test_a_saved_data_set_of_pictures(tmp_path):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    images = [Image.new("RGB", (5, 4), (index, 0, 0)) for index in range(8)]
    rows = datasets.Dataset.from_dict({"img": images, "label": [0, 1] * 4}, features=features)
    rows.save_to_disk(tmp_path / "saved")
    rows.to_parquet(tmp_path / "pets.parquet")
    # Copies of a hub's set hold its Parquet files in a folder, beside its card.
    for folder in ("copy/data", "flat"):
        (tmp_path / folder).mkdir(parents=True)
        for number in (0, 1):
            shard = rows.shard(2, number, contiguous=True)
            shard.to_parquet(tmp_path / folder / f"train-0000{number}-of-00002.parquet")
    (tmp_path / "copy/README.md").write_text("---\n")
    wanted = read_data("image", tmp_path / "saved", image="img")
    assert wanted.facts.rows == {"train": 6, "test": 2}
    for path in ("saved", "pets.parquet", "copy", "flat"):
        data = read_data("image", tmp_path / path, image="img")
        assert data.classes == ("cat", "dog")
        assert data.facts.fingerprint == wanted.facts.fingerprint
        for columns in data.splits.values():
            np.testing.assert_array_equal(columns["image"][:, 0, 0, 0] % 2, columns["label"])
    shutil.copytree(tmp_path / "copy/data", tmp_path / "copy/other")
    with pytest.raises(ValueError, match=r"copy: holds several sets, \['data', 'other'\]. Give the folder of one"):
        image_data(tmp_path / "copy")


def test_labels_of_one_column_too_many_say_which(tmp_path):
    np.savez(tmp_path / "a.npz", image=np.zeros((12, 4, 4), np.uint8), label=np.zeros((12, 1), int))
    with pytest.raises(ValueError, match=r"has shape \(12, 1\); expected one label per row\. Give its column 0\."):
        image_data(tmp_path / "a.npz")


def test_minus_one_beside_three_classes_or_more_is_no_class(tmp_path):
    save = lambda labels: np.savez(tmp_path / "a.npz", image=np.zeros((12, 4, 4), np.uint8), label=labels)
    save(np.arange(12) % 4 - 1)
    with pytest.raises(
        ValueError, match=r"3 rows \(0, 4, 8; .*\) with -1, which beside the classes 0 to 2 means unknown"
    ):
        image_data(tmp_path / "a.npz")
    for classes in ((-1, 1), (-1, 0, 1), (-2, -1, 0, 1)):
        save(np.resize(classes, 12))
        assert image_data(tmp_path / "a.npz").classes == tuple(map(str, classes))
