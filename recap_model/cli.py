"""The `recap` command: a table of lazily imported sub-commands, and one place where errors become words.

Nothing heavy is imported before a command is chosen, so `recap --help` answers at once in every environment.
Exit codes: 0 done; 1 the command ran and says no; 2 wrong input, usage or missing package; 130 interrupted.
"""

import os
import sys
from collections.abc import Callable
from importlib import import_module

# name -> (module:function, help). The function takes argv after the name and returns the exit code.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("services.demo.cli:main", "serve the shipped models and drive a simulated arm with them, live"),
    "doctor": ("recap_model.doctor:main", "what works on this machine, and what to install for the rest"),
    "loop": ("training.cli_loop:loop", "the whole circle in simulation: collect ... evaluate, resumable"),
    "collect": ("training.evaluate:collect", "record episodes of the simulated robot (script or served policy)"),
    "ingest": ("training.cli_data:ingest", "rollouts (MCAP) -> LeRobot dataset with the RECAP columns"),
    "data merge": ("training.cli_data_tools:merge", "datasets of one robot -> one dataset, with provenance"),
    "data convert": ("training.cli_data_tools:convert", "LeRobot v2.1 dataset -> v3.0 copy"),
    "data stats": ("training.cli_data_tools:stats", "mean, std, min, max, quantiles of every dimension"),
    "data check": ("training.cli_data_tools:check", "everything that is wrong with a dataset, in one list"),
    "data view": ("training.cli_view:view", "dataset, with labels or without -> one page to look at its episodes"),
    "returns": ("training.cli_data:returns", "dataset -> normalised return of every frame"),
    "train critic": ("training.cli:critic", "dataset + returns -> distributional value model"),
    "values": ("training.cli_values:values", "critic -> value of every frame, in parts that processes share"),
    "label": ("training.cli_data:label", "critic -> values, advantages, indicators, and their audit"),
    "label preview": ("training.cli_view:label_preview", "labels -> film and contact sheet of what is positive"),
    "fit-fast": ("training.cli_fast:main", "dataset -> FAST action tokenizer, for `recap train policy --fast`"),
    "train policy": ("training.cli:policy", "dataset + labels -> advantage-conditioned policy"),
    "distill": ("training.cli_distill:distill", "policy -> one-step policy with guidance baked in"),
    "distill gate": ("training.cli_distill:gate", "student against teacher in closed loop: PASSED or FAILED"),
    "import-lerobot": ("training.cli_lerobot:import_lerobot", "LeRobot SmolVLA folder or hub name -> checkpoint"),
    "export-lerobot": (
        "training.cli_lerobot:export_lerobot",
        "checkpoint -> folder that LeRobot's SmolVLA class opens",
    ),
    "export": ("exporters.cli:export", "checkpoint -> model repository with a parity receipt"),
    "serve": ("services.cli:serve", "policy and critic services on a model repository"),
    "keys add": ("services.keys_cli:add", "a key for a robot or an operator, printed once; limits, scopes, expiry"),
    "keys list": ("services.keys_cli:show", "the keys of a file, without the keys"),
    "keys revoke": ("services.keys_cli:revoke", "end a key; its sessions end within a second"),
    "models list": ("services.models_cli:list_", "models of a running policy service"),
    "models load": ("services.models_cli:load", "load a model beside the live one: shadow, canary or live"),
    "models promote": ("services.models_cli:promote", "make the canary or the shadow the live model"),
    "models rollback": ("services.models_cli:rollback", "end the canary, or back to the previous live model"),
    "models unload": ("services.models_cli:unload", "end the shadow"),
    "evaluate": ("training.evaluate:evaluate", "success rate and throughput of a policy in simulation"),
    "offline": ("training.cli_view:offline", "policy against recorded actions, by label and by prompt"),
    "probe": ("training.cli_probe:main", "one checkpoint in simulation under every prompt: positive, negative, none"),
    "pool": ("training.cli_pool:main", "several runs of a loop as one body of evidence, with intervals"),
    "report": ("training.report:main", "report.html of a finished or running loop"),
    "bench": ("services.cli:bench", "latency of the services on this machine"),
    "bench engine": ("benchmarks.engine:main", "every engine on the same model, beside LeRobot and the roofline"),
    "bench serve": ("benchmarks.serve.command:main", "the policy service beside other servers: latency, CPU, robots"),
}

# imported package -> extra of recap-stack that brings it
EXTRAS: dict[str, str] = {
    **dict.fromkeys(("fastapi", "uvicorn", "starlette", "onnxruntime", "prometheus_client", "structlog"), "serve"),
    **dict.fromkeys(("grpc", "zmq"), "fronts"),
    **dict.fromkeys(("metaworld", "mujoco", "gymnasium"), "sim"),
    **dict.fromkeys(("matplotlib", "av"), "report"),
    **dict.fromkeys(
        ("torch", "lerobot", "transformers", "huggingface_hub", "safetensors", "pyarrow", "onnx", "onnxscript"), "train"
    ),
    **dict.fromkeys(("tensorboard", "scipy", "datasets", "wandb", "peft", "accelerate"), "train"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code. argv defaults to the process's own arguments."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = bool(os.environ.get("RECAP_DEBUG"))
    if "--debug" in args:
        args.remove("--debug")
        debug = True
    if args[:1] == ["--version"]:
        from importlib.metadata import version

        print(f"recap {version('recap-stack')}")
        return 0
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, rest = _split(args)
    if name not in COMMANDS:
        return _unknown(name, rest)
    return _guarded(name, lambda: _load(COMMANDS[name][0])(rest), debug)


def usage(prefix: str = "") -> str:
    """The table of commands (those that start with `prefix`) as text."""
    lines = [f"  {name:<16}{text}" for name, (_, text) in COMMANDS.items() if name.startswith(prefix)]
    head = ["usage: recap COMMAND [options]     `recap COMMAND --help` tells its options", ""]
    tail = ["", "--debug (or RECAP_DEBUG=1) shows the traceback behind an error; --version prints the version"]
    return "\n".join(head + lines + tail)


def _split(args: list[str]) -> tuple[str, list[str]]:
    """A command's name is one word or two (`train critic`)."""
    two = " ".join(args[:2])
    return (two, args[2:]) if two in COMMANDS else (args[0], args[1:])


def _unknown(name: str, rest: list[str]) -> int:
    group = [full for full in COMMANDS if full.startswith(name + " ")]
    if group and (not rest or rest[0] in ("-h", "--help")):
        print(usage(name + " "))
        return 0 if rest else 2
    known = ", ".join(group or COMMANDS)
    got = " ".join([name, *rest[:1]]) if group else name
    print(f"recap: expected one of: {known}; got {got!r}. `recap --help` says what each does.", file=sys.stderr)
    return 2


def _load(target: str) -> Callable[[list[str]], int]:
    module, _, function = target.partition(":")
    loaded: Callable[[list[str]], int] = getattr(import_module(module), function)
    return loaded


def _guarded(name: str, run: Callable[[], int | None], debug: bool) -> int:
    """Run a command; known errors become one line on stderr and an exit code."""
    try:
        return run() or 0
    except KeyboardInterrupt:
        print(f"recap {name}: interrupted; what was finished is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `recap ... | head`: the reader left, which is not an error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        if debug or missing_package(error) is None:
            raise
        print(f"recap {name}: {missing_package(error)}", file=sys.stderr)
    except (ValueError, OSError, RuntimeError) as error:
        # the robot side's errors (service away, no such robot) are RuntimeErrors; any other is a defect and is shown
        ours = not isinstance(error, RuntimeError) or type(error).__module__.startswith("recap_client.")
        if debug or not ours:
            raise
        text = str(error) or type(error).__name__
        print(f"recap {name}: {text}\n  (add --debug to see where it came from)", file=sys.stderr)
    return 2


def missing_package(error: ModuleNotFoundError) -> str | None:
    """What to install for a missing optional package; None when it is not one of ours to explain."""
    package = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(package)
    if extra is None:
        return None
    verb = "make install" if extra in ("train", "fronts") else "make install-demo"
    return (
        f"needs the Python package {package!r}, which this environment ({sys.prefix}) does not have; "
        f"install it with `{verb}` or `pip install 'recap-stack[{extra}]'`"
    )


def run() -> None:
    """Console-script entry point."""
    sys.exit(main())


if __name__ == "__main__":
    run()
