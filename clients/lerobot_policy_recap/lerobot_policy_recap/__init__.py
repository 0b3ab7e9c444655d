"""Registers the policy type `recap` with LeRobot, which imports this package because of its distribution's name."""

from lerobot_policy_recap.configuration_recap import RecapConfig

__all__ = ["RecapConfig"]
