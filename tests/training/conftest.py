"""Fixtures of the trainings."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def one_thread():
    """Torch with one thread, as results to the bit are for a fixed number of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
