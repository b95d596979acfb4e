"""A process that gave way while nobody waited for it, and gives way no more."""

from __future__ import annotations

import os
from pathlib import Path


def give_way_no_more(pid: int) -> bool:
    """Give a process's threads this process's own niceness; False = the kernel allows that to nobody like us.

    Taking niceness back needs CAP_SYS_NICE, or an RLIMIT_NICE that reaches so far (setpriority(2)).
    """
    own = os.getpriority(os.PRIO_PROCESS, 0)
    try:
        threads = [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return True  # it has ended
    for thread in threads:
        try:
            if os.getpriority(os.PRIO_PROCESS, thread) > own:
                os.setpriority(os.PRIO_PROCESS, thread, own)
        except PermissionError:
            return False
        except ProcessLookupError:
            continue
    return True
