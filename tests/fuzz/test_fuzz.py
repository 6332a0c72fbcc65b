"""A campaign of hostile inputs: no traceback, no hang, bounded memory, nothing written elsewhere, the place is named.

`make test` tries some 300 inputs with a fixed seed, `make fuzz` thousands with the seed of `FUZZ_SEED`.
"""

import os
import resource
import shutil
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mslora_cr.reporting.report
import mslora_cr.stream.train  # noqa: F401  (imports take no input's time)
from mslora_cr.cli.main import main
from mslora_cr.data.images import check_name, load_image
from mslora_cr.data.records import DataError
from mslora_cr.models.layout import linear_name
from tests.fuzz.surfaces import SURFACES, Surface, image

TIMES = int(os.environ.get("FUZZ_TIMES", "1"))
"""How many times as many inputs as `make test` tries."""
SEED = int(os.environ.get("FUZZ_SEED", "0"))
SECONDS = 60
MEMORY = 1 << 31
"""Bytes by which the whole process may grow."""


class Hang(BaseException):
    """An input took too long."""


@contextmanager
def time_limit() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def elsewhere(folder: Path, inside: Path) -> set[tuple[str, int]]:
    """Everything below a folder, with its size, but what is inside another one."""
    found = set()
    for place, folders, files in os.walk(folder):
        if Path(place) == inside:
            folders.clear()
        else:
            paths = [Path(place) / name for name in files]
            found |= {(str(path), path.lstat().st_size) for path in paths}
    return found


def attempt(surface: Surface, random: Random, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command on one hostile input; what was wrong with how it ended, or nothing."""
    inside = folder / "inside"
    inside.mkdir()
    words = surface(inside, random)
    before = elsewhere(folder.parent, inside)
    os.chdir(inside / "made" if (inside / "made").exists() else inside)
    capsys.readouterr()
    try:
        with time_limit():
            status = main(words)
    except Hang:
        return f"{words}: still running after {SECONDS} seconds"
    except SystemExit as error:  # argparse
        status = 1 if error.code else 0
    except BaseException:
        return f"{words}: {traceback.format_exc()[-1500:]}"
    finally:
        os.chdir(folder)
    said = capsys.readouterr()
    if elsewhere(folder.parent, inside) != before:
        return f"{words}: wrote outside"
    if status not in (0, 1):
        return f"{words}: exit status {status}"
    if any(not mark.isprintable() and mark not in "\n\t\r" for mark in said.out + said.err):
        return f"{words}: a control character reached the terminal: {ascii(said.out + said.err)[:500]}"
    if status == 1 and len((said.out + said.err).strip()) < 20:
        return f"{words}: refused without a reason"
    if "Traceback" in said.err:
        return f"{words}: {said.err[-1500:]}"
    return ""


@pytest.fixture
def unchanged_folder() -> Iterator[None]:
    before = Path.cwd()
    yield
    os.chdir(before)


@pytest.mark.parametrize("name", SURFACES)
@pytest.mark.usefixtures("unchanged_folder")
def test_hostile_inputs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    surface, count = SURFACES[name]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    faults = []
    for number in range(count * TIMES):
        folder = tmp_path / str(number)
        folder.mkdir()
        if fault := attempt(surface, Random(f"{SEED} {name} {number}"), folder, capsys):
            faults.append(f"input {number}: {fault}")
        else:
            shutil.rmtree(folder)
    assert not faults, f"{len(faults)} of {count * TIMES} (seed {SEED})\n" + "\n".join(faults[:8])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    assert grown < MEMORY, f"grew by {grown >> 20} MB"


def test_hostile_images(tmp_path: Path) -> None:
    for number in range(40 * TIMES):
        path = tmp_path / "image"
        path.write_bytes(image(Random(f"{SEED} image {number}")))
        with time_limit():
            try:
                assert load_image(path).mode == "RGB"
            except DataError as error:
                assert str(path) in str(error)


BOUNDED = settings(
    max_examples=60 * TIMES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=SEED == 0
)


@BOUNDED
@given(st.text())
def test_a_name_that_is_accepted_stays_below(name: str) -> None:
    try:
        path = check_name(name)
    except DataError:
        return
    assert (Path("/root") / path).is_relative_to("/root") and ".." not in path.parts


@BOUNDED
@given(st.from_regex(r"(model\.|language_model\.)*layers\.\d{1,5}\.(mlp|self_attn)\.\w{1,9}", fullmatch=True))
def test_a_layer_that_is_known_has_one_name(name: str) -> None:
    found = linear_name(name)
    assert found is None or (linear_name(found) == found and found.isascii())
