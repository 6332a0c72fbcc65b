"""The scorers of CoIN, UCIT and MLLM-CL against small ones written anew from what is known of them, on made-up answers."""

import random
import re
from collections.abc import Callable

import numpy as np
import pytest

from mslora_cr.config.benchmarks import Benchmark
from mslora_cr.data.answers.boxes import Box, iou, read_box
from mslora_cr.metrics.benchmarks import BenchmarkAnswer, corrected_score, published_score, soft_accuracy
from mslora_cr.metrics.captions import METEOR, WITHOUT_JAVA, caption_columns


def letter(text: str, truth: str, **_: str) -> float:
    if text in list("ABCDE"):
        chosen = text
    elif len(text) >= 3 and text[0] in "ABCDE" and text[1:3] == ". ":
        chosen = text[0]
    else:
        alone = re.findall(r"\b(\w)\b", text)
        chosen = alone[0].upper() if alone else "FAILED"
    return float(chosen == truth)


def box(text: str, truth: str, **_: str) -> float:
    corners = text.replace("[", "").replace("]", "")[1:-1].split(",")
    try:
        x1, y1, x2, y2 = map(float, corners)
    except ValueError:
        return 0.0
    a1, b1, a2, b2 = map(float, truth.strip("[]").split(","))
    shared = max(0, min(x2, a2) - max(x1, a1)) * max(0, min(y2, b2) - max(y1, b1))
    union = (x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - shared
    return float((shared / union if union > 0 else 0) > 0.5)


def words_of_driving(text: str, truth: str, **_: str) -> float:
    said, true = text.lower(), truth.lower()
    if "Unanswerable" in text:
        return 0.0
    if " " in true:
        return float(true in said)
    true = true.replace(".", "")
    near = " " + true in said or true + " " in said or true + "." in said or true + "," in said
    return float(near if " " in said else true in said)


def science(text: str, truth: str, question: str, image: str) -> float:
    said, true = text.lower(), truth.lower()
    if "Unanswerable" in text:
        return 0.0
    if image.split("/")[-1].split("_")[0] in ("AI2D", "TQA", "VQA", "SciVerse"):
        return float(true == said)
    if "Which states" in question:
        return sum(state in said.split(",") for state in true.split(",")) / len(true.split(","))
    return float(true in said)


BY_HAND: dict[Benchmark, Callable[..., float]] = {
    "scienceqa": letter,
    "imagenet": lambda text, truth, **_: float(truth in text or text in truth),
    "gqa": lambda text, truth, **_: float(text.rstrip(".").lower() == truth),
    "exact": lambda text, truth, **_: float(text.upper() == truth.upper()),
    "grounding": box,
    "ocrvqa": lambda text, truth, **_: float("Unanswerable" not in text and text.lower() == truth.lower()),
    "ai2d": words_of_driving,
    "pvqa": lambda text, truth, **_: float("Unanswerable" not in text and truth.lower() in text.lower()),
    "sci": science,
    "finvis": lambda text, truth, **_: float(
        "Unanswerable" not in text and text.lower().replace(" ", "").replace(".", "") == truth.lower()
    ),
}
TEXTS = (
    *(
        "A",
        "B",
        "b",
        "B. a cat",
        "(B)",
        "The answer is B.",
        "a cat, B",
        "Yes",
        "yes.",
        "no",
        "normal",
        "piano music",
        "",
    ),
    *("cat", "caterpillar", "A cat", "a, b", "Ohio,Iowa", "Ohio, Iowa", "ohio,iowa,utah", "Unanswerable", "3.0", "30"),
)
BOXES = (
    "[0.1,0.2,0.5,0.75]",
    "[0.10, 0.20, 0.50, 0.70]",
    "[1.0,0,1.0,1.0]",
    "[0.5,0.5,0.1,0.1]",
    "[0.1,0.2]",
    "0.1,0.2",
)
IMAGES = ("AI2D_1.png", "images/VQA_2.png", "MapQA_3.png", "")
QUESTIONS = ("Which states are red?", "What is it?")


@pytest.mark.parametrize("benchmark", BY_HAND)
def test_every_scorer_as_published(benchmark: Benchmark) -> None:
    draw = random.Random(0)
    texts = BOXES + TEXTS if benchmark == "grounding" else TEXTS
    truths = BOXES[:3] if benchmark == "grounding" else tuple("ABC") if benchmark == "scienceqa" else TEXTS[:-1]
    seen = set()
    for _ in range(3_000):
        text, truth = draw.choice(texts), draw.choice(truths)
        question, image = draw.choice(QUESTIONS), draw.choice(IMAGES)
        by_hand = BY_HAND[benchmark](text, truth, question=question, image=image)
        assert published_score(benchmark, BenchmarkAnswer(text, [truth], question, image)) == by_hand, (text, truth)
        seen.add(by_hand)
    assert {0.0, 1.0} <= seen


@pytest.mark.parametrize(
    ("benchmark", "text", "truth", "published", "corrected"),
    [
        ("scienceqa", "This is a mammal: the answer is B", "B", 0, 1),
        ("scienceqa", "This is a mammal: the answer is B", "A", 1, 0),
        ("scienceqa", "(c)", "C", 1, 1),
        ("imagenet", "", "cat", 1, 0),
        ("imagenet", "caterpillar", "cat", 1, 0),
        ("imagenet", "a tabby cat", "tabby cat", 1, 1),
        ("grounding", "[0.10,0.10,0.30,0.19]", "[0.10,0.10,0.30,0.30]", 0, 0),
        ("grounding", "[1.0,0.0,2.0,1.0]", "[1.0,0.0,2.0,1.0]", 0, 1),
        ("grounding", "[0.0,0.0,0.1,0.9]", "[0.0,0.0,0.1,0.9]", 0, 1),
        ("ocrvqa", "Unanswerable", "unanswerable", 0, 1),
        ("ai2d", "There is an apple", "a", 1, 0),
        ("pvqa", "normal", "no", 1, 0),
        ("finvis", "A.", "A.", 0, 1),
    ],
)
def test_a_known_fault_and_what_corrects_it(
    benchmark: Benchmark, text: str, truth: str, published: float, corrected: float
) -> None:
    answer = BenchmarkAnswer(text, [truth])
    assert (published_score(benchmark, answer), corrected_score(benchmark, answer)) == (published, corrected)


def test_states_too_many_cost_nothing_in_the_published_score() -> None:
    answer = BenchmarkAnswer("Ohio, Iowa, Utah", ["ohio,iowa"], "Which states are red?", "MapQA_1.png")
    assert (published_score("sci", answer), corrected_score("sci", answer)) == (0.5, 0.8)


def test_soft_accuracy_of_ten_annotators() -> None:
    truths = ["2"] * 2 + ["two"] + ["The 3"] * 7
    assert soft_accuracy(BenchmarkAnswer("Two.", truths)) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert soft_accuracy(BenchmarkAnswer("3", truths)) == pytest.approx(1.0)
    assert soft_accuracy(BenchmarkAnswer("4", truths)) == 0
    assert soft_accuracy(BenchmarkAnswer("John's", ["john 's"] + ["x"] * 9)) == pytest.approx(9 * (1 / 3) / 10)


def test_soft_accuracy_against_leaving_one_annotator_out() -> None:
    """The mean over annotators of min(1, how many of the other nine say it / 3), of texts without case, full stops and
    articles, number words as digits."""
    said = ("2", "Two", "the two", "3", "stop", "Stop.", "a stop", "go")
    numbers, articles = {"two": "2", "three": "3"}, ("a", "an", "the")

    def plain(text: str) -> str:
        words = text.lower().replace(".", "").split()
        return " ".join(numbers.get(word, word) for word in words if word not in articles)

    draw = random.Random(1)
    for _ in range(500):
        text, truths = draw.choice(said), draw.choices(said, k=10)
        by_hand = [
            min(1, sum(plain(truths[other]) == plain(text) for other in range(10) if other != left) / 3)
            for left in range(10)
        ]
        assert soft_accuracy(BenchmarkAnswer(text, truths)) == pytest.approx(sum(by_hand) / 10), (text, truths)


def test_overlap_of_boxes() -> None:
    assert iou(Box(0, 0, 2, 2), Box(1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou(Box(0, 0, 1, 1), Box(0, 0, 1, 1)) == 1
    assert iou(Box(1, 1, 0, 0), Box(0, 0, 1, 1)) == 0 == iou(Box(0, 0, 0, 0), Box(0, 0, 0, 0))
    assert read_box("It is at [12, 0.5, 3.,-4].") == Box(12, 0.5, 3, -4) == read_box("12, 0.5, 3., -4.")
    assert read_box("4 of 5 cells") is None and read_box("[1, 2, 3]") is None


CAPTIONS = ["a cat sits on the mat", "two dogs (brown) run!", "a red car"]
REFERENCES = [
    ["the cat sits on a mat", "a cat on the mat."],
    ["two brown dogs run", "dogs run in grass"],
    ["a bus", "a car"],
]


def test_captions_without_java_are_the_library_s_scores_of_the_same_words() -> None:
    pytest.importorskip("pycocoevalcap", reason="pip install 'mslora-cr[captions]'")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    columns = caption_columns(CAPTIONS, REFERENCES, java=False)
    said = {0: ["a cat sits on the mat"], 1: ["two dogs -lrb- brown -rrb- run"], 2: ["a red car"]}
    true = dict(enumerate([["the cat sits on a mat", "a cat on the mat"], *REFERENCES[1:]]))
    bleu, _ = Bleu(4).compute_score(true, said, verbose=0)
    expected = [*bleu, Rouge().compute_score(true, said)[0], Cider().compute_score(true, said)[0]]
    means = {name: float(np.mean(values)) for name, values in columns.items()}
    assert means.pop(WITHOUT_JAVA) == pytest.approx(float(np.mean(expected)), abs=1e-9)
    assert METEOR not in means
    assert [*means.values()] == pytest.approx([*expected[:5], expected[5] / 10], abs=1e-9)


def test_an_answer_s_value_of_bleu_is_how_far_it_moves_the_set() -> None:
    """To first order: an answer that is asked once more, with weight ε, moves the score by ε · (value - score) / n."""
    pytest.importorskip("pycocoevalcap", reason="pip install 'mslora-cr[captions]'")
    many, references = CAPTIONS * 200, REFERENCES * 200
    values = np.array(caption_columns(many, references, java=False)["BLEU-2"])
    more = np.mean(caption_columns([*many, CAPTIONS[1]], [*references, REFERENCES[1]], java=False)["BLEU-2"])
    assert (more - values.mean()) * len(many) == pytest.approx(values[1] - values.mean(), rel=0.01)


@pytest.mark.long
def test_captions_with_java() -> None:
    import shutil

    pytest.importorskip("pycocoevalcap", reason="pip install 'mslora-cr[captions]'")
    if shutil.which("java") is None:
        pytest.skip("METEOR and the published tokenizer need Java")
    columns = caption_columns([*CAPTIONS, ""], [*REFERENCES, ["a dog"]], java=True)
    without = caption_columns([*CAPTIONS, ""], [*REFERENCES, ["a dog"]], java=False)
    assert columns["BLEU-4"] == pytest.approx(without["BLEU-4"])  # both cut these words alike
    assert 0 < np.mean(columns[METEOR]) < 1
    seven = [np.mean(columns[name]) for name in columns if name not in ("benchmark", "CIDEr / 10")]
    assert np.mean(columns["benchmark"]) == pytest.approx(np.mean([*seven, 10 * np.mean(columns["CIDEr / 10"])]))
