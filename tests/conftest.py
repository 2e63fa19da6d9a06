import contextlib
import gc
import os
from importlib.metadata import version

# A trace makes so many objects that most of the collector's passes would find nothing.
gc.set_threshold(100_000, 20, 20)

FLAGS = ["--xla_force_host_platform_device_count=8"]
# Compiling is most of the tests' time: neither of these changes what is computed, and both shorten it.
FLAGS += ["--xla_cpu_enable_concurrency_optimized_scheduler=false"]
if version("jaxlib").startswith("0.10."):
    FLAGS += ["--xla_cpu_use_fusion_emitters=false"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

import jax  # noqa: E402
import jax.monitoring  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
# What XLA's optimizations could change, test_types checks with them.
jax.config.update("jax_disable_most_optimizations", True)


def pytest_collection_finish():
    gc.collect()
    gc.freeze()


@pytest.fixture
def compilations():
    """`with compilations() as events`: what the backend compiles; of another stage, or "" for all of them."""

    @contextlib.contextmanager
    def counted(stage="backend_compile"):
        events = []

        def listen(event, duration_secs, **_):
            if event.startswith(f"/jax/core/compile/{stage}"):
                events.append(event)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield events
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    return counted
