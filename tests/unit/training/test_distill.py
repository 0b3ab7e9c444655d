"""`recap distill`: a one-step student of a frozen, guided teacher, and the gate that judges it in closed loop."""

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_factory import ROBOT, TASKS, TOKENIZER, make_policy, make_table, save_critic, save_policy
from recap_model import cli
from recap_model.manifest import content_hash, read_manifest, verify
from recap_model.policy.load import load_policy
from sample_rollouts import record
from trained import SPEC
from training import distill
from training.cli_distill import Distill
from training.distill import DistillError, DistillSettings, Lessons, Teacher, distill_loss, make_student
from training.ingest import ingest, survey
from training.loader import Part
from training.settings import FitSettings

FIT = FitSettings(steps=3, batch_size=8, precision="fp32")


def make_frames(folder: Path, episodes: int = 4, spec=ROBOT) -> Path:
    for number in range(episodes):
        task = spec.tasks[number % 2]
        record(folder / "rollouts", number, length=6 + number, success=number != 1, task=task, spec=spec)
    ingest(survey([folder / "rollouts"]), folder / "dataset")
    return folder / "dataset"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """teacher/ (prompts matter to it), dataset/, and student/ made by the command with guidance 2."""
    root = tmp_path_factory.mktemp("distill")
    save_policy(root / "teacher")
    make_frames(root)
    assert cli.main(command(root, root / "student", "--beta", "2", "--steps", "40")) == 0
    return root


def command(root, out, *more, teacher=None):
    base = ["distill", str(teacher or root / "teacher"), "--dataset", str(root / "dataset"), "--out", str(out)]
    return [*base, "--preset", "debug", "--lr", "2e-3", "--held-out", "0.25", *more]


def failing(capsys, *argv):
    assert cli.main(list(argv)) == 2
    return " ".join(capsys.readouterr().err.split())


def chunks(policy, *, beta=1.0, steps=1, seed=9):
    """Chunks of `policy` as a teacher with these settings, on frames and noise that no training saw."""
    lesson = Lessons(make_table(seed=seed), TOKENIZER, chunk=8, shift=0, seed=0)(np.arange(0, 47, 3), 0, train=False)
    guide = Teacher(policy, beta, steps)
    noise = torch.randn(16, 8, 4, generator=torch.Generator().manual_seed(seed))
    return guide.solve(noise, guide.read(lesson).prefix(policy)).detach()


def apart(a, b):
    return (a - b).abs().mean().item()


def test_the_student_is_nearer_to_its_teacher_than_the_teacher_in_one_step(root):
    student, teacher = load_policy(root / "student")[0], load_policy(root / "teacher")[0]
    assert student.config == replace(teacher.config, denoise_steps=1)
    target = chunks(teacher, beta=2.0, steps=3)
    assert apart(chunks(student), target) < 0.6 * apart(chunks(teacher, beta=2.0, steps=1), target)
    metrics = read_manifest(root / "student").metrics
    assert metrics["mean_abs"] < 0.6 * metrics["one_step_mean_abs"] and metrics["cosine"] > metrics["one_step_cosine"]


def test_guidance_is_baked_in(root):
    student, teacher = load_policy(root / "student")[0], load_policy(root / "teacher")[0]
    guided, plain = chunks(teacher, beta=2.0, steps=3), chunks(teacher, steps=3)
    assert apart(chunks(student), guided) < 0.7 * apart(chunks(student), plain)


def test_only_the_expert_changed_and_the_teacher_did_not(root):
    student, teacher = (dict(load_policy(root / name)[0].named_parameters()) for name in ("student", "teacher"))
    same = {name for name in teacher if torch.equal(student[name], teacher[name])}
    assert {name for name in teacher if not name.startswith("expert.")} <= same
    assert not {name for name in same if name.startswith("expert.layers")}
    verify(root / "teacher", "policy")


def test_the_manifest_says_of_whom_and_how(root):
    manifest = read_manifest(root / "student", "policy")
    teacher = read_manifest(root / "teacher").hash
    assert manifest.parents == {"teacher": teacher, "dataset": read_manifest(root / "dataset").hash}
    wanted = {"mode": "distilled", "teacher": teacher, "beta": 2.0, "teacher_steps": 3, "train": "expert"}
    assert {key: manifest.parameters[key] for key in wanted} == wanted
    metrics, names = manifest.metrics, [dim.name for dim in ROBOT.action]
    assert list(metrics["mean_abs_by_dimension"]) == list(metrics["max_abs_by_dimension"]) == names
    assert np.mean(list(metrics["mean_abs_by_dimension"].values())) == pytest.approx(metrics["mean_abs"])
    assert max(metrics["max_abs_by_dimension"].values()) == metrics["max_abs"]
    # 6 + 7 + 8 + 9 frames, one whole episode held out
    assert metrics["frames"] + metrics["held_out_frames"] == 30 and metrics["held_out_frames"] in (6, 7, 8, 9)


def test_a_student_is_not_exported_with_guidance_a_second_time(root, tmp_path):
    from exporters.repository import ExportOptions, export_checkpoint

    with pytest.raises(ValueError, match=r"expected no --guided for a distilled policy: the guidance of its teacher"):
        export_checkpoint(root / "student", tmp_path, ExportOptions(guided=True))


def test_an_exported_student_is_served_in_one_step(root, tmp_path):
    import onnx

    from exporters.repository import ExportOptions, export_checkpoint

    (manifest,) = export_checkpoint(root / "student", tmp_path, ExportOptions(batch_sizes=(1,)))
    assert manifest.metrics["max_abs"] <= 1e-4 and manifest.parameters["training"]["beta"] == 2.0
    model = onnx.load(tmp_path / "policy/1/model.onnx")
    assert {item.name for item in model.graph.input} == {"images", "state", "tokens", "token_mask", "noise"}
    # the exporter writes every denoising step out, under its number
    assert {node.name.split(".")[0] for node in model.graph.node if node.name.startswith("step")} == {"step0"}


@pytest.mark.parametrize("train", ["expert", "all"])
def test_training_never_moves_the_teacher(train):
    teacher = make_policy()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student, guide = make_student(teacher, train), Teacher(teacher, 2.0, 3)
    settings = DistillSettings(FIT, beta=2.0, train=train)
    lessons = Lessons(make_table(), TOKENIZER, chunk=8, shift=2, seed=0)
    learning = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, 0.1)
    for step in range(2):
        optimizer.zero_grad()
        distill_loss(student, guide, lessons(np.arange(8), step), settings, torch.Generator()).backward()
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    moved = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert any(n.startswith("vision.") for n in moved) == (train == "all") and any("expert" in n for n in moved)


def test_sharing_the_reading_changes_nothing_but_the_cost():
    """With the expert alone to train, the shared prefix gives the loss that the student's own encoding gives."""
    losses = []
    for train in ("expert", "all"):
        teacher = make_policy()
        lessons = Lessons(make_table(), TOKENIZER, chunk=8, shift=2, seed=0)
        settings = DistillSettings(FIT, beta=1.5, train=train)
        student, guide = make_student(teacher, train), Teacher(teacher, 1.5, 3)
        torch.nn.init.normal_(student.expert.action_out.weight, generator=torch.Generator().manual_seed(1))
        losses.append(
            distill_loss(student, guide, lessons(np.arange(9), 0), settings, torch.Generator().manual_seed(3))
        )
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


def test_the_teacher_is_what_the_services_would_serve():
    policy, rows = make_policy(), np.arange(0, 47, 5)
    lesson = Lessons(make_table(), TOKENIZER, chunk=8, shift=0, seed=0)(rows, 0, train=False)
    batch, beta = lesson.batch, 1.75
    noise = torch.randn(len(rows), 8, 4, generator=torch.Generator().manual_seed(0))
    arrays = (batch.images, batch.state, batch.tokens, batch.token_mask, lesson.bare_tokens, lesson.bare_mask)
    with torch.no_grad():
        served = policy.sample_actions_guided(*map(torch.from_numpy, arrays), torch.full((len(rows),), beta), noise)
    guide = Teacher(policy, beta, policy.config.denoise_steps)
    ours = policy.scaling.physical(guide.solve(noise, guide.read(lesson).prefix(policy)))
    torch.testing.assert_close(ours, served, rtol=0, atol=1e-5)


def test_the_perfect_student_of_a_straight_flow_has_no_loss():
    """A velocity without dependence on x and t is solved exactly by one step: both terms vanish at the teacher."""
    teacher = make_policy()
    torch.nn.init.zeros_(teacher.expert.action_out.weight)
    student = make_student(teacher, "expert")
    lessons = Lessons(make_table(), TOKENIZER, chunk=8, shift=0, seed=0)
    settings = DistillSettings(FIT, flow_weight=1.0)
    loss = distill_loss(student, Teacher(teacher, 1.0, 5), lessons(np.arange(8), 0), settings, torch.Generator())
    assert loss.item() < 1e-10


def test_every_prompt_is_positive_whatever_the_labels_say():
    table = replace(make_table(), indicator=np.zeros(47, np.int8))
    lesson = Lessons(table, TOKENIZER, chunk=8, shift=0, seed=0)(np.arange(47), 0)
    for row, task in enumerate(table.task):
        ids, mask = TOKENIZER(f"{TASKS[task]}\nAdvantage: positive\n")
        np.testing.assert_array_equal(lesson.batch.tokens[row][lesson.batch.token_mask[row]], ids[mask])
        ids, mask = TOKENIZER(f"{TASKS[task]}\n")
        np.testing.assert_array_equal(lesson.bare_tokens[row][lesson.bare_mask[row]], ids[mask])


@given(st.integers(1, 5))
def test_parts_of_a_step_add_up_to_the_step(count):
    teacher = make_policy()
    student, guide = make_student(teacher, "expert"), Teacher(teacher, 2.0, 2)
    lessons, rows = Lessons(make_table(), TOKENIZER, chunk=8, shift=2, seed=0), np.arange(3, 10)
    settings = DistillSettings(FIT, beta=2.0)

    def loss(part):
        lesson = lessons(rows, 4, part=part)
        return distill_loss(student, guide, lesson, settings, torch.Generator().manual_seed(1)).item()

    assert sum(loss(Part(i, count)) for i in range(count)) == pytest.approx(loss(Part()), rel=1e-5)


def test_an_interrupted_run_ends_bit_equal_to_a_straight_one(root, tmp_path, monkeypatch):
    more = ["--steps", "6", "--beta", "1.5", "--flow-weight", "0"]
    assert cli.main(command(root, tmp_path / "straight", *more)) == 0
    seen = []

    def interrupted(*arguments):
        seen.append(0)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return distill_loss(*arguments)

    monkeypatch.setattr(distill, "distill_loss", interrupted)
    assert cli.main(command(root, tmp_path / "broken", *more)) == 130
    assert not (tmp_path / "broken").exists()
    seen.clear()
    seen.extend(range(10))
    assert cli.main(command(root, tmp_path / "broken", *more)) == 0
    assert len(seen) == 13, "three steps were left"
    assert (tmp_path / "broken/model.safetensors").read_bytes() == (
        tmp_path / "straight/model.safetensors"
    ).read_bytes()
    assert not list((tmp_path / "broken.work").rglob("state.safetensors"))


def test_one_episode_is_trained_on_and_measured_on(root, tmp_path, capsys):
    make_frames(tmp_path, episodes=1)
    assert cli.main(command(tmp_path, tmp_path / "out", "--steps", "1", teacher=root / "teacher")) == 0
    assert "on the training frames" in capsys.readouterr().out
    assert read_manifest(tmp_path / "out").metrics["held_out_frames"] == 0


def test_wrong_teachers_and_data_are_refused(root, tmp_path, capsys):
    said = failing(capsys, *command(root, tmp_path / "x", teacher=save_critic(tmp_path / "critic")))
    assert "kind: expected 'policy', got 'critic'" in said
    said = failing(capsys, *command(root, tmp_path / "x", teacher=root / "student"))
    assert "expected a teacher of several denoising steps, got 1" in said and "distilled from" in said
    said = failing(capsys, *command(root, root / "teacher"))
    assert "--out: expected another folder than the teacher's" in said
    make_frames(tmp_path, spec=replace(SPEC, tasks=TASKS))
    said = failing(capsys, *command(tmp_path, tmp_path / "x", teacher=root / "teacher"))
    assert "dataset against" in said and "differs" in said
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.work").exists()


def test_guidance_needs_a_teacher_that_knows_the_bare_prompt(root, tmp_path, capsys):
    teacher = save_policy(tmp_path / "teacher")
    manifest = json.loads((teacher / "manifest.json").read_text())
    (teacher / "manifest.json").write_text(json.dumps({**manifest, "parameters": {"dropout": 0.0}}))
    said = failing(capsys, *command(root, tmp_path / "x", "--beta", "2", teacher=teacher))
    assert "was trained with --dropout 0" in said and "got 2.0" in said
    assert cli.main(command(root, tmp_path / "x", "--steps", "1", teacher=teacher)) == 0
    assert content_hash(teacher) == manifest["hash"]


@pytest.mark.parametrize("setting, message", [
    ({"beta": 0.5}, r"beta: expected at least 1 \(1 = no guidance\), got 0.5"),
    ({"beta": float("nan")}, "beta: expected at least 1.*got nan"),
    ({"teacher_steps": 1}, "teacher_steps: expected 2 or more Euler steps, got 1"),
    ({"teacher_steps": 0}, "teacher_steps: expected 2 or more Euler steps, got 0"),
    ({"jump_weight": 0.0}, "jump_weight: expected a positive weight, got 0.0"),
    ({"flow_weight": -1.0}, "flow_weight: expected a weight of 0 or more, got -1.0"),
    ({"draws": 0}, "draws: expected 1 or more, got 0"),
    ({"held_out": 1.0}, "held_out: expected a share between 0 and 1, got 1.0"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(setting, message):
    with pytest.raises(DistillError, match=message):
        DistillSettings(FIT, **setting)


def test_the_command_and_the_library_have_the_same_defaults():
    shown = {field.name: field.default for field in fields(Distill)}
    ours = {field.name: field.default for field in fields(DistillSettings) if field.name != "fit"}
    assert ours == {name: shown[name] for name in ours}


def evaluation(path: Path, successes: list[bool | None], digest: str = "a", **changes) -> str:
    """A file as `recap evaluate` writes it: one task, seeds from 100000."""
    rows = [{"task": "open it", "seed": 100_000 + i, "success": ok, "steps": 9} for i, ok in enumerate(successes)]
    data = {"schema": 1, "robot": "toy", "policy": {"name": "policy", "version": "1", "hash": digest * 64},
            "realtime": False, "execute": 4, "control_hz": 20.0, "episodes": rows}  # fmt: skip
    path.write_text(json.dumps({**data, **changes}))
    return str(path)


def gated(capsys, *argv):
    code = cli.main(["distill", "gate", *argv])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


@given(lost=st.integers(0, 40), won=st.integers(0, 40), both=st.integers(0, 40), margin=st.integers(0, 20))
def test_the_verdict_counts_whole_episodes(lost, won, both, margin):
    from training.cli_distill import Evaluation, judge

    total = lost + won + both + 1
    ours = [False] * lost + [True] * (won + both) + [False]
    theirs = [True] * lost + [False] * won + [True] * both + [False]
    work = {"robot": "toy"}
    sides = [Evaluation(Path(name), work, {"hash": name}, {("t", i): ok for i, ok in enumerate(side)})
             for name, side in (("teacher", theirs), ("student", ours))]  # fmt: skip
    verdict = judge(*sides, margin)
    assert verdict["verdict"] == ("FAILED" if 100 * (lost - won) > margin * total else "PASSED")
    low, high = verdict["difference_points_95"]
    assert -100 <= low <= high <= 100 and verdict["difference_points"] == pytest.approx(100 * (won - lost) / total)
    assert (verdict["only_teacher"], verdict["only_student"], verdict["episodes"]) == (lost, won, total)
    swapped = judge(*sides[::-1], margin)
    assert swapped["difference_points"] == pytest.approx(-verdict["difference_points"])


def test_the_gate_passes_at_the_margin_and_fails_beyond(tmp_path, capsys):
    teacher = evaluation(tmp_path / "teacher.json", [True] * 90 + [False] * 10)
    at = evaluation(tmp_path / "at.json", [True] * 87 + [False] * 13, "b")
    beyond = evaluation(tmp_path / "beyond.json", [True] * 86 + [False] * 14, "c")
    code, verdict = gated(capsys, teacher, at)
    assert code == 0 and verdict["verdict"] == "PASSED" and not verdict["conclusive"]
    code, verdict = gated(capsys, teacher, beyond)
    assert code == 1 and verdict["verdict"] == "FAILED" and verdict["difference_points"] == pytest.approx(-4)
    assert gated(capsys, teacher, beyond, "--margin", "5")[0] == 0
    code, verdict = gated(capsys, at, teacher)
    assert code == 0 and verdict["difference_points"] == pytest.approx(3) and verdict["conclusive"]


def test_the_gate_takes_folders_and_pairs_by_task_and_seed(tmp_path, capsys):
    for name, digest, flip in (("teacher", "a", 1), ("student", "b", -1)):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "evaluation.json"
        evaluation(path, [True, False, True], digest)
        data = json.loads(path.read_text())
        path.write_text(json.dumps({**data, "episodes": data["episodes"][::flip]}))
    code, verdict = gated(capsys, str(tmp_path / "teacher"), str(tmp_path / "student"))
    assert code == 0 and verdict["only_teacher"] == verdict["only_student"] == 0


def test_the_gate_refuses_other_work(tmp_path, capsys):
    teacher = evaluation(tmp_path / "teacher.json", [True, False, True])

    def refused(successes, digest="b", **changes):
        return failing(
            capsys, "distill", "gate", teacher, evaluation(tmp_path / "s.json", successes, digest, **changes)
        )

    said = refused([True, False])
    assert "1 that only the teacher ran ('open it' seed 100002) and 0 that only the student ran (none)" in said
    assert "execute: expected 4, got 8; evaluate both alike" in refused([True] * 3, execute=8)
    assert "robot: expected 'toy', got 'other'" in refused([True] * 3, robot="other")
    assert "schema: expected 1, got 2" in refused([True] * 3, schema=2)
    assert "got the same one twice" in refused([True] * 3, "a")
    assert "success true or false for every episode, got none for 'open it' seed 100001" in refused([True, None, True])
    assert "every task and seed once, got 0 episodes" in refused([])
    assert "every task and seed once, got 2 episodes, 1 of them" in refused(
        [], episodes=[{"task": "t", "seed": 1, "success": True}] * 2
    )
    assert "--margin: expected points from 0 to 100, got -1.0" in failing(
        capsys, "distill", "gate", teacher, evaluation(tmp_path / "s.json", [True] * 3, "b"), "--margin", "-1"
    )


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"schema": 1, "episodes": [3]}', "\x00", '{"schema": 1}'])
def test_files_that_are_no_evaluation_are_refused(tmp_path, capsys, text):
    teacher = evaluation(tmp_path / "teacher.json", [True])
    (tmp_path / "other.json").write_text(text)
    said = failing(capsys, "distill", "gate", teacher, str(tmp_path / "other.json"))
    assert "other.json: expected an evaluation.json of `recap evaluate`" in said
    assert "No such file" in failing(capsys, "distill", "gate", teacher, str(tmp_path / "none.json"))
