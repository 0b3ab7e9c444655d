"""The smallest loop that drives a robot from a policy service: replace MetaWorldRobot by your own class.

python minimal_loop.py ws://127.0.0.1:8000/act
"""

import sys

from recap_client.policy import RemotePolicy
from recap_client.robots.metaworld import MetaWorldRobot
from recap_client.safety import SafetyLimits

robot = MetaWorldRobot()
policy = RemotePolicy(sys.argv[1], robot.spec)
safe = SafetyLimits(robot.spec)
robot.reset("drawer-open", seed=1)
policy.reset("episode-1", task=robot.prompt("drawer-open"))
done = False
while not done:
    chunk = policy.infer(robot.observe(), prompt="open the drawer", deadline_s=1.0)
    for action in chunk.actions[:4]:
        result = robot.act(safe(action))
        if done := result.done:
            break
print("success" if result.success else "failed")
