"""What all benchmarks share: sizes, models of random weights, interleaved timing, a table, JSON.

Variants are timed in rounds, each variant once a round and another one first each time, so that a machine that slows
down or is shared slows all of them alike. At 7B, where not all fit a device, each is built, timed and dropped before
the next. A figure is the median over the rounds; its spread is the first and third quartile. A ratio is that of two
medians; its spread is the quartiles of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig, PreTrainedModel

from mslora_cr.banks.bank import Bank
from mslora_cr.distributed.deepspeed import free_memory
from mslora_cr.models.language import language_linears
from mslora_cr.runs.environment import environment
from mslora_cr.utils.files import write_json
from mslora_cr.utils.workers import cores


@dataclass(frozen=True)
class Size:
    """A language model's shape, its banks, and a batch of it."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    rank: int
    batch: int
    length: int
    dtype: str


SIZES = {
    "tiny": Size(64, 2, 4, 2, 128, 256, 4, 2, 16, "float32"),
    "small": Size(768, 8, 12, 3, 2688, 32000, 16, 2, 128, "float32"),
    "long": Size(768, 8, 12, 3, 2688, 32000, 16, 8, 640, "float32"),
    "7b": Size(4096, 32, 32, 8, 14336, 32000, 64, 24, 640, "bfloat16"),
}
"""`small` is the shape that the published code was measured at, `long` the same with as many positions as images bring;
`7b` is LLaVA-Med v1.5's language model."""


def _processor_seconds() -> float:
    """What this process and the ended ones that it started have taken of the processor."""
    return sum(
        used.ru_utime + used.ru_stime
        for used in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


CLOCKS = {"wall": time.perf_counter, "cpu": _processor_seconds}


@dataclass
class Setting:
    """What a benchmark is run with, and where."""

    name: str
    size: Size
    device: torch.device
    repetitions: int
    clock: Callable[[], float]
    in_turn: bool
    json: Path | None
    argv: Sequence[str]
    args: argparse.Namespace

    def seconds(self, work: Callable[[], Any]) -> float:
        """What `work` takes, until the device has finished it."""
        self._synchronize()
        started = self.clock()
        work()
        self._synchronize()
        return self.clock() - started

    def measured(
        self, builders: Mapping[str, Callable[[], Callable[[], Any]]], warm_up: int = 1
    ) -> tuple[dict[str, list[float]], list[str]]:
        """Seconds of each variant, and the names of those that the device has no memory for.

        Args:
            builders: name → makes what is timed.
        """
        if not self.in_turn:
            return self.interleaved({name: build() for name, build in builders.items()}, warm_up), []
        seconds: dict[str, list[float]] = {}
        too_large = []
        for name, build in builders.items():
            try:
                seconds |= self.interleaved({name: build()}, warm_up)
            except torch.OutOfMemoryError:
                too_large.append(name)
            free_memory()
        return seconds, too_large

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def interleaved(self, variants: Mapping[str, Callable[[], Any]], warm_up: int = 1) -> dict[str, list[float]]:
        """Seconds of each variant, round by round. The first `warm_up` rounds do not count."""
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        names = list(variants)
        for number in range(warm_up + self.repetitions):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                gc.collect()
                taken = self.seconds(variants[name])
                if number >= warm_up:
                    seconds[name].append(taken)
        return seconds


def parse(
    module: str,
    description: str | None,
    argv: Sequence[str] | None,
    add: Callable[[argparse.ArgumentParser], Any] | None = None,
    size: str = "small",
) -> Setting:
    """Read a benchmark's command line.

    Args:
        module: the benchmark's name below `benchmarks`.
        add: adds the benchmark's own arguments.
        size: the shape to start from where the command line names none.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default=size, help=f"a shape to start from (default: {size})")
    for field in fields(Size):
        kind = str if field.name == "dtype" else int
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, help=f"instead of the size's {field.name}")
    parser.add_argument("--repetitions", type=int, metavar="N", help="rounds of all variants (default: 7; at 7b 3)")
    parser.add_argument(
        "--in-turn",
        action=argparse.BooleanOptionalAction,
        help="build, time and drop each variant before the next, instead of a round of all of them (default at 7b)",
    )
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="wall: seconds that pass (default); cpu: seconds "
        "that the processor spends on this process, on all its threads",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures, ratios and what made them there")
    if add is not None:
        add(parser)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    sizes = {field.name: getattr(args, field.name) for field in fields(Size)}
    chosen = replace(SIZES[args.size], **{name: value for name, value in sizes.items() if value is not None})
    large = args.size == "7b"
    repetitions = args.repetitions if args.repetitions is not None else 3 if large else 7
    if repetitions < 1:
        parser.error("--repetitions must be at least 1")
    return Setting(
        name=module,
        size=chosen,
        device=torch.device(args.device),
        repetitions=repetitions,
        clock=CLOCKS[args.clock],
        in_turn=large if args.in_turn is None else args.in_turn,
        json=args.json,
        argv=argv,
        args=args,
    )


# --- models, banks, batches ------------------------------------------------------------------------------------------


def language_model(size: Size, device: torch.device, seed: int = 0) -> LlavaForConditionalGeneration:
    """LLaVA with a language model of random weights and a token of a tower, frozen: what the figures are about is the
    language model, so no images are shown to it."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = MistralConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=3)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, size.dtype))
    try:
        with device:
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False)
    return model.eval()


def random_banks(size: Size, count: int, scale: float = 0.01, model: PreTrainedModel | None = None) -> list[Bank]:
    """Banks as trained ones look: A near its Kaiming-uniform start, B small and normal. All layers of one are copies of
    the first: numbers for each would take minutes at 7B."""
    generator = torch.Generator().manual_seed(1)
    linears = language_linears(model or language_model(size, torch.device("meta")))
    banks = []
    for number in range(count):
        drawn: dict[str, tuple[Tensor, Tensor]] = {}
        matrices = {}
        for name, linear in linears.items():
            kind = name.rpartition(".")[2]
            if kind not in drawn:
                a = (torch.rand(size.rank, linear.in_features, generator=generator) * 2 - 1) / linear.in_features**0.5
                drawn[kind] = a, torch.randn(linear.out_features, size.rank, generator=generator) * scale
            a, b = drawn[kind]
            matrices[name] = (a.clone(), b.clone())
        banks.append(Bank(f"bank{number}", size.rank, size.rank, matrices))
    return banks


def random_batch(size: Size, labelled: int, device: torch.device) -> dict[str, Tensor]:
    """Random ids, (batch, length), the last `labelled` of each row labelled."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(4, size.vocabulary, (size.batch, size.length), generator=generator)
    labels = ids.clone()
    labels[:, :-labelled] = -100
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    return {name: tensor.to(device) for name, tensor in batch.items()}


# --- results ---------------------------------------------------------------------------------------------------------


def figure(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {"median": median(values), "q1": low, "q3": high, "min": min(values), "max": max(values)}


def finish(
    setting: Setting,
    figures: Mapping[str, Sequence[float]],
    ratios: Mapping[str, tuple[str, str]],
    unit: str = "s",
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Print the table, write the JSON, return it.

    Args:
        figures: values of each variant, round by round.
        ratios: name → (variant above, variant below the line); left out where one of them has no figures.
        extra: further facts, added to the JSON under their own names.
    """
    summary = {name: figure(values) for name, values in figures.items()}
    ratios = {name: pair for name, pair in ratios.items() if summary.keys() >= set(pair)}
    result = {
        "benchmark": setting.name,
        "command": shlex.join(["python", "-m", f"benchmarks.{setting.name}", *setting.argv]),
        "size": asdict(setting.size),
        "device": str(setting.device),
        "repetitions": setting.repetitions,
        "clock": setting.args.clock,
        "unit": unit,
        "figures": summary,
        "ratios": {
            name: summary[above]["median"] / summary[below]["median"] for name, (above, below) in ratios.items()
        },
        "ratio_spread": {
            name: figure([a / b for a, b in zip(figures[above], figures[below], strict=False)])
            for name, (above, below) in ratios.items()
        },
        **(extra or {}),
        "environment": {**environment(), "machine": machine()},
    }
    _print(result, extra or {})
    if setting.json is not None:
        setting.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(setting.json, result)
    return result


def machine() -> dict[str, Any]:
    """The processor, how many cores this process may use, and how busy they have been."""
    found = {"processor": platform.processor() or platform.machine(), "load": list(os.getloadavg())}
    found["cores"] = cores()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = information.read_text(encoding="utf-8").splitlines()
        found["processor"] = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    return found


def _print(result: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
    facts = result["environment"]
    clock = f"{result['clock']} clock, {facts['hardware']['threads']} threads, load {facts['machine']['load'][0]:.1f}"
    print(f"{result['benchmark']}: {result['repetitions']} rounds on {result['device']}, {clock}")
    width = max(len(name) for name in [*result["figures"], *result["ratios"]]) + 2
    print(f"{'':<{width}}{'median':>12}{'q1':>12}{'q3':>12}  {result['unit']}")
    for name, row in result["figures"].items():
        print(f"{name:<{width}}{row['median']:>12.4g}{row['q1']:>12.4g}{row['q3']:>12.4g}")
    for name, value in result["ratios"].items():
        spread = result["ratio_spread"][name]
        print(f"{name:<{width}}{value:>12.4g}{spread['q1']:>12.4g}{spread['q3']:>12.4g}  ratio")
    for name, value in extra.items():
        print(f"{name}: {json.dumps(value)}")
