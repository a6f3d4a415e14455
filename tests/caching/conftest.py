"""What tests of the cached step share."""

import pytest
import torch


@pytest.fixture
def float64():
    """Tensors are float64 unless they say otherwise; a fixed seed."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(7)
    yield
    torch.set_default_dtype(before)
