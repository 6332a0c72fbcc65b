"""The model card of an exported run, made from its ledger, its evaluation and the data sets' catalogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import EvalResult, ModelCardData

from mslora_cr.config.schema import StreamConfig
from mslora_cr.data.sources.catalog import catalog
from mslora_cr.data.sources.leaks import found_by_check, sentences
from mslora_cr.evaluation.results import Cell, Evaluation
from mslora_cr.models.family import Family, family_of
from mslora_cr.models.save import class_of
from mslora_cr.reporting.shown_to_do import COLUMNS, TITLE, shown_to_do
from mslora_cr.runs.entries import RunLedger
from mslora_cr.statistics.interval import CONFIDENCE

Uploaded = Literal["peft", "merged"]
OVERLAP = {"precision": "word-overlap precision", "recall": "word-overlap recall"}
"""The card's names of these metrics of `metrics.json`, which do not measure diagnoses."""
SECRET = ("token", "key", "secret", "password")


@dataclass(frozen=True)
class Card:
    """The content of a model card.

    Attributes:
        repo: The repository.
        kind: The kind of upload.
        base: The base model's name on the hub.
        folders: By task, or `model`, its folder in the repository; "" is the repository itself.
        banks: By the same keys, the banks that answer.
        evaluation: The run's evaluation, if there is one.
    """

    config: StreamConfig
    repo: str
    kind: Uploaded
    base: str
    folders: Mapping[str, str]
    banks: Mapping[str, Sequence[str]]
    ledger: RunLedger
    evaluation: Evaluation | None

    @cached_property
    def _class(self) -> str:
        return class_of(Path(self.config.model.path))[0]

    @cached_property
    def _family(self) -> Family:
        return family_of(Path(self.config.model.path))

    def text(self) -> str:
        """Return the whole `README.md`."""
        scores = (self._shown_to_do, self._scores)
        parts = (self._head, self._title, self._loading, *scores, self._data, self._use, self._training)
        return "\n\n".join(text for part in parts if (text := part().strip())) + "\n"

    def _head(self) -> str:
        modalities = sorted({task.modality for task in self.config.stream})
        tags = [
            "medical",
            "continual-learning",
            "mslora-cr",
            *self._family.tags,
            self.config.method.replace(":", "-"),
            *modalities,
        ]
        data = ModelCardData(
            base_model=self.base,
            base_model_relation="adapter" if self.kind == "peft" else "finetune",
            library_name="peft" if self.kind == "peft" else "transformers",
            pipeline_tag="image-text-to-text",
            language="en",
            license="other",
            license_name="base-model-and-data-sets",
            license_link="#data-and-licences",
            tags=[*tags, *(["lora"] if self.kind == "peft" else [])],
            model_name=self.config.run,
            eval_results=self._results() or None,
        )
        return f"---\n{data.to_yaml()}\n---"

    def _results(self) -> list[EvalResult]:
        return [
            EvalResult(
                task_type="visual-question-answering",
                dataset_type=task,
                dataset_name=_title(task),
                dataset_split="test",
                metric_type=OVERLAP.get(metric, metric).replace(" ", "_"),
                metric_name=OVERLAP.get(metric, metric),
                metric_value=round(value, 2),
                metric_args={
                    "confidence": CONFIDENCE,
                    "low": round(cell.intervals[metric][0], 2),
                    "high": round(cell.intervals[metric][1], 2),
                    "questions": cell.rows,
                },
            )
            for task, cell in self._cells().items()
            for metric, value in cell.metrics.items()
        ]

    def _cells(self) -> dict[str, Cell]:
        """Return the ledger's entries of the uploaded banks, by task."""
        cells: dict[str, Cell] = {}
        for cell in self.evaluation.cells if self.evaluation else ():
            banks = self.banks.get(cell.task, self.banks.get("model"))
            if banks is not None and list(banks) == list(cell.banks):
                cells[cell.task] = cell
        return cells

    def _title(self) -> str:
        what = "LoRA adapters" if self.kind == "peft" else "Models with their LoRA banks merged in"
        tasks = "\n".join(
            f"- `{folder or '.'}`: {_title(name) if name != 'model' else 'every task'}, "
            f"banks {', '.join(self.banks[name]) or 'none: the base model itself'}"
            for name, folder in self.folders.items()
        )
        return f"""# {_cell(self.config.run)}

{what} of [MSLoRA-CR](https://github.com/VentusAislant/MSLoRA_CR), continual learning of biomedical imaging tasks, one
LoRA bank per task over `{self.base}`. Method `{self.config.method}`, a stream of {len(self.config.tasks)} tasks:
{", ".join(_cell(task.name) for task in self.config.stream)}.
{self._quantised()}
{tasks}"""

    def _quantised(self) -> str:
        """Return the base model of training, if the uploaded one differs."""
        if not self.config.model.quantization:
            return ""
        return (
            f"\nThe banks were trained beside a {self.config.model.quantization} base; with the base in "
            f"{self.config.model.dtype} answers differ, and scores must be measured again.\n"
        )

    def _loading(self) -> str:
        name, folder = next(iter(self.folders.items()))
        where = f', subfolder="{folder}"' if folder else ""
        if self.kind == "merged":
            load = f"""model = {self._class}.from_pretrained("{self.repo}"{where}, dtype="auto")
processor = AutoProcessor.from_pretrained("{self.repo}"{where})"""
        else:
            load = f"""# {self.base} in transformers' layout, as `mslora-cr export RUN --format peft` writes it
base = "exported/base"
model = {self._class}.from_pretrained(base, dtype="auto")
model = PeftModel.from_pretrained(model, "{self.repo}"{where})
processor = AutoProcessor.from_pretrained(base)"""
        peft = "from peft import PeftModel\n" if self.kind == "peft" else ""
        return f"""## How to load

```python
{peft}from PIL import Image
from transformers import AutoProcessor, {self._class}

{load}
{self._asking(name)}
ids = model.generate(**inputs.to(model.dtype), max_new_tokens=100, do_sample=False)
print(processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```"""

    def _asking(self, name: str) -> str:
        """Return the lines of code that make a question's inputs."""
        if self._family.own_template:
            return f"""image = Image.open("image.png").convert("RGB")
content = [{{"type": "image", "image": image}}, {{"type": "text", "text": "Your question about {name}?"}}]
asked = {{"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}}
inputs = processor.apply_chat_template([{{"role": "user", "content": content}}], **asked)"""
        return f"""content = [{{"type": "image"}}, {{"type": "text", "text": "Your question about {name}?"}}]
prompt = processor.apply_chat_template([{{"role": "user", "content": content}}])
image = Image.open("image.png").convert("RGB")
inputs = processor(text=prompt, images=[image], add_special_tokens=False, return_tensors="pt")"""

    def _scores(self) -> str:
        cells = self._cells()
        if not cells:
            return "## Scores\n\nThese banks have not been evaluated with this project."
        rows = [
            f"| {_cell(task)} | {cell.rows} | {OVERLAP.get(metric, metric)} | {value:.2f} | "
            f"{cell.intervals[metric][0]:.2f} to {cell.intervals[metric][1]:.2f} |"
            for task, cell in cells.items()
            for metric, value in cell.metrics.items()
        ]
        leaks = sentences(found_by_check(self.config, {task: cell.questions for task, cell in cells.items()}))
        return "\n".join(
            [
                "## Scores",
                "",
                f"In percent, greedy answers to the test questions, with intervals of {CONFIDENCE:.0%} over "
                "the questions. They do not cover other seeds, orders of tasks, or hospitals.",
                "",
                "| task | questions | metric | score | interval |",
                "| --- | --- | --- | --- | --- |",
                *rows,
                "",
                "Word-overlap precision and recall are the shares of an open answer's words, and of its truth's, that "
                "the two have in common: neither the positive predictive value nor the sensitivity of a diagnosis.",
                *(f"\n**{_cell(task)}**: the data check found that {found}." for task, found in leaks.items()),
            ]
        )

    def _shown_to_do(self) -> str:
        """Return one line for each task: what was measured of it, and what is not known."""
        cells = self._cells().values()
        if not cells:
            return ""
        leaks = found_by_check(self.config, {cell.task: cell.questions for cell in cells})
        rows = [f"| {' | '.join(map(_cell, row))} |" for row in shown_to_do(cells, self.config.results_run_dir, leaks)]
        head = [f"## {TITLE}", "", f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
        return "\n".join([*head, *rows])

    def _data(self) -> str:
        rows = []
        for task in self.config.stream:
            entry = catalog().get(task.name)
            origin = (entry.source, entry.license) if entry else ("the author's own", "ask the author")
            rows.append(f"| {_cell(_title(task.name))} | {task.modality} | {_cell(origin[0])} | {_cell(origin[1])} |")
        return "\n".join(
            [
                "## Data and licences",
                "",
                "| data set | modality | source | licence |",
                "| --- | --- | --- | --- |",
                *rows,
                "",
                "The terms of the base model and of every data set above apply to what was trained on them; the "
                "sources have the last word. Licences are those that MSLoRA-CR's catalogue states for data sets of "
                "these names; whether the data were theirs is for the author to say.",
            ]
        )

    def _use(self) -> str:
        return """## Intended use and limits

For research on continual learning and on vision-language models in medical imaging. **Not for clinical use**: not for
diagnosis, triage or treatment, nor for advice to patients; it is no medical device and was not tried on patients' care.

- It answers every question, also about pictures of a kind that it has never seen, and does not say how sure it is.
- The task of a question must be known, to take its adapter or model; the scores above are given that.
- Test pictures come from the same sources as training pictures; expect less elsewhere, and for people whom those data
  sets hold few of.
- Biases and errors of the base model remain. Its images and text are largely English-language publications."""

    def _training(self) -> str:
        rows = [
            f"| {_cell(task)} | {entry.steps} | {_number(entry.train_loss)} | {_number(entry.seconds)} |"
            for task, entry in self.ledger.tasks.items()
        ]
        versions = ", ".join(f"{name} {version}" for name, version in self.ledger.versions.items())
        commit = (self.ledger.git or {}).get("commit", "not recorded")
        gpus = ", ".join(self.ledger.hardware.get("gpus", [])) or "none"
        settings = _without_secrets(self.config.fingerprint_fields())
        return "\n".join(
            [
                "## Training",
                "",
                "| task | steps | training loss | seconds |",
                "| --- | --- | --- | --- |",
                *rows,
                "",
                f"Made with {versions or 'versions that are not recorded'}; commit {commit}; GPUs: {gpus}.",
                "",
                "What decided the banks, as the run's configuration has it:",
                "",
                "```yaml",
                yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip(),
                "```",
            ]
        )


def _title(task: str) -> str:
    return catalog()[task].title if task in catalog() else task


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "not known"


def _cell(text: str) -> str:
    """Return text that stays within its cell of a Markdown table and is no markup."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _without_secrets(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {
            key: _without_secrets(value)
            for key, value in node.items()
            if not any(word in str(key).lower() for word in SECRET) or isinstance(value, int | float)
        }
    return [_without_secrets(item) for item in node] if isinstance(node, list) else node
