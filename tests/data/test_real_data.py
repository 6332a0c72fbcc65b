"""Images and texts as hospitals and Mistral have them, not as a generator draws them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor

from mslora_cr.data.images import check_images, load_image, preprocess, washed_out
from mslora_cr.data.prompts import IMAGE_INDEX, encode_prompt, generation_prompt
from mslora_cr.data.tokenizer import Tokenizer
from tests.helpers.real_data import SKIMAGE, STARDIST, TOKENIZER, real


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Mistral's own 32,000 pieces, in a folder as LLaVA-Med has them."""
    folder = tmp_path_factory.mktemp("mistral")
    (folder / "tokenizer.model").write_bytes(real(TOKENIZER).read_bytes())
    return Tokenizer(folder)


def test_mistrals_pieces_are_mistrals(mistral: Tokenizer) -> None:
    assert (len(mistral), mistral.bos_token_id, mistral.eos_token_id) == (32_000, 1, 2)
    assert mistral.encode("Hello") == [22557]  # ▁Hello, as Mistral's documentation has it
    assert mistral.encode("two  spaces") != mistral.encode("two spaces")
    assert mistral.encode("</s>") == [2]
    for text in ("Bilateral pleural effusion, 3.5 cm.", "Ödem über 40 µm – ≥ Grad Ⅱ", "肺炎", "a\n\nb"):
        assert mistral.decode([mistral.encode(text)]) == [text]


def test_a_prompt_holds_one_image_between_whole_chunks(mistral: Tokenizer) -> None:
    ids = encode_prompt(mistral, generation_prompt("Is there a fracture?"))
    assert ids.count(IMAGE_INDEX) == 1 and ids[0] == 1
    place = ids.index(IMAGE_INDEX)
    chunks = [ids[1:place], ids[place + 1 :]]
    assert "[INST]" in mistral.decode([chunks[0]])[0]
    assert mistral.decode([chunks[1]])[0].strip().startswith("Is there a fracture?")


def test_real_photographs_become_pixels(tmp_path: Path) -> None:
    processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    paths = [real(SKIMAGE / name) for name in ("retina.jpg", "ihc.png", "microaneurysms.png")]
    paths.append(real(STARDIST / "histo.jpg"))
    assert check_images(paths, workers=1, progress=False) == []
    for path in paths:
        pixels = preprocess(load_image(path), processor)
        assert pixels.shape == (3, 336, 336) and pixels.isfinite().all()
        assert pixels.std() > 0.1
    grey = np.asarray(load_image(paths[2]))
    assert (grey[..., 0] == grey[..., 1]).all()
    wide = tmp_path / "wide.png"
    with Image.open(paths[0]) as retina:
        retina.crop((0, 600, 1411, 800)).save(wide)
    padded = preprocess(load_image(wide), processor)
    assert float(padded[:, :100].std()) < 0.01  # the mean colour above the strip


def test_stained_tissue_keeps_its_colours_and_fluorescence_its_nuclei() -> None:
    stained = real(STARDIST / "histo.jpg")
    assert washed_out(stained) is None
    red, green, blue = np.asarray(load_image(stained)).reshape(-1, 3).mean(axis=0)
    assert green < red and green < blue  # haematoxylin and eosin
    cells, nuclei = real(STARDIST / "img2d.tif"), real(STARDIST / "mask2d.tif")
    assert "stored with more than 8 bits (mode I;16)" in str(washed_out(cells))
    grey = np.asarray(load_image(cells))[..., 0]
    with Image.open(cells) as stored, Image.open(nuclei) as segmented:
        assert (grey == np.asarray(stored)).all()  # of this one, all values are below 256
        inside = np.asarray(segmented) > 0
    assert grey[inside].mean() > 2 * grey[~inside].mean()
