"""What `ask` refuses before a model is loaded."""

import logging
from pathlib import Path

import pytest

from mslora_cr.data.records import DataError
from mslora_cr.serving.questions import Ask, check_asked


def test_empty_questions_and_missing_images_are_refused(tmp_path: Path) -> None:
    image = tmp_path / "scan.png"
    image.touch()
    check_asked([Ask("left?", (str(image),))], [str(image)])
    with pytest.raises(DataError, match="a question is empty"):
        check_asked([Ask(" ", (str(image),))], [])
    for questions, images in (([Ask("left?", (str(tmp_path / "no.png"),))], []), ([], [str(tmp_path / "no.png")])):
        with pytest.raises(DataError, match=r"no\.png: there is no such image file"):
            check_asked(questions, images)


def test_a_question_without_an_image_is_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mslora_cr"), "propagate", True)
    check_asked([Ask("left?", ())], [])
    assert "1 of 1 questions have no image" in caplog.text
