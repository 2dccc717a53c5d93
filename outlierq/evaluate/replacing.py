"""Settings of other libraries, changed for a while and put back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(target: Any, **values: Any) -> Iterator[None]:
    """Attributes of a module or object have these values inside, and their former ones after."""
    former = {name: getattr(target, name) for name in values}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name, value in former.items():
            setattr(target, name, value)


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Environment variables have these values inside; after, their former ones or none."""
    former = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
