import pytest

from mslora_cr.statistics.matrix import MissingCellError, TaskStageMatrix

# A stream of three tasks, worked by hand:
#        stage 0  stage 1  stage 2  stage 3
#   a        5       90       96       60
#   b       20       40       80       70
#   c       25       10       30       50
STREAM = ("a", "b", "c")
SCORES = {
    ("a", 0): 5.0, ("a", 1): 90.0, ("a", 2): 96.0, ("a", 3): 60.0,
    ("b", 0): 20.0, ("b", 1): 40.0, ("b", 2): 80.0, ("b", 3): 70.0,
    ("c", 0): 25.0, ("c", 1): 10.0, ("c", 2): 30.0, ("c", 3): 50.0,
}  # fmt: skip


def matrix(*without):
    return TaskStageMatrix(STREAM, STREAM, {cell: SCORES[cell] for cell in SCORES if cell not in without})


def test_averages_by_hand():
    assert matrix().own_stage_average() == pytest.approx((90 + 80 + 50) / 3)
    assert matrix().final_average() == pytest.approx((60 + 70 + 50) / 3)
    assert matrix().average_incremental_accuracy() == pytest.approx((90 + (96 + 80) / 2 + (60 + 70 + 50) / 3) / 3)


def test_forgetting_and_transfer_by_hand():
    assert [matrix().forgetting_of(task) for task in STREAM] == [96 - 60, 80 - 70, 0]
    assert matrix().forgetting() == pytest.approx((36 + 10) / 2)
    assert matrix().backward_transfer() == pytest.approx(((60 - 90) + (70 - 80)) / 2)
    assert matrix().forward_transfer() == pytest.approx(((40 - 20) + (30 - 25)) / 2)


def test_a_task_that_ends_better_than_ever_has_negative_forgetting():
    better = TaskStageMatrix(("a", "b"), ("a", "b"), {("a", 1): 50.0, ("a", 2): 60.0, ("b", 2): 70.0})
    assert better.forgetting() == -10
    assert better.backward_transfer() == 10


def test_tasks_without_the_score_leave_the_stages_as_they_are():
    # `a` has no closed accuracy: b is still learned at stage 2, and stage 1 has nothing to average
    part = TaskStageMatrix(STREAM, ("b", "c"), {cell: score for cell, score in SCORES.items() if cell[0] != "a"})
    with pytest.raises(ValueError, match="learned by stage 1"):
        part.stage_average(1)
    assert part.final_average() == 60
    assert part.average_incremental_accuracy() == pytest.approx((80 + (70 + 50) / 2) / 2)
    assert part.forgetting() == 10
    assert part.backward_transfer() == -10
    assert part.forward_transfer() == pytest.approx((20 + 5) / 2)


def test_one_task_forgets_and_transfers_nothing():
    one = TaskStageMatrix(("a",), ("a",), {("a", 1): 80.0})
    assert one.final_average() == one.average_incremental_accuracy() == 80
    assert one.forgetting() == one.backward_transfer() == one.forward_transfer() == 0


@pytest.mark.parametrize(
    ("cell", "figure"),
    [
        (("b", 2), TaskStageMatrix.own_stage_average),
        (("a", 3), TaskStageMatrix.final_average),
        (("a", 2), TaskStageMatrix.average_incremental_accuracy),
        (("a", 2), TaskStageMatrix.forgetting),
        (("b", 3), TaskStageMatrix.backward_transfer),
        (("b", 1), TaskStageMatrix.forward_transfer),
        (("c", 0), TaskStageMatrix.forward_transfer),
    ],
)
def test_a_missing_cell_is_named(cell, figure):
    with pytest.raises(MissingCellError, match=f"'{cell[0]}' was not evaluated at stage {cell[1]}"):
        figure(matrix(cell))


def test_the_stages_that_mend_it_are_named():
    with pytest.raises(MissingCellError, match="--stages seen"):
        matrix(("a", 2)).forgetting()
    with pytest.raises(MissingCellError, match="--stages all"):
        matrix(("c", 0)).forward_transfer()


def test_cells_before_a_task_is_learned_are_not_needed():
    upper = matrix(("b", 1), ("c", 1), ("c", 2))
    assert upper.forgetting() == 23
    assert upper.average_incremental_accuracy() == matrix().average_incremental_accuracy()
    assert matrix(("a", 2)).backward_transfer() == -20


def test_summary_has_none_where_a_cell_is_missing():
    assert matrix().summary() == {
        "own_stage_average": matrix().own_stage_average(),
        "final_average": matrix().final_average(),
        "average_incremental_accuracy": matrix().average_incremental_accuracy(),
        "forgetting": matrix().forgetting(),
        "backward_transfer": matrix().backward_transfer(),
        "forward_transfer": matrix().forward_transfer(),
    }
    absent = [name for name, value in matrix(("a", 2)).summary().items() if value is None]
    assert absent == ["average_incremental_accuracy", "forgetting"]


@pytest.mark.parametrize(
    ("tasks", "scores"),
    [
        ((), {}),
        (("b", "a"), {}),
        (("a", "d"), {}),
        (("a",), {("a", 4): 1.0}),
        (("a",), {("a", -1): 1.0}),
        (("a",), {("b", 2): 1.0}),
    ],
)
def test_what_does_not_fit_the_stream_is_refused(tasks, scores):
    with pytest.raises(ValueError, match=r"must be some of the stream|outside the matrix"):
        TaskStageMatrix(STREAM, tasks, scores)
