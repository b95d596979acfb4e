"""The embedded state between processes: one owner, and nothing acknowledged is lost when it is killed."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

import pytest

from stoker.errors import ConfigError
from stoker.state import open_state

if TYPE_CHECKING:
    from pathlib import Path

COUNT = """
import asyncio, itertools, sys
from stoker.state import Put, open_state

async def count(url):
    async with open_state(url) as store:
        for number in itertools.count():
            await store.transact([], [Put(key="count", value=b"%d" % number)])
            print(number, flush=True)

asyncio.run(count(sys.argv[1]))
"""


async def test_a_killed_owner_loses_nothing_it_acknowledged_and_its_lock_dies_with_it(tmp_path: Path) -> None:
    url = f"embedded://{tmp_path}/state.db"
    for _ in range(3):
        owner = await asyncio.create_subprocess_exec(
            sys.executable, "-c", COUNT, url, stdout=asyncio.subprocess.PIPE
        )
        assert owner.stdout is not None
        try:
            for _ in range(20):
                acknowledged = int(await owner.stdout.readline())
            with pytest.raises(ConfigError, match=f"in use by process {owner.pid}:"):
                async with open_state(url):
                    pass
        finally:
            owner.kill()
        acknowledged = max([acknowledged, *map(int, (await owner.stdout.read()).split())])
        await owner.wait()
        async with open_state(url) as store:
            item = await store.get("count")

        assert item is not None
        assert int(item.value) in {acknowledged, acknowledged + 1}
