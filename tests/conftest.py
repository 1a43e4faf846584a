from __future__ import annotations

from hypothesis import HealthCheck, settings

# The same examples in every run: a law that fails here fails everywhere.
settings.register_profile(
    "default",
    derandomize=True,
    deadline=None,
    max_examples=10,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("thorough", parent=settings.get_profile("default"), derandomize=False, max_examples=500)
settings.load_profile("default")
