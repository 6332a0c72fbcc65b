"""Models that come with a processor of their own: what docs/how-to/models.md says of every family it names."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText

import mslora_cr
from mslora_cr.cli.main import main
from mslora_cr.data.images import load_image
from mslora_cr.data.prompts import IGNORE_INDEX
from mslora_cr.data.records import TestRecord, TrainingRecord
from mslora_cr.models.cached_features import CachedFeatures
from mslora_cr.models.language import language_linears, language_model, linears_pattern
from mslora_cr.models.layout import ModelError
from mslora_cr.models.llava_med import load
from mslora_cr.models.load import load_model
from mslora_cr.models.processor_base import ProcessorBase
from mslora_cr.models.save import writer_of
from tests.conftest import GOLDEN, bank_bytes, first_in_make_test, once, write_config
from tests.helpers.families import FAMILIES, make
from tests.helpers.killing import KillPoint, run_until_killed

EVERY = first_in_make_test(*FAMILIES)
"""LLaVA-1.5 in `make test`, the others in `make test-all`."""
TASKS = [
    {"name": "pathvqa", "epochs": 1, "batch_size": 8, "learning_rate": 0.02},
    {"name": "slake-vqarad", "epochs": 1, "batch_size": 8, "learning_rate": 0.02},
]

Folder = Callable[[str], Path]


@pytest.fixture(scope="session")
def folder(shared_tmp: Path) -> Folder:
    """The folder of a family's tiny model."""
    return lambda family: once(shared_tmp / "families" / family, lambda place: make(family, place))


@pytest.fixture(scope="session", autouse=True)
def _families(shared_tmp: Path) -> None:
    (shared_tmp / "families").mkdir(exist_ok=True)


def loaded(folder: Folder, family: str) -> ProcessorBase:
    base = load_model(folder(family), dtype=torch.float32)
    assert isinstance(base, ProcessorBase)
    return base


def picture(place: Path, width: int, height: int, colour: tuple[int, int, int] = (200, 40, 90)) -> str:
    """An image file of noise around a colour; its name."""
    noise = Image.effect_noise((width, height), 60).convert("RGB")
    Image.blend(noise, Image.new("RGB", (width, height), colour), 0.5).save(place / f"{width}x{height}.png")
    return f"{width}x{height}.png"


def conversation(images: list[str], *texts: str) -> TrainingRecord:
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    return TrainingRecord.model_validate({"id": 1, "image": images, "conversations": turns})


# --- what a record becomes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EVERY)
def test_ids_labels_and_loss_are_those_of_the_processor(family: str, folder: Folder, tmp_path: Path) -> None:
    base = loaded(folder, family)
    input_processor, processor = base.input_processor(2048, True), base.processor
    small, wide = picture(tmp_path, 40, 50), picture(tmp_path, 110, 45)
    records = [
        conversation([small], "<image>\nis this a cell?", "yes it is"),
        conversation([wide, small], "<image><image>\nwhat does the picture show?", "a lesion", "left?", "no, right"),
        conversation([], "is the skin normal?", "no"),
        conversation([small], "<image>\nis this a cell?", "<think>the skin shows a lesion</think> no"),
    ]
    samples = [input_processor.sample(index, record, [tmp_path]) for index, record in enumerate(records)]
    batch = input_processor.batch(samples)
    assert batch.pop("record_index").tolist() == [*range(len(records))]
    ended = "<eos>" if family == "llava" else ""  # LLaVA-1.5's template ends no answer
    for row, record in enumerate(records):
        images = [load_image(tmp_path / name) for name in record.images]
        messages: list[dict[str, Any]] = [
            {
                "role": {"human": "user", "gpt": "assistant"}[turn.speaker],
                "content": [{"type": "text", "text": turn.text.replace("<image>", "").strip()}],
            }
            for turn in record.turns
        ]
        messages[0]["content"] = [{"type": "image", "image": image} for image in images] + messages[0]["content"]
        theirs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
        )
        wanted = theirs["input_ids"][0].tolist() + ([processor.tokenizer.eos_token_id] if ended else [])
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][real].tolist() == wanted
        assert input_processor.length(record, [tmp_path]) == len(wanted)
        labels = batch["labels"][row]
        learned = int((labels != IGNORE_INDEX).sum())
        assert input_processor.count_labels(record, [tmp_path]) == (learned, learned, len(wanted))
        said = processor.tokenizer.decode(labels[labels != IGNORE_INDEX], skip_special_tokens=True)
        assert said.replace(" ", "") == "".join(t.text for t in record.turns if t.speaker == "gpt").replace(" ", "")
        masked = theirs["assistant_masks"][0].tolist() + ([1] if ended else [])
        found = (labels[real] != IGNORE_INDEX).long().tolist()
        odd = [token for token, ours, other in zip(wanted, found, masked, strict=True) if ours != other]
        # A space in front of an answer, which the generation prompt lacks: it is generated, and so it is learned.
        assert found >= masked and all(processor.tokenizer.decode([token]) == " " for token in odd)
        assert {int(label) for label in labels[labels != IGNORE_INDEX]} & set(input_processor.end_ids)
        assert labels[real].eq(batch["input_ids"][row][real])[labels[real] != IGNORE_INDEX].all()
    with torch.no_grad():
        whole = base.model(**batch).loss
        alone = [
            base.model(**input_processor.batch([sample]), num_items_in_batch=torch.tensor(1)).loss for sample in samples
        ]
        alone_sum = sum(alone) / (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
    torch.testing.assert_close(whole, alone_sum, rtol=1e-4, atol=1e-5)


def test_llava_med_by_its_exported_processor_is_llava_med(tmp_path: Path) -> None:
    """The golden ids, masks and pixels by the other way: the chat template of what `export` writes."""
    llava_med = load(GOLDEN / "llava_med_tiny", dtype=torch.float32)
    exported = tmp_path / "exported"
    exported.mkdir()
    writer_of(llava_med, GOLDEN / "llava_med_tiny")(exported)
    ours, other = llava_med.input_processor(2048, True), loaded(lambda _: exported, "llava").input_processor(2048, True)
    image = picture(tmp_path, 40, 50)
    for record in (conversation([image], "is this a cell?", "yes  it is"), conversation([image], "a?", "b", "c", "d")):
        one, two = (
            input_processor.collator()([input_processor.sample(0, record, [tmp_path])])
            for input_processor in (ours, other)
        )
        assert one.keys() == two.keys()
        assert all(one[name].equal(two[name]) for name in one)
    question = {"question_id": 1, "image": image, "text": "is  this a cell?", "gt": "yes", "answer_type": "CLOSED"}
    prompts = [
        input_processor.prompt(TestRecord.model_validate(question), [tmp_path]) for input_processor in (ours, other)
    ]
    assert len({prompt.opening + prompt.rest for prompt in prompts}) == 1


@pytest.mark.parametrize("family", EVERY)
def test_a_bank_adapts_the_language_model_and_nothing_else(family: str, folder: Folder) -> None:
    model = loaded(folder, family).model
    linears = language_linears(model)
    inside = {id(module) for module in language_model(model).modules()}
    assert len(linears) == 2 * 7
    for name, module in model.named_modules():
        known = name in linears
        assert known == (isinstance(module, torch.nn.Linear) and id(module) in inside), name
    pattern = linears_pattern(linears)
    assert {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)} == set(linears)


# --- a stream, end to end ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def settings(tiny_settings: dict[str, Any], folder: Folder) -> Callable[[str], dict[str, Any]]:
    """The tiny stream's configuration of two tasks, for a family's model."""

    def of(family: str) -> dict[str, Any]:
        model = {**tiny_settings["model"], "path": str(folder(family))}
        datasets = {name: tiny_settings["datasets"][name] for name in ("pathvqa", "slake-vqarad")}
        training = {**tiny_settings["training"], "save_steps": 1}
        return {**tiny_settings, "model": model, "datasets": datasets, "tasks": TASKS, "training": training}

    return of


@pytest.fixture(scope="session")
def trained(shared_tmp: Path, settings: Callable[[str], dict[str, Any]]) -> Folder:
    """A family's stream trained without a break, evaluated told and routed: the folder with its configuration."""

    def of(family: str) -> Path:
        def build(place: Path) -> None:
            config = str(write_config(place, settings(family)))
            assert main(["train", config]) == 0
            assert main(["evaluate", config]) == 0
            assert main(["evaluate", config, "--banks-by", "routed"]) == 0

        return once(shared_tmp / "families" / f"{family}-trained", build)

    return of


def answers(place: Path) -> dict[str, list[str]]:
    files = sorted(place.rglob("answer-file.jsonl"))
    return {
        str(file.relative_to(place)): [json.loads(line)["text"] for line in file.read_text().splitlines()]
        for file in files
    }


@pytest.mark.parametrize("family", EVERY)
def test_a_killed_run_ends_in_the_same_banks(
    family: str, trained: Folder, settings: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    config = write_config(tmp_path, settings(family))
    point = KillPoint("mslora_cr.training.callbacks:JsonLinesCallback.on_log", call=5)  # in the second task
    run_until_killed(["train", str(config)], point, tmp_path / "output")
    assert main(["train", str(config)]) == 0
    ours, whole = bank_bytes(tmp_path / "checkpoints" / "tiny"), bank_bytes(trained(family) / "checkpoints" / "tiny")
    assert len(whole) == 2 and ours == whole


@pytest.mark.parametrize("family", EVERY)
def test_batched_answers_are_those_of_one_by_one(family: str, trained: Folder, folder: Folder, tmp_path: Path) -> None:
    config, single = trained(family) / "run.yaml", tmp_path / "results"
    assert main(["evaluate", str(config), "evaluation.batch_size=1", f"results_dir={single}"]) == 0
    found, expected = answers(single / "tiny"), answers(trained(family) / "results" / "tiny")
    assert len(found) == 2 and found == {name: expected[name] for name in found}
    routed = json.loads((trained(family) / "results" / "tiny" / "routed" / "routing.json").read_text())
    assert routed["stages"][-1]["accuracy"] > 50
    ledger = json.loads((trained(family) / "checkpoints" / "tiny" / "ledger.json").read_text())
    for entry in ledger["tasks"].values():
        assert entry["switched_off"] == []
        bank = json.loads((trained(family) / "checkpoints/tiny/banks/pathvqa/bank.json").read_text())
        base_model = {"architecture": type(loaded(folder, family).model).__name__, "digest": entry["model_digest"]}
        assert bank["base_model"] == base_model


@pytest.mark.parametrize("family", EVERY)
def test_what_is_exported_answers_in_plain_peft(family: str, trained: Folder, tmp_path: Path, tiny_data: Path) -> None:
    run, out = trained(family) / "run.yaml", tmp_path / "out"
    assert main(["export", str(run), "--format", "peft", "--task", "pathvqa", "--output", str(out)]) == 0
    ours = mslora_cr.load(str(run), task="pathvqa")
    image = next((tiny_data / "PathVQA").rglob("*.png"))
    wanted = ours.ask(image, "is this a cell?", max_new_tokens=5)
    model = AutoModelForImageTextToText.from_pretrained(out / "base", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(model, out / "pathvqa").eval()
    processor = loaded(lambda _: out / "base", family).processor
    content = [{"type": "image"}, {"type": "text", "text": "is this a cell?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    bos = processor.tokenizer.bos_token
    inputs = processor(
        text=[text],
        images=[[load_image(image)]],
        return_tensors="pt",
        add_special_tokens=not (bos and text.startswith(bos)),
    )
    found = theirs.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert found.tolist() == list(wanted.ids)
    loads: list[str] = []
    assert ours.ask(image, "is this a cell?", on_text=loads.append, max_new_tokens=5).text == "".join(loads)


@pytest.mark.parametrize("family", EVERY)
def test_kept_features_are_to_a_model_what_pixels_are(family: str, folder: Folder, tmp_path: Path) -> None:
    base = loaded(folder, family)
    names = [picture(tmp_path, 40, 50), picture(tmp_path, 110, 45)]
    features = CachedFeatures(tmp_path / "features", base.given_features(), torch.device("cpu"))
    features.fill([tmp_path / name for name in names], workers=0)
    records = [
        conversation(names[:1], "<image>\nis this a cell?", "yes it is"),
        conversation(names[::-1], "<image><image>\nwhat does the picture show?", "a lesion"),
        conversation([], "is the skin normal?", "no"),
    ]
    found = []
    for processor in (base.input_processor(2048, True), base.input_processor(2048, True, features.cache)):
        batch = processor.batch([processor.sample(0, record, [tmp_path]) for record in records])
        del batch["record_index"]
        found.append((batch, base.model(**batch)))
    (pixels, wanted), (kept, ours) = found
    assert "pixel_values" in pixels and "pixel_values" not in kept
    assert kept["input_ids"].equal(pixels["input_ids"]) and kept["labels"].equal(pixels["labels"])
    torch.testing.assert_close(ours.logits, wanted.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_with_kept_features_gives_the_same_banks_and_answers(
    family: str, trained: Folder, settings: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    run = settings(family)
    run["data"] = {**run["data"], "cache_image_features": str(tmp_path / "features")}
    config = str(write_config(tmp_path, run))
    assert main(["train", config]) == 0
    assert main(["evaluate", config]) == 0
    assert answers(tmp_path / "results" / "tiny").items() <= answers(trained(family) / "results" / "tiny").items()
    for task in ("pathvqa", "slake-vqarad"):
        ours, plain = (
            mslora_cr.load_bank(place / "checkpoints" / "tiny" / "banks" / task)
            for place in (tmp_path, trained(family))
        )
        for name, (a, b) in ours.matrices.items():
            torch.testing.assert_close(
                (b @ a), (plain.matrices[name][1] @ plain.matrices[name][0]), rtol=1e-2, atol=1e-3
            )
    assert list((tmp_path / "features").rglob("*.safetensors"))


# --- what is taken, and what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", EVERY)
def test_questions_about_several_images_of_other_sizes_are_answered_as_alone(
    family: str, folder: Folder, tmp_path: Path
) -> None:
    base = loaded(folder, family)
    input_processor = base.input_processor(2048, True)
    names = [picture(tmp_path, 40, 50), picture(tmp_path, 110, 45), picture(tmp_path, 30, 90)]
    asked = [
        TestRecord.model_validate(
            {"question_id": 1, "image": images, "text": "what does it show?", "gt": "a cell", "answer_type": "OPEN"}
        )
        for images in (names[:1], names, names[1:])
    ]
    prompts = [input_processor.prompt(record, [tmp_path]) for record in asked]
    loaded_images = [input_processor.load_images(record.images, [tmp_path]) for record in asked]
    batch = input_processor.answering_batch(prompts, loaded_images)
    assert batch["attention_mask"].sum(1).tolist() == [len(prompt) for prompt in prompts]
    together = base.model.generate(**batch, max_new_tokens=4, do_sample=False)[:, -4:].tolist()
    for prompt, images, row in zip(prompts, loaded_images, together, strict=True):
        alone = input_processor.answering_batch([prompt], [images])
        assert alone["input_ids"][0].tolist() == [*prompt.opening, *prompt.rest]
        assert base.model.generate(**alone, max_new_tokens=4, do_sample=False)[0, -4:].tolist() == row


def test_features_behind_a_projector_that_banks_change_are_not_kept(
    settings: Callable[[str], dict[str, Any]], folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_config(tmp_path, settings("llava")))
    options = [
        "method=sequential",
        "lora.projector_learning_rate=1e-3",
        f"data.cache_image_features={tmp_path / 'kept'}",
    ]
    assert main(["train", config, *options]) == 1
    assert "lora.projector_learning_rate trains it; set one of them to null" in capsys.readouterr().err
    with pytest.raises(ModelError, match="banks change the projector"):
        loaded(folder, "llava").given_features(projector_changes=True)


def test_what_a_model_would_misread_is_refused(folder: Folder, tmp_path: Path) -> None:
    input_processor = loaded(folder, "llava").input_processor(40, True)
    with pytest.raises(ValueError, match="spells out '</s>', which the model takes for a control token"):
        input_processor.length(conversation([], "is </s> a word?", "no"), [tmp_path])
    wide = picture(tmp_path, 110, 45)
    cut = conversation([wide], "is this a cell?", "no " * 30)
    assert input_processor.length(cut, [tmp_path]) == 40  # the answer's end
    counted, batch = (
        input_processor.count_labels(cut, [tmp_path]),
        input_processor.batch([input_processor.sample(0, cut, [tmp_path])]),
    )
    assert counted.learned == (batch["labels"] != IGNORE_INDEX).sum() < counted.labels and counted.length > 40
    with pytest.raises(ValueError, match=r"an image ends past data\.max_length = 40, of \d+ positions"):
        input_processor.length(conversation([wide] * 3, "is this a cell?", "no"), [tmp_path])


def test_a_template_that_refuses_or_rewrites_a_conversation_is_named(folder: Folder, tmp_path: Path) -> None:
    base = loaded(folder, "llava")
    base.processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="chat template refuses the conversation: roles must alternate"):
        base.input_processor(99, True).length(conversation([], "a?", "b"), [tmp_path])
    base.processor.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="changes an answer once the conversation continues"):
        base.input_processor(99, True).length(conversation([], "a?", "b", "c?", "d"), [tmp_path])


def test_a_folder_without_a_processor_or_a_template_is_refused(folder: Folder, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder("qwen3_vl"), copy)
    (copy / "chat_template.jinja").rename(copy / "gone")
    assert "has no chat template" in refused(copy)
    (copy / "gone").rename(copy / "chat_template.jinja")
    (copy / "tokenizer.json").unlink()
    assert "the model's processor cannot be loaded" in refused(copy)


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(path)
    return str(caught.value)


@pytest.mark.parametrize("family", EVERY)
def test_a_plan_and_an_inspection_describe_the_model(
    family: str, settings: Callable[[str], dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, settings(family))
    assert main(["train", str(config), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "14 layers adapted" in plan and "not used with it" not in plan
    assert main(["model", "inspect", settings(family)["model"]["path"]]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layout"] == family and sum(found["adapted"].values()) == 14
    assert found["bank"]["parameters"] == 16 * int(re.search(r"per bank: ([\d,]+)", plan)[1].replace(",", ""))
    assert all(f"{count} of {size}" in plan for size, count in found["positions"].items())
    assert found["memory"]["GB"].keys() == {"ddp", "zero1", "zero2", "zero3"} and "QUESTION" in found["template"]


@pytest.mark.parametrize("bits", first_in_make_test("4bit", "8bit", first=0))
def test_the_language_model_alone_is_quantised(bits: str, folder: Folder) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    kind = {"4bit": bitsandbytes.nn.Linear4bit, "8bit": bitsandbytes.nn.Linear8bitLt}[bits]
    for family in ("qwen3_vl", "idefics3"):
        model = load_model(folder(family), dtype=torch.bfloat16, quantization=bits).model
        assert {name for name, module in model.named_modules() if isinstance(module, kind)} == {
            *language_linears(model)
        }


@pytest.mark.long
def test_a_bank_of_another_family_is_refused_by_name(trained: Folder, tmp_path: Path) -> None:
    llava, gemma = trained("llava"), trained("gemma3")
    config = yaml.safe_load((llava / "run.yaml").read_text())
    path = write_config(tmp_path, config)
    command = ["evaluate", str(path), "--banks", str(gemma / "checkpoints" / "tiny")]
    assert main(command) != 0
    assert main(["bank", "import", str(path), "--from", str(gemma / "checkpoints" / "tiny")]) != 0
    with pytest.raises(mslora_cr.BankError, match="was trained on Gemma3For"):
        bank = mslora_cr.load_bank(gemma / "checkpoints" / "tiny" / "banks" / "pathvqa")
        mslora_cr.merge_banks(loaded(lambda _: Path(config["model"]["path"]), "llava").model, [bank])
