from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
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

# All that tests import stays: Python need not search it for garbage, neither while it grows nor while tests run.
gc.disable()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_configure(config: pytest.Config) -> None:
    # By the name of a test alone pytest-xdist tells its group, and none would be kept together.
    if config.getoption("dist", "no") == "loadgroup" and not hasattr(pytest.Item, "_nodeid"):
        raise pytest.UsageError("pytest-xdist cannot rename the tests of this pytest: pip install 'pytest<9.2'")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs on a real Kafka broker, so that -m finds it, and have one process start an engine for a module."""
    for item in items:
        if "broker" in getattr(item, "fixturenames", ()):
            item.add_marker("kafka")
        for engine in ("flink", "kafka", "prism"):
            if item.get_closest_marker(engine) is not None:
                item.add_marker(pytest.mark.xdist_group(f"{item.path.stem} on {engine}"))


@pytest.fixture(scope="module", autouse=True)
def quick_beam(request: pytest.FixtureRequest) -> Iterator[None]:
    """Beam that need not look twice, for the tests of pipelines."""
    if request.path.parent.name == "beam_door":
        import remembering_beam

        with remembering_beam.remembering():
            yield
    else:
        yield


@pytest.fixture(scope="module")
def mock() -> Iterator[Any]:
    """The Kafka cluster that librdkafka keeps."""
    import kafka_broker

    with closing(kafka_broker.MockCluster()) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real Kafka broker, where there can be one."""
    import kafka_broker

    reason = kafka_broker.why_no_broker()
    if reason is not None:
        pytest.skip(reason)
    with closing(kafka_broker.Broker(tmp_path_factory.mktemp("kafka"))) as broker:
        yield broker


@pytest.fixture(params=["mock", pytest.param("broker", marks=pytest.mark.kafka)])
def cluster(request: pytest.FixtureRequest) -> Any:
    """Each of the two in turn."""
    return request.getfixturevalue(request.param)
