"""An adapter's options, `NAME=VALUE` of the operator, as values: pure."""

from __future__ import annotations

from collections.abc import Mapping


def parse_flag(options: Mapping[str, str], name: str) -> bool:
    """Return whether an option is true; False where it is not given. Raises ValueError for anything but `true` and `false`."""
    value = options.get(name, "false")
    if value.lower() not in ("true", "false"):
        raise ValueError(f"the option {name} must be true or false, not {value!r}")
    return value.lower() == "true"


def parse_choice(options: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    """Return the value of an option; the first of `choices` where it is not given. Raises ValueError for any other value."""
    value = options.get(name, choices[0])
    if value not in choices:
        raise ValueError(f"the option {name} must be one of {', '.join(choices)}, not {value!r}")
    return value
