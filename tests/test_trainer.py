"""transformers' Trainer on two processes trains what it trains on one with twice the batch."""

import numpy as np
import pytest

from .distributed import trainer

pytestmark = pytest.mark.xdist_group("processes")


@pytest.mark.slow
@pytest.mark.parametrize("peft", [False, True], ids=["inject", "peft"])
def test_two_processes_train_as_one(groups, peft):
    ((losses, changes),) = groups.run(1, trainer.train, 8, peft)
    moved = {name for name, change in changes.items() if change.any()}
    adapters = {name for name in moved if name.endswith(("A_down", "A_up", "B_down", "B_up"))}
    assert len(adapters) == 4 * 8
    assert all("classifier" in name for name in moved - adapters)
    for other_losses, others in groups.run(2, trainer.train, 4, peft):
        np.testing.assert_allclose(other_losses, losses, rtol=1e-4)
        for name, change in changes.items():
            assert abs(others[name] - change).max() <= 1e-3 * abs(change).max(), name
