"""CPU time of what a bench compares."""

import time
from collections.abc import Callable


def seconds(call: Callable[[], object]) -> float:
    """CPU seconds of this process during one call."""
    start = time.process_time()
    call()
    return time.process_time() - start
