"""LeRobot's own commands with a served policy: the plug-in installed by pip, the real service behind it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from recap_client.session import ServiceRefused
from recap_client.spec import SpecError
from service_harness import Served, policy_server

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plug-in, built and installed as a user would, and the metadata of the simulated robot."""
    from lerobot_robot_simulated import install

    folder, source = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(ROOT / "clients/lerobot_policy_recap", source)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
               "--target", str(folder), str(source)]  # fmt: skip
    subprocess.run(command, check=True)
    install(folder, "lerobot_robot_simulated", "lerobot_env_simulated")
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from lerobot_robot_simulated import build_models

    with policy_server(build_models(tmp_path_factory.mktemp("models"))) as service:
        yield service


def lerobot(site: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of LeRobot's in `folder`, offline, its home and calibration there too."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT / "tests"), str(ROOT)]),
                   "HF_HUB_OFFLINE": "1", "HF_LEROBOT_HOME": str(folder), "OMP_NUM_THREADS": "1"}  # fmt: skip
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True,
                          timeout=900, check=False)  # fmt: skip


def test_lerobot_eval_runs_its_environments_on_the_service(site: Path, served: Served, tmp_path: Path) -> None:
    before = len(served.engine.calls)
    done = lerobot(site, tmp_path, "-m", "lerobot.scripts.lerobot_eval", "--policy.type=recap",
                   f"--policy.url={served.url()}", "--policy.n_action_steps=3", "--env.type=simulated_reach",
                   "--eval.n_episodes=4", "--eval.batch_size=2", "--seed=1", "--output_dir=out")  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    info = json.loads((tmp_path / "out/eval_info.json").read_text())
    # the graph answers mean(state) + brightness + words: it always drives the second joint up to +1
    assert info["overall"]["pc_success"] == 100.0 and info["overall"]["n_episodes"] == 4
    calls = served.engine.calls[before:]
    states = np.concatenate([call["state"] for call in calls])
    assert all((call["images"] == 7).all() for call in calls), "frames arrive as they were, through floats in [0, 1]"
    assert len(np.unique(states[:, 1])) == len(states), "every robot of the batch was asked about its own state"


def test_lerobot_rollout_drives_an_arm_from_a_policy_folder(site: Path, served: Served, tmp_path: Path) -> None:
    made = lerobot(site, tmp_path, "-m", "lerobot_policy_recap.folder", served.url(), "folder")
    assert made.returncode == 0, made.stderr[-2000:]
    config = json.loads((tmp_path / "folder/config.json").read_text())
    assert config["type"] == "recap" and config["action_feature_names"] == ["pan.pos", "lift.pos", "grip.pos"]
    before = len(served.engine.calls)
    done = lerobot(site, tmp_path, "-m", "lerobot.scripts.lerobot_rollout", "--policy.path=folder",
                   "--robot.type=simulated_arm", "--robot.id=one", "--task=open the drawer", "--duration=2",
                   "--fps=20", "--strategy.type=base")  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert len(served.engine.calls) > before, done.stderr[-2000:]
    np.testing.assert_allclose(served.engine.calls[before]["state"][0], [0, -0.25, 0])


def test_a_robot_that_does_not_fit_the_service_is_refused(
    site: Path, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies import factory
    from lerobot.utils.import_utils import register_third_party_plugins

    monkeypatch.syspath_prepend(site)
    register_third_party_plugins()
    joints = ["pan.pos", "lift.pos", "grip.pos"]
    for wrong, message in [
        ({"output_features": {"action": PolicyFeature(FeatureType.ACTION, (2,))}}, "action: expected [3]"),
        ({"input_features": {"observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 16, 16))}},
         "cameras: expected ['front'] (service), got ['top']; rename with --rename_map"),
        ({"action_feature_names": joints[::-1]}, f"action: expected {joints} (service), got {joints[::-1]}"),
    ]:  # fmt: skip
        config = factory.make_policy_config("recap", url=served.url(), **wrong)
        with pytest.raises(SpecError, match=re.escape(message)):
            factory.get_policy_class("recap")(config)
    policy = factory.get_policy_class("recap")(factory.make_policy_config("recap", url=served.url()))
    with pytest.raises(ServiceRefused, match="front"):  # no frame at all: the service's own error, by name
        policy.select_action({"observation.state": torch.zeros(1, 3), "task": "open the drawer"})
    policy.close()
