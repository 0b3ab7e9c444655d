"""The smallest program that drives a robot from a policy service: replace MetaWorldRobot by your own class.

python minimal_loop.py ws://127.0.0.1:8000/act
"""

import sys

from recap_client.policy import RemotePolicy
from recap_client.robots.metaworld import MetaWorldRobot
from recap_client.runtime import run_episode

robot = MetaWorldRobot()
policy = RemotePolicy(sys.argv[1], robot.spec)
try:  # keeps the control rate, holds position when starved, reconnects, checks limits
    result = run_episode(robot, "drawer-open", seed=1, policy=policy)
finally:
    policy.close()
    robot.close()
print("success" if result.success else "failed")
