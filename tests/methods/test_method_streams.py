"""Every method through the command line: trained, killed and started again, evaluated, reported."""

import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mslora_cr.banks.bank import BankError
from mslora_cr.banks.directions import decoupled
from mslora_cr.banks.io import load_bank
from mslora_cr.banks.stack import BankStack
from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.config.methods import method_names
from mslora_cr.data.collator import TrainingCollator
from mslora_cr.data.datasets import TrainDataset
from mslora_cr.data.records import TestRecords, TrainingRecords
from mslora_cr.data.tasks import task_folder, task_image_roots
from mslora_cr.models.load import input_processor_of, load_base
from mslora_cr.reporting.plots import TERMS as TITLES
from mslora_cr.runs.ledger import Ledger
from mslora_cr.serving.answering import AnsweringModel
from mslora_cr.stream.plan import plan
from tests.conftest import STEPS, ConfigWriter, bank_bytes, first_in_make_test, method_of_the_page, once, write_config
from tests.helpers.killing import KillPoint, run_until_killed

Trained = Callable[[str], Path]


@pytest.fixture(scope="session")
def method_run(shared_tmp: Path, tiny_settings: dict[str, Any]) -> Trained:
    """The configuration of a method's run on the tiny stream, trained and evaluated once. Read only."""

    def run(method: str) -> Path:
        def build(folder: Path) -> None:
            config = str(write_config(folder, tiny_settings, run=method, method=method))
            assert main(["train", config]) == 0
            if load_config(Path(config)).evaluation.banks_by == "routed":
                assert main(["evaluate", config, "--stages", "seen"]) == 0
                assert main(["evaluate", config, "--stages", "all", "--banks-by", "prefix"]) == 0
            else:
                assert main(["evaluate", config, "--stages", "all"]) == 0
            assert main(["report", config]) == 0

        return once(shared_tmp / f"evaluated-{method}", build) / "run.yaml"

    return run


TRAINED = [method for method in method_names() if method not in ("zero_shot", "mslora_cr")]
"""Methods that train; tests/stream/test_stream.py kills runs of mslora_cr."""
BUILT_ALIKE = ("hide_llava", "mr_lora", "reglora", "keeplora", "olora", "incremental", "sd_lora")
"""Methods whose runs resume by what other methods do too: a router, a penalty without a state, a bank that starts
otherwise. Here `make test` trains the first one alone; tests/distributed trains all of them."""
WITHOUT_STATE = ("each", "sequential", "joint")
"""Methods of which `make test` kills no run: they resume by the trainer's checkpoints alone, as mslora_cr's do."""
BANKS = {"zero_shot": 0, "joint": 1}
"""How many banks a method trains, if not one per task."""
TERMS = {
    "mslora_cr": {"contrastive", "orthogonality", "alpha", "beta"},
    "olora": {"overlap", "norm"},
    "ewc": {"drift"},
    "lwf": {"distillation"},
    "reglora": {"key_elements"},
}
"""What a method's log shows of its second task beside the cross entropy."""


@pytest.mark.parametrize(
    "method",
    [pytest.param(method, marks=[pytest.mark.long] * (method in BUILT_ALIKE[1:])) for method in method_names()],
)
def test_a_method_trains_evaluates_and_reports(method: str, method_run: Trained) -> None:
    config = load_config(method_run(method))
    ledger = json.loads((config.run_dir / "ledger.json").read_text())
    assert ledger["method"] == method and len(ledger["tasks"]) == BANKS.get(method, 3)
    planned = {item.task: item.steps for item in plan(config)[0]}
    assert planned == {task: entry["steps"] for task, entry in ledger["tasks"].items()}
    for task in ledger["tasks"]:
        rows = [json.loads(line) for line in (config.run_dir / "logs" / f"{task}.jsonl").open()]
        expected = TERMS.get(method, set()) if task != "pathvqa" else set()
        assert rows[0].keys() - {"step", "loss", "ce", "learning_rate", "grad_norm", "epoch"} == expected
    cells = json.loads((config.results_run_dir / "evaluation.json").read_text())["cells"]
    seen = {(cell["task"], cell["stage"]) for cell in cells}
    assert {(task, stage) for number, task in enumerate(STEPS, 1) for stage in range(number, 4)} <= seen
    page = (config.results_run_dir / "report.html").read_text()
    assert f"<code>{method}</code>" in page
    for term in TERMS.get(method, set()) - {"alpha", "beta"}:
        assert f">{TITLES[term]}</text>" in page


def test_the_method_of_the_page_is_added_from_outside(
    config_file: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/how-to/add-a-method.md has it in full; nothing inside the package knows of it."""
    assert len(method_of_the_page().splitlines()) < 40
    (tmp_path / "held.py").write_text(method_of_the_page(), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    command = [str(config_file(run="held", method="held:Held")), "tasks=[pathvqa, slake-vqarad]", "held.strength=1e-1"]
    assert main(["train", *command]) == 0
    assert main(["evaluate", *command, "--stages", "seen"]) == 0
    config = load_config(command[0], command[1:])
    assert main(["report", str(config.run_dir)]) == 0
    assert config.model_dump()["held"] == {"strength": 0.1}
    rows = [json.loads(line) for line in (config.run_dir / "logs" / "slake-vqarad.jsonl").open()]
    assert [row["loss"] - row["ce"] for row in rows] == pytest.approx(
        [0.05 * row["distance"] for row in rows], abs=1e-5
    )
    assert rows[0]["distance"] == 0 < rows[-1]["distance"]
    page = (config.results_run_dir / "report.html").read_text()
    assert "<code>held:Held</code>, each with its weight" in page and ">distance</text>" in page
    capsys.readouterr()
    sweep = ["sweep", command[0], *command[1:], "--methods", "each", "held:Held", "--dry-run"]
    assert main(sweep) == 0
    assert "held-order0-seed42  to do" in capsys.readouterr().out


# The fourth file that a task of 4 steps writes with save_bank is its bank's memory, behind two checkpoints and the bank.
MEMORY_WRITTEN = KillPoint("mslora_cr.banks.io:save_file", call=4)
LOGGED = KillPoint("mslora_cr.training.callbacks:JsonLinesCallback.on_log", call=8, after=True)
"""In the second task, after a checkpoint; `joint` has one task, of more steps."""


@pytest.mark.parametrize(
    ("method", "point"),
    [
        *((method, LOGGED) for method in TRAINED if method not in (*BUILT_ALIKE, *WITHOUT_STATE)),
        ("ewc", MEMORY_WRITTEN),
        ("replay", MEMORY_WRITTEN),
        *(pytest.param(method, MEMORY_WRITTEN, marks=pytest.mark.long) for method in ("inflora", "keeplora")),
        *(pytest.param(method, LOGGED, marks=pytest.mark.long) for method in (*BUILT_ALIKE, *WITHOUT_STATE)),
    ],
)
def test_a_killed_run_of_a_method_ends_in_the_same_files(
    method: str, point: KillPoint, method_run: Trained, config_file: ConfigWriter, tmp_path: Path
) -> None:
    config = config_file(run=method, method=method)
    tasks = [] if method == "joint" else ["tasks=[pathvqa, slake-vqarad]"]
    run_until_killed(["train", str(config), *tasks], point, tmp_path / "output")
    assert main(["train", str(config), *tasks]) == 0
    ours, whole = load_config(config).run_dir, load_config(method_run(method)).run_dir
    written = sorted(path.relative_to(ours) for path in ours.glob("banks/*/*.safetensors"))
    assert len(written) >= BANKS.get(method, 2)
    for file in written:
        assert (ours / file).read_bytes() == (whole / file).read_bytes(), file


def test_memory_is_saved_with_the_bank_and_watched(method_run: Trained, tmp_path: Path) -> None:
    run = load_config(method_run("ewc")).run_dir
    memory = load_file(run / "banks" / "slake-vqarad" / "memory.safetensors")
    bank = load_bank(run / "banks" / "slake-vqarad").matrices
    assert memory.keys() == {f"fisher.{name}.{half}" for name in bank for half in "AB"}
    assert all((values >= 0).all() for values in memory.values()) and any(values.any() for values in memory.values())
    copied = shutil.copytree(run, tmp_path / "ewc")
    save_file({name: values + 1 for name, values in memory.items()}, copied / "banks/slake-vqarad/memory.safetensors")
    config = load_config(method_run("ewc"), [f"output_dir={tmp_path}"])
    with pytest.raises(BankError, match=r"memory\.safetensors is not what the ledger records"):
        Ledger.read(config).done("slake-vqarad")


def test_inflora_trains_b_where_earlier_inputs_are_not(method_run: Trained) -> None:
    """Its A is what the source says, and the inputs that it kept of earlier tasks are left as they are."""
    config = load_config(method_run("inflora"))
    banks = {name: load_bank(config.run_dir / "banks" / name) for name in STEPS}
    memories = [load_file(config.run_dir / "banks" / name / "memory.safetensors") for name in STEPS]
    for before, after in itertools.pairwise(memories):
        for name, basis in before.items():
            assert torch.equal(after[name][:, : basis.shape[1]], basis)
            torch.testing.assert_close(after[name].T @ after[name], torch.eye(after[name].shape[1]), atol=1e-5, rtol=0)
    for name, (a, b) in banks["PCAM"].matrices.items():
        assert (a @ memories[1][f"inputs.{name}"]).abs().max() < 1e-5
        lengths = a.norm(dim=1) * 3**0.5
        assert ((lengths - 1).abs().lt(1e-5) | lengths.eq(0)).all() and lengths[0] > 0
        assert b.any()


def test_fisher_information_is_the_mean_of_squared_gradients(method_run: Trained, tiny_model: Path) -> None:
    """Against transformers' own loss, sample by sample, at the first task's bank; all of its samples are taken."""
    config = load_config(method_run("ewc"))
    task = config.stream[0]
    base = load_base(config, "cpu")
    stack = BankStack(base.model, "merge")
    stack.add_trainable(config.lora.rank, config.lora.alpha, initial=load_bank(config.run_dir / "banks" / task.name))
    records = TrainingRecords(task_folder(config, task) / "train.json")
    samples = TrainDataset(records, task_image_roots(config, task), input_processor_of(config, base))
    totals = {parameter: torch.zeros_like(parameter) for parameter in stack.trainable_parameters()}
    for sample in (samples[index] for index in range(len(samples))):
        batch = TrainingCollator(0)([sample])
        del batch["record_index"]
        stack.model.zero_grad()
        answer = sum(label != -100 for label in sample["labels"])
        (stack.model(**batch).loss * answer).backward()
        for parameter, total in totals.items():
            total += parameter.grad.square() / len(samples)
    fisher = load_file(config.run_dir / "banks" / task.name / "memory.safetensors")
    for name, pair in stack.trainable().items():
        for half, parameter in zip("AB", pair, strict=True):
            torch.testing.assert_close(fisher[f"fisher.{name}.{half}"], totals[parameter], rtol=1e-4, atol=1e-12)


def test_online_ewc_adds_up_what_it_forgets_slowly(method_run: Trained, config_file: ConfigWriter) -> None:
    """Training alike up to the second bank, only what is kept differs: F̃_2 = γ F̃_1 + F_2."""
    config = config_file(run="ewc", method="ewc", ewc={"decay": 0.5, "strength": 1e-30})
    assert main(["train", str(config), "tasks=[pathvqa, slake-vqarad]"]) == 0
    per_task = ["tasks=[pathvqa, slake-vqarad]", "run=per_task", "ewc.mode=per_task"]
    assert main(["train", str(config), *per_task]) == 0
    online, single = (load_config(config).run_dir.parent / name / "banks" for name in ("ewc", "per_task"))
    first, second, alone = (
        load_file(folder / "memory.safetensors")
        for folder in (online / "pathvqa", online / "slake-vqarad", single / "slake-vqarad")
    )
    for name, values in second.items():
        torch.testing.assert_close(values, 0.5 * first[name] + alone[name], rtol=1e-5, atol=1e-12)


def test_changed_images_and_records_of_a_replayed_task_are_refused(
    method_run: Trained, config_file: ConfigWriter, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_data, tmp_path / "data")
    shutil.copytree(load_config(method_run("replay")).run_dir, tmp_path / "checkpoints" / "replay")
    ledger = tmp_path / "checkpoints" / "replay" / "ledger.json"
    content = json.loads(ledger.read_text())
    del content["tasks"]["PCAM"]
    ledger.write_text(json.dumps(content))
    records = tmp_path / "data" / "PathVQA" / "train.json"
    config = str(config_file(run="replay", method="replay"))
    image = records.parent / json.loads(records.read_text())[0]["image"]
    before = image.read_bytes()
    Image.new("RGB", (64, 64), "red").save(image)
    assert main(["train", config, f"data.root={tmp_path / 'data'}", "--force"]) == 1
    assert f"the images of {records} have changed since 'pathvqa' was trained on them" in capsys.readouterr().err
    image.write_bytes(before)
    records.write_text(json.dumps(json.loads(records.read_text())[1:]))
    assert main(["train", config, f"data.root={tmp_path / 'data'}", "--force"]) == 1
    assert f"{records} has changed since 'pathvqa' was trained on it" in capsys.readouterr().err


def test_incremental_is_mslora_cr_without_its_terms(method_run: Trained, config_file: ConfigWriter) -> None:
    config = config_file(regularization={"alpha": 0, "beta": 0})
    assert main(["train", str(config)]) == 0
    assert bank_bytes(load_config(config).run_dir) == bank_bytes(load_config(method_run("incremental")).run_dir)


def test_zero_shot_trains_nothing_and_says_so(config_file: ConfigWriter, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(config_file(method="zero_shot"))
    assert main(["train", config]) == 0
    assert "zero_shot trains nothing" in capsys.readouterr().err
    assert main(["train", config, "--task", "PCAM"]) == 1
    assert "--task PCAM: method zero_shot trains no bank for it; it trains nothing" in capsys.readouterr().err


@pytest.mark.parametrize("method", first_in_make_test("hide_llava", "mr_lora"))
def test_a_question_alone_is_answered_as_among_others(method: str, method_run: Trained) -> None:
    """One by one with the banks merged into the base by their shares, and in mixed batches beside it."""
    config = load_config(method_run(method))
    model = AnsweringModel(config)
    routing = json.loads((config.results_run_dir / "routed" / "routing.json").read_text())
    assert [stage["stage"] for stage in routing["stages"]] == [1, 2, 3]
    for task in config.stream:
        records = TestRecords(task_folder(config, task) / "test.jsonl")
        lines = (config.results_run_dir / "routed" / task.name / "stage-3" / "answer-file.jsonl").open()
        for index, line in zip(range(3), lines, strict=False):
            image = task_image_roots(config, task)[0] / records[index].images[0]
            asked = model.ask(image, records[index].text)
            answer = json.loads(line)
            assert (asked.text, asked.task) == (answer["text"], answer["metadata"]["routed_to"])
            assert sum(asked.probabilities.values()) == pytest.approx(1)
            assert len(asked.banks) == (1 if method == "mr_lora" else 4)


def test_a_mixture_may_start_as_its_source_s(config_file: ConfigWriter) -> None:
    """A of a standard deviation of 0.01, where a plain bank's is 1 / √(3 in); B zero, and routers as ever."""
    command = [str(config_file(method="moe_lora")), "tasks=[pathvqa]", "training.max_grad_norm=1e-9"]
    still = ["training.optim=sgd", "moe_lora.initialization=source"]
    assert main(["train", *command, *still]) == 0
    bank = load_bank(load_config(command[0]).run_dir / "banks" / "pathvqa")
    entries = torch.cat([a.flatten() for a, _ in bank.matrices.values()])
    assert entries.std().item() == pytest.approx(0.01, rel=0.05) and bank.experts == 4
    assert all(b.abs().max() < 1e-6 for _, b in bank.matrices.values())


def test_sd_lora_keeps_directions_and_learns_magnitudes(method_run: Trained) -> None:
    """Bank t is one plain bank of rank t · r, whose earlier parts are those of the bank before, each scaled anew."""
    config = load_config(method_run("sd_lora"))
    banks = [load_bank(config.run_dir / "banks" / name) for name in STEPS]
    assert [bank.rank for bank in banks] == [4, 8, 12] and {bank.scaling for bank in banks} == {2}
    for before, after in itertools.pairwise(banks):
        known, learned = decoupled(before, 4), decoupled(after, 4)
        moved = 0.0
        for name, (a, b) in known[0].matrices.items():
            parts = before.rank // 4
            torch.testing.assert_close(learned[0].matrices[name][0][: before.rank], a)
            torch.testing.assert_close(learned[0].matrices[name][1][:, : before.rank], b)
            moved += (learned[1][name][:parts] - known[1][name]).abs().sum().item()
        assert moved > 0.01


def test_banks_that_grow_are_imported_and_evaluated_from_where_they_are(method_run: Trained, tmp_path: Path) -> None:
    config = method_run("sd_lora")
    run = load_config(config).run_dir
    moved = [str(config), "run=again", f"output_dir={tmp_path}", f"results_dir={tmp_path}/results"]
    assert main(["bank", "import", *moved, "--from", str(run)]) == 0
    assert bank_bytes(tmp_path / "again") == bank_bytes(run)
    assert main(["evaluate", *moved, "run=elsewhere", "--banks", str(run), "--task", "PCAM"]) == 0


def test_a_learned_router_asks_for_the_questions_that_another_method_kept_none_of(
    method_run: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = method_run("each")
    moved = [str(config), "method=mr_lora", "run=again", f"output_dir={tmp_path}", f"results_dir={tmp_path}/results"]
    assert main(["bank", "import", *moved, "--from", str(load_config(config).run_dir)]) == 0
    assert main(["evaluate", *moved, "--stages", "final"]) == 1
    assert "mslora-cr bank fit-router" in capsys.readouterr().err
    assert main(["bank", "fit-router", *moved]) == 0
    assert main(["evaluate", *moved, "--stages", "final"]) == 0
