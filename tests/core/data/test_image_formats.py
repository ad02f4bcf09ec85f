"""Hold-outs in the formats that they are published in, read a batch at a time, and what does not fit the model."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import ExifTags, Image, ImageOps, features
from pyarrow import parquet
from scipy.io import savemat

from nayer_edge.config import Fit, InputSpec
from nayer_edge.data.datasets import load, open_images
from nayer_edge.data.pictures import Mismatches, decode
from nayer_edge.data.stream import ImageStream
from nayer_edge.data.torchvision_formats import CIFAR_FILES
from nayer_edge.errors import UsageError, hidden_memory_error

GREY = InputSpec(channels=1, height=28, width=28)
COLOUR = InputSpec(channels=3, height=32, width=32)
PART = {"holdout": "test", "train": "train"}
TEN = tuple(str(number) for number in range(10))


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def opened(path: Path, spec: InputSpec = COLOUR, classes: tuple[str, ...] = TEN, fit: Fit = "exact") -> ImageStream:
    return open_images(str(path), "holdout", spec, classes, fit)


def whole(stream: ImageStream, size: int = 3) -> np.ndarray:
    batches = list(stream.batches(size))
    assert all(len(batch) <= size for batch in batches)
    assert all(batch.dtype == np.uint8 for batch in batches)
    return np.concatenate(batches)


def refused(path: Path, spec: InputSpec = COLOUR, classes: tuple[str, ...] = TEN, fit: Fit = "exact") -> UsageError:
    with pytest.raises(UsageError) as caught:
        whole(opened(path, spec, classes, fit))
    assert caught.value.fix, "an error says what to type or change next"
    return caught.value


# ------------------------------------------------------------------ torchvision's formats


def idx(images: np.ndarray) -> bytes:
    """The published format: a zero word, the type 8 (unsigned bytes), the number of dimensions, sizes, data."""
    head = bytes((0, 0, 8, images.ndim)) + b"".join(size.to_bytes(4, "big") for size in images.shape)
    return head + images.tobytes()


def write_mnist(folder: Path, images: np.ndarray, labels: np.ndarray, part: str = "t10k") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        (folder / f"{part}-{name}-ubyte").write_bytes(idx(array))


@pytest.mark.parametrize("place", ["root", "set", "raw", "file"])
def test_mnist(tmp_path: Path, place: str) -> None:
    images, labels = pixels(7, 28, 28), np.arange(7, dtype=np.uint8)
    raw = tmp_path / "FashionMNIST" / "raw"
    write_mnist(raw, images, labels)
    write_mnist(raw, images[:2], labels[:2], "train")
    path = {
        "root": tmp_path,
        "set": tmp_path / "FashionMNIST",
        "raw": raw,
        "file": raw / "t10k-images-idx3-ubyte",
    }[place]
    stream = opened(path, GREY)
    assert stream.labels.tolist() == labels.tolist()
    assert stream.name == "t10k-images-idx3-ubyte"
    assert (whole(stream)[:, 0] == images).all()
    assert (whole(stream)[:, 0] == images).all(), "a stream is read as often as one likes"
    assert len(load(str(raw), "train", GREY, TEN)) == 2


@pytest.mark.parametrize(
    ("part", "split"),
    [
        ("emnist-digits-train", "train"),
        ("emnist-digits-test", "test"),
        ("t10k", "test"),
        ("train", "train"),
        ("mine", None),
    ],
)
def test_the_split_of_an_idx_file_is_in_its_name(tmp_path: Path, part: str, split: str | None) -> None:
    write_mnist(tmp_path, pixels(4, 28, 28), np.arange(4, dtype=np.uint8), part)
    file, grey = str(tmp_path / f"{part}-images-idx3-ubyte"), InputSpec(channels=1, height=28, width=28)
    assert open_images(file, "holdout", grey, TEN, "exact").split == split
    if split is not None:
        assert open_images(file, "holdout", grey, TEN, "exact", split).split == split
    with pytest.raises(UsageError):
        open_images(file, "holdout", grey, TEN, "exact", "validation")


def test_compressed_mnist_says_how_to_unpack_it(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    write_mnist(raw, pixels(3, 28, 28), np.arange(3, dtype=np.uint8))
    for path in list(raw.iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert len(opened(tmp_path, GREY)) == 3, "torchvision keeps what it downloaded beside what it unpacked"
    for path in raw.glob("*-ubyte"):
        path.unlink()
    for place in (tmp_path, raw, raw / "t10k-images-idx3-ubyte.gz"):
        error = refused(place, GREY)
        assert "is compressed" in error.what
        assert error.fix.startswith(f"Type: gunzip -k {raw}/t10k-images-idx3-ubyte.gz {raw}/t10k-labels-idx1-ubyte.gz")


def test_two_sets_in_one_root_are_not_guessed_between(tmp_path: Path) -> None:
    for name in ("MNIST", "KMNIST"):
        write_mnist(tmp_path / name / "raw", pixels(2, 28, 28), np.zeros(2, np.uint8))
    assert "2 data sets" in refused(tmp_path, GREY).what


def test_damaged_mnist(tmp_path: Path) -> None:
    write_mnist(tmp_path, pixels(4, 28, 28), np.zeros(4, np.uint8))
    images, labels = tmp_path / "t10k-images-idx3-ubyte", tmp_path / "t10k-labels-idx1-ubyte"
    good = images.read_bytes()
    # 751,066 × 4,116,241 × 5,966,791 is 2^64 + 3,030: torch's count of elements overflows to what the file holds.
    overflowing = b"".join(size.to_bytes(4, "big") for size in (751066, 4116241, 5966791)) + bytes(3030)
    for data in (
        b"",
        good[:12],
        good[:16],
        good[:-1],
        good + b"\0",
        b"\0\0\x0d\x03" + good[4:],
        b"\0\0\x0a\x03" + good[4:],
        b"\0\0\x08\x00" + good[4:],
        b"\0\0\x08\x04" + good[4:],
        b"\xff" * 200,
        good[:4] + b"\xff" * 4 + good[8:],
        good[:4] + b"\xff" * 12 + good[16:],
        good[:4] + overflowing,
    ):
        images.write_bytes(data)
        assert str(images) in str(refused(tmp_path, GREY))
    with images.open("wb") as file:
        file.truncate(2**31 + 1)
    assert "larger than 2 GiB" in refused(tmp_path, GREY).why
    images.write_bytes(good)
    labels.write_bytes(idx(np.zeros(3, np.uint8)))
    assert "4 images and 3 labels" in refused(tmp_path, GREY).what
    labels.unlink()
    assert str(labels) in refused(tmp_path, GREY).what


@pytest.mark.parametrize("name", list(CIFAR_FILES))
@pytest.mark.parametrize("split", ["holdout", "train"])
def test_cifar_binary(tmp_path: Path, name: str, split: Any) -> None:
    folder = tmp_path / name
    folder.mkdir()
    images, labels = [], []
    for number, file in enumerate(CIFAR_FILES[name][PART[split]]):
        part, fine = pixels(5, 3072, seed=number), np.arange(5, dtype=np.uint8) + number
        coarse = np.full((5, 1), 77, np.uint8)
        head = [coarse, fine[:, None]] if name == "cifar-100-binary" else [fine[:, None]]
        (folder / file).write_bytes(np.concatenate([*head, part], axis=1).tobytes())
        images.append(part.reshape(5, 3, 32, 32))
        labels += fine.tolist()
    for path in (folder, tmp_path):
        stream = open_images(str(path), split, COLOUR, TEN, "exact")
        assert stream.labels.tolist() == labels
        assert (whole(stream) == np.concatenate(images)).all()
    (folder / CIFAR_FILES[name][PART[split]][0]).write_bytes(b"\0" * 3000)
    with pytest.raises(UsageError, match="not a whole number of records"):
        open_images(str(folder), split, COLOUR, TEN, "exact")


def test_pickled_cifar_is_refused_and_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    for name, binary in (("cifar-10-batches-py", "cifar-10-binary"), ("cifar-100-python", "cifar-100-binary")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "test_batch").write_bytes(pickle.dumps(Trap()))
        for path in (folder, tmp_path, folder / "test_batch"):
            error = refused(path)
            assert "never unpickles" in error.what
            assert "binary version" in error.fix
        assert binary in refused(folder).fix
    assert not (tmp_path / "executed").exists()


def test_stl10(tmp_path: Path) -> None:
    """Columns before rows, labels from 1."""
    spec = InputSpec(channels=3, height=96, width=96)
    images, folder = pixels(4, 3, 96, 96), tmp_path / "stl10_binary"
    folder.mkdir()
    (folder / "test_X.bin").write_bytes(images.transpose(0, 1, 3, 2).tobytes())
    (folder / "test_y.bin").write_bytes(bytes((1, 10, 3, 2)))
    stream = opened(tmp_path, spec)
    assert stream.labels.tolist() == [0, 9, 2, 1]
    assert (whole(stream) == images).all()
    (folder / "test_y.bin").write_bytes(bytes((1, 10, 3)))
    assert "4 images and 3 labels" in refused(folder, spec).what


def write_svhn(folder: Path, part: str, images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torchvision reads only files with the published MD5; here that is the MD5 of made-up images."""
    from torchvision.datasets import SVHN

    path = folder / f"{part}_32x32.mat"
    labels = np.array([[1], [10], [9], [2], [10]], np.uint8)
    savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": labels}, do_compression=True)
    digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setitem(SVHN.split_list, part, ["", path.name, digest])
    return path


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three parts, of which the test part is the hold-out; label 10 is the digit 0."""
    parts = {part: pixels(5, 3, 32, 32, seed=seed) for seed, part in enumerate(("test", "train", "extra"))}
    paths = {part: write_svhn(tmp_path, part, images, monkeypatch) for part, images in parts.items()}
    for place, asked, split in (
        (tmp_path, None, "test"),
        *((tmp_path, part, part) for part in parts),
        *((paths[part], asked, part) for part in parts for asked in (None, part)),
    ):
        stream = open_images(str(place), "holdout", COLOUR, TEN, "exact", asked)
        assert stream.split == split
        assert stream.labels.tolist() == [1, 0, 9, 2, 0]
        assert (whole(stream) == parts[split]).all()
    assert load(str(paths["extra"]), "train", COLOUR, TEN).labels.tolist() == [1, 0, 9, 2, 0]
    for place, splits in ((tmp_path, "extra, test, train"), (paths["extra"], "extra")):
        with pytest.raises(UsageError, match="no split 'validation'") as caught:
            open_images(str(place), "holdout", COLOUR, TEN, "exact", "validation")
        assert caught.value.fix == f"Its splits: {splits}."


def test_damaged_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_svhn(tmp_path, "extra", pixels(5, 3, 32, 32), monkeypatch)
    good = path.read_bytes()
    for data in (b"", good[:200], good[:-40], good + b"\0"):
        path.write_bytes(data)
        error = refused(path)
        assert "SVHN's format 2" in error.what
        assert path.name in error.fix
    other = tmp_path / "other_32x32.mat"
    other.write_bytes(good)
    assert "other" in refused(other).why


# ------------------------------------------------------------------ folders and parquet


def png(shape: tuple[int, ...], seed: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(*shape, seed=seed)).save(file, "PNG")
    return file.getvalue()


def write_folder(root: Path, shapes: list[tuple[int, ...]]) -> None:
    for number, shape in enumerate(shapes):
        (root / TEN[number % 10]).mkdir(parents=True, exist_ok=True)
        (root / TEN[number % 10] / f"{number:03}.png").write_bytes(png(shape, number))


def test_pictures_in_folders_below_a_class_are_found(tmp_path: Path) -> None:
    write_folder(tmp_path, [(32, 32, 3)])
    (tmp_path / "0" / "images").mkdir()
    (tmp_path / "0" / "images" / "x.JPEG").write_bytes(png((32, 32, 3), 9))
    stream = opened(tmp_path)
    assert stream.labels.tolist() == [0, 0]
    assert (whole(stream)[1] == pixels(32, 32, 3, seed=9).transpose(2, 0, 1)).all()


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_everything_that_does_not_fit_is_counted_and_named_at_once(tmp_path: Path, kind: str) -> None:
    shapes = [(32, 32, 3)] * 3 + [(40, 30, 3)] * 2 + [(16, 16, 3)]
    if kind == "folder":
        write_folder(tmp_path, shapes)
        (tmp_path / "7").mkdir()
        (tmp_path / "7" / "bad.png").write_bytes(b"no picture")
        Image.fromarray(np.zeros((32, 32), np.uint16)).save(tmp_path / "7" / "deep.png")
        path, first = tmp_path, "3/003.png"
    else:
        deep = io.BytesIO()
        Image.fromarray(np.zeros((32, 32), np.uint16)).save(deep, "PNG")
        cells = [*(png(shape) for shape in shapes), b"no picture", deep.getvalue()]
        path, first = tmp_path / "x.parquet", "x.parquet, row 3"
        parquet.write_table(pa.table({"image": cells, "label": list(range(8))}), path)
    error = refused(path)
    assert error.what.startswith("5 of the 8 images")
    assert "32×32 pixels" in error.what
    assert f"2 × 30×40 instead of 32×32 pixels (width × height), first {first}." in error.why
    assert "1 × 16×16 instead of 32×32" in error.why
    assert "1 × not readable as an image" in error.why
    assert "1 × pixels of type I;16 instead of 8 bits per channel" in error.why
    assert "--fit center-crop" in error.fix


def test_colour_is_not_silently_made_grey(tmp_path: Path) -> None:
    write_folder(tmp_path, [(28, 28, 3), (28, 28)])
    error = refused(tmp_path, GREY)
    assert error.what.startswith("1 of the 2 images")
    assert "colour (RGB) instead of grey" in error.why
    assert whole(opened(tmp_path, GREY, fit="stretch")).shape == (2, 1, 28, 28)


def test_grey_pictures_are_colour_pictures_too(tmp_path: Path) -> None:
    """ImageNet's validation set holds some; every reader of it repeats the grey value."""
    write_folder(tmp_path, [(32, 32)])
    (image,) = whole(opened(tmp_path))
    assert (image == pixels(32, 32)[None]).all()


def test_stretch_and_center_crop(tmp_path: Path) -> None:
    """A picture whose outer eighth is white: the crop sees none of it, the stretch does."""
    (tmp_path / "3").mkdir()
    picture = np.full((256, 512, 3), 255, np.uint8)
    picture[16:240, 144:368] = (10, 20, 30)
    Image.fromarray(picture).save(tmp_path / "3" / "x.png")
    spec = InputSpec(channels=3, height=224, width=224)
    (cropped,) = whole(opened(tmp_path, spec, fit="center-crop"))
    assert cropped.shape == (3, 224, 224)
    assert {tuple(pixel) for pixel in cropped.reshape(3, -1).T.tolist()} == {(10, 20, 30)}
    (stretched,) = whole(opened(tmp_path, spec, fit="stretch"))
    assert stretched[:, 112, 112].tolist() == [10, 20, 30]
    assert stretched[:, 0, 0].tolist() == [255, 255, 255]


def test_center_crop_is_torchvisions(tmp_path: Path) -> None:
    from torchvision.transforms import v2

    (tmp_path / "0").mkdir()
    picture = Image.fromarray(pixels(300, 400, 3)).resize((400, 300))
    picture.save(tmp_path / "0" / "x.png")
    theirs = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])(picture)
    (ours,) = whole(opened(tmp_path, InputSpec(channels=3, height=224, width=224), fit="center-crop"))
    assert (ours == np.asarray(theirs).transpose(2, 0, 1)).all()


def test_arrays_are_resized_like_pictures(tmp_path: Path) -> None:
    write_mnist(tmp_path, pixels(3, 28, 28), np.arange(3, dtype=np.uint8))
    assert "3 images of shape (1, 28, 28); the model expects (3, 32, 32)" in refused(tmp_path).what
    found = whole(opened(tmp_path, fit="stretch"))
    theirs = Image.fromarray(pixels(3, 28, 28)[1]).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    assert (found[1] == np.asarray(theirs).transpose(2, 0, 1)).all()


def test_a_folder_of_parquet_parts(tmp_path: Path) -> None:
    for part in range(3):
        cells = [{"bytes": png((32, 32, 3), 10 * part + row), "path": None} for row in range(4)]
        table = pa.table({"image": cells, "label": [part] * 4})
        parquet.write_table(table, tmp_path / f"test-{part:05}-of-00003.parquet", row_group_size=3)
    stream = opened(tmp_path)
    assert stream.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (whole(stream, 5)[9] == pixels(32, 32, 3, seed=21).transpose(2, 0, 1)).all()


def test_phones_turn_pictures_by_their_exif_orientation(tmp_path: Path) -> None:
    """Hugging Face's datasets turn pictures when they decode them, torchvision's ImageFolder does not."""
    lying, buffer = Image.fromarray(pixels(40, 32, 3)), io.BytesIO()
    orientation = Image.Exif()
    orientation[ExifTags.Base.Orientation] = 6
    lying.save(buffer, "png", exif=orientation)
    wide = InputSpec(height=32, width=40)
    table = pa.table({"image": [{"bytes": buffer.getvalue(), "path": None}], "label": [0]})
    parquet.write_table(table, tmp_path / "test.parquet")
    found = whole(opened(tmp_path / "test.parquet", wide))
    assert (found[0] == np.rot90(pixels(40, 32, 3), -1).transpose(2, 0, 1)).all()
    folder = tmp_path / "set" / "zero"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(buffer.getvalue())
    found = whole(opened(folder.parent, InputSpec(height=40, width=32), ("zero",)))
    assert (found[0] == pixels(40, 32, 3).transpose(2, 0, 1)).all()


@pytest.mark.parametrize("orientation", range(10))
def test_orientations_are_pillows(orientation: int) -> None:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels(32, 32, 3)).save(buffer, "png", exif=exif)
    with Image.open(io.BytesIO(buffer.getvalue())) as picture:
        wanted = np.asarray(ImageOps.exif_transpose(picture)).transpose(2, 0, 1)
    assert (decode(buffer.getvalue(), COLOUR, "x", upright=True) == wanted).all()


@pytest.mark.parametrize("damaged", [b"Exif\0\0MM\0*\0\0", b"Exif\0\0", b"noise" * 9, b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_damaged_exif_states_no_orientation(damaged: bytes) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels(32, 32, 3)).save(buffer, "png", exif=damaged)
    mismatches = Mismatches(COLOUR, "exact", upright=True)
    mismatches.check(io.BytesIO(buffer.getvalue()), "x")
    mismatches.raise_if_any(1, "x")
    found = decode(buffer.getvalue(), COLOUR, "x", upright=True)
    assert (found == pixels(32, 32, 3).transpose(2, 0, 1)).all()


def test_a_picture_that_breaks_off_is_named_when_it_is_reached(tmp_path: Path) -> None:
    write_folder(tmp_path, [(32, 32, 3)] * 4)
    path = tmp_path / "2" / "002.png"
    path.write_bytes(path.read_bytes()[:200])
    assert f"{path} is not a readable image" in refused(tmp_path).what


# ------------------------------------------------------------------ npz


def test_npz_in_fortran_order_says_how_to_save_it(tmp_path: Path) -> None:
    images = np.asfortranarray(pixels(4, 32, 32, 3))
    np.savez(tmp_path / "x.npz", images=images, labels=np.zeros(4, int))
    assert "ascontiguousarray" in refused(tmp_path / "x.npz").fix


def npy(shape: str, dtype: str = "|u1", data: bytes = b"") -> bytes:
    head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + data


def test_an_npz_that_claims_more_than_it_holds(tmp_path: Path) -> None:
    """Headers of terabytes: refused before anything of that size is asked for."""
    path = tmp_path / "x.npz"
    tracemalloc.start()
    for images, labels in (
        ("(1000000000, 32, 32, 3)", "(1000000000,)"),
        ("(4, 32, 32, 3)", "(99999999999999,)"),
        ("(-4, 32, 32, 3)", "(4,)"),
        ("(4, 32, 32, True)", "(4,)"),
        ("(-4, -32, 32, 3)", "(4,)"),
        ("__import__('os').getcwd()", "(4,)"),
        ("(" * 5000, "(4,)"),
        ("-" * 9000 + "1", "(4,)"),
        ("{[]: 1}", "(4,)"),
    ):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("images.npy", npy(images))
            archive.writestr("labels.npy", npy(labels, "<i8"))
        assert hidden_memory_error(refused(path)) is None, "a parser that gives up is no lack of memory"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20


def test_headers_that_lie_about_themselves(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    long = b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little") + b" " * 2**16
    short = b"\x93NUMPY\x01\x00\x02\x00{}"
    for data, why in (
        (npy("(1, 32, 32, 3)", data=bytes(3072 + 1)), "says otherwise"),
        (npy("(-1, -32, 32, 3)", data=bytes(3072)), "says otherwise"),
        (npy("(1, 32, 32, 3)", dtype="|O", data=bytes(8 * 3072)), "Python objects"),
        (npy("(1,)", dtype="|u12").replace(b"'|u12'", b"('O',)"), "damaged header"),
        (long, "plain numbers"),
        (b"\x93NUMPY\x09\x00" + b" " * 20, "plain numbers"),
        (short, "correct keys"),
        (b"\x93NUMPY", "expected 8 bytes"),
        (b"", "expected 8 bytes"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", data)
            archive.writestr("labels.npy", npy("(1,)", "<i8", bytes(8)))
        error = refused(path)
        assert why in error.what + error.why


@pytest.mark.parametrize("tries", [80, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("compression", ["STORED", "DEFLATED", "BZIP2", "LZMA"])
@pytest.mark.filterwarnings("ignore:Reading `.npy` or `.npz` file required additional header parsing")
def test_a_damaged_npz_is_read_or_refused_and_nothing_else(tmp_path: Path, compression: str, tries: int) -> None:
    path, random = tmp_path / "x.npz", np.random.default_rng(0)
    with zipfile.ZipFile(path, "w", getattr(zipfile, f"ZIP_{compression}")) as archive:
        archive.writestr("images.npy", npy("(2, 32, 32, 3)", data=bytes(2 * 3072)))
        archive.writestr("labels.npy", npy("(2,)", "<i8", bytes(16)))
    good, refusals = path.read_bytes(), 0
    assert len(whole(opened(path))) == 2
    for _ in range(tries):
        data = bytearray(good)
        for place in random.integers(0, len(data), random.integers(1, 8)):
            data[place] = random.integers(0, 256)
        path.write_bytes(data)
        try:
            assert len(whole(opened(path))) == 2
        except UsageError:
            refusals += 1
    assert refusals > 0


@pytest.mark.parametrize("tries", [80, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("head", [npy("(2, 32, 32, 3)"), npy("(2,)", "<i8")], ids=["images", "labels"])
@pytest.mark.filterwarnings("ignore:Reading `.npy` or `.npz` file required additional header parsing")
@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_a_damaged_header_is_read_or_refused_and_nothing_else(tmp_path: Path, head: bytes, tries: int) -> None:
    """The archive is whole; a header in it is not."""
    path, random, refusals = tmp_path / "x.npz", np.random.default_rng(0), 0
    for _ in range(tries):
        data = bytearray(head)
        for place in random.integers(8, len(head), random.integers(1, 5)):
            data[place] = random.choice(list(b"()[]{}',:<|OViu4819-x \0L"))
        images = bytes(data) if b"|u1" in head else npy("(2, 32, 32, 3)")
        labels = bytes(data) if b"<i8" in head else npy("(2,)", "<i8")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", images + bytes(2 * 3072))
            archive.writestr("labels.npy", labels + bytes(16))
        try:
            assert len(whole(opened(path))) == 2
        except UsageError:
            refusals += 1
    assert refusals > 0


# ------------------------------------------------------------------ bounded memory


@pytest.mark.parametrize(
    "kind",
    [
        *("npz", "cifar", "parquet"),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("compressed npz", "folder", "parquet row group")),
    ],
)
def test_memory_holds_a_batch_and_not_the_set(tmp_path: Path, kind: str) -> None:
    """The set is 12 MiB of pixels and more; a batch of 16 images is 192 KiB. numpy's and Python's own allocations are
    traced, Arrow's are asked of its pool."""
    count, spec = 1024, InputSpec(channels=3, height=64, width=64)
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    labels = np.arange(count) % 10
    path = tmp_path / "x"
    if kind.endswith("npz"):
        path = tmp_path / "x.npz"
        save = np.savez_compressed if kind.startswith("compressed") else np.savez
        save(path, images=np.tile(noise, (count // 8, 1, 1, 1)), labels=labels)
    elif kind == "cifar":
        count, spec, path = 4096, COLOUR, tmp_path / "cifar-10-batches-bin"
        path.mkdir()
        (path / "test_batch.bin").write_bytes((b"\3" + noise.tobytes()[:3072]) * count)
    else:
        encoded = []
        for image in noise:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG", compress_level=0)
            encoded.append(file.getvalue())
        if kind == "folder":
            for number in range(count):
                (path / TEN[number % 10]).mkdir(parents=True, exist_ok=True)
                (path / TEN[number % 10] / f"{number}.png").write_bytes(encoded[number % 8])
        else:
            path = tmp_path / "x.parquet"
            # Each picture its own, so that no dictionary makes the file small.
            cells = [encoded[number % 8] + number.to_bytes(4, "big") for number in range(count)]
            rows = count if kind == "parquet row group" else 100
            table = pa.table({"image": cells, "label": labels})
            # Pages of 16 rows: a page, and not the row group, is what has to be in memory.
            options = {"use_dictionary": False, "data_page_size": 2**17, "write_batch_size": 16}
            parquet.write_table(table, path, row_group_size=rows, **options)
            del cells, table
    pool = pa.default_memory_pool()
    pool.release_unused()
    before = pool.bytes_allocated()
    tracemalloc.start()
    stream, seen, arrow = opened(path, spec), 0, 0
    for batch in stream.batches(16):
        seen += len(batch)
        arrow = max(arrow, pool.bytes_allocated() - before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == count
    assert peak + arrow < 3 * 2**20, f"{peak / 2**20:.1f} MiB traced, {arrow / 2**20:.1f} MiB of Arrow's"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("tries", [80, pytest.param(150, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "TIFF", "GIF", "BMP"])
def test_a_damaged_picture_is_read_or_refused_and_nothing_else(kind: str, tries: int) -> None:
    if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
        pytest.skip(f"this Pillow has no {kind}")
    buffer, random = io.BytesIO(), np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(buffer, kind)
    whole, refused = buffer.getvalue(), 0
    assert decode(whole, InputSpec(height=16, width=16), "x").shape == (3, 16, 16)
    for _ in range(tries):
        data = bytearray(whole)
        for place in random.integers(0, len(data), random.integers(1, 8)):
            data[place] = random.integers(0, 256)
        try:
            assert decode(bytes(data), InputSpec(height=16, width=16), "x").shape == (3, 16, 16)
        except UsageError:
            refused += 1
    assert refused > 0
