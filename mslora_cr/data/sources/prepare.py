"""`mslora-cr data prepare NAME --raw PATH`: a raw download becomes a folder of the published tree.

The annotations say which images are needed and under which names. Each name is looked for in the raw download
by its longest path suffix, and linked or copied to where it points below the data root. Nothing is written
elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from mslora_cr.data.images import check_images, check_name, image_roots, resolve_image
from mslora_cr.data.records import DataError, TestRecords, TrainingRecords
from mslora_cr.data.sources.annotations import annotation_rows, build_annotations
from mslora_cr.data.sources.catalog import DataSet
from mslora_cr.data.sources.pcam import export_images, has_arrays
from mslora_cr.data.sources.raw import RawData, RawFile, alike, extract, fingerprint
from mslora_cr.utils.files import hidden_folder
from mslora_cr.utils.walk import composed
from mslora_cr.utils.workers import cores

MAX_IMAGE_BYTES = 256 << 20


@dataclass
class Prepared:
    """The result of preparing a data set. `missing` and `ambiguous` images (with the candidates) were not placed."""

    placed: int = 0
    present: int = 0
    missing: list[str] = field(default_factory=list)
    ambiguous: dict[str, list[str]] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    """With `skip_missing`: placed images that cannot be decoded, and were removed again."""
    rows: Mapping[str, int] | None = None
    """Rows built by split, with --annotations."""


def prepare(
    dataset: DataSet,
    raw: Sequence[Path],
    data_root: Path,
    annotations: bool = False,
    copy: bool = False,
    questions: Mapping[str, str] | None = None,
    progress: bool = True,
    skip_missing: bool = False,
) -> Prepared:
    """Bring a data set's images from its raw download into `data_root`; safe to repeat.

    Loose images are linked, or copied with `copy`; those in archives are unpacked. With `annotations`, `train.json`,
    `test.jsonl` and, for a release's validation split, `val.jsonl` are built first (`questions`: templates that replace
    the catalogue's). With `skip_missing` they are built last, without the rows of images that are missing, ambiguous or
    unreadable.

    Raises:
        DataError: No or malformed annotations, an unsafe archive or image name, a way out of the data root.
    """
    folder = data_root / dataset.folder
    _check_inside(folder, data_root)
    folder.mkdir(parents=True, exist_ok=True)
    result = Prepared()
    with hidden_folder(folder / "prepare") as work, RawData(raw, work) as data:
        if annotations and not skip_missing:
            result.rows = build_annotations(dataset, data, folder, questions)
        if skip_missing:
            answers = {str(check_name(row.image)): row.answer for row in annotation_rows(dataset, data, questions)}
        else:
            answers = _named_images(dataset, folder)
        targets = _targets(answers, dataset, data_root)
        result.present = len(answers) - len(targets)
        if has_arrays(data):
            export_images(data, targets, answers, progress)
            result.placed = len(targets)
        else:
            # All names take part, so that a repeated run matches like the first one.
            matches = _match(dataset, list(answers), data, result)
            # An image that is already in place, perhaps by hand, is no longer ambiguous.
            result.ambiguous = {name: candidates for name, candidates in result.ambiguous.items() if name in targets}
            result.missing = [name for name in targets if name not in matches and name not in result.ambiguous]
            place_files({name: matches[name] for name in targets if name in matches}, targets, copy, progress)
            result.placed = len(targets) - len(result.missing) - len(result.ambiguous)
        if skip_missing:
            gone = {*result.missing, *result.ambiguous}
            result.unreadable = _take_away_unreadable(answers.keys() - gone, targets, dataset, data_root, progress)
            result.rows = build_annotations(dataset, data, folder, questions, gone | {*result.unreadable})
    return result


def _take_away_unreadable(
    names: Iterable[str], targets: Mapping[str, Path], dataset: DataSet, data_root: Path, progress: bool
) -> list[str]:
    """Return the images that cannot be decoded; those that were just placed are removed again."""
    roots = image_roots(data_root, dataset.folder, dataset.image_folders)
    paths = {resolve_image(name, roots): name for name in sorted(names)}
    bad = [paths[path] for path, _ in check_images(list(paths), cores(), progress)]
    for name in bad:
        if name in targets:
            targets[name].unlink()
    return bad


def _named_images(dataset: DataSet, folder: Path) -> dict[str, str]:
    """Return every image that the annotations name, with the (last) answer about it."""
    if not (folder / "train.json").exists() and not (folder / "test.jsonl").exists():
        build = "or build them with --annotations" if dataset.questions else "they are on the hub only"
        raise DataError(f"{folder}: no train.json or test.jsonl; fetch them with `mslora-cr data download`; {build}")
    names = {}
    for location, images, answer in _uses(folder):
        for name in images:
            try:
                names[str(check_name(name))] = answer
            except DataError as error:
                raise DataError(f"{location}: {error}") from None
    return names


def _uses(folder: Path) -> Iterator[tuple[str, tuple[str, ...], str]]:
    training, test = TrainingRecords(folder / "train.json"), TestRecords(folder / "test.jsonl")
    for index, conversation in enumerate(training):
        yield f"{training.path}: record {index}", conversation.images, conversation.turns[-1].text
    validation = folder / "val.jsonl"
    for records in (test, *([TestRecords(validation)] if validation.is_file() else [])):
        for index, question in enumerate(records):
            yield f"{records.path}: question {index}", question.images, question.gt


def _targets(names: Iterable[str], dataset: DataSet, data_root: Path) -> dict[str, Path]:
    """Return where each image goes that is not in place yet. Names count from the data set's folder, or from the
    data root if they start with that folder."""
    roots = image_roots(data_root, dataset.folder, dataset.image_folders)
    targets = {}
    for name in names:
        if not _in_place(name, roots):
            from_root = PurePosixPath(name).parts[0] == dataset.folder
            targets[name] = (data_root if from_root else data_root / dataset.folder) / name
    for parent in {target.parent for target in targets.values()}:
        _check_inside(parent, data_root)
    return targets


def _in_place(name: str, roots: Sequence[Path]) -> bool:
    try:
        return bool(resolve_image(name, roots))
    except DataError:
        return False


def _check_inside(folder: Path, data_root: Path) -> None:
    """Refuse links below the data root that lead writing out of it."""
    if not folder.resolve().is_relative_to(data_root.resolve()):
        raise DataError(
            f"{folder} leads to {folder.resolve()}, outside the data root {data_root}: nothing is written "
            "there. Remove the link, or put the missing images in place yourself"
        )


Likeness = tuple[int, int]


def _match(dataset: DataSet, names: Sequence[str], data: RawData, result: Prepared) -> dict[str, RawFile]:
    """Return the raw file of each name. A file that several names could mean belongs to the most similar ones."""
    shared = Counter(PurePosixPath(name).name for name in names)
    matches: dict[str, tuple[Likeness, RawFile]] = {}
    claims: dict[RawFile, Likeness] = {}
    for name in names:
        path = PurePosixPath(name)
        if shared[path.name] > 1 or path.parent.name not in ("", dataset.folder, *dataset.image_folders):
            # `source.jpg` alone says nothing: its folder must be the same, too.
            candidates = data.named_below(path.parent.name, path.name)
        else:
            candidates = data.named(path.name)
        highest = max((_likeness(path, file) for file in candidates), default=(0, 0))
        best = [file for file in candidates if _likeness(path, file) == highest]
        if len(best) > 1 and len({fingerprint(file) for file in best}) > 1:
            result.ambiguous[name] = [str(file.path) for file in best]
        elif best:
            matches[name] = highest, best[0]
            claims[best[0]] = max(highest, claims.get(best[0], highest))
    return {name: file for name, (likeness, file) in matches.items() if likeness == claims[file]}


def _likeness(name: PurePosixPath, file: RawFile) -> Likeness:
    """Return the length of the common path suffix; then how many folders are shared anywhere (`test/person1.jpeg` is
    `test/NORMAL/person1.jpeg` rather than `train/NORMAL/person1.jpeg`)."""
    ours, theirs = (reversed([*map(composed, path.parts[:-1]), alike(path.name)]) for path in (name, file.path))
    pairs = zip(ours, theirs, strict=False)
    suffix = next((i for i, (our, their) in enumerate(pairs) if our != their), len(name.parts))
    return suffix, len(set(name.parts) & set(file.path.parts))


def place_files(matches: Mapping[str, RawFile], targets: Mapping[str, Path], copy: bool, progress: bool) -> None:
    """Link or copy raw files, and unpack those in archives.

    Args:
        matches: The raw file of each name.
        copy: Copy loose files instead of linking them.

    Raises:
        DataError: A file is too large for an image.
    """
    packed: dict[RawFile, list[Path]] = {}
    with tqdm(total=len(matches), desc="images", unit="image", disable=not progress) as bar:
        for name, file in matches.items():
            target = targets[name]
            if file.size > MAX_IMAGE_BYTES:
                raise DataError(f"image {name!r}: {file.path} holds {file.size:,} bytes, too large for an image")
            if file.member or copy:
                packed.setdefault(file, []).append(target)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)  # The link's target is gone.
            target.symlink_to(file.container.resolve())
            bar.update()
        extract(packed, bar.update)
