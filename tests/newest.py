"""What is looked at in full on the newest jax alone, and in part on the older ones, to save time."""

import jax
import pytest

NEWEST = jax.__version_info__ >= (0, 12)
# With these of XLA's options two programs round what they compute in float32 alike, as they do for users: on
# jax 0.10 conftest turns off the emitters that fuse operations, which take half of the time to compile.
FUSED = {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else {}
newest = pytest.mark.skipif(not NEWEST, reason="checked on the newest jax")


def some(table, count=1):
    """A whole table on the newest jax; its first rows on the older ones."""
    return list(table) if NEWEST else list(table)[:count]
