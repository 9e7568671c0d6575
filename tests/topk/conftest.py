from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def memory_that_no_kernel_wrote_is_nan():
    """Let torch fill what ``torch.empty`` and its like return: an element that a kernel forgets is then seen."""
    before = torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(mode=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
