import math

import pytest
import torch

from mslora_cr.banks.bank import Bank
from mslora_cr.banks.similarity import by_layer_and_module, effective_rank, update_cosines

NAME = "model.language_model.layers.0.self_attn.q_proj"


def bank(a: torch.Tensor, b: torch.Tensor, name: str = "x") -> Bank:
    return Bank(name, a.shape[0], 1.0, {NAME: (a, b)})


def test_effective_rank_by_hand() -> None:
    a, b = torch.eye(3, 5), torch.eye(6, 3)
    assert effective_rank(a, b) == pytest.approx(3)  # three equal singular values
    assert effective_rank(a, b * torch.tensor([1.0, 0.0, 0.0])) == pytest.approx(1)
    # singular values 3 and 1: p = 3/4 and 1/4
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(a, b * torch.tensor([3.0, 1.0, 0.0])) == pytest.approx(math.exp(entropy))
    assert effective_rank(a, torch.zeros(6, 3)) == 0  # a bank that never moved


def test_effective_rank_meets_the_whole_matrix() -> None:
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(8, 40, generator=random), torch.randn(30, 8, generator=random) * torch.arange(8)
    singular = torch.linalg.svdvals((b @ a).double())[:8]
    share = singular / singular.sum()
    assert effective_rank(a, b) == pytest.approx(math.exp(-(share[share > 0] * share[share > 0].log()).sum()), rel=1e-6)


def test_cosines_meet_the_whole_updates() -> None:
    random = torch.Generator().manual_seed(1)
    banks = [
        bank(torch.randn(rank, 10, generator=random), torch.randn(12, rank, generator=random)) for rank in (2, 3, 2)
    ]
    banks.append(bank(banks[0].matrices[NAME][0] * -2, banks[0].matrices[NAME][1]))
    banks.append(bank(torch.zeros(1, 10), torch.zeros(12, 1)))
    updates = torch.stack([(b @ a).flatten() for a, b in (bank.matrices[NAME] for bank in banks)])
    found = update_cosines(NAME, banks)
    expected = torch.nn.functional.cosine_similarity(updates[:4, None], updates[None, :4], dim=2)
    assert torch.allclose(found[:4, :4].float(), expected, atol=1e-5)
    assert found[0, 3] == pytest.approx(-1)
    assert not found[4].any()


def test_means_by_layer_and_module() -> None:
    values = {
        f"model.language_model.layers.{layer}.{part}": torch.tensor(value)
        for layer, part, value in (
            (0, "self_attn.q_proj", 1.0), (0, "mlp.up_proj", 3.0), (10, "self_attn.q_proj", 5.0), (10, "mlp.up_proj", 7.0)
        )
    }  # fmt: skip
    layers, modules = by_layer_and_module(values)
    assert {key: float(value) for key, value in layers.items()} == {"0": 2, "10": 6}
    assert {key: float(value) for key, value in modules.items()} == {"q_proj": 3, "up_proj": 5}
