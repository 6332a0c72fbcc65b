"""Both penalties and their gradient, against the formulas as they are written, under autograd.

    python -m benchmarks.penalty                   # the shape that the published code was measured at
    python -m benchmarks.penalty --size 7b --layers 2

The trainable bank is bank 8 of 8, then bank 32 of 32; values and gradients of both ways are compared as well. The
frozen banks are held in float32 and in bfloat16; on a GPU also in the CPU's pinned memory. `--profile` prints where
their time goes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.profiler import profile

from benchmarks.baselines import Pairs, alternating, autograd_penalties
from benchmarks.harness import finish, parse, random_banks
from mslora_cr.losses.bank_penalties import BankPenalties

ALPHA, BETA = 0.1, 0.01
BANKS, MANY = 8, 32
PROFILED = 20
"""Calls that a profile covers."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    setting = parse("penalty", __doc__, argv, _add_arguments)
    device = setting.device
    banks = random_banks(setting.size, MANY)
    trainable: Pairs = {
        name: (a.to(device).requires_grad_(), b.to(device).requires_grad_())
        for name, (a, b) in banks[BANKS - 1].matrices.items()
    }
    frozen = banks[: BANKS - 1]
    same = alternating(len(frozen))

    def autograd() -> Callable[[], None]:
        others = [{name: (a.to(device), b.to(device)) for name, (a, b) in bank.matrices.items()} for bank in frozen]

        def step() -> None:
            for pair in trainable.values():
                for matrix in pair:
                    matrix.grad = None
            autograd_penalties(trainable, others, same, ALPHA, BETA).backward()

        return step

    makers: dict[str, Callable[[], BankPenalties]] = {
        "ours": partial(BankPenalties, frozen, same, device),
        "ours, bfloat16": partial(BankPenalties, frozen, same, device, torch.bfloat16),
        "ours, 32 banks": partial(BankPenalties, [*frozen, *banks[BANKS:]], alternating(MANY - 1), device),
    }
    if device.type == "cuda":
        makers["ours, pinned"] = partial(BankPenalties, frozen, same, device, frozen_device=torch.device("cpu"))
    megabytes = {}

    def ours(name: str) -> Callable[[], Any]:
        penalties = makers[name]()
        megabytes[name] = round(penalties.frozen_bytes / 1e6, 1)
        return lambda: penalties.terms(trainable, ALPHA, BETA)

    if setting.args.profile:
        penalties = makers["ours"]()
        with profile() as profiled:
            for _ in range(PROFILED):
                penalties.terms(trainable, ALPHA, BETA)
        print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=12))
    builders = {"autograd": autograd} | {name: partial(ours, name) for name in makers}
    seconds, too_large = setting.measured(builders, warm_up=2)
    return finish(
        setting,
        seconds,
        {
            "autograd_over_ours": ("autograd", "ours"),
            "autograd_over_ours_bfloat16": ("autograd", "ours, bfloat16"),
            "banks_32_over_8": ("ours, 32 banks", "ours"),
        },
        extra={
            "frozen_megabytes": megabytes,
            "largest_deviation_from_autograd": _deviation(makers["ours"](), trainable, autograd()),
            "out_of_memory": too_large,
        },
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile", action="store_true", help=f"print PyTorch's profile of {PROFILED} calls of ours first"
    )


def _deviation(penalties: BankPenalties, trainable: Pairs, autograd: Callable[[], None]) -> dict[str, float]:
    """Of the gradient, absolute, and against the largest entry of autograd's."""
    autograd()
    gradients = penalties.terms(trainable, ALPHA, BETA)[2]
    pairs = [(trainable[module][half].grad, gradient) for (module, half), gradient in gradients.items()]
    largest = max(float(theirs.abs().max()) for theirs, _ in pairs if theirs is not None)
    absolute = max(float((theirs - ours).abs().max()) for theirs, ours in pairs if theirs is not None)
    return {"gradient": absolute, "gradient_relative": absolute / largest}


if __name__ == "__main__":
    main()
