"""What each method adds to the cross entropy, worked by hand and against autograd; which banks answer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mslora_cr.banks import Bank
from mslora_cr.config import OloraConfig
from mslora_cr.methods import METHODS
from mslora_cr.methods.olora import OloraPenalty
from mslora_cr.training.penalties import Pair, Penalty

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
    live = {name: tuple(m.requires_grad_() for m in pair) for name, pair in random_bank(9).matrices.items()}
    value = formula(live)
    value.backward()
    step = penalty.step(live, 0.1)
    torch.testing.assert_close(step.value, value.detach())
    for name, pair in live.items():
        for half, matrix in enumerate(pair):
            expected = torch.zeros_like(matrix) if matrix.grad is None else matrix.grad
            found = step.gradients.get((name, half), torch.zeros_like(matrix))
            torch.testing.assert_close(found, expected)


# --- O-LoRA --------------------------------------------------------------------------------------------------------


def test_olora_by_hand() -> None:
    """|A_old A_newᵀ| = |(1·3 + 2·(-4), 0·3 + (-1)·(-4))| = 5 + 4; ‖A‖ = 5, ‖B‖ = 13."""
    old = bank(q=([[1.0, 2.0], [0.0, -1.0]], [[0.0, 0.0]]))
    live = {"q": (torch.tensor([[3.0, -4.0]]), torch.tensor([[5.0], [12.0]]))}
    step = OloraPenalty([old], OloraConfig(lambda_1=0.5, lambda_2=0.1), CPU).step(live, 0.1)
    assert step.logged == {"overlap": 9.0, "norm": 18.0}
    assert step.value.item() == pytest.approx(0.5 * 9 + 0.1 * 18)
    # signs -1 and +1: 0.5 (-(1, 2) + (0, -1)) + 0.1 (3, -4) / 5
    torch.testing.assert_close(step.gradients["q", 0], torch.tensor([[-0.5 + 0.06, -1.5 - 0.08]]))
    torch.testing.assert_close(step.gradients["q", 1], torch.tensor([[5.0], [12.0]]) / 130)


def test_olora_against_autograd() -> None:
    old = [random_bank(1), random_bank(2)]

    def formula(live: dict[str, Pair]) -> Tensor:
        overlap = sum((one.matrices[name][0] @ a.T).abs().sum() for one in old for name, (a, _) in live.items())
        return 0.5 * overlap + 0.2 * sum(matrix.norm() for pair in live.values() for matrix in pair)

    check_against_autograd(OloraPenalty(old, OloraConfig(lambda_1=0.5, lambda_2=0.2), CPU), formula)


def test_olora_of_a_first_task_is_its_norm_alone_and_zero_at_zero() -> None:
    live = {"q": (torch.tensor([[3.0, -4.0]]), torch.zeros(2, 1))}
    step = OloraPenalty([], OloraConfig(lambda_2=0.1), CPU).step(live, 0.1)
    assert step.value.item() == pytest.approx(0.5)
    assert not step.gradients["q", 1].any()


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
    ],
)
@pytest.mark.parametrize("banks_by", ["prefix", "all"])
def test_banks_of_the_second_task(method: Any, at_stage_3: Any, at_stage_1: list[int], banks_by: str) -> None:
    expected = at_stage_3[banks_by] if isinstance(at_stage_3, dict) else at_stage_3
    assert METHODS[method].banks(2, 3, banks_by) == expected
    assert METHODS[method].banks(2, 1, banks_by) == at_stage_1
