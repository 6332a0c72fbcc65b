"""`mslora-cr completion`."""

from __future__ import annotations

import argparse

from mslora_cr.cli.common import add_command


def add_completion(commands: argparse._SubParsersAction, parser: argparse.ArgumentParser) -> None:
    """Add the command.

    Args:
        commands: The subcommands.
        parser: The parser of the whole command line, whose words are completed.
    """
    command = add_command(
        commands,
        "completion",
        "print a script that lets a shell complete commands and options",
        "mslora-cr completion bash > ~/.local/share/bash-completion/completions/mslora-cr",
        "mslora-cr completion zsh > ~/.zfunc/_mslora-cr     # with ~/.zfunc in $fpath",
    )
    command.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    command.set_defaults(run=lambda args: _print(parser, args.shell))


def _print(parser: argparse.ArgumentParser, shell: str) -> int:
    import shtab

    print(shtab.complete(parser, shell))
    return 0
