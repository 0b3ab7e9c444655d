"""LeRobot's own policy server, as it is, with a policy that returns zeros (a plug-in policy; the stock server's list of
policy names takes one more entry, for it does not load plug-ins by itself)."""

import sys
from pathlib import Path

import configuration_recap_null
from lerobot.async_inference import policy_server
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
)
from lifeline import end_with_parent
from modeling_recap_null import RecapNullPolicy
from sample import load

if __name__ == "__main__":
    end_with_parent()
    port, payload, folder = int(sys.argv[1]), load(Path(sys.argv[2])), Path(sys.argv[3])
    images = {
        f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, *frame.shape[:2]))
        for name, frame in payload.images.items()
    }
    state = {"observation.state": PolicyFeature(FeatureType.STATE, payload.state.shape)}
    config = configuration_recap_null.RecapNullConfig(device="cpu", input_features=state | images)
    RecapNullPolicy(config).save_pretrained(folder)
    steps = [RenameObservationsProcessorStep({}), AddBatchDimensionProcessorStep(), DeviceProcessorStep("cpu")]
    PolicyProcessorPipeline(steps=steps, name="policy_preprocessor").save_pretrained(folder)
    PolicyProcessorPipeline(steps=[DeviceProcessorStep("cpu")], name="policy_postprocessor").save_pretrained(folder)
    policy_server.SUPPORTED_POLICIES.append("recap_null")
    policy_server.serve(policy_server.PolicyServerConfig(host="127.0.0.1", port=port))
