"""A failover with a cut replication link: what was acknowledged is there, or, without barriers, is not."""

from __future__ import annotations

import pytest

from support import failover
from support.store import installed

SERVERS = sorted(installed()) or [""]


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("profile", ["standard", "strict"])
async def test_a_failover_loses_nothing_that_a_barrier_has_confirmed(profile, server):
    # A replica says only once a second what is on its disk.
    appends = 2 if profile == "strict" else 5
    async with failover.rig(profile, installed().get(server), writers=4) as rig:
        found = await rig.fail_over(cut=True, appends=appends)
    assert found.missing == 0
    assert found.acked > 4 * appends
    assert found.rejoined


@pytest.mark.parametrize("server", SERVERS)
async def test_control_without_barriers_it_loses_and_the_log_goes_on_from_what_is_there(server):
    async with failover.rig("dev", installed().get(server), writers=4) as rig:
        found = await rig.fail_over(cut=True, appends=5)
    # What was on its way when the link froze may have arrived.
    assert found.missing > 2 * 5, "writers were told that events are safe, which were not"
    assert found.healed == found.sessions == 2, "a worker whose appends are gone is told so"
    assert found.rejoined
