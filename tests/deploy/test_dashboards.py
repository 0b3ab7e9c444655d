"""The dashboards in the repository are those of their description, and Grafana can place and name every panel."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "deploy" / "observability"
FILES = sorted((FOLDER / "dashboards").glob("*.json"))


def description() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dashboards", FOLDER / "dashboards.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_are_what_the_description_makes() -> None:
    module = description()
    made = {f"{dashboard.uid}.json": module.to_json(dashboard) for dashboard in module.DASHBOARDS}
    assert made == {path.name: path.read_text() for path in FILES}, "run deploy/observability/dashboards.py"


def test_there_is_a_page_for_each_concern() -> None:
    assert [path.stem for path in FILES] == ["recap-fleet", "recap-policy", "recap-triton", "recap-value"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_panels_neither_overlap_nor_share_a_number(path: Path) -> None:
    panels = json.loads(path.read_text())["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_queries_use_only_variables_that_the_page_has(path: Path) -> None:
    page = json.loads(path.read_text())
    known = {variable["name"] for variable in page["templating"]["list"]}
    assert known == {"datasource", "instance"}
    for panel in page["panels"]:
        assert panel["targets"], panel["title"]
        assert [target["refId"] for target in panel["targets"]] == [chr(65 + n) for n in range(len(panel["targets"]))]
        for target in panel["targets"]:
            rest = target["expr"].replace("$instance", "").replace("$__rate_interval", "")
            assert "$" not in rest, target["expr"]
            assert _uses(target) == {"datasource"}


def _uses(target: dict[str, Any]) -> set[str]:
    return {target["datasource"]["uid"].removeprefix("${").removesuffix("}")}
