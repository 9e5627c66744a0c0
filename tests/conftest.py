"""Settings of all tests: one thread for each process, and the same random numbers in every test."""

import os
import signal

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# Where the tests run in the background, signals may be ignored, and so they would be in runs.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
