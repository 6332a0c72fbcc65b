"""The data card of a data set: patients, attributes, origin, and what the test questions can show."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from mslora_cr.data.open.catalog import PREPARED, OpenSource, open_sources
from mslora_cr.data.records import TestRecord, TestRecords, TrainingRecords
from mslora_cr.data.sources.catalog import DataSet, catalog
from mslora_cr.data.sources.check_report import DataCard
from mslora_cr.statistics.sample_size import shown_by
from mslora_cr.utils.strict_json import JsonError, read_object

MOST_VALUES = 8
"""Values of an attribute that a card lists; of more numbers it gives the range, of more texts the commonest."""
CONVERTED = "convert.json"


def data_card(folder: Path, name: str, training: TrainingRecords, test: TestRecords) -> DataCard:
    """Return the card of a data set whose files are open.

    Args:
        folder: The data set's folder.
        name: A name of the catalogue or another name.
    """
    entry = _open_source(folder) or catalog().get(name)
    trained = {str(record.patient) for record in training if record.patient is not None}
    tested: set[str] = set()
    answers: Counter[str] = Counter()
    groups: set[str] = set()
    without = 0
    for record in test:
        patient = None if record.patient is None else str(record.patient)
        without += patient is None
        tested |= set() if patient is None else {patient}
        if record.answer_type == "CLOSED":
            answers[record.gt.strip().lower()] += 1
            groups.add(
                next(iter(record.images), f"question {record.question_id}") if patient is None else f"patient {patient}"
            )
    rarest = min(answers.values(), default=0) if len(answers) > 1 else 0
    return DataCard(
        unit=entry.unit if entry else "patient",
        train_patients=len(trained),
        test_patients=len(tested),
        test_without_patient=without,
        attributes=_attributes(test),
        source=entry.source if entry else "the author's own",
        licence=entry.license if entry else "ask the author",
        made=_made(folder, entry),
        shows=shown_by(answers.total(), len(groups), rarest) if answers else "",
    )


def _open_source(folder: Path) -> OpenSource | None:
    """Return the open stream's source from which `data prepare open` made a data set; None for any other."""
    try:
        repository = read_object(folder / PREPARED).get("repository")
    except JsonError:
        return None
    return next((source for source in open_sources().values() if source.repository == repository), None)


def _attributes(test: Iterable[TestRecord]) -> dict[str, dict[str, int]]:
    values: dict[str, Counter[str | int | float]] = defaultdict(Counter)
    for record in test:
        for name, value in record.attributes.items():
            values[name][value] += 1
    return {name: _commonest(counts) for name, counts in values.items()}


def _commonest(counts: Counter[str | int | float]) -> dict[str, int]:
    numbers = [value for value in counts if not isinstance(value, str)]
    if len(counts) > MOST_VALUES and len(numbers) == len(counts):
        return {f"{min(numbers):g} to {max(numbers):g}": counts.total()}
    listed = {str(value): count for value, count in counts.most_common(MOST_VALUES)}
    rest = counts.total() - sum(listed.values())
    return listed | ({"others": rest} if rest else {})


def _made(folder: Path, entry: DataSet | OpenSource | None) -> str:
    if isinstance(entry, OpenSource):
        return "by the open stream's rule (`data prepare open`)"
    if (folder / CONVERTED).is_file():
        try:
            split = read_object(folder / CONVERTED).get("split_by")
        except JsonError:
            split = None
        return f"converted from a table{f', {split}' if isinstance(split, str) and split else ''}"
    return "as published, or by the catalogue's wording (`data prepare`)" if entry else "the author's own"
