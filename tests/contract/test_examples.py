"""The job files in examples/: they parse, and so do the commands in them, with the parser that will read them."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml
from torch.distributed.run import get_args_parser

from training.cli import TrainPolicy
from training.cli_data import Label
from training.cli_values import Values
from training.values import parse_shard

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ARGUMENTS: dict[str, Any] = {"train policy": TrainPolicy, "values": Values, "label": Label}


def documents() -> list[tuple[str, dict[str, Any]]]:
    files = sorted((EXAMPLES / "kubernetes").glob("*.yaml"))
    return [(job["metadata"]["name"], job) for path in files for job in yaml.safe_load_all(path.read_text())]


JOBS = documents()


def recap_arguments(words: list[str]) -> list[str]:
    """What `recap` is given, from a command that may start it through torchrun, which must take the rest."""
    if words[0] == "recap":
        return words[1:]
    assert words[0] == "torchrun"
    launcher = get_args_parser().parse_args(words[1:])
    assert launcher.module and launcher.training_script == "recap_model.cli"
    return list(launcher.training_script_args)


def parse(arguments: list[str]) -> Any:
    name = next(name for name in (" ".join(arguments[:2]), arguments[0]) if name in ARGUMENTS)
    return tyro.cli(ARGUMENTS[name], args=arguments[len(name.split()) :])


def container(job: dict[str, Any]) -> dict[str, Any]:
    (only,) = job["spec"]["template"]["spec"]["containers"]
    return dict(only)


def command(job: dict[str, Any], index: int = 0) -> list[str]:
    found = container(job)
    words = [*found["command"], *found["args"]]
    if words[:2] != ["sh", "-c"]:
        return words
    run = subprocess.run(  # the shell's own splitting, with the variable that Kubernetes sets
        ["sh", "-c", re.sub(r"^exec recap ", "printf '%s\\\\n' recap ", words[2])],
        env={"JOB_COMPLETION_INDEX": str(index), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return run.stdout.splitlines()


def test_all_files_are_looked_at() -> None:
    assert [name for name, _ in JOBS] == ["recap-values", "recap-label", "recap-train"]
    assert sorted(p.name for p in EXAMPLES.rglob("*") if p.is_file() and p.parent.name in ("slurm", "kubernetes")) == [
        "label-job.yaml", "train-job.yaml", "train.sbatch",
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "job"), JOBS, ids=[name for name, _ in JOBS])
def test_a_job_is_whole_and_its_command_parses(name: str, job: dict[str, Any]) -> None:
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    pod = job["spec"]["template"]["spec"]
    mounts = {mount["name"] for mount in container(job)["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}, name
    assert pod["restartPolicy"] == "OnFailure", "a run that was stopped exits with an error, and must start again"
    args = parse(recap_arguments(command(job)))
    folders = [v for v in vars(args).values() if isinstance(v, Path)]
    places = {mount["mountPath"] for mount in container(job)["volumeMounts"]}
    assert folders and all(any(path.is_relative_to(place) for place in places) for path in folders)


def test_the_pods_of_the_values_job_are_all_its_shards() -> None:
    job = dict(JOBS)["recap-values"]
    count = job["spec"]["completions"]
    shards = [parse_shard(parse(recap_arguments(command(job, index))).shard) for index in range(count)]
    assert [(shard.index, shard.count) for shard in shards] == [(index, count) for index in range(count)]
    label = parse(recap_arguments(command(dict(JOBS)["recap-label"])))
    assert label.values == parse(recap_arguments(command(job))).out


def test_the_training_job_gives_every_process_a_gpu_and_settings_that_exist() -> None:
    job = dict(JOBS)["recap-train"]
    launcher = get_args_parser().parse_args(command(job)[1:])
    assert int(launcher.nproc_per_node) == container(job)["resources"]["limits"]["nvidia.com/gpu"]
    check_overrides(parse(recap_arguments(command(job))))


def test_the_slurm_script_parses_with_its_command() -> None:
    path = EXAMPLES / "slurm" / "train.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text().replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if line.startswith("srun ")]
    values = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7", "head": "node1"}
    line = re.sub(r"\$(\w+)", lambda match: values.get(match[1], f"/shared/{match[1]}"), line)
    words = shlex.split(line)
    args = parse(recap_arguments(words[words.index("torchrun") : words.index("&")]))
    assert (args.dataset, args.out) == (Path("/shared/DATASET"), Path("/shared/OUT"))
    check_overrides(args)
    options = re.findall(r"^#SBATCH (--[a-z-]+)", path.read_text(), re.M)
    assert len(options) == len(set(options)) and {"--signal", "--requeue"} <= set(options)


def check_overrides(args: TrainPolicy) -> None:
    from training import presets

    settings = args.overrides.apply(presets.load(args.overrides.preset).policy())
    assert settings.fit.rows_per_step == 256 and settings.fit.precision == "bf16"
