"""What torch's allocator gave out while a profiler watched it."""

from torch.profiler import profile


def allocated(profiled: profile) -> int:
    """The most that torch's allocator gave out at the same time."""
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
