import os
import pickle
import signal
import threading

import pytest

from reconmtl.errors import Interrupted
from reconmtl.interruptions import asked_politely, leave_if_asked


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_next_step_and_a_second_one_does_not(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with asked_politely():
        leave_if_asked()
        os.kill(os.getpid(), number)
        with asked_politely(), pytest.raises(Interrupted, match=f"Interrupted by {number.name}"):
            leave_if_asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
    leave_if_asked()


def test_somebody_elses_handler_stays() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda n, _: seen.append(n))
    try:
        with asked_politely():
            os.kill(os.getpid(), signal.SIGTERM)
            leave_if_asked()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


def test_other_threads_cannot_handle_signals() -> None:
    entered: list[bool] = []

    def work() -> None:
        with asked_politely():
            entered.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered


def test_an_interruption_travels_between_processes() -> None:
    found = pickle.loads(pickle.dumps(Interrupted(signal.SIGTERM, "Saved.")))
    assert str(found) == "Interrupted by SIGTERM. Saved."
    assert found.signal is signal.SIGTERM
