"""The one place that reads clocks. Durations come from the monotonic clock, timestamps from the wall clock."""

from time import monotonic as now
from time import sleep, time_ns

__all__ = ["now", "sleep", "time_ns"]
