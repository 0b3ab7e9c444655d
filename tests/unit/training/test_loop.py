"""The loop's plan, and what it skips, resumes, redoes and stops; with real child processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import psutil
import pytest

from recap_model import cli
from training.experiment import children
from training.experiment.config import LoopConfig, with_seed
from training.experiment.loop import LoopError, Silent, locked, run_loop, run_stages
from training.experiment.receipts import Receipts
from training.experiment.stages import Serve, Stage, arms, describe, plan
from training.presets import loop_debug, loop_study, loop_tiny

CONFIGS = [loop_debug.loop(), loop_tiny.loop(), loop_study.loop()]

PROGRAM = """
import http.server, pathlib, signal, sys, time, urllib.request
verb, *rest = sys.argv[1:]
if verb == "write":                     # write OUT TEXT [READ]: a stage
    if "fail" in rest: sys.exit("the disk is full")
    with open("calls", "a") as calls: calls.write(rest[0] + "\\n")
    pathlib.Path(rest[0]).write_text(rest[1])
elif verb == "collect":                 # collect OUT TEXT: adds to a folder
    pathlib.Path(rest[0]).mkdir(exist_ok=True)
    (pathlib.Path(rest[0]) / rest[1]).write_text(rest[1])
elif verb == "sleep":                   # sleep OUT: until told to end, which it notes
    def end(*_):
        pathlib.Path(rest[0] + ".stopped").write_text("politely")
        sys.exit(130)
    signal.signal(signal.SIGINT, end)
    pathlib.Path(rest[0] + ".running").write_text("x")
    time.sleep(600)
elif verb == "fetch":                   # fetch OUT URL
    url = rest[1].replace("ws://", "http://").rpartition("/")[0] + "/readyz"
    pathlib.Path(rest[0]).write_text(urllib.request.urlopen(url).read().decode())
elif verb == "serve":
    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200); self.end_headers(); self.wfile.write(b"ready")
    pathlib.Path("served").write_text(" ".join(rest))
    http.server.HTTPServer(("127.0.0.1", int(rest[rest.index("--policy-port") + 1])), Ready).serve_forever()
elif verb == "nothing": pass
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return (sys.executable, str(path))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def write(name, text="x", reads=(), *more):
    return Stage(name, ("write", name, text, *more), tuple(reads), (name,))


class Notes(Silent):
    def __init__(self):
        object.__setattr__(self, "seen", [])

    def skipped(self, stage):
        self.seen.append(f"skip {stage.name}")

    def finished(self, stage, _seconds):
        self.seen.append(f"run {stage.name}")


def go(stages, folder, program):
    notes = Notes()
    run_stages(stages, folder, notes, program=program)
    return notes.seen


def _scenes(stages):
    """(phase, seed) of every episode that the stages collect or judge by."""
    found = set()
    for stage in stages:
        if "--first-seed" in stage.command:
            first = int(stage.command[stage.command.index("--first-seed") + 1])
            found |= set(range(first, first + int(stage.command[stage.command.index("--episodes-per-task") + 1])))
    return found


class TestPlan:
    @pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
    @pytest.mark.parametrize("iterations", [1, 2, 3])
    def test_every_input_is_written_by_an_earlier_stage_and_nothing_twice(self, config, iterations):
        written = set()
        for stage in plan(config, iterations):
            assert set(stage.inputs) <= written, stage.name
            assert not set(stage.outputs) & written, stage.name
            assert stage.serve is None or stage.serve.models in stage.inputs
            written |= set(stage.outputs)
        assert "report.html" in written

    @pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
    def test_every_folder_in_a_command_is_an_input_or_an_output(self, config):
        for stage in plan(config, 2):
            paths = {part for part in stage.command if part[:2] in ("0/", "1/", "2/")}
            assert paths <= set(stage.inputs) | set(stage.outputs), stage.name
            assert stage.name == "report" or set(stage.outputs) <= paths, stage.name

    @pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
    def test_every_command_exists(self, config):
        for stage in plan(config, 1):
            name = " ".join(stage.command[:2]) if stage.command[0] == "train" else stage.command[0]
            assert name in cli.COMMANDS

    def test_arms_differ_in_the_indicator_only(self):
        stages = {stage.name: stage for stage in plan(CONFIGS[1], 2)}
        for k in (1, 2):
            ours, control = (list(stages[f"{k} {arm}"].command) for arm in ("recap", "imitation"))
            place = ours.index("--labels")
            del ours[place : place + 2]
            swap = {"recap": "imitation", f"{k}/recap": f"{k}/imitation"}
            assert sorted(swap.get(part, part) for part in ours) == sorted(control)
            assert "0/sft" in ours

    def test_all_arms_are_evaluated_on_the_same_episodes_and_none_trains_on_them(self):
        config = CONFIGS[1]
        stages = [stage for stage in plan(config, 2) if stage.command[0] in ("evaluate", "collect")]
        seeds = {}
        for stage in stages:
            first = int(stage.command[stage.command.index("--first-seed") + 1])
            count = int(stage.command[stage.command.index("--episodes-per-task") + 1])
            seeds.setdefault(stage.command[0], []).append(range(first, first + count))
        assert len(set(seeds["evaluate"])) == 1 and len(seeds["evaluate"]) == len(arms(config, 2)) == 9
        every = [*seeds["collect"], seeds["evaluate"][0]]
        assert len(set().union(*every)) == sum(len(part) for part in every)

    def test_the_study_s_policies_differ_in_labels_and_balance_only_and_its_runs_share_no_scene(self):
        stages = {stage.name: stage.command for stage in plan(CONFIGS[2], 2)}
        recap, others = stages["2 recap"], [stages[f"2 {name}"] for name in CONFIGS[2].controls]
        for command in others:
            assert command[-2:] == ("--train", "no-vision") and "0/sft" in command and "2/dataset" in command
        assert recap[-4:] == (*others[0][-2:], *CONFIGS[2].conditioned)
        assert {command[command.index("--labels") + 1] for command in (recap, *others[1:])} == {
            "2/advantage", "2/outcomes"
        }  # fmt: skip
        used = [_scenes(plan(with_seed(CONFIGS[2], number), 2)) for number in (0, 1, 2)]
        assert not used[0] & used[1] and not used[1] & used[2] and not used[0] & used[2]
        with pytest.raises(ValueError, match="seed: expected a number from 0 to 49"):
            with_seed(CONFIGS[2], 50)

    def test_iteration_k_holds_all_data_so_far(self):
        commands = {stage.name: stage.command for stage in plan(CONFIGS[0], 2)}
        for folder_ in ("0/demonstrations", "1/rollouts", "2/rollouts"):
            assert folder_ in commands["2 ingest"]

    def test_unusable_settings_are_refused(self):
        with pytest.raises(ValueError, match="iterations: expected at least 1"):
            plan(CONFIGS[0], 0)
        with pytest.raises(ValueError, match="rollouts"):
            replace(CONFIGS[0], rollouts=0)
        with pytest.raises(ValueError, match="betas"):
            replace(CONFIGS[0], betas=(2.0,))
        with pytest.raises(ValueError, match="controls: expected some of"):
            replace(CONFIGS[0], controls=("magic",))
        with pytest.raises(ValueError, match="collect_beta: expected one of"):
            replace(CONFIGS[0], collect_beta=3.0)


class TestResume:
    def test_what_is_done_is_skipped_and_a_change_redoes_it_and_what_follows(self, folder, program):
        stages = [write("a"), write("b", "x", ["a"]), write("c", "x", ["b"])]
        assert go(stages, folder, program) == ["run a", "run b", "run c"]
        assert go(stages, folder, program) == ["skip a", "skip b", "skip c"]
        changed = [stages[0], write("b", "y", ["a"]), stages[2]]
        assert go(changed, folder, program) == ["skip a", "run b", "run c"]

    def test_a_change_that_leaves_the_output_equal_redoes_nothing_after_it(self, folder, program):
        stages = [write("a"), write("b", "x", ["a"])]
        go(stages, folder, program)
        assert go([write("a", "x", (), "other"), stages[1]], folder, program) == ["run a", "skip b"]

    @pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_text("cut")])
    def test_a_missing_or_changed_output_is_made_again(self, folder, program, damage):
        go([write("a")], folder, program)
        damage(folder / "a")
        assert go([write("a")], folder, program) == ["run a"]
        assert (folder / "a").read_text() == "x"

    def test_after_a_failure_it_goes_on_where_it_stopped(self, folder, program):
        stages = [write("a"), write("b", "x", ["a"])]
        with pytest.raises(children.StageError) as caught:
            go([stages[0], write("b", "x", ["a"], "fail")], folder, program)
        text = str(caught.value)
        assert "exit code 1" in text and "the disk is full" in text and f"cd {folder} && recap write b" in text
        assert go(stages, folder, program) == ["skip a", "run b"]
        assert (folder / "calls").read_text() == "a\nb\n"

    def test_a_command_that_writes_nothing_is_an_error(self, folder, program):
        with pytest.raises(FileNotFoundError, match=r"stage 'a' .*wrote no a"):
            go([Stage("a", ("nothing",), (), ("a",))], folder, program)
        assert Receipts(folder).state(Stage("a", ("nothing",), (), ("a",))) == "partial"

    def test_recordings_made_with_other_parameters_are_moved_not_mixed_and_not_deleted(self, folder, program):
        def stage(text):
            return Stage("c", ("collect", "rollouts", text), (), ("rollouts",))

        go([stage("old")], folder, program)
        go([stage("new")], folder, program)
        assert [p.name for p in (folder / "rollouts").iterdir()] == ["new"]
        assert [p.name for p in (folder / "replaced").rglob("*") if p.is_file()] == ["old"]

    def test_a_moved_run_is_still_done(self, folder, program, tmp_path):
        go([write("a")], folder, program)
        assert go([write("a")], folder.rename(tmp_path / "elsewhere"), program) == ["skip a"]

    def test_the_log_keeps_every_attempt(self, folder, program):
        with pytest.raises(children.StageError):
            go([write("a", "x", (), "fail")], folder, program)
        go([write("a")], folder, program)
        assert (folder / "logs" / "a.log").read_text().count("$ recap write a") == 2


class TestServices:
    def test_a_stage_gets_the_url_of_a_service_that_is_ready_and_ends_with_it(self, folder, program):
        stage = Stage("e", ("fetch", "out", "{policy_url}"), (), ("out",), Serve("0/models", 1.75))
        go([stage], folder, program)
        assert (folder / "out").read_text() == "ready"
        served = (folder / "served").read_text()
        assert served.startswith("policy --models 0/models") and "--beta 1.75" in served
        port = int(served.split("--policy-port ")[1].split()[0])
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=1)

    def test_the_ports_are_no_part_of_what_is_compared(self, folder, program):
        stage = Stage("e", ("fetch", "out", "{policy_url}"), (), ("out",), Serve("0/models"))
        assert go([stage], folder, program) == ["run e"] and go([stage], folder, program) == ["skip e"]
        guided = replace(stage, serve=Serve("0/models", 1.5))
        assert go([guided], folder, program) == ["run e"]

    def test_a_service_that_does_not_start_is_reported_with_its_log(self, folder):
        broken = (sys.executable, "-c", "import sys; sys.exit('no model repository here')")
        stage = Stage("e", ("fetch", "out", "{policy_url}"), (), ("out",), Serve("0/models"))
        with pytest.raises(children.StageError, match="no model repository here"):
            go([stage], folder, broken)


DRIVER = """
import sys
from pathlib import Path
from training.experiment.loop import Silent, locked, run_stages, terminable
from training.experiment.stages import Stage
with locked(Path(sys.argv[1])), terminable():
    run_stages([Stage("s", ("sleep", "s"), (), ("s",))], Path(sys.argv[1]), Silent(), program=sys.argv[2:])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_loop_leaves_no_child_and_no_lock(folder, program, number):
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(DRIVER), str(folder), *program],
                               stderr=subprocess.DEVNULL)  # fmt: skip
    wait_for(lambda: (folder / "s.running").exists())
    with pytest.raises(LoopError, match="in use"), locked(folder):
        pass
    child = psutil.Process(process.pid).children()[0].pid
    process.send_signal(number)
    process.wait(90)
    wait_for(lambda: not alive(child))
    if number != signal.SIGKILL:
        assert (folder / "s.stopped").read_text() == "politely"
    with locked(folder):
        assert Receipts(folder).state(Stage("s", ("sleep", "s"), (), ("s",))) == "partial"


def wait_for(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_another_configuration_in_the_same_folder_is_refused(folder):
    config = LoopConfig("debug", ("a",), "debug", 1, 1, 1)
    (folder / "loop.json").write_text(json.dumps({"config": {"name": "debug"}}))
    with pytest.raises(LoopError, match=r"another configuration .*tasks.*choose another --out"):
        run_loop(config, folder, 1)


def test_a_run_from_before_a_setting_existed_goes_on(folder):
    config = LoopConfig("debug", ("a",), "debug", 1, 1, 1)
    old = describe(config, 1)["config"]
    del old["n"]
    for setting, fits in ((config, True), (replace(config, n=config.n + 1), False)):
        (folder / "loop.json").write_text(json.dumps({"config": old}))
        with pytest.raises(children.StageError if fits else LoopError):  # there is no robot task "a"
            run_loop(setting, folder, 1)


def test_label_rules_reach_the_command():
    config = replace(CONFIGS[0], interventions="successes", failures_negative=True, threshold_over="successes")
    command = next(stage.command for stage in plan(config, 1) if stage.name == "1 label")
    assert "--failures-negative" in command
    assert (
        command[command.index("--interventions") + 1] == command[command.index("--threshold-over") + 1] == "successes"
    )


def test_the_plan_can_be_read_without_running_it(tmp_path, capsys):
    assert cli.main(["loop", "--out", str(tmp_path / "x"), "--preset", "debug", "--plan"]) == 0
    text = capsys.readouterr().out
    assert "recap train policy" in text and "# with `recap serve all" in text
    assert not (tmp_path / "x").exists() and os.listdir(tmp_path) == []
