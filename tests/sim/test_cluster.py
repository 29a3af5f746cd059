"""What the machines of a simulated world do when nobody looks after them."""

from __future__ import annotations

import pytest

from tests.sim.cluster import Cluster, Refused
from tests.sim.plan import plan_of
from tests.sim.world import SimLoop, close, run


def test_who_was_not_let_in_is_not_started() -> None:
    """A machine that asked in vain to join is not one that is down: no fault that is over brings it up."""
    loop = SimLoop()
    cluster = Cluster(loop, plan_of(1, nodes=3))

    async def ask_in_vain() -> None:
        with pytest.raises(Refused):
            await cluster.join("n4", "n1")
        cluster.start_if_down("n4")
        assert not cluster.machines["n4"].is_up

    run(loop, ask_in_vain())
    cluster.close()
    close(loop)
