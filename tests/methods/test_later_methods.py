"""RegLoRA, KeepLoRA and the others that came later: their sources' formulas worked by hand, and against autograd."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mslora_cr.banks.directions import ScaledParts, coupled, decoupled
from mslora_cr.losses.penalty import Key, Pair
from mslora_cr.methods.base import method_of
from mslora_cr.methods.keeplora import gradient_directions, principal_inputs
from mslora_cr.methods.reglora import RegloraPenalty, RegloraSettings, key_elements
from mslora_cr.routing.lda import TaskStatistics
from mslora_cr.routing.learned import LearnedRouter
from mslora_cr.routing.prototypes import PrototypeRouter
from tests.methods.test_methods import bank, check_against_autograd, random_bank, stream_of

CPU = torch.device("cpu")

# --- RegLoRA -------------------------------------------------------------------------------------------------------


def test_reglora_by_hand() -> None:
    """|B_1 A_1| = (4 3 | 8 6) with a share of a quarter: the 8 alone. |B_2 A_2| = (0 9 | 0 1): the 9. At
    B A = (2 -4 | 1 -2) the two are 1 and -4, whose mean is 2.5 in absolute value."""
    old = [bank(q=([[4.0, 3.0]], [[1.0], [2.0]])), bank(q=([[0.0, -3.0]], [[3.0], [1 / 3]]))]
    assert [key_elements(*one.matrices["q"], 0.25, CPU).tolist() for one in old] == [[2], [1]]
    penalty = RegloraPenalty(old, RegloraSettings(strength=10.0, share=0.25), CPU)
    assert penalty.frozen_bytes == 2 * 4
    step = penalty.step({"q": (torch.tensor([[1.0, -2.0]]), torch.tensor([[2.0], [1.0]]))}, 0.1)
    assert step.logged["key_elements"].item() == pytest.approx(2.5)
    assert step.value.item() == pytest.approx(25)
    # signs +1 at row 2, column 1, and -1 at row 1, column 2, each times 10 / 2: Bᵀ S and S Aᵀ
    torch.testing.assert_close(step.gradients["q", 0], 5 * torch.tensor([[1.0, -2.0]]))
    torch.testing.assert_close(step.gradients["q", 1], 5 * torch.tensor([[2.0], [1.0]]))


def test_reglora_counts_an_entry_of_two_tasks_twice() -> None:
    one = bank(q=([[4.0, 3.0]], [[1.0], [2.0]]))
    trainable = {"q": (torch.tensor([[1.0, -2.0]]), torch.tensor([[2.0], [1.0]]))}
    values = [
        RegloraPenalty(old, RegloraSettings(share=0.25), CPU).step(trainable, 0.1).value for old in ([one], [one, one])
    ]
    torch.testing.assert_close(*values)


def test_reglora_against_autograd() -> None:
    old, share = [random_bank(1), random_bank(2)], 0.2

    def formula(trainable: dict[str, Pair]) -> Tensor:
        terms = []
        for name, (a, b) in trainable.items():
            products = []
            for one in old:
                size = one.matrices[name][1] @ one.matrices[name][0]
                least = size.abs().flatten().sort(descending=True).values[int(share * size.numel()) - 1]
                products.append((b @ a)[size.abs() >= least])
            terms.append(torch.cat(products).abs().mean())
        return 2500 * sum(terms) / len(terms)

    check_against_autograd(RegloraPenalty(old, RegloraSettings(share=share), CPU), formula)


# --- KeepLoRA ------------------------------------------------------------------------------------------------------


def test_principal_directions_by_hand() -> None:
    """W = diag(3, 2, 1) with energies 9, 4, 1 of 14: e_1 holds 0.64, e_1 and e_2 0.93. As in the source, as many as
    hold less than the share: of 0.95 two, of 0.7 one, and of 0.6 one too, as there must be one."""
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    for shape in (weight, weight[:, [0, 1, 2, 2]] * torch.tensor([1, 1, 1, 0.0]), torch.cat([weight, 0 * weight])):
        for threshold, count in ((0.6, 1), (0.7, 1), (0.95, 2)):
            found = principal_inputs(shape, threshold)
            assert found.shape == (shape.shape[1], count)
            torch.testing.assert_close(found.abs(), torch.eye(shape.shape[1])[:, :count])


@pytest.mark.parametrize("outputs", [9, 30])
def test_gradient_directions_are_those_of_the_projected_gradient(outputs: int) -> None:
    """Against the SVD of G (I - M Mᵀ), from gradients of a bank's matrices under a loss linear in W = s B A, with G."""
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([40.0, 20.0, 10.0, 1.0, 0.5, 0.1])
    left = torch.linalg.qr(torch.randn(outputs, 6, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(20, 6, generator=generator)).Q
    gradient = left * values @ right.T
    known = torch.linalg.qr(torch.randn(20, 4, generator=generator)).Q

    def gradients(trainable: dict[str, Pair]) -> dict[Key, Tensor]:
        a, b = (matrix.clone().requires_grad_() for matrix in trainable["q"])
        (2.0 * (b @ a) * gradient).sum().backward()
        return {("q", 0): a.grad, ("q", 1): b.grad}

    drawn = {"q": torch.randn(3, 20, generator=generator)}
    a = gradient_directions(gradients, {"q": known}, drawn, {"q": outputs}, 4)["q"]
    expected = torch.linalg.svd(gradient @ (torch.eye(20) - known @ known.T)).Vh[:3]
    torch.testing.assert_close(a.T @ a, expected.T @ expected, atol=1e-4, rtol=0)
    torch.testing.assert_close((a * expected).sum(1).abs(), torch.ones(3), atol=1e-4, rtol=0)  # one by one, in order
    assert (a @ known).abs().max() < 1e-5


# --- MR-LoRA -------------------------------------------------------------------------------------------------------


def statistics_of(*examples: list[float]) -> TaskStatistics:
    rows = torch.tensor(examples)
    return TaskStatistics(len(rows), rows.mean(0), torch.zeros(rows.shape[1], rows.shape[1]), rows)


def test_the_learned_router_is_where_its_loss_is_least() -> None:
    """There ``λ W = mean of (target - p) xᵀ`` over the questions, and the mean of target - p is zero."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 5, 4, generator=generator) + 2 * torch.eye(4)[:3, None]
    router = LearnedRouter([statistics_of(*task.tolist()) for task in rows], 0.1)
    questions, targets = rows.flatten(0, 1), torch.eye(3, dtype=torch.float64).repeat_interleave(5, 0)
    away = targets - router.probabilities(questions)
    torch.testing.assert_close(away.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0)
    expected = away.T @ questions.double() / len(questions) / 0.1
    logits = router.probabilities(torch.cat([torch.zeros(1, 4), torch.eye(4)])).log()
    found = (logits[1:] - logits[:1]).T  # W, but for what all tasks have in common
    torch.testing.assert_close(found - found[:1], expected - expected[:1], atol=1e-4, rtol=1e-4)
    assert (router.route(questions).view(3, 5) == torch.arange(3)[:, None]).float().mean() > 0.8


def test_the_learned_router_of_two_mirrored_tasks_by_hand() -> None:
    """Examples +1 and -1: W = (w, -w), no bias, with 1 / (1 + exp(2 w)) = λ w, as the derivative is zero there."""
    router, decay = LearnedRouter([statistics_of([1.0]), statistics_of([-1.0])], 0.1), 0.1
    p = router.probabilities(torch.tensor([[1.0]]))[0, 0].item()
    w = math.log(p / (1 - p)) / 2
    assert 1 / (1 + math.exp(2 * w)) == pytest.approx(decay * w, rel=1e-5)


# --- HiDe-LLaVA ----------------------------------------------------------------------------------------------------


def test_similarities_by_hand() -> None:
    """Of a picture at (0, 2) and words at 3 with prototypes (1, 0 | 1) and (0, 1 | -1): cosines 0 and 1, 1 and -1, so
    ½ and 0; at T = ½ the shares are as e to 1."""
    tasks = [TaskStatistics(1, torch.tensor(mean), torch.zeros(3, 3)) for mean in ([1.0, 0, 1], [0.0, 1, -1])]
    router = PrototypeRouter(tasks, pictures=2, temperature=0.5)
    shares = router.probabilities(torch.tensor([[0.0, 2.0, 3.0]]))
    torch.testing.assert_close(shares, torch.tensor([[math.e, 1.0]]) / (math.e + 1))
    assert router.route(torch.tensor([[0.0, 2.0, 3.0], [0.0, 2.0, -3.0]])).tolist() == [0, 1]


def test_disco_s_similarities_are_the_words_alone(tmp_path: Path) -> None:
    """Cosines 1 and -1 of the words at 3, at T = ½: as e² to e⁻², whatever the picture. What a configuration without
    the choice was, it is."""
    tasks = [TaskStatistics(1, torch.tensor(mean), torch.zeros(3, 3)) for mean in ([1.0, 0, 1], [0.0, 1, -1])]
    section = {"layers": "all", "similarity": "question", "temperature": 0.5}
    config = stream_of("hide_llava", tmp_path, [("pathvqa", 1.0, 2), ("PCAM", 1.0, 2)], hide_llava=section)
    router = method_of(config).router(config, tasks, 2)
    shares = router.probabilities(torch.tensor([[0.0, 2.0, 3.0], [5.0, 0.0, 3.0]]))
    expected = torch.tensor([math.e**2, math.e**-2]) / (math.e**2 + math.e**-2)
    torch.testing.assert_close(shares, expected.expand(2, 2))
    assert method_of(config).router_settings(config) == section
    plain = stream_of("hide_llava", tmp_path, [("pathvqa", 1.0, 2)])
    assert plain.model_dump()["hide_llava"] == {"temperature": 0.1, "layers": "last"}


def test_lower_layers_are_fused_and_the_last_is_mixed(tmp_path: Path) -> None:
    """(B_1 + B_2)(A_1 + A_2) below, cross terms and all; w_1 B_1 A_1 + w_2 B_2 A_2 in the last layer."""
    layers = {"q": "model.layers.0.q", "v": "model.layers.10.v"}
    banks = [
        replace(
            random_bank(seed), name=f"b{seed}", matrices={layers[k]: m for k, m in random_bank(seed).matrices.items()}
        )
        for seed in (1, 2)
    ]
    config = stream_of("hide_llava", tmp_path, [("pathvqa", 1.0, 2), ("PCAM", 1.0, 2)])
    [whole], shared = method_of(config).mixed(config, banks)
    weights = (0.3, 0.7)

    def update(name: str) -> Tensor:
        parts = [(1.0, whole), *zip(weights, shared, strict=True)]
        return sum(
            (w * one.scaling * one.matrices[name][1] @ one.matrices[name][0] for w, one in parts), torch.zeros(())
        )

    (a1, b1), (a2, b2) = (one.matrices[layers["q"]] for one in banks)
    torch.testing.assert_close(update(layers["q"]), banks[0].scaling * (b1 + b2) @ (a1 + a2))
    (a1, b1), (a2, b2) = (one.matrices[layers["v"]] for one in banks)
    torch.testing.assert_close(update(layers["v"]), banks[0].scaling * (0.3 * b1 @ a1 + 0.7 * b2 @ a2))
    config = stream_of("hide_llava", tmp_path, [("pathvqa", 1.0, 2)], hide_llava={"layers": "all"})
    assert method_of(config).mixed(config, banks) == ([], banks)


# --- SD-LoRA -------------------------------------------------------------------------------------------------------


def test_directions_and_magnitudes_by_hand() -> None:
    """2 B A with B = (3, 4)ᵀ and A = (0, 1), and B = (0, 1)ᵀ and A = (2, 0): of norms 10 and 4."""
    two = replace(bank(q=([[0.0, 1.0], [2.0, 0.0]], [[3.0, 0.0], [4.0, 1.0]])), alpha=4.0)
    directions, magnitudes = decoupled(two, 1)
    torch.testing.assert_close(magnitudes["q"], torch.tensor([10.0, 4.0]))
    a, b = directions.matrices["q"]
    assert directions.scaling == 1
    torch.testing.assert_close(b[:, :1] @ a[:1], torch.tensor([[0.0, 0.6], [0.0, 0.8]]))
    torch.testing.assert_close(b[:, 1:] @ a[1:], torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    # with magnitudes 5 and -1, and a new bank of scaling 3: (0 3 | 0 4) - (0 0 | 1 0) + 3 (1 1 | 0 0)
    new = replace(bank(q=([[1.0, 1.0]], [[1.0], [0.0]])), alpha=3.0)
    whole = coupled(directions, {"q": torch.tensor([5.0, -1.0])}, new)
    a, b = whole.matrices["q"]
    assert (whole.rank, whole.scaling) == (3, 3.0)
    torch.testing.assert_close(3 * b @ a, torch.tensor([[3.0, 6.0], [-1.0, 4.0]]))


def test_taken_apart_and_put_together_a_bank_is_what_it_was() -> None:
    old, new = replace(random_bank(1), alpha=6.0), replace(random_bank(2), alpha=6.0)
    nothing = {name: (a, torch.zeros_like(b)) for name, (a, b) in new.matrices.items()}
    for part in (1, 2):
        directions, magnitudes = decoupled(old, part)
        whole = coupled(directions, magnitudes, replace(new, matrices=nothing))
        for name, (a, b) in old.matrices.items():
            known, unit = whole.matrices[name]
            torch.testing.assert_close(whole.scaling * unit @ known, old.scaling * b @ a)
    unlearned = replace(old, matrices=nothing)
    assert all(not b.any() for _, b in decoupled(unlearned, 2)[0].matrices.values())


def test_scaled_parts_and_their_gradient_by_hand() -> None:
    """m ⊙ A x with A = (1 2 | 0 1), x = (3, 1) and m = (2, -1): (10, -1); d/dm of their sum is A x = (5, 1)."""
    plain = torch.nn.Linear(2, 2, bias=False)
    plain.weight.data = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    parts = ScaledParts(plain, torch.tensor([2.0, -1.0]))
    found = parts(torch.tensor([3.0, 1.0]))
    found.sum().backward()
    assert found.tolist() == [10, -1] and parts.magnitudes.grad.tolist() == [5, 1]
