"""What holds for every test."""

import signal


def pytest_configure():
    """Ctrl-C as in a terminal: a shell without job control starts `pytest &` with it ignored, and
    every process that a test starts and interrupts would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
