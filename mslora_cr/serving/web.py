"""A page in the browser: a picture, a question, and the answers of several stages side by side."""

from __future__ import annotations

import io
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlsplit

from PIL import Image
from pydantic import Field, TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from mslora_cr.clinical.asked import asked_answers, typed_columns
from mslora_cr.data.answers.boxes import Box, read_box
from mslora_cr.data.images import load_image, resolve_image
from mslora_cr.data.records import AnswerType, TestRecord, TestRecords, shown_images
from mslora_cr.data.sources.convert_images import first_picture
from mslora_cr.data.sources.rendering import Rendering
from mslora_cr.data.tasks import task_image_roots, test_records
from mslora_cr.metrics.published import score_answers
from mslora_cr.metrics.typed import CHOICE, COUNT
from mslora_cr.serving.answering import AnsweringModel, open_image
from mslora_cr.utils.errors import UserError

PAGE = Path(__file__).with_name("page")
MOST_BYTES = 32 << 20
"""The largest uploaded picture."""
MOST_FORM = MOST_BYTES + (1 << 20)
"""The largest body of a request, picture and fields; a larger one is refused before it fills memory or disk."""
TOO_LARGE = f"a picture may have {MOST_BYTES >> 20} MiB"
LARGEST_SIDE = 640
"""The longest side, in pixels, of a picture on the page."""
MOST_BOXES = 20
"""The most boxes of one question."""
MOST_LISTED = 200
"""The most test questions that one search shows."""
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
"""Headers that let the page load nothing from elsewhere, and run only its own script."""


class _Answered(NamedTuple):
    text: str
    gt: str
    answer_type: AnswerType


class _Web:
    """Handles the page's requests. There is one model, so it answers one question at a time."""

    def __init__(self, model: AnsweringModel, abstain_below: float | None, risk: float | None) -> None:
        self.model, self._lock = model, Lock()
        self._abstain_below, self._risk = abstain_below, risk
        self._records = lru_cache(maxsize=None)(self._open)

    def run(self, request: Request) -> Response:
        config = self.model.config
        return JSONResponse(
            {
                "run": config.run,
                "method": config.method,
                "tasks": [task.name for task in config.stream],
                "stages": self.model.run.stages,
                "routes": self.model.task is None and self.model.run.needs_task,
                "task": self.model.task,
            }
        )

    def questions(self, request: Request) -> Response:
        """Return the test questions of a task that contain a text."""
        records, wanted = self._records(self._task(request)), request.query_params.get("search", "").lower()
        rows: list[dict[str, Any]] = []
        for index, record in enumerate(records):
            question = self.model.question_of(record)
            if record.images and wanted in question.lower():
                rows.append({"index": index, "question": question, "truth": record.gt, "type": record.answer_type})
                if len(rows) == MOST_LISTED:
                    break
        return JSONResponse({"questions": rows, "all": len(records)})

    def image(self, request: Request) -> Response:
        """Return a test question's picture, decoded and re-encoded: no file is sent as it is."""
        task = self._task(request)
        side = min(LARGEST_SIDE, max(1, _number(request.query_params.get("size", str(LARGEST_SIDE)))))
        return _preview(self._pictures(task, self._record(task, request.query_params.get("index", "")))[0], side)

    async def preview(self, request: Request) -> Response:
        """Return an uploaded picture as the model will see it: browsers cannot show DICOM."""
        upload, _ = await self._form(request)
        if upload is None:
            raise HTTPException(400, "choose a picture")
        return _preview(await run_in_threadpool(_uploaded, upload))

    async def ask(self, request: Request) -> Response:
        upload, fields = await self._form(request)
        return JSONResponse(await run_in_threadpool(self._answer, upload, fields))

    async def _form(self, request: Request) -> tuple[bytes | None, dict[str, str]]:
        """Return the picture and the fields of a form."""
        self._check_origin(request)
        async with request.form(max_files=1, max_fields=20, max_part_size=MOST_BYTES) as form:
            upload = form.get("image")
            picture = await upload.read(MOST_BYTES + 1) if upload is not None and not isinstance(upload, str) else None
            fields = {key: value for key, value in form.multi_items() if isinstance(value, str)}
        if picture is not None and len(picture) > MOST_BYTES:
            raise HTTPException(413, TOO_LARGE)
        return picture, fields

    def _answer(self, upload: bytes | None, fields: dict[str, str]) -> dict[str, Any]:
        # Browsers send each line break of a field as a carriage return and a line feed.
        question, task = fields.get("question", "").replace("\r\n", "\n").strip(), fields.get("task") or None
        if not question:
            raise HTTPException(400, "type a question")
        record: TestRecord | None = None
        if upload is not None:
            pictures = [_uploaded(upload)]
        elif "index" in fields:
            of = self.model.config.task(fields.get("of", "")).name
            record = self._record(of, fields["index"])
            pictures = self._pictures(of, record)
        else:
            raise HTTPException(400, "choose a picture")
        if record is not None and self.model.question_of(record).strip() != question:
            record = None  # The truth belongs to another question.
        boxes = _drawn(fields.get("boxes", "[]"), pictures[0].size)
        stages = sorted({_number(stage) for stage in fields.get("stages", "").split(",") if stage})
        if not stages:
            raise HTTPException(400, "choose a stage")
        with self._lock:
            answers = [
                self.model.ask(
                    pictures, question, task, stage, abstain_below=self._abstain_below, risk=self._risk, boxes=boxes
                )
                for stage in stages
            ]
        return {
            "answers": [
                {
                    "stage": answer.stage,
                    "task": answer.task if answer.stage else None,
                    "banks": answer.banks,
                    "text": None if answer.abstained else answer.text,
                    "confidence": answer.confidence,
                    "foreign": bool(answer.foreign),
                    "score": _score(answer.text, record) if record and not answer.abstained else None,
                    "box": None if answer.abstained else self._box(answer.text, pictures[0]),
                }
                for answer in answers
            ],
            "probabilities": next((answer.probabilities for answer in reversed(answers) if answer.probabilities), {}),
            "truth": record.gt if record else None,
            "box": _true_box(record) if record else None,
        }

    def _box(self, answer: str, picture: Image.Image) -> tuple[float, float, float, float] | None:
        """Return the first box of an answer in shares of the picture's width and height; None without one."""
        box = self.model.box_in(answer, picture.size)
        return box.shares(picture.size) if box else None

    def _check_origin(self, request: Request) -> None:
        """Refuse requests from another site's page, which could keep the model busy."""
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            raise HTTPException(403, "this request comes from another site's page")

    def _task(self, request: Request) -> str:
        return self.model.config.task(request.query_params.get("task", "")).name

    def _open(self, task: str) -> TestRecords:
        return test_records(self.model.config, self.model.config.task(task))

    def _record(self, task: str, index: str) -> TestRecord:
        records, number = self._records(task), _number(index)
        if number >= len(records):
            raise HTTPException(404, f"{task} has {len(records)} questions")
        return records[number]

    def _pictures(self, task: str, record: TestRecord) -> list[Image.Image]:
        """Return the pictures with which `evaluate` asks a question."""
        config = self.model.config
        if not record.images:
            raise HTTPException(404, "this question is about no picture")
        roots = task_image_roots(config, config.task(task))
        return [load_image(resolve_image(name, roots)) for name in shown_images(record, config.data.images == "all")]


def _uploaded(content: bytes) -> Image.Image:
    """Return the picture in a file, as `data convert` draws it."""
    return open_image(first_picture(content, Rendering()))


def _preview(picture: Image.Image, side: int = LARGEST_SIDE) -> Response:
    file = io.BytesIO()
    picture.thumbnail((side, side))
    picture.save(file, "PNG")
    return Response(file.getvalue(), media_type="image/png")


def _number(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise HTTPException(400, f"{text[:40]!r} is not a number")
    return int(text)


def _drawn(text: str, size: tuple[int, int]) -> list[Box]:
    """Return the boxes that were drawn on the page, in pixels; the page tells them in shares of width and height."""
    try:
        shares = TypeAdapter(
            Annotated[list[tuple[float, float, float, float]], Field(max_length=MOST_BOXES)]
        ).validate_json(text)
    except ValidationError:
        raise HTTPException(400, f"boxes: give at most {MOST_BOXES}, each four shares of width and height") from None
    return [Box(*box).scaled(*size) for box in shares]


def _true_box(record: TestRecord) -> tuple[float, float, float, float] | None:
    """Return the box in shares of width and height; None where the truth is no box."""
    box = read_box(record.gt) if record.size else None
    return box.shares(record.size) if box and record.size else None


def _score(text: str, record: TestRecord) -> str:
    """Return whether an answer is right, where its kind tells (exact choice, exact count); else its overlap with the
    best truth.
    """
    columns = typed_columns(asked_answers([(record.text, text, record.gt, record.answer_type == "CLOSED")], [record]))
    for name in (CHOICE, COUNT):
        if name in columns:
            return "right" if columns[name] == [1.0] else "wrong"
    rows = score_answers([_Answered(text, truth, record.answer_type) for truth in record.truths]).rows
    return f"F1 {100 * max(row.overlap.f1 for row in rows):.0f} %"


def make_app(
    model: AnsweringModel, hosts: Sequence[str], abstain_below: float | None = None, risk: float | None = None
) -> Starlette:
    """Return the page of a model, as an application.

    Args:
        hosts: Host names under which the page may be requested; another name belongs to another site (DNS rebinding).
        abstain_below: As for `AnsweringModel.ask`.
        risk: As for `AnsweringModel.ask`.
    """
    web = _Web(model, abstain_below, risk)
    pages = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
    routes = [Route(path, _file(PAGE / name)) for path, name in pages.items()]
    routes += [Route("/api/run", web.run), Route("/api/questions", web.questions), Route("/api/image", web.image)]
    routes += [Route("/api/ask", web.ask, methods=["POST"]), Route("/api/preview", web.preview, methods=["POST"])]
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(_Headers),
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts)),
            Middleware(_Bounded),
        ],
        exception_handlers={UserError: _explain, HTTPException: _explain},
    )


def _file(path: Path) -> Callable[[Request], Awaitable[Response]]:
    async def page(request: Request) -> Response:
        return FileResponse(path)

    return page


async def _explain(request: Request, error: Exception) -> Response:
    status, message = (error.status_code, error.detail) if isinstance(error, HTTPException) else (400, str(error))
    return JSONResponse({"error": message}, status)


class _Headers:
    """Adds `HEADERS` to every response."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        await self.app(scope, receive, with_headers)


class _Bounded:
    """Refuses a request as soon as its body turns out to be larger than `MOST_FORM`."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        size = 0

        async def counted() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MOST_FORM:
                raise HTTPException(413, TOO_LARGE)
            return message

        await self.app(scope, counted, send)
