"""The class that LeRobot finds for `configuration_recap_null` by its naming rule."""

from typing import Any

import torch
from configuration_recap_null import RecapNullConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from sample import ACTIONS, CHUNK


class RecapNullPolicy(PreTrainedPolicy):  # type: ignore[misc]
    config_class = RecapNullConfig
    name = "recap_null"

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__(config)
        self.actions = torch.nn.Parameter(torch.zeros(1, CHUNK, ACTIONS), requires_grad=False)

    def get_optim_params(self) -> Any:
        return {}

    def reset(self) -> None:
        pass

    def forward(self, batch: Any) -> Any:
        raise NotImplementedError("a policy to measure servers with; it does not train")

    def predict_action_chunk(self, batch: Any, **_: Any) -> Any:  # noqa: ARG002 - LeRobot's signature
        return self.actions.data

    def select_action(self, batch: Any, **_: Any) -> Any:  # noqa: ARG002 - LeRobot's signature
        return self.actions.data[:, 0]
