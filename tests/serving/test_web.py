"""`mslora-cr web`: the page in a real browser, and what the server refuses."""

import io
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from starlette.testclient import TestClient

import mslora_cr
from mslora_cr.cli.main import main
from mslora_cr.data.records import DataError, TestRecord
from mslora_cr.data.sources.convert_images import first_picture
from mslora_cr.data.sources.rendering import Rendering
from mslora_cr.serving.answering import Answer
from mslora_cr.serving.questions import read_questions
from mslora_cr.serving.web import _score, make_app
from tests.helpers.dicom import dicom, saved

HOSTILE = "<img src=x onerror=\"document.title='owned'\">.png"
MARKUP = "<script>document.title='owned'</script><b id='bold'>Is this & that?</b>"
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def model(trained_config: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> mslora_cr.AnsweringModel:
    """The trained run over a base whose vocabulary is markup, so that every answer is."""
    place = tmp_path_factory.mktemp("hostile") / "model"
    shutil.copytree(tiny_model.parent, place)
    file = place / tiny_model.name / "tokenizer.model"
    vocabulary = ModelProto.FromString(file.read_bytes())
    for number, piece in enumerate(vocabulary.pieces):
        if piece.type == ModelProto.SentencePiece.NORMAL:
            piece.piece = f"▁<img▁src=x▁onerror=\"document.title='owned'\"><b▁id='bold'>{number}</b>"
    file.write_bytes(vocabulary.SerializeToString())
    return mslora_cr.load(trained_config, overrides=[f"model.path={place / tiny_model.name}"])


@pytest.fixture
def client(model: mslora_cr.AnsweringModel) -> TestClient:
    return TestClient(make_app(model, ["127.0.0.1"]), base_url="http://127.0.0.1")


@pytest.fixture
def address(model: mslora_cr.AnsweringModel) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(model, ["127.0.0.1"]), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
    listener.close()


def rows(model: mslora_cr.AnsweringModel, task: str) -> list[dict[str, Any]]:
    folder = Path(model.config.data.root) / model.config.task(task).folder
    return [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]


@pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no chromium and chromedriver here: apt-get install chromium-driver"
)
def test_from_upload_to_answer_in_a_browser(
    address: str, model: mslora_cr.AnsweringModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selenium import webdriver
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        wait = WebDriverWait(browser, 60, 0.1)
        find = lambda css: browser.find_element(By.CSS_SELECTOR, css)  # noqa: E731
        inner = "return [...document.querySelectorAll(arguments[0])].map((element) => element.innerText)"
        texts = lambda css: browser.execute_script(inner, css)  # noqa: E731

        def asked() -> None:
            find("#ask").click()
            wait.until(lambda _: find("#status").text not in ("answering…", ""))

        screen = {"width": 360, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)  # its window would be wider
        browser.get(address)
        wait.until(lambda _: find("body").get_attribute("data-ready"))
        picture = tmp_path / HOSTILE
        Image.new("RGB", (80, 50), "pink").save(picture, "PNG")
        find("#file").send_keys(str(picture))
        find("#question").send_keys(MARKUP)
        for box in browser.find_elements(By.CSS_SELECTOR, "#stages input"):
            if not box.is_selected():
                box.click()
        asked()
        assert find("#status").text == "done"
        answers = [model.ask(picture, MARKUP, stage=stage) for stage in range(4)]
        names = [task.name for task in model.config.stream]
        assert texts(".answer .text") == [answer.text or "(no words)" for answer in answers]
        assert any("<img src=x onerror" in answer.text for answer in answers)
        assert texts(".answer h2") == ["base model", *(f"after {stage}: {name}" for stage, name in enumerate(names, 1))]
        likeliest, share = next(iter(answers[3].probabilities.items()))
        assert texts("#probabilities div")[0] == f"{likeliest} {100 * share:.1f} %"
        assert find("#name").text == HOSTILE and not find("#truth").is_displayed()
        assert browser.title == "tiny" and not browser.find_elements(By.CSS_SELECTOR, "#bold, img[src='x']")

        # A test question has a truth and a score; with other words it has none.
        find("#tests summary").click()
        browser.execute_script(
            "let of = document.getElementById('of'); of.value = 'PCAM'; of.dispatchEvent(new Event('change'))"
        )
        question = rows(model, "PCAM")[0]
        wait.until(lambda _: question["text"] in texts("#questions li"))
        find("#questions li button").click()
        asked()
        assert find("#truth").text == f"Truth: {question['gt']}" and set(texts(".score")) <= {"right", "wrong"}
        assert len(texts(".score")) == 4
        find("#question").send_keys(" Really?")
        # Nothing of an earlier answer stands beside another question.
        assert not texts(".answer") and not find("#truth").is_displayed() and find("#status").text == ""
        asked()
        assert texts(".answer")
        find("#questions li button").click()  # nor beside another picture
        assert not texts(".answer") and not find("#router").is_displayed() and find("#status").text == ""
        find("#question").send_keys(" Really?")
        asked()
        assert not find("#truth").is_displayed() and not texts(".score")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
        find("#question").clear()
        asked()
        assert find("#status").text == "type a question" and not texts(".answer")  # nor below an error

        # A box drawn on the picture stands for <box> in the question; the box that is said is drawn dashed over it.
        given: list[Any] = []
        monkeypatch.setattr(model, "ask", partial(said, "at [0.2500, 0.2500, 1.0000, 0.7500]", given=given))
        find("#file").send_keys(str(picture))
        wait.until(lambda _: browser.execute_script("return document.getElementById('picture').naturalWidth") == 80)
        width, height = (find("#picture").size[side] for side in ("width", "height"))
        mouse = ActionChains(browser).move_to_element_with_offset(find("#picture"), -width // 4, -height // 4)
        mouse.click_and_hold().move_by_offset(width // 2, height // 4).release().perform()
        assert find("#question").get_attribute("value") == "<box>"
        find("#question").send_keys(Keys.HOME, "What is in ")
        asked()
        [box] = given[-1]["boxes"]
        assert box == pytest.approx([20, 12.5, 60, 25], abs=2) and given[-1]["question"] == "What is in <box>"
        style = "return [...document.querySelectorAll('#frame i')].map((mark) => [mark.className, mark.style.cssText])"
        (kind, drawn), (dashed, placed) = browser.execute_script(style)
        assert (kind, dashed) == ("asked", "said") and placed == "left: 25%; top: 10%; width: 75%; height: 80%;"
        assert drawn.startswith("left: 2") and find("#frame i.said").value_of_css_property("border-style") == "dashed"
        find("#question").send_keys(Keys.BACKSPACE)  # without its mark there is no box
        assert not browser.find_elements(By.CSS_SELECTOR, "#frame i")
    finally:
        browser.quit()


def test_the_server_refuses_what_no_page_of_its_own_asks(client: TestClient, model: mslora_cr.AnsweringModel) -> None:
    page = client.get("/")
    assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    fields = {"question": "what?", "of": "PCAM", "index": "0", "stages": "0"}
    assert client.post("/api/ask", data=fields, headers={"origin": "http://evil.example"}).status_code == 403
    assert (
        client.post("/api/ask", data=fields, headers={"origin": "http://127.0.0.1"}).json()["answers"][0]["stage"] == 0
    )
    for path, status, message in (
        ("/api/image?task=PCAM&index=99", 404, "PCAM has 4 questions"),
        ("/api/image?task=PCAM&index=../../etc/passwd", 400, "is not a number"),
        ("/api/image?task=../PCAM&index=0", 400, "unknown task"),
        ("/api/questions?task=nothing", 400, "unknown task"),
    ):
        answer = client.get(path)
        assert answer.status_code == status and message in answer.json()["error"]
    files = {"image": (HOSTILE, b"<svg onload=alert(1)>", "image/png")}
    reply = client.post("/api/ask", data={**fields, "stages": "1"}, files=files)
    assert reply.status_code == 400 and "not a readable image" in reply.json()["error"]
    assert client.post("/api/ask", data={**fields, "stages": "9"}).status_code == 400
    assert client.post("/api/ask", data={**fields, "stages": ""}).json()["error"] == "choose a stage"
    picture = client.get("/api/image?task=PCAM&index=0")
    assert picture.headers["content-type"] == "image/png" and picture.content.startswith(b"\x89PNG")
    listed = client.get("/api/questions", params={"task": "PCAM", "search": "LYMPH"}).json()
    assert listed["all"] == 4 and all("lymph" in row["question"].lower() for row in listed["questions"])


@pytest.mark.long
def test_the_command_serves_the_page(trained_config: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "mslora_cr", "web", str(trained_config), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[0]
            for _ in range(100):
                with suppress(httpx.ConnectError):
                    run = httpx.get(f"{address}api/run").json()["run"]
                    break
                time.sleep(0.1)
            else:
                raise AssertionError(f"{address} never answered")
            assert run == "tiny"
        finally:
            process.terminate()


def test_a_port_that_is_taken_is_told(trained_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["web", str(trained_config), "--port", str(taken.getsockname()[1])]) == 1
    assert "choose another --port" in capsys.readouterr().err


def test_a_dicom_file_is_answered_like_the_picture_that_convert_makes_of_it(client: TestClient, tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    path = saved(dicom(np.arange(256, dtype=np.uint16).reshape(16, 16), PixelSpacing=[3, 1]), tmp_path / "a.dcm")
    fields = {"question": "What?", "stages": "0"}
    sent = [
        client.post("/api/ask", files={"image": content}, data=fields)
        for content in (path.read_bytes(), first_picture(path.read_bytes(), Rendering()))
    ]
    assert [response.status_code for response in sent] == [200, 200]
    assert sent[0].json() == sent[1].json()
    seen = client.post("/api/preview", files={"image": path.read_bytes()})
    with Image.open(io.BytesIO(seen.content)) as picture:
        assert seen.headers["content-type"] == "image/png" and picture.size == (16, 48)
    assert client.post("/api/preview", files={"image": b"none"}).status_code == 400
    assert client.post("/api/preview", headers={"origin": "http://evil.example"}).status_code == 403


def test_a_box_that_is_said_comes_in_shares_of_the_picture(
    client: TestClient, model: mslora_cr.AnsweringModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLaVA-Med says fractions of the padded square: of 40 × 20 the picture is the middle half of its height."""
    monkeypatch.setattr(model, "ask", partial(said, "at [0.2500, 0.2500, 1.0000, 0.7500]"))
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20)).save(buffer, "PNG")
    found = client.post("/api/ask", files={"image": buffer.getvalue()}, data={"question": "where?", "stages": "0"})
    assert found.json()["answers"][0]["box"] == [0.25, 0, 1, 1] and found.json()["box"] is None
    monkeypatch.setattr(model, "ask", partial(said, "nowhere"))
    found = client.post("/api/ask", files={"image": buffer.getvalue()}, data={"question": "where?", "stages": "0"})
    assert found.json()["answers"][0]["box"] is None


def test_a_test_question_is_asked_as_evaluate_asks_it_and_scored_by_its_kind(
    client: TestClient, model: mslora_cr.AnsweringModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Browsers send a line break as CR LF; a question with options has several lines."""
    asked = []
    monkeypatch.setattr(model, "question_of", lambda record: "Is it?\nA. yes\nB. no")
    monkeypatch.setattr(model, "ask", lambda *words, **rest: asked.append(words[1]) or said("yes", *words, **rest))
    fields = {"question": "Is it?\r\nA. yes\r\nB. no", "of": "PCAM", "index": "0", "stages": "0"}
    found = client.post("/api/ask", data=fields).json()
    assert asked == ["Is it?\nA. yes\nB. no"] and found["truth"] is not None
    listed = client.get("/api/questions", params={"task": "PCAM", "search": "b. no"}).json()
    assert listed["questions"][0]["question"] == asked[0]

    def question(gt: str | list[str], answer_type: str, **further: Any) -> TestRecord:
        fields = {"question_id": 1, "image": "a.png", "text": "?", "gt": gt, "answer_type": answer_type, **further}
        return TestRecord.model_validate(fields)

    offered = question("A", "CLOSED", options=["lung", "heart"])
    assert [_score(text, offered) for text in ("A", "heart", "lung")] == ["right", "wrong", "right"]
    normal = question("normal", "CLOSED", answer_kind="choice")
    assert [_score(text, normal) for text in ("normal", "abnormal")] == ["right", "wrong"]
    assert _score("a large mass", question(["cyst", "large mass"], "OPEN")) == "F1 100 %"


def test_half_of_a_surrogate_pair_is_no_question(model: mslora_cr.AnsweringModel) -> None:
    with pytest.raises(mslora_cr.UserError, match="half of a surrogate pair"):
        model.ask([], "Is it \ud83d?", stage=0)


def said(
    text: str,
    picture: Image.Image,
    question: str,
    task: str | None,
    stage: int,
    given: list[Any] | None = None,
    **how: Any,
) -> Answer:
    """An answer of these words; `given` gets what was asked."""
    if given is not None:
        given.append({"question": question, **how})
    return Answer(text, (), task, stage, (), {}, 1.0, False)


def test_boxes_of_a_question_are_written_as_the_family_writes_them(
    client: TestClient, model: mslora_cr.AnsweringModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Drawn on the page in shares, given to `ask` in pixels: in LLaVA-Med's prompt they are as in its records."""
    asked: list[str] = []
    take = model._asked
    monkeypatch.setattr(model, "_asked", lambda question, *rest: asked.append(question) or take(question, *rest))
    picture = Image.new("RGB", (40, 20), "pink")
    picture.save(tmp_path / "a.png")
    text, written = "what is in <box>?", "what is in [0.2500, 0.2500, 1.0000, 0.7500]?"
    fields = {"question": text, "stages": "0", "boxes": "[[0.25, 0, 1, 1]]"}
    answered = client.post("/api/ask", files={"image": (tmp_path / "a.png").read_bytes()}, data=fields)
    assert answered.status_code == 200
    model.ask(picture, text, stage=0, boxes=[(10, 0, 40, 20)])
    assert asked == [written] * 2
    (tmp_path / "asked.jsonl").write_text(
        json.dumps({"question": text, "image": "a.png", "boxes": [[10, 0, 40, 20]]}) + "\n" + text, encoding="utf-8"
    )
    first, second = read_questions(str(tmp_path / "asked.jsonl"), ["b.png"])
    assert (first.boxes, second.boxes) == (([10, 0, 40, 20],), ())
    for boxes, message in (([[0, 0, 41, 20]], "no box inside"), ([[0, 0, 9, 9]] * 2, "2 boxes for 1 marks")):
        with pytest.raises(DataError, match=message):
            model.ask(picture, text, stage=0, boxes=boxes)
    with pytest.raises(DataError, match="a picture that they are in"):
        model.ask([], text, stage=0, boxes=[[0, 0, 9, 9]])
    for drawn in ("[[0, 0, 1]]", "no", json.dumps([[0, 0, 1, 1]] * 21)):
        reply = client.post("/api/ask", data={"question": text, "of": "PCAM", "index": "0", "boxes": drawn})
        assert reply.status_code == 400 and "give at most 20" in reply.json()["error"]
