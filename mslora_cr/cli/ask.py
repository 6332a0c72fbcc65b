"""`mslora-cr ask`."""

from __future__ import annotations

import argparse
import codecs
import io
import math
import sys

from mslora_cr.cli.common import (
    abstains,
    add_abstention,
    add_command,
    add_overrides,
    add_release_option,
    add_run,
    add_stage,
    import_libraries,
    positive,
    run_config,
    stage_of,
    typed,
)
from mslora_cr.cli.conversation import answered_by, aside, converse, write
from mslora_cr.utils.errors import UserError
from mslora_cr.utils.visible import print_json


def add_ask(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "ask",
        "ask a trained run questions about pictures; without a question, start a conversation",
        'mslora-cr ask checkpoints/RUN --image photo.jpg "Which skin condition is seen?"',
        'mslora-cr ask RUN --image scan.png --task CXP --stage 5 "Is there pneumonia?" "Which side?"',
        'mslora-cr ask RUN --image scan.png --box 40,30,120,95 "What is seen in <box>?"',
        "mslora-cr ask RUN --questions questions.jsonl > answers.jsonl     # or - for standard input",
        "mslora-cr ask RUN --image photo.jpg     # a conversation",
    )
    add_run(parser)
    parser.add_argument(
        "question", nargs="*", metavar="QUESTION", help="questions; each is answered on a line of its own"
    )
    add_overrides(parser)
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="picture that the questions are about; repeat it to show several at once",
    )
    parser.add_argument(
        "--box",
        type=_box,
        action="append",
        default=[],
        metavar="LEFT,TOP,RIGHT,BOTTOM",
        help="box in pixels of the picture for the next <box> in each question; repeat it for several",
    )
    parser.add_argument(
        "--questions",
        metavar="FILE",
        help="file of questions, - for standard input: plain lines about --image, or JSON lines with `question`, "
        "`image` (a file or a list of them, relative to FILE) and optionally `task` and `boxes`; JSON is answered in "
        "JSON",
    )
    parser.add_argument(
        "--task", metavar="NAME", help="task whose banks answer (default: the task that the router predicts)"
    )
    add_stage(parser)
    add_release_option(parser)
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="longest answer (default: the run's)")
    add_abstention(parser)
    parser.add_argument(
        "--foreign",
        choices=("answer", "base", "refuse"),
        default="answer",
        help="who answers a routed question that is like none of the tasks: the predicted task's banks (default), the "
        "base model without a bank, or nobody",
    )
    parser.set_defaults(run=_ask)


def _box(text: str) -> tuple[float, ...]:
    try:
        box = tuple(map(float, text.split(",")))
    except ValueError:
        box = ()
    if len(box) != 4 or not all(map(math.isfinite, box)):
        raise argparse.ArgumentTypeError(f"{text!r} is no box; give LEFT,TOP,RIGHT,BOTTOM in pixels")
    return box


def _ask(args: argparse.Namespace) -> int:
    if args.questions and args.question:
        raise UserError("give questions on the command line or in a file, not both")
    unsure = abstains(args)
    if unsure and not (args.question or args.questions) and sys.stdin.isatty():
        option = "--risk" if args.abstain_below is None else "--abstain-below"
        raise UserError(f"{option} needs a question, and does not work in a conversation; add the question")
    config = run_config(args.target, args.overrides)
    piped = not args.question and not args.questions and not sys.stdin.isatty()
    source = "-" if piped else args.questions
    if isinstance(sys.stdin, io.TextIOWrapper) and codecs.lookup(sys.stdin.encoding).name == "ascii":
        sys.stdin.reconfigure(encoding="utf-8")  # As `typed` reads questions of the command line.
    stage = stage_of(args, config)
    import_libraries()
    from mslora_cr.serving.answering import AnsweringModel
    from mslora_cr.serving.questions import Ask, check_asked, read_questions

    # Check before the model is loaded, so that a mistake shows at once.
    questions = (
        read_questions(source, args.image)
        if source
        else [Ask(text, tuple(args.image), boxes=tuple(args.box)) for text in map(typed, args.question)]
    )
    if args.box and (source or not questions):
        raise UserError("--box belongs to questions on the command line; JSON lines have `boxes`")
    check_asked(questions, args.image)
    model = AnsweringModel(config, args.task, stage)
    if not questions and not source:
        converse(model, args.image, sys.stdin, args.max_new_tokens)
    for ask in questions:
        if len(questions) > 1 and not ask.json:
            aside(f"# {ask.question}")
        tell = None if ask.json or unsure or args.foreign == "refuse" else write
        answer = model.ask(
            ask.images,
            ask.question,
            ask.task,
            max_new_tokens=args.max_new_tokens,
            on_text=tell,
            abstain_below=args.abstain_below,
            risk=args.risk,
            foreign=args.foreign,
            boxes=ask.boxes,
        )
        if ask.json:
            print_json(ask.line(answer))
        else:
            if answer.abstained:
                write(f"(no answer: {'like none of the tasks' if answer.foreign else 'the model is not sure enough'})")
            elif tell is None:
                write(answer.text)
            print(flush=True)
            aside(f"# {answered_by(answer)}")
    return 0
