"""DICOM files of a few pixels, each with one thing that a viewer respects; expected values are worked by hand."""

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from mslora_cr.data.records import DataError
from mslora_cr.data.sources.convert_images import first_picture, pictures
from mslora_cr.data.sources.rendering import NOT_SQUARE, Rendering

pytest.importorskip("pydicom")
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from tests.helpers.dicom import dicom, item, saved

RAMP = np.linspace(100, 300, 64).reshape(8, 8)


def drawn(path, frame=None, **rendering):
    notes = []
    found = list(pictures(path, frame, Rendering(**rendering), notes.append))
    return [np.asarray(Image.open(io.BytesIO(data))).astype(int) for _, data in found], notes


def one(data, path, **rendering):
    [picture], _ = drawn(saved(data, path), **rendering)
    return picture


def surrounded(padding, kind, inside=RAMP):
    values = np.full((16, 16), padding, kind)
    values[4:12, 4:12] = inside
    return values


@pytest.mark.parametrize("interpretation", ["MONOCHROME2", "MONOCHROME1"])
def test_padding_is_background_and_out_of_the_range(interpretation, tmp_path):
    data = dicom(surrounded(63536, np.uint16), interpretation=interpretation, PixelPaddingValue=63536)
    picture = one(data, tmp_path / "a.dcm")
    inside = picture[4:12, 4:12]
    assert (inside.min(), inside.max(), picture[0, 0]) == (0, 255, 0)
    assert inside[0, 0] == (0 if interpretation == "MONOCHROME2" else 255)


def test_padding_ranges_signs_and_values_beyond_the_stored_bits(tmp_path):
    values = surrounded(-2000, np.int16)
    values[0, 0] = -1990
    ranged = dicom(values, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1990)
    assert one(ranged, tmp_path / "a.dcm")[5, 4:12].max() > 30
    # 63536 does not fit into 12 bits, where it would be 2096: a value that the tissue may have.
    wide = dicom(surrounded(63536, np.uint16, np.full((8, 8), 2096)), stored=12, PixelPaddingValue=63536)
    wide.PixelData = (
        np.where(np.arange(256) == 5 * 16 + 5, 100, np.frombuffer(wide.PixelData, "<u2")).astype("<u2").tobytes()
    )
    picture = one(wide, tmp_path / "b.dcm")
    assert (picture[6, 6], picture[5, 5], picture[0, 0]) == (255, 0, 0)


def test_the_depth_of_colour_is_told_by_its_bits(tmp_path):
    grey = np.arange(256, dtype=np.uint16)
    index = np.tile(np.arange(0, 256, 16, dtype=np.uint8), (16, 1))
    for entries, most in ((grey, 240), (grey * 257, 240)):  # 8 bits in 16; 16 bits
        tags = {f"{name}PaletteColorLookupTableDescriptor": [256, 0, 16] for name in ("Red", "Green", "Blue")}
        tags |= {f"{name}PaletteColorLookupTableData": entries.tobytes() for name in ("Red", "Green", "Blue")}
        assert one(dicom(index, interpretation="PALETTE COLOR", **tags), tmp_path / "a.dcm").max() == most
    # 1,000 entries of 8 bits: an index may be larger than an entry
    entries = (np.arange(1000) // 4).astype(np.uint8)
    tags = {f"{name}PaletteColorLookupTableDescriptor": [1000, 0, 8] for name in ("Red", "Green", "Blue")}
    tags |= {f"{name}PaletteColorLookupTableData": entries.tobytes() for name in ("Red", "Green", "Blue")}
    wide = dicom(np.full((4, 4), 999, np.uint16), interpretation="PALETTE COLOR", **tags)
    assert (one(wide, tmp_path / "b.dcm") == 249).all()
    colour = np.full((4, 4, 3), 4095, np.uint16)
    assert (one(dicom(colour, stored=12, interpretation="RGB"), tmp_path / "c.dcm") == 255).all()


@pytest.mark.parametrize(
    "tags",
    [
        {"PixelSpacing": ["3.0", "1.0"]},
        {"ImagerPixelSpacing": ["3.0", "1.0"]},
        {"NominalScannedPixelSpacing": ["3.0", "1.0"]},
        {"PixelAspectRatio": ["3", "1"]},
        {"SharedFunctionalGroupsSequence": [item(PixelMeasuresSequence=[item(PixelSpacing=["3.0", "1.0"])])]},
    ],
    ids=lambda tags: next(iter(tags)),
)
def test_pixels_become_square(tags, tmp_path):
    [picture], notes = drawn(saved(dicom(np.eye(20, 60, dtype=np.uint16), **tags), tmp_path / "a.dcm"))
    assert picture.shape == (60, 60) and notes == [NOT_SQUARE]
    [as_it_is], notes = drawn(saved(dicom(np.eye(20, 60, dtype=np.uint16), PixelSpacing=[1, 1.01]), tmp_path / "b.dcm"))
    assert as_it_is.shape == (20, 60) and not notes
    with pytest.raises(DataError, match=r"c\.dcm: .*too large"):
        drawn(saved(dicom(np.eye(20, 60, dtype=np.uint16), PixelSpacing=[10000, 1]), tmp_path / "c.dcm"))


def test_enhanced_files_are_rescaled_and_windowed_by_frame(tmp_path):
    frames = np.full((2, 4, 4), 100, np.uint16)
    shared = item(PixelValueTransformationSequence=[item(RescaleIntercept=-100, RescaleSlope=1, RescaleType="HU")])
    window = {"VOILUTFunction": "LINEAR_EXACT"}
    windows = [
        item(FrameVOILUTSequence=[item(WindowCenter=0, WindowWidth=100, **window)]),
        item(
            FrameVOILUTSequence=[item(WindowCenter=0, WindowWidth=100, **window)],
            PixelValueTransformationSequence=[item(RescaleIntercept=-50, RescaleSlope=0.8, RescaleType="HU")],
        ),
    ]
    data = dicom(
        frames,
        WindowCenter=5000,
        WindowWidth=10,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=windows,
    )
    pictures_of, _ = drawn(saved(data, tmp_path / "a.dcm"))
    assert [picture[0, 0] for picture in pictures_of] == [128, 204]  # 0 and 30 of -50 .. 50
    [second], _ = drawn(tmp_path / "a.dcm", frame=1)
    assert second[0, 0] == 204


def test_a_frame_without_a_group_keeps_the_value_at_the_top(tmp_path):
    windows = [item(FrameVOILUTSequence=[item(WindowCenter=50, WindowWidth=100)]), item()]
    data = dicom(
        np.full((2, 4, 4), 100, np.uint16),
        WindowCenter=["7", "100.5"],
        WindowWidth=["0", "101"],  # A window without a width is none.
        PixelSpacing=["0", "0"],
        PixelAspectRatio=["2", "1"],
        PerFrameFunctionalGroupsSequence=windows,
    )
    found, _ = drawn(saved(data, tmp_path / "a.dcm"))
    assert [picture[0, 0] for picture in found] == [255, 128] and found[0].shape == (8, 4)


@pytest.mark.parametrize("compressed", ["", "RLE", "JPEG 2000"])
def test_overlays_in_high_bits_are_no_pixels(compressed, tmp_path):
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 16
    marked = values.copy()
    marked[3, 3:9] |= 0x8000
    plain, overlaid = dicom(values, stored=12), dicom(marked, stored=12)
    if compressed == "RLE":
        overlaid.compress(RLELossless, generate_instance_uid=False)
    elif compressed:
        file = io.BytesIO()
        Image.fromarray(marked).save(file, "JPEG2000", irreversible=False, no_jp2=True)
        overlaid.PixelData = encapsulate([file.getvalue()])
        overlaid.file_meta.TransferSyntaxUID = JPEG2000Lossless
        overlaid["PixelData"].is_undefined_length, overlaid["PixelData"].VR = True, "OB"
    assert (one(overlaid, tmp_path / "a.dcm") == one(plain, tmp_path / "b.dcm")).all()


def test_a_claim_of_frames_takes_no_memory(tmp_path):
    data = dicom(np.zeros((4, 4), np.uint16), NumberOfFrames=100_000_000)
    rle = dicom(np.zeros((4, 4), np.uint16))
    rle.compress(RLELossless, generate_instance_uid=False)
    rle.NumberOfFrames = 100_000_000
    for number, claimed in enumerate((data, rle)):
        path = saved(claimed, tmp_path / f"{number}.dcm")
        tracemalloc.start()
        with pytest.raises(DataError, match=r"says that it has 100,000,000 frames"):
            drawn(path)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
        tracemalloc.stop()


def test_a_deflated_bomb_is_not_inflated(tmp_path, monkeypatch):
    data = dicom(np.zeros((1000, 1000), np.uint16), WindowCenter=0, WindowWidth=2)
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    path = saved(data, tmp_path / "a.dcm")
    assert len(drawn(path)[0]) == 1
    monkeypatch.setattr("mslora_cr.data.sources.dicom.MAX_INFLATED", 1_000_000)
    with pytest.raises(DataError, match="once it is inflated"):
        drawn(path)


def test_a_supplemental_palette_colours_the_values_that_it_maps(tmp_path):
    values = np.array([[0, 100, 200, 201]], np.uint16)
    tags = {"PixelPresentation": "MIXED", "WindowCenter": 100.5, "WindowWidth": 201}
    for name, entries in {"Red": [255, 0], "Green": [0, 255], "Blue": [0, 0]}.items():
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [2, 200, 8]
        tags[f"{name}PaletteColorLookupTableData"] = bytes(entries)
    [row] = one(dicom(values, **tags), tmp_path / "a.dcm")
    assert row.tolist() == [[0, 0, 0], [128, 128, 128], [255, 0, 0], [0, 255, 0]]


def test_other_colours_are_refused_by_name(tmp_path):
    data = dicom(np.zeros((4, 4, 3), np.uint8), stored=8, interpretation="RGB")
    data.PhotometricInterpretation = "HSV"
    with pytest.raises(DataError, match=r"a\.dcm: it has 3 samples a pixel, as HSV"):
        one(data, tmp_path / "a.dcm")
    data = dicom(np.zeros((4, 4, 3), np.uint8), stored=8, interpretation="RGB")
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelData = 4, "CMYK", bytes(64)
    with pytest.raises(DataError, match=r"a\.dcm: "):
        one(data, tmp_path / "a.dcm")


def test_one_picture_of_a_file_of_any_kind(tmp_path):
    frames = np.stack([np.full((4, 4), value, np.uint8) for value in (0, 100, 200)])
    path = saved(dicom(frames, stored=8, WindowCenter=128, WindowWidth=256), tmp_path / "a.dcm")
    middle = np.asarray(Image.open(io.BytesIO(first_picture(path.read_bytes(), Rendering()))))
    assert middle[0, 0] == pytest.approx(100, abs=1)
    with pytest.raises(DataError, match="an image of 5 bytes: not a readable image"):
        first_picture(b"hello", Rendering())


def test_a_slope_alone_and_a_frames_own_table_are_applied(tmp_path):
    values = np.array([[0, 50, 100]], np.uint16)
    window = {"WindowCenter": 100, "WindowWidth": 200, "VOILUTFunction": "LINEAR_EXACT"}
    assert one(dicom(values, RescaleSlope=2, **window), tmp_path / "a.dcm").tolist() == [[0, 128, 255]]
    table = item(LUTDescriptor=[101, 0, 8], LUTData=[255 - number for number in range(101)])
    table["LUTData"].VR = "US"
    groups = [item(FrameVOILUTSequence=[item(VOILUTSequence=[table])])]
    enhanced = dicom(values, WindowCenter=5, WindowWidth=1, PerFrameFunctionalGroupsSequence=groups)
    assert one(enhanced, tmp_path / "b.dcm").tolist() == [[255, 205, 155]]


def test_floating_point_pixels_have_padding_of_their_own(tmp_path):
    data = dicom(np.zeros((1, 3), np.uint32), stored=32)
    del data.PixelData, data.BitsStored, data.HighBit, data.PixelRepresentation
    data.FloatPixelData = np.array([[-999, 0, 4]], np.float32).tobytes()
    data.FloatPixelPaddingValue = -999.0
    assert one(data, tmp_path / "a.dcm").tolist() == [[0, 0, 255]]
