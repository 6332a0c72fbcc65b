"""The embedded stream and its tiny model: same bytes for a seed, the published tree, no answer given away."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sentencepiece import SentencePieceProcessor

from mslora_cr.data.records import DataError, TestRecords, TrainingRecords
from mslora_cr.models.llava_med import load
from mslora_cr.synthetic.images import SIDES, TRAITS, draw
from mslora_cr.synthetic.model import MODEL_FOLDER, TOWER_FOLDER, make_tiny_llava_med
from mslora_cr.synthetic.pretraining import pretrain, pretraining_texts
from mslora_cr.synthetic.stream import TASKS, SyntheticTask, all_texts, build_once, make_stream, sample_traits

TREE = {
    "CXP": {"train", "test"},
    "Fitzpatrick": {"images"},
    "HAM": {"images"},
    "IU-X-Ray": {"NLMCXR_png"},
    "PathVQA": {"images"},
    "PCam": {"train", "test"},
    "Slake-VQARad": {"Slake_images", "VqaRad_images"},
    "WSI-DX": {"images"},
}
TRAIN, TEST = 96, 32


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("synthetic") / "stream"
    make_stream(root, seed=3, train_images=TRAIN, test_images=TEST)
    return root


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def training(root: Path, task: SyntheticTask) -> list[tuple[str, str, str]]:
    """(image, question, answer) of each record, in the file's order."""
    records = TrainingRecords(root / task.folder / "train.json")
    return [(r.images[0], r.turns[0].text, r.turns[1].text) for r in records]


def test_tree_is_the_published_one(stream: Path) -> None:
    found = {f.name: {d.name for d in f.iterdir() if d.is_dir()} for f in stream.iterdir() if f.is_dir()}
    assert found == TREE
    for task in TASKS:
        folder = stream / task.folder
        assert {path.name for path in folder.iterdir() if path.is_file()} == {"train.json", "test.jsonl"}
        assert all(any((folder / name).iterdir()) for name in TREE[task.folder])


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        make_stream(tmp_path / name, seed=seed, train_images=3, test_images=2)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert not set(digests(tmp_path / "a").values()) & set(digests(tmp_path / "c").values())


def test_a_complete_stream_is_kept_and_one_with_other_parameters_replaced(tmp_path: Path) -> None:
    root = tmp_path / "stream"
    make_stream(root, train_images=2, test_images=1)
    before = (root / "synthetic.json").stat().st_mtime_ns
    make_stream(root, train_images=2, test_images=1)
    assert (root / "synthetic.json").stat().st_mtime_ns == before
    make_stream(root, train_images=3, test_images=1)
    assert len(TrainingRecords(root / "HAM" / "train.json")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["stream"]


def test_foreign_data_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="not made by this generator"):
        make_stream(tmp_path, train_images=1, test_images=1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_interrupted_build_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("done")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "made", "anything", {}, interrupted)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_records_are_valid_and_split_by_image(stream: Path, task: SyntheticTask) -> None:
    folder = stream / task.folder
    tests = list(TestRecords(folder / "test.jsonl"))
    trained, asked = {image for image, _, _ in training(stream, task)}, {r.images[0] for r in tests}
    assert len(trained) == TRAIN and len(asked) == TEST
    assert not trained & asked
    contents = [hashlib.sha256((folder / image).read_bytes()).digest() for image in trained | asked]
    assert len(set(contents)) == TRAIN + TEST
    on_disk = {str(path.relative_to(folder)) for path in folder.rglob("*.png")}
    assert on_disk == trained | asked
    if task.name in ("CXP", "PCAM"):
        assert all(image.startswith("train/") for image in trained)
        assert all(image.startswith("test/") for image in asked)


def test_kinds_of_answers_are_the_published_ones(stream: Path) -> None:
    kinds = {t.name: {r.answer_type for r in TestRecords(stream / t.folder / "test.jsonl")} for t in TASKS}
    mixed, closed, opened = {"OPEN", "CLOSED"}, {"CLOSED"}, {"OPEN"}
    assert kinds == {
        "pathvqa": mixed,
        "slake-vqarad": mixed,
        "derm": mixed,
        "PCAM": closed,
        "CXP": closed,
        "HAM": closed,
        "nmi": opened,
        "iu-x-ray": opened,
    }


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_names_dimensions_lengths_and_order_do_not_tell_the_answer(stream: Path, task: SyntheticTask) -> None:
    """Within one question, every such feature ranks alike for each answer: its mean rank is what chance gives."""
    folder = stream / task.folder
    by_question: dict[str, list[tuple[str, list[float]]]] = {}
    for place, (image, question, answer) in enumerate(training(stream, task)):
        with Image.open(folder / image) as picture:
            dimensions = [float(picture.width), float(picture.height)]
        name, length = float(Path(image).stem), float((folder / image).stat().st_size)
        by_question.setdefault(question, []).append((answer, [float(place), name, length, *dimensions]))
    for rows in by_question.values():
        ranks = np.argsort(np.argsort([features for _, features in rows], axis=0), axis=0)
        for answer, count in Counter(answer for answer, _ in rows).items():
            chosen = ranks[[given == answer for given, _ in rows]]
            # Standard deviation of the mean of `count` of n ranks, drawn without putting back.
            n = len(rows)
            deviation = ((n + 1) * (n - count) / (12 * count)) ** 0.5
            assert (np.abs(chosen.mean(0) - (n - 1) / 2) <= 4 * deviation + 1e-9).all(), answer


def test_a_files_length_follows_from_its_dimensions(stream: Path) -> None:
    for task in TASKS:
        lengths: dict[tuple[str, tuple[int, int]], set[int]] = {}
        for path in (stream / task.folder).rglob("*.png"):
            with Image.open(path) as picture:
                lengths.setdefault((picture.mode, picture.size), set()).add(path.stat().st_size)
        assert all(len(found) == 1 for found in lengths.values())


def test_closed_answers_are_balanced(stream: Path) -> None:
    for task in TASKS:
        closed = [r for r in TestRecords(stream / task.folder / "test.jsonl") if r.answer_type == "CLOSED"]
        answers = Counter(r.gt.lower() for r in closed)
        assert not closed or max(answers.values()) <= 0.7 * len(closed), task.name


@pytest.mark.parametrize("kind", TRAITS)
def test_pictures_show_their_traits_and_vary(kind: str) -> None:
    rng = np.random.default_rng(0)
    traits = sample_traits(kind, rng)
    pictures = [draw(kind, traits, rng) for _ in range(4)]
    assert len({picture.tobytes() for picture in pictures}) == 4
    assert all(SIDES[0] <= side <= SIDES[1] for picture in pictures for side in picture.size)
    assert {picture.mode for picture in pictures} == {"L" if kind in ("chest", "brain") else "RGB"}
    for name, values in TRAITS[kind].items():  # the same random numbers, another trait: another picture
        drawn = {draw(kind, traits | {name: v}, np.random.default_rng(1)).tobytes() for v in values}
        assert len(drawn) == len(values), name


def test_refuses_empty_splits_and_negative_steps(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        make_stream(tmp_path / "stream", train_images=0)
    with pytest.raises(ValueError, match="negative"):
        make_tiny_llava_med(tmp_path / "model", pretrain_steps=-1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "model"
    make_tiny_llava_med(directory, pretrain_steps=0, progress=False)
    return directory


def test_tokenizer_follows_llama_and_spells_the_stream(model: Path) -> None:
    pieces = SentencePieceProcessor(model_file=str(model / MODEL_FOLDER / "tokenizer.model"))
    assert [pieces.id_to_piece(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert pieces.id_to_piece(258) == "<0xFF>"
    assert pieces.vocab_size() == 1024
    for text in [*all_texts(), "two  spaces", "naïve 肺\n"]:
        assert pieces.decode(pieces.encode(text)) == text
    per_word = np.mean([len(pieces.encode(text)) / len(text.split()) for text in all_texts()])
    assert per_word < 1.5  # sentences end in a full stop of their own


def test_model_has_the_layout_of_llava_med_and_loads(model: Path) -> None:
    config = json.loads((model / MODEL_FOLDER / "config.json").read_text())
    assert config["model_type"] == "llava_mistral"
    assert (model / MODEL_FOLDER / config["mm_vision_tower"]).resolve() == (model / TOWER_FOLDER).resolve()
    names = json.loads((model / MODEL_FOLDER / "model.safetensors.index.json").read_text())["weight_map"]
    for prefix in ("lm_head.", "model.embed_tokens.", "model.mm_projector.2.", "model.vision_tower.vision_tower."):
        assert any(name.startswith(prefix) for name in names), prefix
    base = load(model / MODEL_FOLDER, dtype=torch.float32)
    assert base.image_token_id == 3 and base.patches == 16 and base.tokenizer.pad_token_id == 0


def test_pretraining_is_repeatable_and_keeps_the_vocabulary(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mslora_cr.synthetic.pretraining.ALBUM_SIZE", 12)
    before = load(model / MODEL_FOLDER, dtype=torch.float32).model.state_dict()
    after = []
    for _ in range(2):
        base = load(model / MODEL_FOLDER, dtype=torch.float32)
        pretrain(base, seed=5, steps=2, progress=False)
        assert not any(parameter.requires_grad for parameter in base.model.parameters())
        after.append(base.model.state_dict())
    assert all(torch.equal(after[0][name], after[1][name]) for name in before)
    unchanged = {name for name in before if torch.equal(before[name], after[0][name])}
    assert {"lm_head.weight", "model.language_model.embed_tokens.weight"} <= unchanged
    assert not any(name.startswith("model.multi_modal_projector") for name in unchanged)


def test_pretraining_shares_no_answer_with_the_stream() -> None:
    assert not set(all_texts()) & set(pretraining_texts())
