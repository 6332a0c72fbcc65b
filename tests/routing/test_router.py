"""The router's statistics and decisions, on features worked by hand."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mslora_cr.banks.bank import BankError
from mslora_cr.data.records import TrainingRecord
from mslora_cr.routing.features import FIT_RECORDS, _asked_first, sampled_records
from mslora_cr.routing.lda import Router, TaskStatistics, combine, load_statistics, statistics_of


def gram(features: torch.Tensor) -> torch.Tensor:
    wide = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
    return wide.T @ wide


def test_statistics_by_hand_and_in_parts() -> None:
    features = torch.tensor([[1.0, 0.0], [3.0, 2.0], [2.0, 4.0]])
    found = statistics_of(gram(features[:1]) + gram(features[1:]))
    assert found.count == 3
    assert found.mean.tolist() == [2, 2]
    # deviations (-1, -2), (1, 0), (0, 2)
    assert found.scatter.tolist() == [[2, 2], [2, 8]]


def test_sites_combine_to_the_statistics_of_all_records() -> None:
    features = torch.randn(70, 5, generator=torch.Generator().manual_seed(3)) + 20
    whole, parts = statistics_of(gram(features)), [statistics_of(gram(part)) for part in features.split([1, 29, 40])]
    found = combine(parts)
    assert found.count == 70
    torch.testing.assert_close(found.mean, whole.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.scatter, whole.scatter, rtol=1e-6, atol=1e-4)  # of about 70 on the diagonal
    with pytest.raises(ValueError, match="5, 4"):
        combine([parts[0], statistics_of(gram(features[:, :4]))])


def test_a_router_of_combined_sites_is_that_of_all_records() -> None:
    random = torch.Generator().manual_seed(3)
    tasks = [torch.randn(70, 5, generator=random) + place for place in (0.0, 0.5)]
    whole = Router([statistics_of(gram(task)) for task in tasks])
    sites = Router([combine([statistics_of(gram(part)) for part in task.split([1, 29, 40])]) for task in tasks])
    expected = whole.probabilities(torch.cat(tasks))
    assert 0.2 < expected.mean() < 0.8 and expected.max() > 0.9
    torch.testing.assert_close(sites.probabilities(torch.cat(tasks)), expected, rtol=0, atol=1e-6)


def test_the_shared_covariance_decides_not_the_distance() -> None:
    """Two tasks that differ along a narrow direction, both spread along the other one."""
    random = torch.Generator().manual_seed(0)
    spread = torch.tensor([10.0, 0.1])
    tasks = [torch.randn(400, 2, generator=random) * spread + torch.tensor([0.0, place]) for place in (0.0, 1.0)]
    router = Router([statistics_of(gram(task)) for task in tasks])
    # (30, 0.1) is far from both means and slightly nearer, in plain distance, to a mean it does not belong to
    assert router.route(torch.tensor([[30.0, 0.1], [-30.0, 0.9]])).tolist() == [0, 1]
    fresh = [torch.randn(400, 2, generator=random) * spread + torch.tensor([0.0, place]) for place in (0.0, 1.0)]
    right = sum((router.route(task) == number).sum().item() for number, task in enumerate(fresh))
    assert right / 800 > 0.99


def test_a_later_task_needs_nothing_but_its_own_statistics() -> None:
    random = torch.Generator().manual_seed(1)
    tasks = [torch.randn(50, 6, generator=random) + 4 * torch.eye(6)[number] for number in range(3)]
    statistics = [statistics_of(gram(task)) for task in tasks]
    for known in (1, 2, 3):
        router = Router(statistics[:known])
        for number, task in enumerate(tasks[:known]):
            assert (router.route(task) == number).float().mean() > 0.9


def test_one_record_a_task_and_features_that_never_vary() -> None:
    ones = [TaskStatistics(1, torch.eye(3)[number], torch.zeros(3, 3)) for number in range(2)]
    assert Router(ones).route(torch.eye(3)[:2]).tolist() == [0, 1]


@pytest.mark.parametrize("records", [1, 7, FIT_RECORDS, FIT_RECORDS + 1, 262_144])
def test_what_is_looked_at_is_bounded_and_spread(records: int) -> None:
    looked = sampled_records(records)
    assert len(set(looked)) == len(looked) == min(records, FIT_RECORDS)
    assert looked == sorted(looked) and looked[0] >= 0 and looked[-1] < records
    parts = torch.histc(torch.tensor(looked, dtype=torch.float64), bins=4, min=0, max=records - 1)
    assert records < 100 or (parts / len(looked) - 0.25).abs().max() < 0.05


def test_both_kinds_of_question_are_looked_at_where_they_alternate() -> None:
    """With every second record, only one kind would be."""
    odd = sum(place % 2 for place in sampled_records(2 * FIT_RECORDS))
    assert 0.4 < odd / FIT_RECORDS < 0.6


@pytest.mark.parametrize(
    ("speakers", "question"), [("human gpt", "0"), ("gpt human gpt", "1"), ("gpt gpt human", "2"), ("gpt", "")]
)
def test_the_question_is_the_human_s(speakers: str, question: str) -> None:
    turns = [{"from": speaker, "value": str(number)} for number, speaker in enumerate(speakers.split())]
    assert _asked_first(TrainingRecord.model_validate({"id": 1, "conversations": turns})) == question


def test_missing_statistics_are_named(tmp_path: Path) -> None:
    with pytest.raises(BankError, match=r"router\.safetensors: no usable router statistics.*fit-router"):
        load_statistics(tmp_path)
    known = TaskStatistics(5, torch.rand(3), torch.rand(3, 3))
    save_file(known.tensors(), tmp_path / "router.safetensors")
    found = load_statistics(tmp_path)
    assert (found.count, found.mean.tolist(), found.scatter.tolist()) == (
        5,
        known.mean.tolist(),
        known.scatter.tolist(),
    )
