"""Answers on a GPU: steps recorded as CUDA graphs give the ids that the CPU's steps give."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mslora_cr.banks.bank import Bank
from mslora_cr.banks.per_sample import PerSampleAdapters, QuestionBanks, whole_banks
from mslora_cr.banks.stack import BankStack
from mslora_cr.data.datasets import EvalDataset
from mslora_cr.data.llava_med_inputs import LlavaMedInputs
from mslora_cr.data.records import TestRecords
from mslora_cr.generation.batching import Limits, grouped, in_waves
from mslora_cr.generation.prefix_decoder import Decoder, Stopping
from mslora_cr.generation.run import scored_batches
from mslora_cr.models.language import language_linears
from mslora_cr.models.llava_med import LlavaMed, load
from tests.conftest import GOLDEN

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NEW_TOKENS = 10
IMAGES = sorted(f"images/{path.name}" for path in (GOLDEN / "images").glob("*.png"))


@dataclass(frozen=True)
class Ends:
    eos_token_id: int = -1
    pad_token_id: int = 0


def questions(base: LlavaMed, folder: Path) -> EvalDataset:
    """Twelve about two images, two about a list of them, and one about another."""
    image_lists = [IMAGES[:1]] * 7 + [IMAGES[1:2]] * 5 + [IMAGES[:2]] * 2 + [IMAGES[2:3]]
    rows = [
        {"question_id": number, "image": images, "text": f"is it {'very ' * number}", "gt": "", "answer_type": "OPEN"}
        for number, images in enumerate(image_lists)
    ]
    path = folder / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    input_processor = LlavaMedInputs(
        base.tokenizer, base.image_processor, base.image_token_id, base.patches, all_images=True
    )
    return EvalDataset(TestRecords(path), [GOLDEN], input_processor)


def banks(base: LlavaMed) -> list[Bank]:
    generator = torch.Generator().manual_seed(2)
    shapes = {name: linear.weight.shape for name, linear in language_linears(base.model).items()}
    return [
        Bank(
            name,
            2,
            2,
            {
                layer: (
                    torch.randn(2, columns, generator=generator) * 0.3,
                    torch.randn(rows, 2, generator=generator) * 0.3,
                )
                for layer, (rows, columns) in shapes.items()
            },
        )
        for name in ("one", "two")
    ]


@pytest.mark.parametrize("how", ["merge", "concatenate", "mixed"])
def test_recorded_steps_give_the_cpus_ids(how: str, tmp_path: Path) -> None:
    answers = {}
    for device in ("cpu", "cuda"):
        base = load(GOLDEN / "llava_med_tiny", dtype=torch.float32, device=device)
        asked, frozen = questions(base, tmp_path), banks(base)
        mixed, model = None, base.model
        if how == "mixed":
            each = [[(), (0,), (0, 1)][number % 3] for number in range(len(asked))]
            mixed = QuestionBanks(PerSampleAdapters(base.model, frozen), whole_banks(each, len(frozen)))
        else:
            stack = BankStack(base.model, how)
            stack.set_frozen(frozen)
            model = stack.model.eval()
        prompts = asked.prompts()
        decoder = Decoder(model, prompts, Stopping.of(Ends(), NEW_TOKENS), mixed)
        assert (decoder.steps is not None) == (device == "cuda")
        groups = grouped(prompts, range(len(asked)), mixed.of if mixed else lambda _: ())
        found: dict[int, list[int]] = {}
        for batch in scored_batches(decoder, asked, in_waves(groups, prompts, Limits(4, NEW_TOKENS, 480))):
            found.update(zip(batch.questions, batch.ids, strict=True))
        if decoder.steps is not None:
            assert decoder.steps.replayed > 0  # recording did not fail, and was used
        answers[device] = [found[index] for index in range(len(asked))]
    assert answers["cuda"] == answers["cpu"]


def test_a_few_questions_are_not_worth_recording(tmp_path: Path) -> None:
    base = load(GOLDEN / "llava_med_tiny", dtype=torch.float32, device="cuda")
    asked = questions(base, tmp_path)
    prompts = asked.prompts()
    decoder = Decoder(base.model, prompts, Stopping.of(Ends(), NEW_TOKENS))
    waves = in_waves(grouped(prompts, [0, 1], lambda _: ()), prompts, Limits(4, NEW_TOKENS, 480))
    assert len(list(scored_batches(decoder, asked, waves))) == 1
    assert decoder.steps is not None and decoder.steps.replayed == 0
