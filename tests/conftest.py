"""What holds for all tests: hypothesis sets no time limit, because a loaded machine is not a defect; what takes longest
comes first, so that two workers end at the same time."""

import logging
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("recap", deadline=None)
settings.load_profile("recap")

_ROOT_LEVEL = logging.getLogger().level
# the whole loop takes minutes in one file: begun last, it would leave the other worker idle for as long
LONGEST_FIRST = (
    "e2e/test_loop.py",
    "unit/services/test_torch_engine.py",
    "e2e/test_demo.py",
    "parity/test_export_precision.py",
    "parity/test_export.py",
    "unit/training/test_loop.py",
    "unit/training/test_distill.py",
)


@pytest.fixture(autouse=True)
def _root_logger_keeps_its_level() -> Iterator[None]:
    """LeRobot's commands make the root logger take everything; pytest would then keep every websocket frame."""
    logging.getLogger().setLevel(_ROOT_LEVEL)
    yield
    logging.getLogger().setLevel(_ROOT_LEVEL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}

    def rank(item: pytest.Item) -> int:
        return next((rank for name, rank in ranks.items() if item.nodeid.split("::")[0].endswith(name)), len(ranks))

    items.sort(key=rank)  # stable
