"""What each method adds to the cross entropy, worked by hand and against autograd; which banks answer."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from mslora_cr.banks.bank import Bank
from mslora_cr.config.load import load_config
from mslora_cr.config.methods import load_method
from mslora_cr.config.schema import ConfigError, StreamConfig
from mslora_cr.losses.penalty import Pair, Penalty
from mslora_cr.methods.base import Method, Setup, method_of
from mslora_cr.methods.ewc import EwcPenalty, fisher_name
from mslora_cr.methods.inflora import grown, new_directions
from mslora_cr.methods.lwf import softened_cross_entropy
from mslora_cr.methods.olora import RELATIVE, OloraPenalty, fresh_overlap
from mslora_cr.methods.replay import Replay
from mslora_cr.runs.entries import RunLedger
from mslora_cr.runs.ledger import Ledger

CPU = torch.device("cpu")


def bank(**matrices: tuple[list[list[float]], list[list[float]]]) -> Bank:
    pairs = {name: (torch.tensor(a), torch.tensor(b)) for name, (a, b) in matrices.items()}
    return Bank("bank", len(next(iter(matrices.values()))[0]), 1.0, pairs)


def random_bank(seed: int) -> Bank:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (2, 5, 3), "v": (2, 4, 6)}
    return Bank("bank", 2, 1.0, {
        name: (torch.randn(r, i, generator=generator), torch.randn(o, r, generator=generator))
        for name, (r, i, o) in shapes.items()
    })  # fmt: skip


def check_against_autograd(penalty: Penalty, formula: Callable[[dict[str, Pair]], Tensor]) -> None:
    trainable = {name: tuple(m.requires_grad_() for m in pair) for name, pair in random_bank(9).matrices.items()}
    value = formula(trainable)
    value.backward()
    step = penalty.step(trainable, 0.1)
    torch.testing.assert_close(step.value, value.detach())
    for name, pair in trainable.items():
        for half, matrix in enumerate(pair):
            expected = torch.zeros_like(matrix) if matrix.grad is None else matrix.grad
            found = step.gradients.get((name, half), torch.zeros_like(matrix))
            torch.testing.assert_close(found, expected)


# --- O-LoRA --------------------------------------------------------------------------------------------------------


def test_olora_by_hand() -> None:
    """|A_old A_newᵀ| = |(1·3 + 2·(-4), 0·3 + (-1)·(-4))| = 5 + 4; ‖A‖ = 5, ‖B‖ = 13."""
    old = bank(q=([[1.0, 2.0], [0.0, -1.0]], [[0.0, 0.0]]))
    trainable = {"q": (torch.tensor([[3.0, -4.0]]), torch.tensor([[5.0], [12.0]]))}
    penalty = OloraPenalty([old], 0.5, 0.1, CPU)
    assert penalty.frozen_bytes == 4 * 4  # A alone
    step = penalty.step(trainable, 0.1)
    assert step.logged == {"overlap": 9.0, "norm": 18.0}
    assert step.value.item() == pytest.approx(0.5 * 9 + 0.1 * 18)
    # signs -1 and +1: 0.5 (-(1, 2) + (0, -1)) + 0.1 (3, -4) / 5
    torch.testing.assert_close(step.gradients["q", 0], torch.tensor([[-0.5 + 0.06, -1.5 - 0.08]]))
    torch.testing.assert_close(step.gradients["q", 1], torch.tensor([[5.0], [12.0]]) / 130)


def test_olora_against_autograd() -> None:
    old = [random_bank(1), random_bank(2)]

    def formula(trainable: dict[str, Pair]) -> Tensor:
        overlap = sum((one.matrices[name][0] @ a.T).abs().sum() for one in old for name, (a, _) in trainable.items())
        return 0.5 * overlap + 0.2 * sum(matrix.norm() for pair in trainable.values() for matrix in pair)

    check_against_autograd(OloraPenalty(old, 0.5, 0.2, CPU), formula)


def test_olora_of_a_first_task_is_its_norm_alone_and_zero_at_zero() -> None:
    trainable = {"q": (torch.tensor([[3.0, -4.0]]), torch.zeros(2, 1))}
    step = OloraPenalty([], 0.0, 0.1, CPU).step(trainable, 0.1)
    assert step.value.item() == pytest.approx(0.5)
    assert not step.gradients["q", 1].any()


def test_olora_of_two_fresh_banks_is_what_the_page_says() -> None:
    """r² √(2/π) / (3 √in) a layer: entries of A are uniform with variance 1 / (3 in), so products' are 1 / (9 in)."""
    torch.manual_seed(0)
    old, new = (torch.nn.Linear(1024, 64, bias=False).weight.detach() for _ in range(2))  # as PEFT starts A
    frozen = [Bank("old", 64, 64.0, {"q": (old, torch.zeros(8, 64))})]
    penalty = OloraPenalty(frozen, 0.5, 0.0, CPU)
    overlap = penalty.step({"q": (new, torch.zeros(8, 64))}, 0.1).logged["overlap"].item()
    assert overlap == pytest.approx(64**2 * math.sqrt(2 / math.pi) / (3 * math.sqrt(1024)), rel=0.03)
    assert overlap == pytest.approx(fresh_overlap(frozen), rel=0.03) == pytest.approx(fresh_overlap(2 * frozen) / 2)


def test_olora_takes_weights_by_task(tmp_path: Path) -> None:
    """As the source's long script; and one that follows the size of the model."""
    tasks = [("pathvqa", 1.0, 2), ("PCAM", 1.0, 2)]
    config = stream_of("olora", tmp_path, tasks, olora={"lambda_1": [0.5, 5], "lambda_2": [0, 0.3]})
    method, old = method_of(config), random_bank(1)
    assert [method.regularizes(config, task) for task in config.stream] == [False, True]
    setup = Setup(config, config.stream[1], Ledger(tmp_path, RunLedger(run="r", method="olora", tasks={})), CPU)
    new = random_bank(2).matrices
    step = method.penalty(setup, [old]).step(new, 0.1)
    assert step.value.item() == pytest.approx((5 * step.logged["overlap"] + 0.3 * step.logged["norm"]).item())
    relative = stream_of("olora", tmp_path, tasks, olora={"relative": 20.0})
    assert relative.model_dump()["olora"] == {"lambda_2": 0.0, "relative": 20.0}
    step = method.penalty(replace(setup, config=relative), [old]).step(new, 0.1)
    assert step.value.item() == pytest.approx(20 * step.logged["overlap"].item() / fresh_overlap([old]))
    assert method.penalty(replace(setup, config=relative), []).step(new, 0.1).value == 0
    unset = stream_of("olora", tmp_path, tasks)
    assert unset.model_dump()["olora"] == {"lambda_2": 0.0, "relative": RELATIVE}
    assert [method.regularizes(unset, task) for task in unset.stream] == [False, True]
    published = stream_of("olora", tmp_path, tasks, olora={"lambda_1": 0.5})
    assert published.model_dump()["olora"] == {"lambda_1": 0.5, "lambda_2": 0.0}
    for section, message in (
        ({"lambda_1": [0.5]}, r"olora\.lambda_1: has 1 weights for 2 tasks"),
        ({"lambda_1": 1.0, "relative": 1.0}, r"olora\.relative: stands in place of olora\.lambda_1"),
    ):
        with pytest.raises(ConfigError, match=message):
            stream_of("olora", tmp_path, tasks, olora=section)


# --- LwF -----------------------------------------------------------------------------------------------------------


def test_lwf_by_hand() -> None:
    """At T = 2 logits (2 ln 3, 0) soften to (3/4, 1/4), and (0, 2 ln 3) to (1/4, 3/4)."""
    high = 2 * math.log(3)
    teacher = torch.tensor([[high, 0.0], [high, 0.0]])
    student = torch.tensor([[high, 0.0], [0.0, high]])
    found = softened_cross_entropy(student, teacher, temperature=2.0)
    same = -(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4))
    other = -(3 / 4 * math.log(1 / 4) + 1 / 4 * math.log(3 / 4))
    torch.testing.assert_close(found, torch.tensor([same, other]))


def test_lwf_pulls_towards_the_teacher_alone() -> None:
    """The gradient at T is (softmax(student / T) - softmax(teacher / T)) / T, and none where they agree."""
    student, teacher = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    student.requires_grad_()
    softened_cross_entropy(student, teacher, 2.0).sum().backward()
    expected = ((student / 2).softmax(-1) - (teacher / 2).softmax(-1)) / 2
    torch.testing.assert_close(student.grad, expected.detach())


# --- EWC -----------------------------------------------------------------------------------------------------------


def anchor(a: float, b: float, fisher_a: float, fisher_b: float) -> tuple[Bank, dict[str, Tensor]]:
    values = {"fisher.q.A": torch.tensor([[fisher_a]]), "fisher.q.B": torch.tensor([[fisher_b]])}
    return bank(q=([[a]], [[b]])), values


def test_ewc_by_hand() -> None:
    """One anchor: λ/2 (2 (3 - 1)² + 0.5 (1 - 0)²) = λ/2 · 8.5."""
    trainable = {"q": (torch.tensor([[3.0]]), torch.tensor([[1.0]]))}
    penalty = EwcPenalty([anchor(1.0, 0.0, 2.0, 0.5)], 10.0, CPU)
    assert penalty.frozen_bytes == 4 * 4  # two numbers, and how much each matters
    step = penalty.step(trainable, 0.1)
    assert step.value.item() == pytest.approx(42.5)
    assert step.logged["drift"].item() == pytest.approx(4.25)
    assert (step.gradients["q", 0].item(), step.gradients["q", 1].item()) == pytest.approx((40.0, 5.0))


def test_ewc_of_two_tasks_by_hand() -> None:
    """λ/2 (2 (3-1)² + 6 (3-2)² + 0.5 · 1² + 0 · (1-9)²) with λ = 2; d/dA = 2 (2·2 + 6·1)."""
    trainable = {"q": (torch.tensor([[3.0]]), torch.tensor([[1.0]]))}
    anchors = [anchor(1.0, 0.0, 2.0, 0.5), anchor(2.0, 9.0, 6.0, 0.0)]
    step = EwcPenalty(anchors, 2.0, CPU).step(trainable, 0.1)
    assert step.value.item() == pytest.approx(8 + 6 + 0.5)
    assert (step.gradients["q", 0].item(), step.gradients["q", 1].item()) == pytest.approx((20.0, 1.0))


def test_ewc_against_autograd() -> None:
    old = [random_bank(seed) for seed in (1, 2, 3)]
    fishers = [
        {
            fisher_name(name, half): matrix.square()
            for name, pair in random_bank(seed).matrices.items()
            for half, matrix in enumerate(pair)
        }
        for seed in (4, 5, 6)
    ]

    def formula(trainable: dict[str, Pair]) -> Tensor:
        return 400 / 2 * sum(
            (fisher[fisher_name(name, half)] * (trainable[name][half] - one.matrices[name][half]).square()).sum()
            for one, fisher in zip(old, fishers, strict=True) for name in trainable for half in (0, 1)
        )  # fmt: skip

    check_against_autograd(EwcPenalty(zip(old, fishers, strict=True), 400.0, CPU), formula)


# --- replay --------------------------------------------------------------------------------------------------------


def stream_of(method: str, tmp_path: Path, tasks: list[tuple[str, float, int]], **section: Any) -> StreamConfig:
    listed = [{"name": n, "epochs": e, "batch_size": b, "learning_rate": 1e-3} for n, e, b in tasks]
    raw = {"run": "r", "method": method, "model": {"path": "m"}, "data": {"root": "d"}, "tasks": listed, **section}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    return load_config(tmp_path / "run.yaml")


def test_the_replay_buffer_is_balanced_and_only_shrinks(tmp_path: Path) -> None:
    tasks = [("pathvqa", 1.0, 4), ("PCAM", 1.0, 4), ("CXP", 1.0, 4)]
    config = stream_of("replay", tmp_path, tasks, replay={"buffer_size": 10})
    buffers = [Replay().choose(config, config.stream[:seen], [100, 50, 2][:seen]) for seen in (1, 2, 3)]
    assert [{name: len(samples) for name, samples in buffer.items()} for buffer in buffers] == [
        {"pathvqa": 10},
        {"pathvqa": 5, "PCAM": 5},
        {"pathvqa": 4, "PCAM": 3, "CXP": 2},  # CXP has no third sample
    ]
    for smaller, larger in zip(buffers[1:], buffers, strict=False):
        for name, samples in larger.items():
            assert torch.equal(smaller[name], samples[: len(smaller[name])])


def test_a_replayed_order_mixes_every_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 4 with a share of 0.25: 3 new ones, 1 old; 9 new samples, 2 epochs, so 6 batches."""
    tasks = [("pathvqa", 1.0, 4), ("PCAM", 2.0, 4)]
    config = stream_of("replay", tmp_path, tasks, replay={"buffer_size": 3, "share": 0.25})
    method, second = method_of(config), config.stream[1]
    assert [task.name for task in method.sources(config, second)] == ["PCAM", "pathvqa"]
    ledger = Ledger(tmp_path, RunLedger(run="recorded", method="replay", tasks={}))
    assert method.order(config, config.stream[0], [20], ledger) is None
    assert method.order(config, second, [9, 20], ledger) is not None  # a plan, before the first task is trained
    monkeypatch.setattr(ledger, "task_state", {"pathvqa": {"pathvqa": torch.tensor([19, 0, 7])}}.get)
    order = method.order(config, second, [9, 20], ledger)
    assert order is not None and len(order) == 24
    batches = [order[start : start + 4] for start in range(0, 24, 4)]
    assert all(sum(position >= 9 for position in batch) == 1 for batch in batches)
    new = [position for position in order if position < 9]
    assert sorted(new[:9]) == sorted(new[9:]) == list(range(9)) and new[:9] != new[9:]
    old = [position - 9 for position in order if position >= 9]
    assert sorted(old[:3]) == sorted(old[3:]) == [0, 7, 19]  # the whole buffer before any comes again
    assert method.order(config, second, [9, 20], ledger) == order


def test_replay_of_batches_of_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"tasks\.\w+\.batch_size: replay mixes new and old samples in a batch; use at least 2"
    ):
        stream_of("replay", tmp_path, [("pathvqa", 1.0, 2), ("PCAM", 1.0, 1)])


# --- mixture of experts: the layer itself is worked by hand in test_banks.py -----------------------------------------


def test_experts_that_cannot_share_the_rank_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"moe_lora\.experts: 3 does not divide lora\.rank 64"):
        stream_of("moe_lora", tmp_path, [("pathvqa", 1.0, 2)], moe_lora={"experts": 3})


# --- InfLoRA -------------------------------------------------------------------------------------------------------


def test_inflora_by_hand() -> None:
    """Inputs 3 e_1, 2 e_2, 1 e_3 of energy 9 + 4 + 1: two directions hold 13/14, over 0.9. With e_1 known, the next
    ones are e_2 and e_3, and there is no further."""
    inputs = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))
    nothing = torch.zeros(4, 0)
    basis = grown(nothing, inputs, 0.9)
    torch.testing.assert_close(basis @ basis.T, torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0])))
    assert grown(nothing, inputs, 0.6).shape == (4, 1) and grown(nothing, inputs, 0.65).shape == (4, 2)
    assert torch.equal(grown(basis, inputs, 0.9), basis)  # which it holds already
    first = grown(nothing, inputs, 0.6)
    found = new_directions(inputs, first, 3)
    torch.testing.assert_close(found.abs(), torch.eye(4)[:, [1, 2, 3]] * torch.tensor([1.0, 1.0, 0.0]))


def test_inflora_leaves_what_earlier_inputs_lead_to() -> None:
    """Against the formulas with the whole projector, and the source's claim: B A x = 0 for earlier inputs x."""
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(20, 5, generator=generator) @ torch.randn(5, 40, generator=generator)
    new = torch.randn(20, 40, generator=generator)
    known = grown(torch.zeros(20, 0), old, 0.9999999)
    assert known.shape == (20, 5)
    torch.testing.assert_close(known.T @ known, torch.eye(5), atol=1e-5, rtol=0)
    a = new_directions(new, known, 4).T
    assert (a @ old).abs().max() < 1e-4
    whole = (torch.eye(20) - known @ known.T) @ new
    expected = torch.linalg.svd(whole).U[:, :4]
    torch.testing.assert_close(a.T @ a, expected @ expected.T, atol=1e-5, rtol=0)
    after = grown(known, new, 0.8)
    held = [(basis.T @ new).square().sum() / new.square().sum() for basis in (after, after[:, :-1])]
    assert held[0] >= 0.8 > held[1]


def test_inflora_beside_its_source_s_code() -> None:
    """Which takes the singular vectors of the inputs' mean H Hᵀ, (in, in): the same directions. It measures their energy
    there too, by fourth powers of H's singular values: of a first task's (9 + 4 + 1) 81 + 16 + 1, of which e_1 holds 0.83
    instead of 0.64. So at the same threshold it keeps no more directions than the paper's ‖H‖_F² does."""
    generator = torch.Generator().manual_seed(0)
    for inputs in (torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0])), torch.randn(12, 40, generator=generator)):
        found = torch.linalg.svd(inputs @ inputs.T / inputs.shape[1])
        a = new_directions(inputs, torch.zeros(len(inputs), 0), 2).T
        torch.testing.assert_close(a.T @ a, found.U[:, :2] @ found.U[:, :2].T, atol=1e-4, rtol=0)
        shares = (found.S**2).cumsum(0) / (found.S**2).sum()
        for threshold in (0.7, 0.9, 0.95):
            theirs = max(1, int((shares < threshold).sum()))
            assert theirs <= grown(torch.zeros(len(inputs), 0), inputs, threshold).shape[1]
    assert grown(torch.zeros(4, 0), torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0])), 0.8).shape[1] == 2


def test_inflora_from_too_few_inputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"inflora\.samples: 2 × inflora\.tokens 16 are fewer inputs than lora\.rank 64"
    ):
        stream_of("inflora", tmp_path, [("pathvqa", 1.0, 2)], inflora={"samples": 2})


# --- joint ---------------------------------------------------------------------------------------------------------


def test_joint_visits_every_sample_as_often_as_the_stream_does(tmp_path: Path) -> None:
    config = stream_of("joint", tmp_path, [("pathvqa", 2.0, 8), ("PCAM", 1.0, 4), ("CXP", 0.5, 4)])
    method = method_of(config)
    (task,) = method.trained(config)
    order = method.order(config, task, [3, 4, 6], Ledger(tmp_path, {"tasks": {}}))
    assert order is not None
    counted = Counter(order)
    assert [counted[position] for position in range(7)] == [2] * 3 + [1] * 4
    assert sum(counted[position] for position in range(7, 13)) == 3 and max(order) < 13
    assert order != sorted(order)


# --- which banks answer --------------------------------------------------------------------------------------------

SUMMED: dict[str, Any] = {"prefix": [1, 2], "all": [1, 2, 3]}


@pytest.mark.parametrize(
    ("method", "at_stage_3", "at_stage_1"),
    [
        ("zero_shot", [], []),
        ("each", [2], []),
        ("sequential", [3], [1]),
        ("incremental", SUMMED, [1]),
        ("mslora_cr", SUMMED, [1]),
        ("olora", SUMMED, [1]),
        ("lwf", SUMMED, [1]),
        ("inflora", SUMMED, [1]),
        ("keeplora", SUMMED, [1]),
        ("reglora", SUMMED, [1]),
        ("mr_lora", [2], []),
        ("hide_llava", [2], []),
        ("sd_lora", [3], [1]),
        ("ewc", [3], [1]),
        ("replay", [3], [1]),
        ("moe_lora", [3], [1]),
        ("joint", [1], [1]),
    ],
)
@pytest.mark.parametrize("banks_by", ["prefix", "all"])
def test_banks_of_the_second_task(method: Any, at_stage_3: Any, at_stage_1: list[int], banks_by: str) -> None:
    expected = at_stage_3[banks_by] if isinstance(at_stage_3, dict) else at_stage_3
    loaded = load_method(method)
    assert isinstance(loaded, Method) and loaded.name == method
    assert loaded.banks(2, 3, banks_by) == expected
    assert loaded.banks(2, 1, banks_by) == at_stage_1


@pytest.mark.parametrize(("hook", "flag"), [("penalty", "has_penalty"), ("task_state", "has_task_state")])
def test_a_hook_without_its_flag_is_refused_where_the_class_is_made(hook: str, flag: str) -> None:
    with pytest.raises(TypeError, match=f"Silent overrides `{hook}`, so it must set `{flag} = True`"):
        type("Silent", (Method,), {"name": "silent", hook: lambda self, *_: None})
    assert getattr(type("Declared", (Method,), {"name": "declared", flag: True, hook: lambda self, *_: None}), flag)
