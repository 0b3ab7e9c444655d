"""What the demo came to: the numbers of its last line, and all of them in demo.json."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recap_client.runtime import EpisodeResult
from recap_model.statistics import auc
from services.demo.values import value_midway


@dataclass(frozen=True)
class Episode:
    """One driven episode with what the critic said. span_s: robot time from the first to the last observation.
    values: (control step, value)."""

    result: EpisodeResult
    drill: bool
    span_s: float
    values: tuple[tuple[float, float], ...]
    alarm: bool

    @property
    def success(self) -> bool:
        return bool(self.result.success)


@dataclass(frozen=True)
class Summary:
    """The last line. Rates and latencies are over the counted episodes, fault drills only enter value_auc.

    control_hz: measured; act_*_ms: request to reply at the robot; deadline_misses: control steps without a fresh
    action in time; value_auc: how well the value half-way tells success from failure (None when all ended alike).
    """

    episodes: int
    success_rate: float
    control_hz: float
    act_p50_ms: float
    act_p99_ms: float
    deadline_misses: int
    value_auc: float | None

    def line(self) -> str:
        """One JSON object on one line."""
        rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items()}
        return json.dumps(rounded)


def summarise(episodes: Sequence[Episode]) -> Summary:
    """The numbers of a run; needs at least one counted episode that ended."""
    counted = [item for item in episodes if not item.drill]
    latencies = latencies_ms(episodes)
    moves = sum(item.result.steps - 1 for item in counted)
    span = sum(item.span_s for item in counted)
    judged = [(value_midway(list(item.values), item.result.steps), item.success) for item in episodes]
    known = [(value, success) for value, success in judged if value is not None]
    area = auc([value for value, _ in known], [success for _, success in known])
    return Summary(
        episodes=len(counted),
        success_rate=sum(item.success for item in counted) / max(1, len(counted)),
        control_hz=moves / span if span else 0.0,
        act_p50_ms=float(np.percentile(latencies, 50)) if len(latencies) else 0.0,
        act_p99_ms=float(np.percentile(latencies, 99)) if len(latencies) else 0.0,
        deadline_misses=sum(item.result.missed_deadlines for item in counted),
        value_auc=None if math.isnan(area) else area,
    )


def latencies_ms(episodes: Sequence[Episode]) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Of every chunk of the counted episodes, in milliseconds."""
    seconds = [latency for item in episodes if not item.drill for latency in item.result.act_latency_s]
    return 1e3 * np.array(seconds, np.float64)


def write_json(path: Path, summary: Summary, episodes: Sequence[Episode], settings: dict[str, Any]) -> None:
    """demo.json: settings, summary, every episode with its values."""
    data = {
        "summary": asdict(summary),
        "settings": settings,
        "episodes": [
            {**asdict(item.result), "drill": item.drill, "span_s": item.span_s, "alarm": item.alarm,
             "values": item.values}
            for item in episodes
        ],
    }  # fmt: skip
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    temporary.replace(path)
