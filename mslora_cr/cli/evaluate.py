"""`mslora-cr evaluate` and `mslora-cr score`."""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from mslora_cr.cli.common import add_command, add_config, config_of, import_libraries, positive
from mslora_cr.config.schema import EvaluationConfig, StreamConfig
from mslora_cr.utils.errors import UserError

if TYPE_CHECKING:
    from mslora_cr.evaluation.openai_client import Endpoint
    from mslora_cr.evaluation.passes import Evaluating

log = logging.getLogger(__name__)


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "evaluate",
        "answer and score the test questions of every trained task; an interrupted evaluation resumes",
        "mslora-cr evaluate demo",
        "mslora-cr evaluate demo --stages all",
        "mslora-cr evaluate demo --banks-by routed     # without task IDs",
        "mslora-cr evaluate finetune_mslora_cr_ortho --banks checkpoints     # published banks",
        "mslora-cr evaluate CONFIG --endpoint http://127.0.0.1:8000/v1 --model '{task}'     # a served model",
        "mslora-cr evaluate CONFIG --probe DATASET     # forgetting on a held-out data set",
        "mslora-cr evaluate demo --judge http://127.0.0.1:8000/v1 --judge-model NAME",
    )
    add_config(parser)
    parser.add_argument("--task", metavar="NAME", help="evaluate only this task")
    parser.add_argument(
        "--stages",
        choices=("own", "final", "seen", "all"),
        help="when each task is evaluated. own: right after it was learned, as published (default); final: after the "
        "last task (default if routed); seen: after its own and every later task; all: the full task × stage matrix, "
        "including the base model without banks (stage 0), as forward transfer needs it",
    )
    parser.add_argument(
        "--banks",
        type=Path,
        metavar="DIR",
        help="read the banks from published checkpoints or another run folder instead of this run's folder",
    )
    parser.add_argument(
        "--banks-by",
        choices=get_args(EvaluationConfig.model_fields["banks_by"].annotation),
        help="which banks answer a question of task t (default: evaluation.banks_by of the configuration). prefix: "
        "banks 1..t, as published; all: every bank trained so far; routed: without task IDs, a router predicts the "
        "task of "
        "each question; results go to routed/",
    )
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        help="ask a server that speaks OpenAI's chat completions instead of loading a model; results go to served/. "
        "A key is read from OPENAI_API_KEY",
    )
    parser.add_argument("--model", metavar="NAME", help="with --endpoint: the model's name there; {task} is replaced")
    parser.add_argument(
        "--concurrency", type=positive, metavar="N", help="with --endpoint or --judge: concurrent requests (default: 8)"
    )
    parser.add_argument(
        "--probe",
        metavar="DATASET",
        help="then evaluate the base model and every stage on a held-out data set, and show the loss; "
        "results go to probe/",
    )
    parser.add_argument(
        "--blind",
        action="store_true",
        help="then ask the same banks with a grey picture, and show what the picture adds; results go to blind/",
    )
    parser.add_argument(
        "--circular",
        action="store_true",
        help="then ask questions with options in every rotation of them; a question counts if every answer is right",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="first answer the validation questions (val.jsonl) and fit a temperature and thresholds to abstain by",
    )
    parser.add_argument(
        "--judge",
        metavar="URL",
        help="then let a language model at this address (OpenAI's chat completions) judge the open answers; its "
        "verdicts go to judged/ and into no other score. A key is read from JUDGE_API_KEY",
    )
    parser.add_argument("--judge-model", metavar="NAME", help="with --judge: the model's name there")
    parser.set_defaults(run=_evaluate, parallel=True)


def _evaluate(args: argparse.Namespace) -> int:
    if args.banks_by:
        args.overrides.append(f"evaluation.banks_by={args.banks_by}")
    if bool(args.judge) != bool(args.judge_model):
        raise UserError("a judge needs both --judge URL and --judge-model NAME")
    if args.concurrency and not (args.endpoint or args.judge):
        raise UserError("--concurrency needs --endpoint or --judge: give one of them, or leave it out")
    if args.judge:
        _judge_of(args).check()
    config = config_of(args)
    if args.endpoint or args.model:
        return _evaluate_endpoint(args, config)
    if args.task and config.evaluation.banks_by == "routed":
        raise UserError("--task cannot be combined with routed evaluation, which mixes the questions of all tasks")
    import_libraries()
    from mslora_cr.distributed.comm import rank
    from mslora_cr.distributed.launch import abort_together
    from mslora_cr.evaluation.evaluate import evaluate
    from mslora_cr.evaluation.probe import check_held_out, evaluate_probe
    from mslora_cr.evaluation.probe_result import Probe, probe_table
    from mslora_cr.evaluation.routed import evaluate_routed
    from mslora_cr.runs.ledger import finished_banks
    from mslora_cr.stream.import_export import load_banks

    if args.probe:
        check_held_out(config, args.probe)
    with abort_together():
        banks = load_banks(args.banks, config) if args.banks else finished_banks(config)
        if config.evaluation.banks_by == "routed":
            evaluating = partial(evaluate_routed, config, args.stages or "final", banks)
        else:
            evaluating = partial(evaluate, config, args.stages or "own", args.task, banks)
        digests = {name: bank.digest for name, bank in banks.items()}
        path, circular = _evaluate_passes(args, config, lambda asking: evaluating(asking=asking), digests)
        if rank() == 0:
            _show_scores(path)
            _show_routing(path)
            _show_circular(circular)
        if args.probe:
            probe = evaluate_probe(config, args.probe, banks)
    if rank() == 0:
        if args.probe:
            print(f"\n{probe_table(Probe.read(probe))}")
        _show_next(path, args)
    return 0


def _evaluate_passes(
    args: argparse.Namespace, config: StreamConfig, evaluating: Evaluating, digests: Mapping[str, str]
) -> tuple[Path, Path | None]:
    """Evaluate, with the further passes that are asked for; return the paths of `evaluation.json` and
    `circular.json`."""
    from mslora_cr.evaluation.asking import AS_IT_IS, BLIND
    from mslora_cr.evaluation.passes import evaluate_calibration, evaluate_circular

    if args.calibrate:
        evaluate_calibration(config, evaluating, digests, args.task)
    path = evaluating(AS_IT_IS)
    if args.blind:
        evaluating(BLIND)
    return path, evaluate_circular(config, evaluating, path.parent) if args.circular else None


def _show_circular(path: Path | None) -> None:
    """Print the scores of a `circular.json`, if there is one."""
    from mslora_cr.evaluation.passes import CircularFile, circular_table

    if path is not None:
        print(f"\n{circular_table(CircularFile.read(path))}")


def _show_scores(path: Path) -> None:
    """Print the scores of an `evaluation.json`."""
    from mslora_cr.evaluation.console import score_table
    from mslora_cr.evaluation.results import required_evaluation

    print(f"\n{score_table(required_evaluation(path.parent), path.parent)}\n\nresults: {path.parent}", flush=True)


def _show_routing(path: Path) -> None:
    """Print how often the router predicted the right task, if one chose the banks."""
    from mslora_cr.evaluation.schemas import ROUTED, ROUTING, Routing
    from mslora_cr.statistics.interval import bracketed

    if path.parent.name != ROUTED:
        return
    for stage in Routing.read(path.parent / ROUTING).stages:
        if stage.accuracy is not None:
            ends = f" {bracketed(stage.interval)}" if stage.interval else ""
            accuracy = f"{stage.accuracy:.1f} %{ends} of {stage.questions} questions"
            print(f"routing accuracy after task {stage.stage}: {accuracy}")
        if foreign := stage.foreign_in_words():
            print(f"after task {stage.stage}, {foreign}")


def _show_next(path: Path, args: argparse.Namespace) -> None:
    """Let a judge read the answers of an `evaluation.json`, if one is given, and print the next command."""
    if args.judge:
        from mslora_cr.evaluation.judge import Judged, judge, judged_table

        print(f"\n{judged_table(Judged.read(judge(path.parent, _judge_of(args))))}\n")
    log.info("next: mslora-cr report %s", shlex.join([str(args.config), *args.overrides]))


def _judge_of(args: argparse.Namespace) -> Endpoint:
    from mslora_cr.evaluation.judge import KEY
    from mslora_cr.evaluation.openai_client import Endpoint

    return Endpoint(args.judge, args.judge_model, args.concurrency or 8, option="--judge", key=KEY)


def _evaluate_endpoint(args: argparse.Namespace, config: StreamConfig) -> int:
    if not (args.endpoint and args.model):
        raise UserError("a served model needs both --endpoint URL and --model NAME")
    if args.banks or args.banks_by or args.stages or args.probe:
        raise UserError(
            "a served model is scored as it is: --endpoint cannot be combined with --banks, --banks-by, --stages or "
            "--probe"
        )
    from mslora_cr.evaluation.endpoint import evaluate_endpoint
    from mslora_cr.evaluation.openai_client import Endpoint

    endpoint = Endpoint(args.endpoint, args.model, args.concurrency or 8)
    path, circular = _evaluate_passes(args, config, partial(evaluate_endpoint, config, endpoint, args.task), {})
    _show_scores(path)
    _show_circular(circular)
    _show_next(path, args)
    return 0


def add_score(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "score",
        "score an answer file with the published metrics",
        "mslora-cr score results/RUN/pathvqa/answer-file.jsonl --output scores/",
    )
    parser.add_argument(
        "answers",
        type=Path,
        metavar="ANSWERS.jsonl",
        help="answer file, one object per line with question_id, prompt, text, gt and answer_type",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for metrics and hit lists")
    parser.add_argument(
        "--questions",
        type=Path,
        metavar="TEST.jsonl",
        help="the task's test.jsonl, which says which questions are about one image or patient, so that intervals "
        "take it into account",
    )
    parser.set_defaults(run=_score)


def _score(args: argparse.Namespace) -> int:
    from mslora_cr.data.records import TestRecords
    from mslora_cr.evaluation.console import headline
    from mslora_cr.evaluation.score import render_metrics, score_file
    from mslora_cr.utils.workers import cores

    questions = TestRecords(args.questions) if args.questions else None
    scores = score_file(args.answers, args.output, questions, cores())
    print(headline(scores))
    print(f"\nas published ({args.output / 'metrics.txt'}):\n{render_metrics(scores)}")
    if silent := sum(not row.prediction for row in scores.rows):
        log.warning("%d of %d answers say nothing", silent, len(scores.rows))
    if empty := [str(number) for number, row in enumerate(scores.rows, 1) if not row.reference]:
        listed = ", ".join(empty[:5]) + (", …" if len(empty) > 5 else "")
        log.warning(
            "normalising leaves nothing of %d truths (answer %s): the published closed accuracy counts every answer to "
            "them as right, whole-word accuracy in metrics.json does not",
            len(empty),
            listed,
        )
    return 0
