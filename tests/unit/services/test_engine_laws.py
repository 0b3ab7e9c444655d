"""The embedded engine keeps the laws of engines; tests/triton holds Triton's to the same ones."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine_laws import LAWS, describes_itself
from repository_factory import build_repository
from services.common.engine import Engine, load_engine


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_repository(tmp_path_factory.mktemp("models"), models=("policy", "critic"))


@pytest.fixture(scope="module", params=["policy", "critic"])
def engine(models: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    loaded = load_engine(models, request.param)
    yield loaded
    loaded.close()


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_embedded_engine(engine: Engine, law: Callable[[Engine], None]) -> None:
    law(engine)


def test_it_describes_itself(models: Path, engine: Engine) -> None:
    describes_itself(engine, load_engine(models, engine.name))
