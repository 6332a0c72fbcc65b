"""`mslora-cr web`."""

from __future__ import annotations

import argparse
import logging
import socket

from mslora_cr.cli.common import (
    abstains,
    add_abstention,
    add_command,
    add_overrides,
    add_release_option,
    add_run,
    count,
    import_libraries,
    run_config,
    stage_of,
)
from mslora_cr.utils.errors import UserError

log = logging.getLogger(__name__)

LOCAL = ("127.0.0.1", "localhost", "::1")


def add_web(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "web",
        "open a page on which a trained run answers questions about pictures",
        "mslora-cr web RUN",
        "mslora-cr web RUN --task derm --port 8080 model.device=cpu",
    )
    add_run(parser)
    add_overrides(parser)
    parser.add_argument("--task", metavar="NAME", help="task whose banks answer at first (default: the router chooses)")
    add_release_option(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine alone); there is no log-in"
    )
    parser.add_argument("--port", type=count, default=7860, metavar="N", help="port (%(default)s); 0 takes a free one")
    add_abstention(parser)
    parser.set_defaults(run=_web)


def _web(args: argparse.Namespace) -> int:
    abstains(args)
    config = run_config(args.target, args.overrides)
    stage = stage_of(args, config)
    import_libraries()
    import uvicorn

    from mslora_cr.serving.answering import AnsweringModel
    from mslora_cr.serving.web import make_app

    try:  # before the model is loaded
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        listener = socket.create_server((args.host, args.port), family=family)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {args.host}, port {args.port} ({error}); choose another --port") from None
    with listener:
        hosts = ["*"] if args.host not in LOCAL else LOCAL
        app = make_app(AnsweringModel(config, args.task, stage), hosts, args.abstain_below, args.risk)
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"http://{host}:{listener.getsockname()[1]}/ (Ctrl-C ends it)", flush=True)
        if args.host not in LOCAL:
            log.warning("anybody who reaches this address can ask and see the test pictures: there is no log-in")
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
    return 0
