"""The dashboard page in a real browser, fed by a real critic."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from repository_factory import TASKS, robot_spec
from service_harness import NativeClient, critic_server, eventually, observation

pytestmark = pytest.mark.browser
SPEC = robot_spec()
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--window-size=1400,900",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def observe(client: NativeClient, robot: str, step: int, x: float, **parts: Any) -> None:
    seen = observation(SPEC, prompt=parts.pop("prompt", TASKS[0]), state=np.array([x, 0, 0, 0], np.float32))
    reply = client.ask(
        {
            "type": "observe",
            "seq": step,
            "t_obs": step / 20,
            "robot": robot,
            "episode": "e1",
            "observation": seen,
            **parts,
        }
    )
    assert reply["type"] == "value", reply


def card(browser: webdriver.Chrome, robot: str) -> Any:
    selector = f'article[data-robot="{robot}"]'
    return eventually(lambda: next(iter(browser.find_elements(By.CSS_SELECTOR, selector)), None))


def shows(browser: webdriver.Chrome, robot: str, **attributes: object) -> None:
    """Wait until the robot's card carries these data attributes."""

    def check() -> bool:
        element = card(browser, robot)
        return all(element.get_attribute(f"data-{name}") == str(value) for name, value in attributes.items())

    eventually(check)


def part(browser: webdriver.Chrome, robot: str, name: str) -> str:
    return str(card(browser, robot).find_element(By.CLASS_NAME, name).text)


def test_robots_values_alarms_and_outcomes_appear_as_they_happen(models: Path, browser: webdriver.Chrome) -> None:
    with critic_server(models) as critic, NativeClient(critic.url("/value")) as client:
        browser.get(critic.http("/"))
        eventually(lambda: browser.find_element(By.ID, "connection-text").text == "connected")
        assert browser.find_element(By.ID, "empty").is_displayed()
        for step in range(10):
            observe(client, "arm-1", step, -0.9 + step / 20, act_latency_ms=12.3)
            observe(client, "arm-2", step, -0.3 if step < 4 else -0.9, prompt=TASKS[1])
        shows(browser, "arm-1", points=10, alarm="false")
        shows(browser, "arm-2", points=10, alarm="true")
        assert part(browser, "arm-1", "task") == TASKS[0] and part(browser, "arm-2", "task") == TASKS[1]
        assert part(browser, "arm-1", "latency") == "12.3 ms" and part(browser, "arm-2", "badge") == "value has fallen"
        assert 40 <= int(part(browser, "arm-1", "percent").rstrip("%")) <= 60
        assert browser.find_element(By.ID, "alarms").text == "1"
        before = browser.execute_script("return document.querySelector('canvas').toDataURL()")
        observe(client, "arm-1", 11, -0.1)
        shows(browser, "arm-1", points=11)
        assert browser.execute_script("return document.querySelector('canvas').toDataURL()") != before, "the curve grew"
        client.ask({"type": "outcome", "robot": "arm-1", "episode": "e1", "success": True})
        shows(browser, "arm-1", success="true", outcomes=1)
        assert part(browser, "arm-1", "badge") == "success"
        assert "1 of 1 succeeded" in part(browser, "arm-1", "outcomes")
        client.ask({"type": "reset", "robot": "arm-1", "episode": "e2", "task": TASKS[0]})
        shows(browser, "arm-1", points=0, episode="e2", outcomes=1)


def test_a_page_opened_late_shows_the_whole_episode(models: Path, browser: webdriver.Chrome) -> None:
    with critic_server(models) as critic, NativeClient(critic.url("/value")) as client:
        for step in range(15):
            observe(client, "late", step, -0.8)
        browser.get(critic.http("/"))
        shows(browser, "late", points=15)


def test_names_from_robots_are_text_and_not_markup(models: Path, browser: webdriver.Chrome) -> None:
    with critic_server(models) as critic, NativeClient(critic.url("/value")) as client:
        browser.get(critic.http("/"))
        robot = "<img src=x onerror=alert(1)>"
        client.ask({"type": "reset", "robot": robot, "episode": "<b>e</b>", "task": "<i>t</i>"})
        name = eventually(lambda: browser.find_elements(By.CLASS_NAME, "name"))[0]
        assert name.text == robot
        assert not browser.find_elements(By.CSS_SELECTOR, "article img, article b, .task i")


def test_the_page_survives_a_restart_of_the_critic(models: Path, browser: webdriver.Chrome) -> None:
    with critic_server(models) as first:
        port = first.port
        browser.get(first.http("/"))
        with NativeClient(first.url("/value")) as client:
            observe(client, "arm-1", 0, -0.5)
            client.ask({"type": "outcome", "robot": "arm-1", "episode": "e1", "success": True})
            shows(browser, "arm-1", points=1, outcomes=1)
    eventually(lambda: "not reachable" in browser.find_element(By.ID, "connection-text").text)
    with critic_server(models, port=port) as second:
        eventually(lambda: browser.find_element(By.ID, "connection-text").text == "connected")
        with NativeClient(second.url("/value")) as client:
            observe(client, "arm-1", 0, -0.4, episode="e2")
            observe(client, "arm-1", 1, -0.4, episode="e2")
            shows(browser, "arm-1", points=2, episode="e2", outcomes=1)


def test_dozens_of_robots_fit_on_a_page(models: Path, browser: webdriver.Chrome) -> None:
    with critic_server(models) as critic, NativeClient(critic.url("/value")) as client:
        browser.get(critic.http("/"))
        for step in range(3):
            for number in range(36):
                observe(client, f"arm-{number}", step, -0.5)
        eventually(lambda: browser.find_element(By.ID, "known").text == "36")
        shows(browser, "arm-35", points=3)
        names = [element.text for element in browser.find_elements(By.CLASS_NAME, "name")]
        assert names == [f"arm-{number}" for number in range(36)], "in the order of their numbers"
