import math

import pytest

from reconmtl.errors import ProbeError
from reconmtl.schedule import REHEARSAL, Schedule


def _measured(schedule: Schedule, steps: int) -> list[int]:
    out = []
    for number in range(steps):
        with schedule.step() as measure:
            if measure:
                out.append(number)
    return out


def test_steps_are_strided_between_start_and_stop() -> None:
    assert _measured(Schedule(), 4) == [0, 1, 2, 3]
    assert _measured(Schedule(every=3), 8) == [0, 3, 6]
    assert _measured(Schedule(every=3, start=2, stop=9), 20) == [2, 5, 8]


class Clock:
    """A training whose plain step takes `plain` seconds, a third of it backward; measuring adds `extra`."""

    def __init__(self, plain: float, extra: float) -> None:
        self.now, self.plain, self.extra, self.total = 0.0, plain, extra, 0

    def __call__(self) -> float:
        return self.now

    def run(self, schedule: Schedule, steps: int) -> int:
        count = 0
        for _ in range(steps):
            self.now += self.plain * 2 / 3
            with schedule.step() as measure:
                self.now += self.plain / 3 + (self.extra if measure else 0)
                count += measure
        return count


@pytest.mark.parametrize("extra", [0.01, 0.71, 25.1])
@pytest.mark.parametrize("overhead", [0.05, 0.1, 0.5])
def test_a_budget_is_kept_and_used(extra: float, overhead: float) -> None:
    clock = Clock(1.0, extra)
    schedule = Schedule(overhead=overhead, clock=clock)
    steps = 20_000
    count = clock.run(schedule, steps)
    assert schedule.every == max(1, math.ceil(extra / overhead - 1e-9))
    assert clock.now <= steps * (1 + overhead) + extra + 1e-6  # the last measured step may just be done
    assert count >= steps / schedule.every - len(REHEARSAL) - 2


def test_equal_times_give_equal_steps() -> None:
    runs = [_with_clock() for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0][:5] == [3, 5, 7, 7 + 3 * 8, 7 + 4 * 8]


def _with_clock() -> list[int]:
    clock = Clock(1.0, 0.75)
    schedule = Schedule(overhead=0.1, clock=clock)
    out = []
    for number in range(60):
        clock.now += 2 / 3
        with schedule.step() as measure:
            clock.now += 1 / 3 + 0.75 * measure
        if measure:
            out.append(number)
    return out


def test_a_failed_step_of_the_rehearsal_is_repeated() -> None:
    clock = Clock(1.0, 0.75)
    schedule = Schedule(overhead=0.1, clock=clock)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), schedule.step():
            raise ZeroDivisionError
    clock.run(schedule, len(REHEARSAL))
    assert schedule.every == 8


def test_a_disturbed_step_of_the_rehearsal_does_not_count() -> None:
    for disturbed in (0, 1, 3, 4, 7):
        clock = Clock(1.0, 0.75)
        schedule = Schedule(overhead=0.1, clock=clock)
        for step in range(len(REHEARSAL)):
            clock.now += 2 / 3
            with schedule.step() as measure:
                clock.now += 1 / 3 + 0.75 * measure + 5.0 * (step == disturbed)
        assert schedule.every == 8, disturbed


def test_wrong_arguments_are_all_named() -> None:
    with pytest.raises(ProbeError) as error:
        Schedule(every=2, start=-1, overhead=0.1)
    assert "start = -1" in str(error.value)
    assert "both say how often" in str(error.value)
    for wrong in ({"every": 0}, {"every": True}, {"start": 3, "stop": 3}, {"overhead": 0}, {"overhead": "10%"}):
        with pytest.raises(ProbeError, match=next(reversed(wrong))):
            Schedule(**wrong)
