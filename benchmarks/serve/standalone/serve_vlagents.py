"""vlagents' own `AgentService` behind the RPyC server that its `start-server` makes, with an agent that decodes the
observation (`Agent.act` does) and returns a constant chunk."""

import sys
from typing import Any

import rpyc
from lifeline import end_with_parent
from sample import constant_actions
from vlagents.policies.interface import Agent
from vlagents.server import AgentService


class Constant(Agent):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(default_checkpoint_path="")

    def act(self, obs: Any) -> Any:
        super().act(obs)
        return self._chunk_act("robot", constant_actions())


if __name__ == "__main__":
    end_with_parent()
    rpyc.ThreadedServer(
        AgentService(Constant(), "constant"),
        hostname="127.0.0.1",
        port=int(sys.argv[1]),
        protocol_config={"allow_pickle": True, "allow_public_attrs": True},
    ).start()
