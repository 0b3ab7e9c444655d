"""`lerobot-policy-recap URL FOLDER`: a policy folder for LeRobot's commands that want `--policy.path`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from lerobot_policy_recap.configuration_recap import RecapConfig
from lerobot_policy_recap.modeling_recap import headers
from lerobot_policy_recap.processor_recap import make_recap_pre_post_processors
from recap_client.session import ServiceError, served_spec
from recap_client.spec import RobotSpec


def write_folder(url: str, folder: Path) -> RobotSpec:
    """Write config.json and the two processors for the service at `url`. Raises ServiceError when there is none."""
    spec = served_spec(url, headers())
    config = RecapConfig(url=url, action_feature_names=[dim.name for dim in spec.action])
    config.input_features = {OBS_STATE: PolicyFeature(FeatureType.STATE, (len(spec.state),))} | {
        f"{OBS_IMAGES}.{camera.name}": PolicyFeature(FeatureType.VISUAL, (3, camera.height, camera.width))
        for camera in spec.cameras
    }
    config.output_features = {ACTION: PolicyFeature(FeatureType.ACTION, (len(spec.action),))}
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    for pipeline in make_recap_pre_post_processors(config):
        pipeline.save_pretrained(folder)
    return spec


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: 0, or 2 when there is no service."""
    parser = argparse.ArgumentParser("lerobot-policy-recap", description=__doc__)
    parser.add_argument("url", help="policy service, e.g. ws://127.0.0.1:8000/act")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    try:
        spec = write_folder(options.url, options.folder)
    except ServiceError as error:
        print(f"lerobot-policy-recap: {error}", file=sys.stderr)
        return 2
    print(f"{options.folder}: policy of {options.url} for {spec.robot}; use it as --policy.path={options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
