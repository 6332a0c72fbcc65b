"""A family's training step is timed beside LLaVA-Med's, at the shape of its published configuration."""

import pytest
import torch

from benchmarks import family_shapes, step
from benchmarks.harness import SIZES

BILLIONS = {"qwen2_5_vl": 7.62, "internvl": 7.62, "qwen3_vl": 8.19, "gemma3": 3.88}
"""Parameters of Qwen2.5-7B, Qwen3-8B and Gemma 3 4B without a tower, as their pages and reports give them."""


@pytest.mark.long
@pytest.mark.parametrize("family", family_shapes.PUBLISHED)
def test_a_familys_step_beside_llava_meds(family: str) -> None:
    found = step.main(["--family", family, "--size", "tiny", "--repetitions", "1", "--device", "cpu"])
    assert set(found["figures"]) == {"LLaVA-Med", family} and found["utilisation_over_llava_med"] > 0
    empty = family_shapes.family_model(family, SIZES["7b"], True, torch.device("meta"))
    billions = sum(parameter.numel() for parameter in empty.parameters()) / 1e9
    assert billions == pytest.approx(BILLIONS[family], rel=0.01)
