"""The public face: what `import mslora_cr` offers, and `mslora-cr ask`."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import mslora_cr
from mslora_cr.banks.stack import BankStack
from mslora_cr.cli.conversation import converse
from mslora_cr.cli.main import main
from mslora_cr.data.prompts import encode_conversation, encode_next_prompt
from mslora_cr.data.records import Turn
from mslora_cr.models.llava_med import load as load_base
from mslora_cr.serving import answering
from tests.conftest import once

README = Path(__file__).parents[1] / "README.md"
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"
TASKS = ["pathvqa", "slake-vqarad", "PCAM"]


@pytest.fixture(scope="session")
def results(trained_config: Path, shared_tmp: Path) -> Path:
    """The results folder of the trained run, evaluated at all stages and routed."""

    def build(folder: Path) -> None:
        places = [f"results_dir={folder}"]
        mslora_cr.evaluate(trained_config, "all", overrides=places)
        mslora_cr.evaluate(trained_config, overrides=[*places, "evaluation.banks_by=routed"])

    return once(shared_tmp / "api-results", build) / "tiny"


@pytest.fixture(scope="session")
def model(trained_config: Path) -> mslora_cr.AnsweringModel:
    return mslora_cr.load(trained_config)


def questions(config: Path, task: str) -> list[dict[str, Any]]:
    settings = mslora_cr.load_config(config)
    folder = Path(settings.data.root) / settings.task(task).folder
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    return [{**row, "image": str(folder / row["image"])} for row in rows]


def answers(folder: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / "answer-file.jsonl").read_text().splitlines()]


def test_importing_it_is_light() -> None:
    code = "import sys, mslora_cr; dir(mslora_cr); print('torch' in sys.modules, 'pydantic' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["False", "False"]


def test_every_public_name_is_there_and_typed() -> None:
    assert all(getattr(mslora_cr, name) is not None for name in mslora_cr.__all__)
    assert sorted(mslora_cr.__all__) == sorted(sys.modules["mslora_cr.api"].__all__)
    assert (Path(mslora_cr.__file__).parent / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        mslora_cr.no_such_name  # noqa: B018


def test_answers_are_those_of_an_evaluation(
    model: mslora_cr.AnsweringModel, results: Path, trained_config: Path
) -> None:
    cells = json.loads((results / "evaluation.json").read_text())["cells"]
    assert {cell["task"] for cell in cells} == {*TASKS}
    for cell in cells:
        asked = questions(trained_config, cell["task"])[:2]
        said = [
            model.answer(question["image"], question["text"], task=cell["task"], stage=cell["stage"])
            for question in asked
        ]
        assert said == answers((results / cell["answers"]).parent)[:2], (cell["task"], cell["stage"])


def test_routed_answers_are_those_of_a_routed_evaluation(
    model: mslora_cr.AnsweringModel, results: Path, trained_config: Path
) -> None:
    for task in TASKS:
        rows = (results / "routed" / task / "stage-3" / "answer-file.jsonl").read_text().splitlines()
        for question, row in list(zip(questions(trained_config, task), map(json.loads, rows), strict=True))[:3]:
            answer = model.ask(question["image"], question["text"])
            assert (answer.text, answer.task) == (row["text"], row["metadata"]["routed_to"])
            assert sum(answer.probabilities.values()) == pytest.approx(1)
            assert next(iter(answer.probabilities)) == answer.task and set(answer.probabilities) == set(TASKS)
            assert answer.banks == tuple(TASKS[: TASKS.index(answer.task or "") + 1])


def test_the_base_is_loaded_once_and_banks_are_swapped_only_where_others_answer(
    trained_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, swaps = [], []
    load, swap = answering.load_base, BankStack.set_frozen
    monkeypatch.setattr(answering, "load_base", lambda *args: loads.append(1) or load(*args))
    monkeypatch.setattr(BankStack, "set_frozen", lambda self, banks: swaps.append(len(banks)) or swap(self, banks))
    model = mslora_cr.load(trained_config, task="pathvqa")
    [question, *_] = questions(trained_config, "pathvqa")
    for task, stage in (("pathvqa", 1), ("pathvqa", 3), ("PCAM", 3), ("slake-vqarad", 2), ("pathvqa", 0)):
        model.answer(question["image"], question["text"], task=task, stage=stage)
    assert (len(loads), swaps) == (1, [1, 3, 2, 0])


@pytest.mark.parametrize(("merge_mode", "method"), [("merge", "addmm_"), ("concatenate", "copy_")])
def test_after_a_swap_that_failed_half_way_the_right_banks_answer(
    merge_mode: str, method: str, trained_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mslora_cr.load(trained_config, task="pathvqa", overrides=[f"lora.fold={merge_mode}"])
    [question, *_] = questions(trained_config, "pathvqa")

    def state() -> dict[str, torch.Tensor]:
        model.answer(question["image"], question["text"])
        return {name: weight.clone() for name, weight in model._stack.model.state_dict().items()}

    before, calls = state(), []
    works = getattr(torch.Tensor, method)

    def failing(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(method)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory is left")
        return works(tensor, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch.Tensor, method, failing)
        model._use("PCAM", 3, {})
    after = state()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


NOT_NEEDED = {
    *("peft", "deepspeed", "bitsandbytes", "datasets", "pandas", "pyarrow", "sklearn", "optuna"),
    *(
        "librosa",
        "soundfile",
        "torchaudio",
        "torchvision",
        "cv2",
        "av",
        "transformers.trainer",
        "transformers.pipelines",
    ),
}
"""Modules that take long to import, and that neither `evaluate` nor `ask` needs."""


def test_without_the_extra_eval_a_run_answers_and_imports_nothing_that_it_does_not_need(trained_config: Path) -> None:
    [question, *_] = questions(trained_config, "pathvqa")
    code = (
        "import sys\n"
        "for name in ('nltk', 'scipy', 'tabulate', 'matplotlib'): sys.modules[name] = None\n"
        f"import mslora_cr\nmodel = mslora_cr.load({str(trained_config)!r})\n"
        f"model.answer({question['image']!r}, {question['text']!r}, task='pathvqa')\n"
        "for name in ('nltk', 'scipy', 'tabulate', 'matplotlib'): del sys.modules[name]  # scores need them\n"
        "import mslora_cr.cli.ask, mslora_cr.evaluation.evaluate\n"
        f"assert not {NOT_NEEDED!r} & set(sys.modules), {NOT_NEEDED!r} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_pictures_may_be_files_bytes_or_pictures_and_several(
    model: mslora_cr.AnsweringModel, trained_config: Path, tmp_path: Path
) -> None:
    [question, *_] = questions(trained_config, "pathvqa")
    path, text = Path(question["image"]), question["text"]
    ways: list[Any] = [str(path), path, path.read_bytes(), Image.open(path), [path]]
    assert len({model.ask(way, text, task="pathvqa").ids for way in ways}) == 1
    reply = model.ask([path, Image.new("L", (30, 90))], text, task="pathvqa")
    assert reply.ids and model.ask([], text, task="pathvqa").ids
    for broken, name in ((b"no picture", "an image of 10 bytes"), (tmp_path / "gone.png", "gone.png")):
        with pytest.raises(mslora_cr.DataError, match=name):
            model.answer(broken, text)
    with pytest.raises(mslora_cr.DataError, match=r"more than data\.max_length = 2048"):
        model.answer(path, "word " * 3000, task="pathvqa")
    with pytest.raises(mslora_cr.ConfigError, match="max_new_tokens is 0"):
        model.answer(path, text, task="pathvqa", max_new_tokens=0)


def test_an_answer_is_streamed_as_it_grows(model: mslora_cr.AnsweringModel, trained_config: Path) -> None:
    [question, *_] = questions(trained_config, "pathvqa")
    pieces: list[str] = []
    answer = model.ask(question["image"], question["text"], task="pathvqa", max_new_tokens=12, on_text=pieces.append)
    assert "".join(pieces) == answer.text and len(pieces) > 1


def test_a_conversation_goes_on_as_training_encodes_it(model: mslora_cr.AnsweringModel) -> None:
    tokenizer = model._input_processor.tokenizer
    turns = [
        Turn.model_validate({"from": who, "value": text}) for who, text in (("human", "What?"), ("gpt", "A cell."))
    ]
    last = [Turn.model_validate({"from": who, "value": text}) for who, text in (("human", "Where?"), ("gpt", "Left."))]
    prompt = encode_next_prompt(tokenizer, turns, "Where?", 1)
    assert encode_conversation(tokenizer, [*turns, *last], 1).input_ids[: len(prompt)] == prompt


def test_a_run_has_a_name_a_folder_and_a_configuration(
    trained_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained_config.parent)
    ways = [
        mslora_cr.banks_of(way) for way in ("tiny", "checkpoints/tiny", "run.yaml", mslora_cr.load_config("run.yaml"))
    ]
    assert all(list(way) == TASKS for way in ways)
    assert main(["ask", "tny", "what?"]) == 1
    assert "no such configuration, run folder or run in checkpoints/; did you mean 'tiny'?" in capsys.readouterr().err


def test_results_are_tables(results: Path, trained_config: Path) -> None:
    read = mslora_cr.read_results(mslora_cr.load_config(trained_config, [f"results_dir={results.parent}"]))
    rows = read.scores()
    assert {(row["task"], row["stage"]) for row in rows} == {(task, stage) for task in TASKS for stage in range(4)}
    assert all(row["low"] <= row["score"] <= row["high"] for row in rows)
    table = read.answers("pathvqa", 3)
    assert [row["answer"] for row in table] == answers(results / "pathvqa")
    closed = [row["close accuracy"] for row in table if row["close accuracy"] is not None]
    [score] = [
        row["score"] for row in rows if (row["task"], row["stage"], row["metric"]) == ("pathvqa", 3, "close accuracy")
    ]
    assert score == pytest.approx(100 * sum(closed) / len(closed))
    assert read.summary()["final_average"] is not None
    with pytest.raises(mslora_cr.UserError, match="PCAM is not evaluated at that stage"):
        read.answers("PCAM", 9)


def test_banks_are_read_summed_merged_and_saved(trained_config: Path, tiny_model: Path, tmp_path: Path) -> None:
    banks = list(mslora_cr.banks_of(trained_config).values())
    total = mslora_cr.sum_banks(banks, "all")
    assert (total.rank, total.scaling) == (12, 1.0)
    mslora_cr.save_bank(total, tmp_path / "all")
    again = mslora_cr.load_bank(tmp_path / "all")
    assert again.digest == total.digest
    one, other = (load_base(tiny_model, dtype=torch.float32).model for _ in range(2))
    mslora_cr.merge_banks(one, banks)
    mslora_cr.merge_banks(other, [again])
    changed = one.state_dict()["model.language_model.layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(changed, other.state_dict()["model.language_model.layers.0.mlp.up_proj.weight"])
    with pytest.raises(mslora_cr.BankError, match="no bank to sum"):
        mslora_cr.sum_banks([], "none")


# --- mslora-cr ask ---------------------------------------------------------------------------------------------------


def test_ask_streams_an_answer_and_says_who_gave_it(
    trained_config: Path, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = questions(trained_config, "PCAM")[:2]
    assert main(["ask", str(trained_config), first["text"], "--image", first["image"], "model.device=cpu"]) == 0
    output = capsys.readouterr()
    assert "# predicted task " in output.err and "%" in output.err and "banks pathvqa" in output.err
    arguments = ["--task", "PCAM", "--stage", "3", first["text"], second["text"], "--image", first["image"]]
    assert main(["ask", str(trained_config), *arguments]) == 0
    output = capsys.readouterr()
    assert output.out.split("\n")[0] == answers(results / "PCAM")[0] and output.out.count("\n") == 2
    assert f"# {second['text']}" in output.err and "# banks pathvqa+slake-vqarad+PCAM" in output.err


def test_questions_come_from_a_file_or_from_standard_input(
    trained_config: Path,
    results: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = questions(trained_config, "PCAM")
    lines = [{"question": row["text"], "image": row["image"], "task": "PCAM", "mine": 7} for row in asked]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    assert main(["ask", str(trained_config), "--questions", str(file)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["answer"] for row in rows] == answers(results / "PCAM")
    assert all(row["mine"] == 7 and row["banks"] == TASKS for row in rows)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{asked[0]['text']}\n"))
    assert main(["ask", str(trained_config), "--task", "PCAM", "--image", asked[0]["image"]]) == 0
    assert capsys.readouterr().out.strip() == answers(results / "PCAM")[0]
    for line, problem in (
        ('{"question": ""}', "question"),
        ("{broken", "not valid JSON"),
        ('{"image": 3}', "question"),
    ):
        file.write_text(f"first\n{line}\n")
        assert main(["ask", str(trained_config), "--questions", str(file)]) == 1
        assert f"{file}: line 2: " in (output := capsys.readouterr().err) and problem in output


def test_a_conversation_remembers(
    model: mslora_cr.AnsweringModel, trained_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = questions(trained_config, "slake-vqarad")[:2]
    lines = [first["text"], "/image /no/such.png", second["text"], f"/image {first['image']}", first["text"]]
    lines += [second["text"], "/new", "/help", "", second["text"], "/quit", "never asked"]
    converse(model, [first["image"]], [line + "\n" for line in lines])
    output = capsys.readouterr()
    one = model.ask(first["image"], first["text"])
    two = model.ask(first["image"], second["text"], history=[(first["text"], one.text)], task=one.task)
    alone = model.ask(first["image"], second["text"])
    # A mistyped file is named at once, and the conversation goes on with the pictures that it had.
    assert output.out.split("\n") == [one.text, two.text, one.text, two.text, alone.text, ""]
    assert "error: /no/such.png: there is no such image file" in output.err


# --- README and the notebook ----------------------------------------------------------------------------------------------------


def test_the_python_of_the_readme_runs(
    trained_config: Path,
    results: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a run and data that stand where the demo's do."""
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120 and text[: text.index("```python")].count("\n") < 60
    config = mslora_cr.load_config(trained_config)
    run = tmp_path / "checkpoints" / "demo" / "mslora_cr"
    shutil.copytree(config.run_dir, run)
    saved = (
        (run / "config.yaml")
        .read_text()
        .replace(config.output_dir, str(run.parent))
        .replace("run: tiny", "run: mslora_cr")
    )
    (run / "config.yaml").write_text(saved.replace(config.results_dir, str(tmp_path / "results")))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "mslora_cr").symlink_to(results)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "demo").symlink_to(config.data.root)
    monkeypatch.chdir(tmp_path)
    exec(text.partition("```python\n")[2].partition("```")[0], {})
    first = questions(trained_config, "PCAM")[0]
    printed = capsys.readouterr().out
    assert printed.startswith(first["text"]) and f"truth: {first['gt']}" in printed and "final_average" in printed


def test_the_quickstart_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert "pip install jupyterlab" in "".join(cells[0]["source"])
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in codes)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in codes:
        exec("".join(cell["source"]), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names |= {"pretrain_steps": 0, "train_images": 8, "test_images": 4, "epochs": 1}
    assert names["answer"].text == names["model"].answer(
        names["folder"] / names["question"]["image"], names["question"]["text"]
    )
    assert len(names["results"].scores()) > 0 and (tmp_path / "quickstart/both/adapter_model.safetensors").is_file()
    assert "after 2 tasks" in capsys.readouterr().out
