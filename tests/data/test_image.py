from __future__ import annotations

import contextlib
import io
import logging
import os
import struct
import tempfile
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate

from fedmm.data import image
from fedmm.data.image import _shrink
from fedmm.data.image import read as read_image
from fedmm.data.manifest import FileProblem
from fedmm.schema import InputSpec
from tests.data.conftest import ramp

SPEC = InputSpec(image_size=16)
SECRET = "Wolkenstein^Oswald"


def problem_of(path: Path, spec: InputSpec = SPEC) -> str:
    with pytest.raises(FileProblem) as caught:
        read_image(path, spec)
    return caught.value.code


def write_dicom(
    path: Path, pixels: np.ndarray, *, syntax: str = pydicom.uid.ExplicitVRLittleEndian, **tags: Any
) -> Path:
    """A small DICOM file around `pixels` (frames first, colours last); `tags` overwrite."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = pydicom.uid.ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.PatientName = SECRET
    bits = pixels.dtype.itemsize * 8
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit, dataset.PixelRepresentation = bits - 1, int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises a size and holds no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    head = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + head + struct.pack(">I", 1000) + b"IDAT" + b"\0" * 64


@pytest.mark.parametrize("size", [16, 64, 224])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp"])
def test_an_image_is_one_standardised_channel_of_the_asked_size(tmp_path: Path, name: str, size: int) -> None:
    kind = "JPEG" if name == "a.jpg" else "PNG"  # the content decides, not the name
    Image.fromarray(ramp(300, 200)).save(tmp_path / name, format=kind)
    image = read_image(tmp_path / name, InputSpec(image_size=size))
    assert image.shape == (1, size, size)
    assert image.dtype == np.float32
    assert abs(image.mean()) < 1e-5
    assert abs(image.std() - 1) < 1e-4
    assert np.array_equal(image, read_image(tmp_path / name, InputSpec(image_size=size)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_of_png_shows_the_same_picture(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(np.where(ramp(64, 64) > 63, 255, 0).astype(np.uint8))
    grey.save(tmp_path / "grey.png")
    if mode == "I;16":
        other = Image.fromarray(np.asarray(grey).astype(np.uint16) * 100 + 1000)
    else:
        other = grey.convert(mode)
    other.save(tmp_path / "other.png")
    assert np.allclose(read_image(tmp_path / "other.png", SPEC), read_image(tmp_path / "grey.png", SPEC), atol=1e-3)


def test_brightness_and_contrast_of_the_scanner_cancel_out(tmp_path: Path) -> None:
    Image.fromarray(ramp(64, 64)).save(tmp_path / "a.png")
    Image.fromarray(ramp(64, 64).astype(np.uint16) * 300 + 5000).save(tmp_path / "b.png")
    assert np.allclose(read_image(tmp_path / "a.png", SPEC), read_image(tmp_path / "b.png", SPEC), atol=1e-4)


def test_a_blank_image_is_zeros(tmp_path: Path) -> None:
    Image.new("L", (32, 32), 77).save(tmp_path / "a.png")
    assert not read_image(tmp_path / "a.png", SPEC).any()


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    upright = Image.fromarray(ramp(64, 64) * np.linspace(1, 2, 64)[:, None].astype(np.uint8))
    upright.save(tmp_path / "a.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned; to be shown turned clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.jpg", quality=95, exif=exif)
    assert np.abs(read_image(tmp_path / "a.jpg", SPEC) - read_image(tmp_path / "b.jpg", SPEC)).max() < 0.1


def test_a_jpeg_much_larger_than_needed_gives_the_same_picture_as_png(tmp_path: Path) -> None:
    large = np.kron(ramp(40, 40), np.ones((40, 40), dtype=np.uint8))
    Image.fromarray(large).save(tmp_path / "a.png")
    Image.fromarray(large).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "a.png", SPEC) - read_image(tmp_path / "a.jpg", SPEC)).max() < 0.05


def test_dicom_shows_the_same_picture_as_png(tmp_path: Path) -> None:
    Image.fromarray(ramp(64, 64)).save(tmp_path / "a.png")
    expected = read_image(tmp_path / "a.png", SPEC)
    wide = ramp(64, 64).astype(np.uint16) * 16
    forms = {
        "plain": write_dicom(tmp_path / "0", ramp(64, 64)),
        "sixteen bits": write_dicom(tmp_path / "1", wide),
        "signed": write_dicom(tmp_path / "2", (wide.astype(np.int16) - 1000)),
        "rescaled": write_dicom(tmp_path / "3", wide, RescaleSlope="0.5", RescaleIntercept="-1024"),
        "window": write_dicom(tmp_path / "4", wide, WindowCenter="1000", WindowWidth="4000"),
        "two windows": write_dicom(tmp_path / "5", wide, WindowCenter=["1000", "3"], WindowWidth=["4000", "2"]),
        "impossible window": write_dicom(tmp_path / "6", wide, WindowCenter="1000", WindowWidth="0"),
        "window beside": write_dicom(tmp_path / "7", wide, WindowCenter="60000", WindowWidth="10"),
        "inverted": write_dicom(tmp_path / "8", 255 - ramp(64, 64), PhotometricInterpretation="MONOCHROME1"),
        "big endian": write_dicom(tmp_path / "9", ramp(64, 64), syntax=pydicom.uid.ImplicitVRLittleEndian),
    }
    for name, path in forms.items():
        assert np.allclose(read_image(path, SPEC), expected, atol=2e-3), name


def test_a_dicom_window_cuts_what_lies_outside(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a", ramp(64, 64), WindowCenter="32", WindowWidth="20")
    image = read_image(path, SPEC)[0]
    assert image[8:, 8:].std() < 1e-5
    assert image[0, 0] < image[8, 8]


def test_of_many_frames_the_first_is_used_and_colour_becomes_grey(tmp_path: Path) -> None:
    first = read_image(write_dicom(tmp_path / "a", ramp(32, 32)), SPEC)
    both = np.stack([ramp(32, 32), 255 - ramp(32, 32)])
    frames = write_dicom(tmp_path / "b", both, Rows=32, Columns=32, NumberOfFrames=2)
    colour = np.repeat(ramp(32, 32)[..., np.newaxis], 3, axis=2)
    tags = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PhotometricInterpretation": "RGB"}
    assert np.allclose(read_image(frames, SPEC), first, atol=1e-4)
    assert np.allclose(read_image(write_dicom(tmp_path / "c", colour, **tags), SPEC), first, atol=1e-4)


def test_compressed_dicom_is_read_where_a_decoder_is_installed_and_named_unsupported_where_not(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(ramp(64, 64)).save(buffer, format="JPEG", quality=95)
    packed = {"PixelData": encapsulate([buffer.getvalue()])}
    baseline = write_dicom(tmp_path / "a", ramp(64, 64), syntax=pydicom.uid.JPEGBaseline8Bit, **packed)
    plain = read_image(write_dicom(tmp_path / "b", ramp(64, 64)), SPEC)
    assert np.abs(read_image(baseline, SPEC) - plain).max() < 0.1
    for syntax in (pydicom.uid.JPEGLSLossless, pydicom.uid.MPEG2MPML, pydicom.uid.DeflatedExplicitVRLittleEndian):
        extra = {} if syntax == pydicom.uid.DeflatedExplicitVRLittleEndian else packed
        assert problem_of(write_dicom(tmp_path / "c", ramp(64, 64), syntax=syntax, **extra)) == "unsupported_image"


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.dcm"])
def test_a_truncated_or_foreign_file_is_broken(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    noise = np.random.default_rng(1).integers(0, 255, (64, 64), dtype=np.uint8)
    write_dicom(path, noise) if name.endswith("dcm") else Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    for length in (0, 1, 131, 140, len(whole) // 2, len(whole) - 200):
        path.write_bytes(whole[:length])
        assert problem_of(path) == "broken_image", length
    path.write_bytes(b"GIF89a" + whole)
    assert problem_of(path) == "broken_image"


@pytest.mark.parametrize(("width", "height"), [(16_385, 8), (7, 100), (15_000, 15_000), (2**31 - 1, 2**31 - 1)])
def test_an_absurd_size_is_seen_before_anything_is_decoded(tmp_path: Path, width: int, height: int) -> None:
    (tmp_path / "a.png").write_bytes(png_header(width, height))
    assert problem_of(tmp_path / "a.png") == "absurd_size"
    if width < 2**16:
        write_dicom(tmp_path / "a.dcm", ramp(8, 8), Rows=height, Columns=width)
        assert problem_of(tmp_path / "a.dcm") == "absurd_size"


def test_an_image_larger_than_pillows_own_limit_but_within_ours_is_read_without_a_warning(tmp_path: Path) -> None:
    # 100 megapixels of one bit; as 13 MB in memory it is small, Pillow's Image.open would warn.
    picture = Image.new("1", (10_000, 10_000))
    picture.paste(1, (0, 0, 10_000, 5_000))
    picture.save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", SPEC)[0]
    assert (image[:8] > 0.5).all()
    assert (image[8:] < -0.5).all()


def test_a_file_over_half_a_gigabyte_is_refused_by_its_size(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_header(64, 64))
    os.truncate(tmp_path / "a.png", 2**29 + 1)  # sparse
    assert problem_of(tmp_path / "a.png") == "absurd_size"


def test_a_missing_file_and_a_folder_are_problems(tmp_path: Path) -> None:
    assert problem_of(tmp_path / "a.png") == "missing_file"
    assert problem_of(tmp_path) == "not_a_file"


def test_nothing_of_a_dicom_header_reaches_a_log_a_warning_or_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    good = write_dicom(tmp_path / "a", ramp(32, 32))
    data = good.read_bytes()
    # An invalid number of frames, a value that its type forbids, a cut file: pydicom would quote each.
    bad = data.replace(SECRET.encode(), b"\xff" * len(SECRET)).replace(b"MONOCHROME2 ", b"WOLKENSTEIN ")
    messages = []
    for content in (data, bad, data[:-100], data + b"xx"):
        good.write_bytes(content)
        try:
            read_image(good, SPEC)
        except FileProblem as problem:
            messages.append(str(problem) + repr(problem))
    assert messages
    assert "olkenstein" not in "".join(messages).lower()
    captured = capfd.readouterr()
    assert caplog.text + captured.out + captured.err == ""


def test_readers_in_many_threads_are_quiet_and_leave_logging_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two readers that are inside at once and leave in the order in which they came."""
    loggers = [logging.getLogger(name) for name in ("pydicom", "PIL")]
    before, filters, inside = [logger.level for logger in loggers], list(warnings.filters), threading.Barrier(2)
    Image.fromarray(ramp()).save(tmp_path / "a.png")

    def slow(grey_HW: np.ndarray, size: int) -> np.ndarray:
        inside.wait(timeout=60)
        logging.getLogger("PIL").critical("of a patient")
        return np.zeros((size, size), dtype=np.float32)

    with mock.patch.object(image, "_shrink", slow), ThreadPoolExecutor(2) as pool:
        assert len(list(pool.map(lambda _: image.read(tmp_path / "a.png", InputSpec()), range(2)))) == 2
    assert [logger.level for logger in loggers] == before
    assert warnings.filters == filters
    assert not caplog.text
    assert logging.getLogger("pydicom").level < logging.CRITICAL


@given(
    start=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"\0" * 128 + b"DICM", png_header(32, 32)]),
    data=st.binary(max_size=400),
)
def test_no_bytes_make_the_reader_raise_anything_else(start: bytes, data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(start + data)
        file.flush()
        with contextlib.suppress(FileProblem):
            assert np.isfinite(read_image(Path(file.name), SPEC)).all()


@given(kind=st.sampled_from(["PNG", "JPEG", "DICOM"]), where=st.floats(0, 1), byte=st.integers(0, 255))
def test_one_changed_byte_gives_a_picture_or_a_problem(kind: str, where: float, byte: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        write_dicom(path, ramp(32, 32)) if kind == "DICOM" else Image.fromarray(ramp(32, 32)).save(path, format=kind)
        data = bytearray(path.read_bytes())
        data[int(where * (len(data) - 1))] = byte
        path.write_bytes(data)
        with contextlib.suppress(FileProblem):
            assert np.isfinite(read_image(path, SPEC)).all()


@pytest.mark.parametrize("size", [16, 64, 128, 256])
def test_a_pixel_that_is_no_number_is_refused_whatever_size_is_asked_for(size: int) -> None:
    """Rows are cut off depending on the size: whether a hospital refuses must not depend on the coordinator's question."""
    pixels = np.random.default_rng(0).random((515, 515), dtype=np.float32)
    pixels[-1, -1] = np.nan
    with pytest.raises(FileProblem, match="NaN"):
        _shrink(pixels, size)
