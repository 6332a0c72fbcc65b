"""The embedded stream: eight small biomedical tasks, drawn and worded here, in the tree of the published data.

Tasks, folders, modalities and kinds of answers are those of the published stream; the images come from
`synthetic/images.py`. Train and test share no image, and neither a file's name, its dimensions, its length nor its
place in the records says anything about the answer.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mslora_cr.data.records import AnswerType, DataError
from mslora_cr.synthetic.images import TRAITS, Traits, draw
from mslora_cr.utils.files import replacing_folder, write_json
from mslora_cr.utils.progress import progress_bar
from mslora_cr.utils.strict_json import read_object

GENERATOR_VERSION = 2  # increases with every change of what is written for the same arguments
STAMP = "synthetic.json"  # written last: a folder that holds it is complete


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    answer_type: AnswerType


@dataclass(frozen=True)
class SyntheticTask:
    """One task: the folders of its files, its kinds of picture, and the questions about each of them.

    ``questions`` returns groups; one question of every group is asked about each picture.
    """

    name: str
    folder: str
    train_folders: tuple[str, ...]
    test_folders: tuple[str, ...]
    kinds: tuple[str, ...]
    questions: Callable[[str, Traits], list[list[Question]]]


def _closed(text: str, answer: str) -> Question:
    return Question(text, answer, "CLOSED")


def _open(text: str, answer: str) -> Question:
    return Question(text, answer, "OPEN")


def _pathvqa(kind: str, traits: Traits) -> list[list[Question]]:
    glands, dense, large = traits["glands"] == "yes", traits["cells"] == "dense", traits["nuclei"] == "large"
    closed = [
        _closed("Are glands present in this section?", "yes" if glands else "no"),
        _closed("Is the tissue densely cellular?", "yes" if dense else "no"),
        _closed("Are the nuclei enlarged?", "yes" if large else "no"),
    ]
    opened = [
        _open("What is present in this section?", "glandular lumina" if glands else "solid sheets of cells"),
        _open("How do the nuclei look?", "large and pleomorphic" if large else "small and round"),
        _open("What is the cellularity?", "hypercellular" if dense else "hypocellular"),
    ]
    return [closed, opened]


def _slake_vqarad(kind: str, traits: Traits) -> list[list[Question]]:
    modality = _closed("Is this an X-ray or an MRI?", "X-Ray" if kind == "chest" else "MRI")
    if kind == "chest":
        side, organ, site = traits["opacity"], "Lung", "Lung"
        closed = [
            _closed("Is the heart enlarged?", "Yes" if traits["heart"] == "enlarged" else "No"),
            _closed("Is the lung healthy?", "Yes" if side == "none" else "No"),
        ]
    else:
        side, organ, site = traits["lesion"], "Brain", "Hemisphere"
        closed = [
            _closed("Are the ventricles dilated?", "Yes" if traits["ventricles"] == "dilated" else "No"),
            _closed("Is the brain healthy?", "Yes" if side == "none" else "No"),
        ]
    where = "No abnormality" if side == "none" else f"{side.title()} {site}"
    return [
        [*closed, modality],
        [_open("Where is the abnormality?", where), _open("Which organ is shown in this image?", organ)],
    ]


_SKIN_DISEASE = {"plaque": "psoriasis", "spots": "acne", "mole": "malignant melanoma", "depigmented": "vitiligo"}


def _derm(kind: str, traits: Traits) -> list[list[Question]]:
    disease = _SKIN_DISEASE[traits["rash"]]
    inflammatory = traits["rash"] in ("plaque", "spots")
    closed = [
        _closed("Is this condition inflammatory?", "yes" if inflammatory else "no"),
        _closed("Is the skin type light or dark?", traits["tone"]),
    ]
    opened = [_open("What is the diagnosis?", disease), _open("Which skin condition is shown?", disease)]
    return [closed, opened]


def _pcam(kind: str, traits: Traits) -> list[list[Question]]:
    answer = "tumor" if traits["nuclei"] == "large" else "normal"
    return [[_closed("Is this lymph node section normal or tumor?", answer)]]


def _cxp(kind: str, traits: Traits) -> list[list[Question]]:
    answer = "normal" if traits["opacity"] == "none" else "pneumonia"
    return [[_closed("Does this chest X-ray show a normal lung or pneumonia?", answer)]]


_HAM_CLASS = {
    "nevus": "melanocytic nevi",
    "melanoma": "melanoma",
    "keratosis": "benign keratosis-like lesions",
    "carcinoma": "basal cell carcinoma",
    "vascular": "vascular lesions",
}


def _ham(kind: str, traits: Traits) -> list[list[Question]]:
    return [[_closed("What is the diagnosis of this pigmented lesion?", _HAM_CLASS[traits["lesion"]])]]


def _nmi(kind: str, traits: Traits) -> list[list[Question]]:
    sentences = (
        {"papillary": "Papillary tumor with fused fronds.", "flat": "Flat mucosa without papillary growth."},
        {"dark": "High grade atypia.", "pale": "Low grade, mild atypia."},
        {"yes": "Areas of hemorrhage.", "no": "No hemorrhage is seen."},
    )
    values = (traits["growth"], traits["stain"], traits["bleeding"])
    report = " ".join(sentence[value] for sentence, value in zip(sentences, values, strict=True))
    return [[_open("Write the pathology report of this slide.", report)]]


def _iu_x_ray(kind: str, traits: Traits) -> list[list[Question]]:
    heart = {"normal": "The heart size is within limits.", "enlarged": "There is cardiomegaly."}
    effusion = {"no": "No pleural effusion.", "yes": "Bilateral pleural effusion."}
    side = traits["opacity"]
    lungs = "The lungs are clear." if side == "none" else f"Airspace disease in the {side} lung."
    report = " ".join((heart[traits["heart"]], lungs, effusion[traits["effusion"]]))
    return [[_open("Describe the findings of this radiograph.", report)]]


_IMAGES = ("images",)
#: The stream in its published order.
TASKS: tuple[SyntheticTask, ...] = (
    SyntheticTask("pathvqa", "PathVQA", _IMAGES, _IMAGES, ("tissue",), _pathvqa),
    SyntheticTask(
        "slake-vqarad",
        "Slake-VQARad",
        ("Slake_images", "VqaRad_images"),
        ("Slake_images", "VqaRad_images"),
        ("chest", "brain"),
        _slake_vqarad,
    ),
    SyntheticTask("derm", "Fitzpatrick", _IMAGES, _IMAGES, ("skin",), _derm),
    SyntheticTask("PCAM", "PCam", ("train",), ("test",), ("tissue",), _pcam),
    SyntheticTask("CXP", "CXP", ("train",), ("test",), ("chest",), _cxp),
    SyntheticTask("HAM", "HAM", _IMAGES, _IMAGES, ("dermoscopy",), _ham),
    SyntheticTask("nmi", "WSI-DX", _IMAGES, _IMAGES, ("slide",), _nmi),
    SyntheticTask("iu-x-ray", "IU-X-Ray", ("NLMCXR_png",), ("NLMCXR_png",), ("chest",), _iu_x_ray),
)


def make_stream(root: Path, seed: int = 0, train_images: int = 240, test_images: int = 80) -> None:
    """Write the eight tasks under ``root`` in the tree of the published data.

    Every task gets ``train_images`` pictures in ``train.json`` and ``test_images`` others in ``test.jsonl``;
    `pathvqa`, `slake-vqarad` and `derm` ask a closed and an open question about each picture, the rest one.
    The same arguments write the same bytes. A complete stream made with them is left unchanged, one made
    with others is replaced.

    Raises:
        DataError: ``root`` holds something else.
        ValueError: A number of images below 1.
    """
    if train_images < 1 or test_images < 1:
        raise ValueError(f"train_images and test_images must be at least 1, not {train_images} and {test_images}")
    stamp = {"seed": seed, "train_images": train_images, "test_images": test_images}

    def build(folder: Path) -> None:
        with progress_bar(
            total=len(TASKS) * (train_images + test_images), desc="synthetic stream", unit="image"
        ) as bar:
            for number, task in enumerate(TASKS):
                rng = np.random.default_rng([seed, number])
                _write_task(folder / task.folder, task, rng, train_images, test_images, bar)

    build_once(root, "stream", stamp, build)


def build_once(target: Path, what: str, parameters: dict[str, Any], build: Callable[[Path], None]) -> None:
    """Make the folder ``target`` with ``build``, whole or not at all, unless it exists already.

    ``build`` fills a folder next to ``target`` that is renamed at the end. A stamp in it records ``what`` and
    ``parameters``; a folder with the same stamp is kept, one with another stamp is replaced.

    Raises:
        DataError: ``target`` is not empty and bears no stamp: it is somebody's data.
    """
    stamp = {"generator": GENERATOR_VERSION, "what": what, **parameters}
    if target.exists() and any(target.iterdir()):
        if not (target / STAMP).is_file():
            raise DataError(f"{target}: not empty, and not made by this generator; name another folder")
        if read_object(target / STAMP) == stamp:
            return
    with replacing_folder(target) as partial:
        build(partial)
        write_json(partial / STAMP, stamp)


def sample_traits(kind: str, rng: np.random.Generator) -> Traits:
    """Draw random traits of one picture. Sides are "none" in one half of the pictures; everything else is uniform."""
    traits = {name: str(rng.choice(values)) for name, values in TRAITS[kind].items()}
    for name, values in TRAITS[kind].items():
        if "none" in values and rng.random() < 0.25:  # 1/3 + 2/3 * 1/4 = 1/2
            traits[name] = "none"
    return traits


def all_texts() -> list[str]:
    """Return every question and answer of the stream, whatever the seed; sorted."""
    texts = {
        text
        for task in TASKS
        for kind in task.kinds
        for values in product(*TRAITS[kind].values())
        for group in task.questions(kind, dict(zip(TRAITS[kind], values, strict=True)))
        for question in group
        for text in (question.text, question.answer)
    }
    return sorted(texts)


def _write_task(
    folder: Path,
    task: SyntheticTask,
    rng: np.random.Generator,
    train_images: int,
    test_images: int,
    bar: "tqdm[Any]",
) -> None:
    numbers = rng.choice(10**8, size=train_images + test_images, replace=False)
    names = (f"{number:08d}.png" for number in numbers)  # They carry no information.
    train = _draw_split(folder, task, task.train_folders, train_images, names, rng, bar)
    test = _draw_split(folder, task, task.test_folders, test_images, names, rng, bar)
    records = [
        {
            "id": f"{task.name}-{number}",
            "image": image,
            "conversations": [
                {"from": "human", "value": f"<image>\n{question.text}"},
                {"from": "gpt", "value": question.answer},
            ],
        }
        for number, (image, question) in enumerate(train)
    ]
    (folder / "train.json").write_text(json.dumps(records, indent=1) + "\n")
    rows = [
        {
            "question_id": number,
            "image": image,
            "text": question.text,
            "gt": question.answer,
            "answer_type": question.answer_type,
        }
        for number, (image, question) in enumerate(test)
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _draw_split(
    folder: Path,
    task: SyntheticTask,
    image_folders: tuple[str, ...],
    count: int,
    names: Iterator[str],
    rng: np.random.Generator,
    bar: "tqdm[Any]",
) -> list[tuple[str, Question]]:
    """Draw ``count`` pictures; (image path relative to the task's folder, question) in random order."""
    questions = []
    for image_folder in image_folders:
        (folder / image_folder).mkdir(parents=True, exist_ok=True)
    for _ in range(count):
        image = f"{rng.choice(image_folders)}/{next(names)}"
        kind = str(rng.choice(task.kinds))
        traits = sample_traits(kind, rng)
        # Stored, not deflated: a file's length tells its dimensions and nothing about what it shows.
        draw(kind, traits, rng).save(folder / image, compress_level=0)
        for group in task.questions(kind, traits):
            questions.append((image, group[rng.integers(len(group))]))
        bar.update()
    return [questions[index] for index in rng.permutation(len(questions))]
