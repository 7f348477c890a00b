"""What tests of methods share."""

import pytest
import torch
from tiny_models import make_model  # noqa: F401  (a fixture)


@pytest.fixture
def rates_taken(monkeypatch):
    """The learning rates of the groups of every Adam, step by step, as they are taken from here on."""
    taken = []

    class Noting(torch.optim.Adam):
        def step(self, *args, **kwargs):
            taken.append([group["lr"] for group in self.param_groups])
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "Adam", Noting)
    return taken
