import math

import pytest
import torch
from torch import Tensor

from mslora_cr.banks.bank import Bank
from mslora_cr.losses.bank_penalties import BankPenalties
from mslora_cr.losses.contrastive import Frozen, contrastive_value, penalty_terms
from mslora_cr.losses.cosine import cosine_terms
from mslora_cr.losses.penalty import INITIAL_LOG_WEIGHT, PenaltyWeight

LAYERS = {"q_proj": (12, 12), "k_proj": (6, 12), "gate_proj": (20, 12), "down_proj": (12, 20)}
"""Linear layers, (out, in): more and fewer columns than the rank below, and shapes that share a batch."""


def random_bank(name: str, rank: int, scale: float, seed: int) -> Bank:
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> Tensor:
        return scale * torch.randn(*shape, dtype=torch.float64, generator=generator)

    return Bank(name, rank, rank, {key: (matrix(rank, i), matrix(o, rank)) for key, (o, i) in LAYERS.items()})


def loss_of_the_readme(banks: list[Bank], same: list[bool], alpha: float, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas of tests/golden/README.md, word for word; the last bank is the one in training."""
    *frozen, trainable = banks
    modules = list(trainable.matrices)
    contrastive = torch.zeros((), dtype=torch.float64)
    for bank, is_same in zip(frozen, same, strict=True):
        distances = [
            torch.linalg.norm(trainable.matrices[m][half] - bank.matrices[m][half]) for m in modules for half in (0, 1)
        ]
        similarity = torch.stack([torch.exp(-d) for d in distances]).mean()
        contrastive = contrastive + (1 - similarity if is_same else similarity)
    squares = []
    for bank in banks:
        eye = torch.eye(bank.rank, dtype=torch.float64)
        for a, b in bank.matrices.values():
            squares.append(((a @ a.T - eye) ** 2).sum() + ((b.T @ b - eye) ** 2).sum())
    orthogonality = torch.stack(squares).mean()
    return alpha * contrastive + beta * orthogonality, contrastive, orthogonality


def autograd(
    frozen: list[Bank], trainable: Bank, same: list[bool], alpha: float, beta: float
) -> dict[tuple[str, int], Tensor]:
    leaves = {m: tuple(x.clone().requires_grad_() for x in pair) for m, pair in trainable.matrices.items()}
    total, _, _ = loss_of_the_readme(
        [*frozen, Bank("trainable", trainable.rank, trainable.alpha, leaves)], same, alpha, beta
    )
    total.backward()
    return {(m, half): pair[half].grad for m, pair in leaves.items() for half in (0, 1)}


def closed_form(
    frozen: list[Bank], trainable: Bank, same: list[bool], alpha: float, beta: float
) -> dict[tuple[str, int], Tensor]:
    """The gradient from the pure function alone, in float64."""
    found = {}
    coefficients = (
        alpha * torch.tensor([1.0 if flag else -1.0 for flag in same], dtype=torch.float64) / (2 * len(LAYERS))
    )
    pairs = len(LAYERS) * (len(frozen) + 1)
    for module in trainable.matrices:
        for half in (0, 1):
            stacked = torch.stack([bank.matrices[module][half].flatten() for bank in frozen])[None]
            others = Frozen(stacked, stacked.square().sum(2), coefficients)
            terms = penalty_terms(trainable.matrices[module][half][None], others, beta / pairs, transposed=half == 1)
            found[module, half] = terms.gradient[0]
    return found


def shifted(bank: Bank, by: float) -> Bank:
    return Bank("near", bank.rank, bank.alpha, {m: (a + by, b - by) for m, (a, b) in bank.matrices.items()})


@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0])
def test_gradient_is_autograds(rank: int, count: int, scale: float) -> None:
    frozen = [random_bank(f"bank{i}", rank, scale, seed=i) for i in range(count)]
    trainable, same = random_bank("trainable", rank, scale, seed=99), [i % 2 == 0 for i in range(count)]
    expected = autograd(frozen, trainable, same, 0.7, 0.3)
    for key, gradient in closed_form(frozen, trainable, same, 0.7, 0.3).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("by", [1e-9, 1e-6, 1e-4, 1e-2])
def test_gradient_is_autograds_beside_a_frozen_bank(by: float) -> None:
    """Nearly equal matrices, on both sides of the switch from the expansion to the difference."""
    first, other = random_bank("first", 4, 0.5, seed=1), random_bank("other", 4, 0.5, seed=2)
    trainable = shifted(first, by)
    expected = autograd([first, other], trainable, [True, False], 1.0, 0.0)
    for key, gradient in closed_form([first, other], trainable, [True, False], 1.0, 0.0).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-10, atol=1e-10)


def test_gradient_is_zero_where_both_banks_are_equal() -> None:
    bank, other = random_bank("bank", 4, 0.5, seed=1), random_bank("other", 4, 0.5, seed=2)
    for gradient in closed_form([bank], bank, [True], 1.0, 0.0).values():
        assert torch.equal(gradient, torch.zeros_like(gradient))
    # One equal bank among others must not spoil their share (0 · inf, or 0 / 0).
    both, alone = (
        closed_form(banks, bank, same, 1.0, 0.0) for banks, same in (([bank, other], [True, False]), ([other], [False]))
    )
    for key, gradient in both.items():
        torch.testing.assert_close(gradient, alone[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1e-30])
def test_gradient_is_zero_where_both_matrices_are(scale: float) -> None:
    """As B is at the start, beside a frozen bank that never learned; squares of 1e-30 are zero in float32."""
    matrices = torch.full((2, 3, 20), scale)
    found = penalty_terms(scale * torch.ones(2, 4, 5), Frozen(matrices, matrices.square().sum(2), torch.ones(3)))
    assert torch.equal(found.gradient, torch.zeros(2, 4, 5))


def test_contrastive_term_by_hand() -> None:
    current = torch.tensor([[[3.0, 4.0]]], dtype=torch.float64)
    matrices = torch.tensor([[[0.0, 0.0], [3.0, 3.0]]], dtype=torch.float64)  # at distances 5 and 1
    coefficients = torch.tensor([0.5, -0.5], dtype=torch.float64)  # of one modality and of another, K = 2, α = 1
    found = penalty_terms(current, Frozen(matrices, matrices.square().sum(2), coefficients))
    assert found.similarity_sum is not None
    torch.testing.assert_close(found.similarity_sum, torch.tensor([math.exp(-5), math.exp(-1)], dtype=torch.float64))
    # + exp(-5)/2 · (3, 4)/5 for the bank of the same modality, - exp(-1)/2 · (0, 1)/1 for the other.
    expected = torch.tensor([[[math.exp(-5) * 0.3, math.exp(-5) * 0.4 - math.exp(-1) / 2]]], dtype=torch.float64)
    torch.testing.assert_close(found.gradient, expected)
    value = contrastive_value(found.similarity_sum / 2, torch.tensor([True, False]))
    assert value.item() == pytest.approx(1 - math.exp(-5) / 2 + math.exp(-1) / 2)


@pytest.mark.parametrize("transposed", [False, True])
def test_orthogonality_by_hand(transposed: bool) -> None:
    matrices = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])
    expected = torch.zeros_like(matrices)
    expected[0, 0, 0] = 4 * 3 * 2
    if transposed:
        matrices, expected = (tensor.transpose(1, 2).contiguous() for tensor in (matrices, expected))
    found = penalty_terms(matrices, beta=1.0, transposed=transposed)
    assert found.similarity_sum is None
    # (4 - 1)² of the first, whose second row is a unit vector; the second is orthonormal
    assert found.orthogonality.item() == 9.0
    assert torch.equal(found.gradient, expected)


def test_shapes_that_do_not_fit_are_refused() -> None:
    frozen = Frozen(torch.ones(2, 3, 4), torch.ones(2, 3), torch.ones(3))
    with pytest.raises(ValueError, match=r"current \(2, 5\).*do not fit"):
        penalty_terms(torch.ones(2, 1, 5), frozen)
    with pytest.raises(ValueError, match="expected"):
        penalty_terms(torch.ones(3, 4))


def test_bank_penalties_are_the_formula_in_float32() -> None:
    """The batching over shapes, the constant share of frozen banks, B's transpose: values and gradients of a whole bank."""
    frozen = [random_bank(f"bank{i}", 4, 0.3, seed=i) for i in range(3)]
    trainable, same = random_bank("trainable", 4, 0.3, seed=9), [True, False, True]
    penalties = BankPenalties([single(bank) for bank in frozen], same, torch.device("cpu"))
    contrastive, orthogonality, gradients = penalties.terms(single(trainable).matrices, 0.7, 0.3)
    _, expected_contrastive, expected_orthogonality = loss_of_the_readme([*frozen, trainable], same, 0.7, 0.3)
    assert contrastive.item() == pytest.approx(expected_contrastive.item(), rel=1e-6)
    assert orthogonality.item() == pytest.approx(expected_orthogonality.item(), rel=1e-6)
    expected = autograd(frozen, trainable, same, 0.7, 0.3)
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.double(), expected[key], rtol=1e-5, atol=1e-6)


def test_without_the_contrastive_term_no_frozen_bank_is_held() -> None:
    frozen, trainable = (
        [single(random_bank("frozen", 4, 0.3, seed=1))],
        single(random_bank("trainable", 4, 0.3, seed=9)),
    )
    whole = BankPenalties(frozen, [True], torch.device("cpu"))
    without = BankPenalties(frozen, [True], torch.device("cpu"), contrastive=False)
    assert whole.frozen_bytes > 0 == without.frozen_bytes
    expected, found = whole.terms(trainable.matrices, 0.0, 0.3), without.terms(trainable.matrices, 0.0, 0.3)
    assert found.contrastive.item() == 0 and found.orthogonality == expected.orthogonality
    for key, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[key], gradient, rtol=1e-6, atol=1e-9)


def test_nearly_equal_matrices_keep_their_digits_in_float32() -> None:
    first = single(random_bank("first", 4, 1.0, seed=1))
    trainable = shifted(first, 1e-4)
    _, expected, _ = loss_of_the_readme([double(first), double(trainable)], [False], 1.0, 0.0)
    contrastive, _, gradients = BankPenalties([first], [False], torch.device("cpu")).terms(trainable.matrices, 1.0, 0.0)
    assert contrastive.item() == pytest.approx(expected.item(), rel=1e-6)
    for key, exact in autograd([double(first)], double(trainable), [False], 1.0, 0.0).items():
        torch.testing.assert_close(gradients[key].double(), exact, rtol=1e-4, atol=1e-7)


def single(bank: Bank) -> Bank:
    return Bank(bank.name, bank.rank, bank.alpha, {m: (a.float(), b.float()) for m, (a, b) in bank.matrices.items()})


def double(bank: Bank) -> Bank:
    return Bank(bank.name, bank.rank, bank.alpha, {m: (a.double(), b.double()) for m, (a, b) in bank.matrices.items()})


def test_a_learnable_weight_follows_adamw_by_hand() -> None:
    weight, rate = PenaltyWeight(-1), 0.01
    assert weight.value == pytest.approx(math.exp(INITIAL_LOG_WEIGHT)) == pytest.approx(math.exp(-4.6))
    a, first, second = -4.6, 0.0, 0.0
    for step, penalty in enumerate([0.5, 2.0, 0.1], start=1):
        weight.update(torch.tensor(penalty), rate)
        gradient = math.exp(a) * penalty  # d exp(a)·penalty / da
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        a -= rate * (first / (1 - 0.9**step)) / (math.sqrt(second / (1 - 0.999**step)) + 1e-8)
        assert weight.value == pytest.approx(math.exp(a), rel=1e-6)


def test_a_learnable_weight_goes_on_from_its_state() -> None:
    straight, halted = PenaltyWeight(-1), PenaltyWeight(-1)
    for penalty in (0.5, 2.0):
        straight.update(torch.tensor(penalty), 0.01)
        halted.update(torch.tensor(penalty), 0.01)
    resumed = PenaltyWeight(-1)
    resumed.load_state_dict(halted.state_dict())
    straight.update(torch.tensor(1.0), 0.01)
    resumed.update(torch.tensor(1.0), 0.01)
    assert resumed.value == straight.value


def test_a_fixed_weight_stays() -> None:
    weight = PenaltyWeight(0.1)
    weight.update(torch.tensor(5.0), 1.0)
    assert weight.value == 0.1


@pytest.mark.parametrize("same", [[True, False], [False, False]])
def test_the_cosine_term_is_its_formula(same: list[bool]) -> None:
    generator = torch.Generator().manual_seed(3)
    frozen = torch.randn(4, 2, 30, dtype=torch.float64, generator=generator)
    current = torch.randn(4, 30, dtype=torch.float64, generator=generator)
    current[3] = 0.0  # as B is before its first update
    leaf = current.clone().requires_grad_()
    cosine = torch.nn.functional.cosine_similarity(leaf[:3].unsqueeze(1), frozen[:3], dim=2)
    similarity = torch.exp(cosine - 1).sum(0) + math.exp(-1)
    (0.3 * contrastive_value(similarity / 8, torch.tensor(same))).backward()
    coefficients = torch.tensor([0.3 if flag else -0.3 for flag in same], dtype=torch.float64) / 8
    found, gradient = cosine_terms(current, Frozen(frozen, frozen.square().sum(2), coefficients))
    torch.testing.assert_close(found, similarity.detach())
    assert leaf.grad is not None
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-10, atol=1e-14)
    with pytest.raises(ValueError, match="do not fit"):
        cosine_terms(current[:, :5], Frozen(frozen, frozen.square().sum(2), coefficients))


def test_the_cosine_term_joins_the_orthogonality_term() -> None:
    banks = [random_bank(str(seed), 4, 0.5, seed) for seed in range(3)]
    *frozen, last = banks
    trainable = {name: (a.float(), b.float()) for name, (a, b) in last.matrices.items()}
    device = torch.device("cpu")
    by_angle = BankPenalties(frozen, [True, False], device, cosine=True).terms(trainable, 0.5, 0.25)
    alone = BankPenalties(frozen, [True, False], device, contrastive=False).terms(trainable, 0.0, 0.25)
    assert float(by_angle.orthogonality) == pytest.approx(float(alone.orthogonality))
    for module, half in by_angle.gradients:
        rows = torch.stack([bank.matrices[module][half].flatten() for bank in frozen]).float()[None]
        coefficients = torch.tensor([0.5, -0.5]) / (2 * len(LAYERS))
        current = trainable[module][half].flatten()[None]
        expected = cosine_terms(current, Frozen(rows, rows.square().sum(2), coefficients))[1]
        rest = by_angle.gradients[module, half] - alone.gradients[module, half]
        torch.testing.assert_close(rest.flatten()[None], expected, rtol=1e-4, atol=1e-6)
