"""Drawn mutations that make nothing wrong that a test on a CPU could see, each with the reason."""

EQUIVALENT: dict[tuple[str, str], str] = {}
"""By file and the changed line as it is then, without indentation."""
