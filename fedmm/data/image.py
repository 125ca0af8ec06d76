"""A radiograph's file (PNG, JPEG, DICOM) becomes one small standardised grey image.

H, W: pixels of the file. S: `spec.image_size`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydicom
import pydicom.filereader
import pydicom.pixels
import pydicom.uid
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from fedmm.data.manifest import FileProblem, open_file
from fedmm.schema import InputSpec

MIN_SIDE, MAX_SIDE, MAX_PIXELS = 8, 16_384, 200_000_000
WINDOW_PERCENTILES = (1.0, 99.0)  # guess: cuts burnt-in markers and collimator edges, keeps the lungs
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's "L"

# All that is ever parsed of a DICOM file: no name, no date, no identifier.
DICOM_TAGS = [
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PlanarConfiguration", "PhotometricInterpretation",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData", "FloatPixelData",
    "DoubleFloatPixelData", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "VOILUTSequence", "WindowCenter",
    "WindowWidth", "VOILUTFunction", "RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
]  # fmt: skip


def read(path: Path, spec: InputSpec) -> np.ndarray:
    """(1, S, S) float32, mean 0 and standard deviation 1 over its own pixels; a blank image is all 0.

    The whole image is resized to a square without keeping its aspect: radiographs are nearly square, so borders would
    cost more pixels than the stretch costs shape, and a border's width would tell which scanner was used.
    Guarantee: the same file gives the same array; size is checked from the header before pixels are decoded.
    Raises: FileProblem broken_image, unsupported_image, absurd_size, or as open_file. Nothing else, nothing to stderr.
    """
    with open_file(path) as file, _quiet:
        try:
            grey_HW = _read(file, path, spec)
            return _standardise(_shrink(grey_HW, spec.image_size))[np.newaxis]
        except (FileProblem, MemoryError):  # how much memory there is says nothing about the file
            raise
        except Exception:  # decoders raise dozens of kinds for broken bytes, with the bytes in the text
            raise _broken("the file cannot be decoded; it is damaged or cut short") from None


class _Quiet:
    """Pillow and pydicom put values of the file into warnings and log lines. Both are switches of the whole process, so with
    several threads the first one in turns them off and the last one out turns them on again."""

    def __init__(self) -> None:
        self._lock, self._inside, self._after = threading.Lock(), 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._after.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                for logger in (logging.getLogger(name) for name in ("pydicom", "PIL")):
                    self._after.callback(logger.setLevel, logger.level)
                    logger.setLevel(logging.CRITICAL + 1)

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._after.close()


_quiet = _Quiet()


def _broken(message: str) -> FileProblem:
    return FileProblem("broken_image", message, "export the image again or empty the cell")


def _unsupported(message: str) -> FileProblem:
    return FileProblem("unsupported_image", message, "convert to uncompressed DICOM or to PNG")


def _read(file: BinaryIO, path: Path, spec: InputSpec) -> np.ndarray:
    """(H, W) of any number type. What the file is, its first bytes say, not its name."""
    start = file.read(132)
    file.seek(0)
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return _pillow(PngImageFile(file), spec)
    if start.startswith(b"\xff\xd8\xff"):
        return _pillow(JpegImageFile(file), spec)
    if start[128:] == b"DICM":
        return _dicom(file, path)
    raise _broken("the file is empty" if not start else "the file is not PNG, JPEG or DICOM")


def _check_size(height: int, width: int) -> None:
    if min(height, width) < MIN_SIDE or max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        limits = f"{MIN_SIDE} to {MAX_SIDE} pixels a side and {MAX_PIXELS // 10**6} million in all"
        raise FileProblem("absurd_size", f"the image is outside {limits}", "is this the right file? export it again")


# --- PNG and JPEG -----------------------------------------------------------------------------------------------------


def _pillow(image: PngImageFile | JpegImageFile, spec: InputSpec) -> np.ndarray:
    # The classes are called directly because Image.open warns or stops by its own, lower limit.
    _check_size(image.height, image.width)
    if isinstance(image, JpegImageFile):
        image.draft("L", (2 * spec.image_size, 2 * spec.image_size))  # the decoder itself shrinks by 2, 4 or 8
    image.load()
    upright: Image.Image = image
    with contextlib.suppress(Exception):  # broken EXIF is no reason to refuse good pixels
        upright = ImageOps.exif_transpose(image)
    if upright.mode not in ("L", "F") and not upright.mode.startswith("I"):  # I, I;16, I;16B: 16-bit grey stays so
        upright = upright.convert("L")
    return np.asarray(upright)


# --- DICOM ------------------------------------------------------------------------------------------------------------


def _dicom(file: BinaryIO, path: Path) -> np.ndarray:
    syntax = pydicom.filereader.read_file_meta_info(path).TransferSyntaxUID
    if syntax == pydicom.uid.DeflatedExplicitVRLittleEndian:
        raise _unsupported("the file is deflated as a whole")  # it would unpack to any size before its header is seen
    header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=DICOM_TAGS)
    _check_size(int(header.Rows), int(header.Columns))
    try:
        available = pydicom.pixels.get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    twelve_bits = syntax == pydicom.uid.JPEGExtended12Bit and int(header.BitsStored) > 8
    if not available or twelve_bits:
        raise _unsupported("the pixels are compressed in a way that is not installed")
    file.seek(0)
    dataset = pydicom.dcmread(file, specific_tags=DICOM_TAGS)
    return _dicom_grey(dataset)


def _dicom_grey(dataset: Any) -> np.ndarray:
    """First frame as the viewer would show it: rescaled, windowed, bright is dense."""
    pixels = pydicom.pixels.pixel_array(dataset, index=0)
    kind = str(dataset.PhotometricInterpretation)
    if kind == "PALETTE COLOR":
        pixels = pydicom.pixels.apply_color_lut(pixels, dataset)
    if pixels.ndim == 3:
        return np.asarray(pixels[..., :3], dtype=np.float32) @ np.array(LUMA, dtype=np.float32)
    raw_HW = np.asarray(pydicom.pixels.apply_modality_lut(pixels, dataset))
    shown_HW = raw_HW
    # Window and LUT are free text in practice: an impossible one falls back to the percentile window of _standardise.
    with contextlib.suppress(Exception):
        shown_HW = np.asarray(pydicom.pixels.apply_voi_lut(raw_HW, dataset, index=0))
    if not np.isfinite(shown_HW).all() or shown_HW.min() == shown_HW.max():
        shown_HW = raw_HW
    return -shown_HW.astype(np.float32) if kind == "MONOCHROME1" else shown_HW


# --- any format -------------------------------------------------------------------------------------------------------


def _shrink(grey_HW: np.ndarray, size: int) -> np.ndarray:
    """(S, S) float32, antialiased."""
    if grey_HW.ndim != 2:
        raise _broken("the image has an unexpected number of axes")
    if not all(np.isfinite(rows_HW).all() for rows_HW in np.array_split(grey_HW, max(1, len(grey_HW) // 256))):
        raise _broken("pixels are NaN or infinite")  # before rows are cut: whether it is told must not depend on `size`
    height, width = grey_HW.shape
    rows, columns = max(1, height // (4 * size)), max(1, width // (4 * size))
    if rows > 1 or columns > 1:  # block means first: a 200-megapixel image needs no float copy
        cut = grey_HW[: height // rows * rows, : width // columns * columns]
        grey_HW = cut.reshape(height // rows, rows, width // columns, columns).mean(axis=(1, 3), dtype=np.float32)
    image = Image.fromarray(np.ascontiguousarray(grey_HW, dtype=np.float32))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))  # Pillow's bilinear widens when shrinking


def _standardise(image_SS: np.ndarray) -> np.ndarray:
    """Percentile window, then mean 0 and deviation 1, by this image alone: nothing is learned from other patients."""
    image_SS = image_SS.astype(np.float64)
    if not np.isfinite(image_SS).all():  # finite pixels so large that their mean is not: blank, whatever the size
        return np.zeros(image_SS.shape, dtype=np.float32)
    low, high = np.percentile(image_SS, WINDOW_PERCENTILES)
    if low < high:
        image_SS = image_SS.clip(low, high)
    deviation = image_SS.std()
    if deviation <= 1e-6 * max(1.0, float(np.abs(image_SS).max())):  # blank, up to rounding
        return np.zeros(image_SS.shape, dtype=np.float32)
    standard: np.ndarray = ((image_SS - image_SS.mean()) / deviation).astype(np.float32)
    return standard
