"""Who does not lead names who does, and nobody where it would name itself."""

from __future__ import annotations

import pytest

from services.controller.leadership import Leadership
from services.controller.settings import ControllerSettings
from stoker.clock import ManualClock
from stoker.errors import NotLeader

OWN = "127.0.0.1:7001"


@pytest.mark.parametrize(
    ("known", "named", "message"),
    [
        ("127.0.0.1:7002", "127.0.0.1:7002", "does not lead: ask 127.0.0.1:7002"),
        ("", "", "none leads now, ask again"),
        (OWN, "", "none leads now, ask again"),
    ],
    ids=["another one leads", "none does", "its own term begins, or was just lost"],
)
def test_who_does_not_lead_sends_nobody_to_itself(known: str, named: str, message: str) -> None:
    settings = ControllerSettings(state="embedded:/nowhere", advertised_address=OWN)
    leadership = Leadership(None, settings, ManualClock())  # type: ignore[arg-type]  # nothing is asked of the state
    leadership.leader_address = known

    with pytest.raises(NotLeader, match=message) as refused:
        leadership.term()

    assert refused.value.details == {"leader": named}
