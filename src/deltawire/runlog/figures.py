"""A report's numbers under the names that a trainer's dashboards show: `deltawire/…`."""

import dataclasses
from typing import Any

import msgspec

PREFIX = "deltawire/"


def figures(report: Any, **others: float) -> dict[str, float]:
    """Every number of a report, a dataclass or a struct, and these others; words and None are left out."""
    if isinstance(report, msgspec.Struct):
        named = {name: getattr(report, name) for name in report.__struct_fields__}
    else:
        named = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    numbers = {name: float(value) for name, value in (named | others).items() if isinstance(value, int | float)}
    return {f"{PREFIX}{name}": value for name, value in numbers.items()}
