"""One Triton for all tests that only ask it, a fresh one for those that hurt it. Without one, see `triton_server`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from triton_server import Triton, triton, triton_repository


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of this folder needs a server."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.triton)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return triton_repository(tmp_path_factory.mktemp("served") / "models", models=("policy", "critic"))


@pytest.fixture(scope="session")
def server(models: Path) -> Iterator[Triton]:
    with triton(models) as running:
        yield running


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Triton]:
    with triton(triton_repository(tmp_path / "models", models=("policy",))) as running:
        yield running
