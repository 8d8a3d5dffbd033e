"""When ranks count as hung: what a step may take, and what they owe an answer to."""

import pytest

from parallel_backend.runtime.client.deadlines import Owed, StepTimes, Stopped
from parallel_backend.runtime.patience import MESH_SECONDS, MESH_VARIABLE, mesh_seconds, step_seconds
from parallel_backend.runtime.patience import STEP_SECONDS as LEAST_SECONDS
from parallel_backend.runtime.patience import STEP_VARIABLE as VARIABLE


class TestStepTimes:
    def test_the_first_step_of_a_shape_may_take_any_time_while_it_gets_on(self):
        times = StepTimes()
        assert times.is_first("small")
        assert times.limit("small") == LEAST_SECONDS  # without a sign of that
        times.add("small", 1.0)
        assert not times.is_first("small")
        assert times.limit("small") == LEAST_SECONDS
        assert times.is_first("large")

    def test_twenty_times_the_median(self):
        times = StepTimes()
        for seconds in (4.0, 5.0, 600.0):
            times.add("large", seconds)
        assert times.limit("large") == 100.0

    def test_the_least_is_adjustable(self, monkeypatch):
        times = StepTimes()
        times.add("small", 0.1)
        monkeypatch.setenv(VARIABLE, "7.5")
        assert times.limit("small") == 7.5
        assert times.limit("large") == 7.5
        monkeypatch.setenv(VARIABLE, "0")
        assert times.limit("small") is None
        assert times.limit("large") is None

    @pytest.mark.parametrize("text", ["soon", "-1", "inf", "nan", ""])
    def test_a_deadline_that_is_no_number(self, text, monkeypatch):
        monkeypatch.setenv(VARIABLE, text)
        with pytest.raises(ValueError, match=f"{VARIABLE} is '{text}'; it takes seconds"):
            step_seconds()
        monkeypatch.setenv(MESH_VARIABLE, text)
        with pytest.raises(ValueError, match=f"{MESH_VARIABLE} is '{text}'; it takes seconds, such as 30"):
            mesh_seconds()

    def test_the_deadline_of_a_mesh(self, monkeypatch):
        assert mesh_seconds() == MESH_SECONDS == 30.0
        monkeypatch.setenv(MESH_VARIABLE, "2.5")
        assert mesh_seconds() == 2.5

    def test_only_so_many_shapes_are_remembered(self):
        times = StepTimes()
        for shape in range(100):
            times.add(shape, 1.0)
        assert times.is_first(0)
        assert times.limit(99) == LEAST_SECONDS


class TestOwed:
    @pytest.fixture
    def now(self):
        return [1000.0]

    @pytest.fixture
    def owed(self, now):
        return Owed(clock=lambda: now[0])

    def test_ranks_that_have_not_answered_in_time(self, owed, now):
        owed.sent(1, {0, 1, 2}, 10.0)
        owed.answered(1, 1)
        now[0] += 10.0
        assert owed.overdue() is None
        now[0] += 0.1
        assert owed.overdue() == ({0, 2}, 10.0)

    def test_waiting_behind_a_cancelled_step_is_no_fault(self, owed, now):
        owed.sent(1, {0, 1}, None)
        owed.sent(2, {0, 1}, 10.0)
        now[0] += 500.0
        assert owed.overdue() is None
        for rank in (0, 1):
            owed.answered(1, rank)
        now[0] += 9.0
        assert owed.overdue() is None
        now[0] += 2.0
        assert owed.overdue() == ({0, 1}, 10.0)

    def test_a_cancelled_step_that_hangs_is_found_by_the_next(self, owed, now):
        owed.sent(1, {0, 1}, 10.0)
        now[0] += 8.0
        owed.sent(2, {0, 1}, 60.0)
        now[0] += 3.0
        assert owed.overdue() == ({0, 1}, 10.0)

    def test_idle_time_does_not_count(self, owed, now):
        owed.sent(1, {0}, 10.0)
        owed.answered(1, 0)
        now[0] += 1000.0
        assert owed.overdue() is None
        owed.sent(2, {0}, 10.0)
        assert owed.overdue() is None

    def test_progress_begins_the_time_anew(self, owed, now):
        owed.sent(1, {0}, 10.0)
        now[0] += 9.0
        owed.progressed()
        now[0] += 9.0
        assert owed.overdue() is None

    def test_answers_to_nothing_are_ignored(self, owed):
        owed.answered(99, 0)
        assert owed.overdue() is None


class TestStopped:
    @pytest.fixture
    def states(self):
        return {10: "S", 11: "R"}

    def test_a_rank_that_stays_stopped(self, states):
        now = [0.0]
        stopped = Stopped(lambda: now[0], states.__getitem__)
        pids = {0: 10, 1: 11}
        assert stopped.overdue(pids) is None
        states[11] = "T"
        for second in range(1, 61):
            now[0] = float(second)
            assert stopped.overdue(pids) is None
        now[0] = 61.0
        assert stopped.overdue(pids) == ({1}, LEAST_SECONDS)

    def test_one_that_goes_on_in_between(self, states):
        now = [0.0]
        stopped = Stopped(lambda: now[0], states.__getitem__)
        for second in range(200):
            now[0] = float(second)
            states[10] = "S" if second % 50 == 0 else "T"
            assert stopped.overdue({0: 10}) is None

    def test_nobody_knows_how_long_while_nobody_looked(self, states):
        now = [0.0]
        stopped = Stopped(lambda: now[0], states.__getitem__)
        states[10] = "T"
        assert stopped.overdue({0: 10}) is None
        now[0] = 500.0  # it may have gone on, and been stopped again, in between
        assert stopped.overdue({0: 10}) is None
        for second in range(501, 560):
            now[0] = float(second)
            assert stopped.overdue({0: 10}) is None
        now[0] = 560.0
        assert stopped.overdue({0: 10}) == ({0}, LEAST_SECONDS)

    def test_it_can_be_turned_off(self, states, monkeypatch):
        monkeypatch.setenv(VARIABLE, "0")
        now = [0.0]
        states[10] = "T"
        stopped = Stopped(lambda: now[0], states.__getitem__)
        for second in range(0, 1000, 10):
            now[0] = float(second)
            assert stopped.overdue({0: 10}) is None
