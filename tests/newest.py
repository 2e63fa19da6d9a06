"""What is looked at in full on the newest jax alone, and in part on the older ones, to save time."""

import jax
import pytest

NEWEST = jax.__version_info__ >= (0, 12)
newest = pytest.mark.skipif(not NEWEST, reason="checked on the newest jax")


def some(table, count=1):
    """A whole table on the newest jax; its first rows on the older ones."""
    return list(table) if NEWEST else list(table)[:count]
