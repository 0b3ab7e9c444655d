"""The dispatcher: errors in words, exit codes, and a traceback only when asked."""

import pytest

from recap_model import cli


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("RECAP_DEBUG", raising=False)
    monkeypatch.setitem(cli.COMMANDS, "probe", ("probe:main", "a probe"))
    return monkeypatch


def raising(error: BaseException):  # type: ignore[no-untyped-def]
    def run(_: list[str]) -> int:
        raise error

    return lambda _: run


@pytest.mark.parametrize("error", [ValueError("state: expected 4, got 5"), FileNotFoundError("no such folder: x")])
def test_known_errors_are_one_line_and_exit_2(
    command: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    command.setattr(cli, "_load", raising(error))
    assert cli.main(["probe"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"recap probe: {error}")
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("argv", [["probe", "--debug"], ["--debug", "probe"]])
def test_debug_shows_the_traceback(command: pytest.MonkeyPatch, argv: list[str]) -> None:
    command.setattr(cli, "_load", raising(ValueError("inside")))
    with pytest.raises(ValueError, match="inside"):
        cli.main(argv)


def test_a_bug_is_not_dressed_up(command: pytest.MonkeyPatch) -> None:
    command.setattr(cli, "_load", raising(TypeError("a bug")))
    with pytest.raises(TypeError):
        cli.main(["probe"])


def test_interrupt_is_130(command: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command.setattr(cli, "_load", raising(KeyboardInterrupt()))
    assert cli.main(["probe"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "verb", "extra"),
    [
        ("torch.nn", "make install", "train"),
        ("fastapi", "make install-demo", "serve"),
        ("av", "make install-demo", "report"),
    ],
)
def test_a_missing_package_names_what_installs_it(
    command: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str, verb: str, extra: str
) -> None:
    command.setattr(cli, "_load", raising(ModuleNotFoundError("gone", name=package)))
    assert cli.main(["probe"]) == 2
    message = capsys.readouterr().err
    assert f"`{verb}`" in message
    assert f"recap-stack[{extra}]" in message


def test_arguments_reach_the_command(command: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    command.setitem(cli.COMMANDS, "train probe", ("probe:main", "two words"))
    command.setattr(cli, "_load", lambda _: lambda argv: seen.append(argv) or 7)
    assert cli.main(["train", "probe", "--steps", "3"]) == 7
    assert seen == [["--steps", "3"]]


@pytest.mark.parametrize("argv", [["tarin"], ["train", "robot"], ["train"]])
def test_unknown_commands_exit_2(argv: list[str]) -> None:
    assert cli.main(argv) == 2
