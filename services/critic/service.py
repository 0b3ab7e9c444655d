"""What the critic's fronts share: values in, judgements and events out."""

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager

from recap_model.spec import spec_to_json
from services.common import tracing
from services.common.auth import Gate
from services.common.batcher import Batcher
from services.common.channel import Message, number, text
from services.common.drain import Connections
from services.common.engine import Engine
from services.common.errors import bad_field, fault_of
from services.common.handshake import check_spec
from services.common.logs import get_logger
from services.common.metrics import CriticMetrics
from services.common.observation import decoded, read_observation, task_text
from services.common.settings import CriticSettings, limits_for
from services.critic.episodes import Episodes, Judgement, Track
from services.critic.pipeline import CriticPipeline, Value
from services.critic.stream import Broadcast

log = get_logger("critic")


class CriticService:
    """One critic model, many robots."""

    def __init__(self, engine: Engine, settings: CriticSettings) -> None:
        self.engine, self.settings = engine, settings
        self.tracing = tracing.from_environment("recap-critic")
        self.metrics = CriticMetrics()
        self.connections = Connections()
        self.gate = Gate(settings.access, settings.api_key, lambda reason: self.metrics.refused.labels(reason).inc())
        self.batcher = Batcher(engine)
        self.pipeline = CriticPipeline(engine, self.batcher)
        self.episodes = Episodes(self.pipeline.spec, settings)
        self.limits = limits_for(engine.spec.robot)
        self.broadcast = Broadcast(self.snapshot)
        self.metrics.describe(engine.name, engine.version, engine.hash, engine.spec)

    def stop(self) -> None:
        self.batcher.close()
        self.engine.close()
        if self.tracing is not None:
            self.tracing.close()

    def not_ready(self) -> str | None:
        if self.connections.draining:
            return "shutting down"
        return None if (why := self.batcher.trouble) is None else f"the engine failed: {why}"

    def welcome(self) -> Message:
        model = {"name": self.engine.name, "version": self.engine.version, "hash": self.engine.hash}
        return {
            "type": "welcome",
            "protocol": "recap.v1",
            "kind": "critic",
            "spec": spec_to_json(self.engine.spec),
            "model": model,
        }

    async def observe(self, body: Message, sender: object) -> Message:
        """Answer an `observe` message. Raises what `read_observation` and `CriticPipeline.value` raise.

        sender: whose it is; a robot and the policy's tap may both send its frames, and must not supersede each other.
        """
        start = time.perf_counter()
        try:
            with self._request(start, body.get(tracing.FIELD)):
                reply = await self._observe(body, sender)
        except Exception as error:
            self.metrics.requests.labels(fault_of(error).code).inc()
            raise
        self.metrics.requests.labels("ok").inc()
        self.metrics.latency.observe(time.perf_counter() - start)
        return reply

    def _request(self, received: float, sent: object) -> AbstractContextManager[None]:
        held = self.connections.request()
        if self.tracing is None:
            return held
        return self.tracing.request("observe", dialect="recap.v1", received=received, sent=sent, around=held)

    async def _observe(self, body: Message, sender: object) -> Message:
        robot, episode = text(body, "robot", "robot", limit=64), text(body, "episode", "0", limit=128)
        t_obs, latency = number(body, "t_obs"), number(body, "act_latency_ms")
        observation = read_observation(body)
        task = task_text(observation.prompt)
        track = self.episodes.track(robot, episode)  # now: while the engine runs, the next episode may begin
        if track is None or track.task != task:
            track = self._begin(robot, episode, task)
        observation = await decoded(observation, self.pipeline.spec.robot.cameras)
        value = await self.pipeline.value((id(sender), robot), observation)
        if latency is not None:
            track.latency_ms = latency
        judgement = self.episodes.add(track, value.value, t_obs)
        if self.episodes.track(robot, episode) is track:
            self._publish(track, judgement)
        return self._reply(body, track, value, judgement)

    def reset(self, body: Message) -> Message:
        """Begin an episode."""
        check_spec(body, self.pipeline.spec.robot)
        self._begin(
            text(body, "robot", "robot", limit=64),
            text(body, "episode", "0", limit=128),
            text(body, "task", "", limit=2000),
        )
        return {"type": "ok"}

    def outcome(self, body: Message) -> Message:
        """End an episode."""
        success = body.get("success")
        if success is not None and not isinstance(success, bool):
            raise bad_field("bad_message", "success", "true, false or null", type(success).__name__)
        track = self.episodes.end(
            text(body, "robot", "robot", limit=64), text(body, "episode", "0", limit=128), success
        )
        if track is not None:
            self.broadcast.send(
                _state(track) | {"type": "outcome", "success": success, "outcomes": list(track.outcomes)}
            )
        return {"type": "ok"}

    def snapshot(self) -> Iterable[Message]:
        """Everything a new listener needs to draw every robot."""
        for track in self.episodes.tracks:
            yield _state(track) | {
                "type": "snapshot",
                "outcomes": list(track.outcomes),
                "finished": track.finished,
                "history": [[round(step, 2), round(v, 4)] for step, v in track.points],
            }

    def _begin(self, robot: str, episode: str, task: str) -> Track:
        track, forgotten = self.episodes.begin(robot, episode, task)
        for name in forgotten:
            self.metrics.value.remove(name)
            self.broadcast.send({"type": "forgotten", "robot": name})
        self.broadcast.send(_state(track) | {"type": "reset", "outcomes": list(track.outcomes)})
        return track

    def _publish(self, track: Track, judgement: Judgement) -> None:
        self.metrics.value.labels(track.robot).set(judgement.value)
        if judgement.raised:
            self.metrics.alarms.inc()
            log.warning(
                "alarm",
                robot=track.robot,
                reason=judgement.alarm,
                value=round(judgement.value, 3),
                step=round(judgement.step),
            )
        self.broadcast.send(_state(track) | {"type": "value", "seconds_to_success": judgement.seconds_to_success})

    def _reply(self, body: Message, track: Track, value: Value, judgement: Judgement) -> Message:
        seq = body.get("seq")
        return {
            "type": "value",
            "seq": seq if isinstance(seq, int) else None,
            "robot": track.robot,
            "episode": track.episode,
            "value": judgement.value,
            "progress": judgement.progress,
            "std": value.std,
            "advantage": judgement.advantage,
            "seconds_to_success": judgement.seconds_to_success,
            "alarm": judgement.alarm is not None,
            "alarm_reason": judgement.alarm,
            "server_timing": {"queue_ms": 1000 * value.queue_s, "infer_ms": 1000 * value.infer_s},
        }


def _state(track: Track) -> Message:
    step, value = track.points[-1] if track.points else (0.0, None)
    return {
        "robot": track.robot,
        "task": track.task,
        "episode": track.episode,
        "step": round(step, 2),
        "value": value,
        "progress": None if value is None else 1 + value,
        "alarm": track.rule.reason is not None,
        "alarm_reason": track.rule.reason,
        "latency_ms": track.latency_ms,
        "success": track.success,
    }
