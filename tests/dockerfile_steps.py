"""A Dockerfile as data, and its steps as a shell script for a folder instead of a container.

What the script leaves out, because it needs a container's root: `apt-get` steps. The base image is stood for by a clean
virtual environment (its python and pip), the build context by the repository.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_OURS = re.compile(r"(?<![\w./-])/(opt|src|wheels|models|rollouts)\b")


@dataclass(frozen=True)
class Step:
    """One instruction: its word in capitals, and its text with continued lines joined."""

    word: str
    text: str


@dataclass(frozen=True)
class Copy:
    """sources: of the context, or of the stage `origin`. target: as written."""

    sources: tuple[str, ...]
    target: str
    origin: str | None


@dataclass(frozen=True)
class Stage:
    """One FROM: the image it starts at, its name or None, and the steps that follow."""

    image: str
    name: str | None
    steps: tuple[Step, ...]

    def all(self, word: str) -> list[str]:
        return [step.text for step in self.steps if step.word == word]

    def last(self, word: str) -> str | None:
        found = self.all(word)
        return found[-1] if found else None

    @property
    def copies(self) -> list[Copy]:
        return [_copy(text) for text in self.all("COPY")]

    @property
    def environment(self) -> dict[str, str]:
        """Of all ENV steps, as written."""
        pairs = (item.partition("=") for text in self.all("ENV") for item in shlex.split(text))
        return {name: value for name, _, value in pairs}

    def command(self, *arguments: str) -> list[str]:
        """What a container runs; arguments take the place of CMD, as with `docker run`."""
        tail = list(arguments) or json.loads(self.last("CMD") or "[]")
        return [*json.loads(self.last("ENTRYPOINT") or "[]"), *tail]

    @property
    def health_command(self) -> list[str]:
        found: list[str] = json.loads((self.last("HEALTHCHECK") or "").partition("CMD")[2])
        return found


def read(path: Path) -> list[Stage]:
    """The stages of a Dockerfile. Raises ValueError when a step stands before the first FROM."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    stages: list[Stage] = []
    for line in filter(str.strip, text.splitlines()):
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            image, _, name = rest.partition(" AS ")
            stages.append(Stage(image, name or None, ()))
        elif not stages:
            raise ValueError(f"{path}: expected FROM first, got {line}")
        else:
            last = stages[-1]
            stages[-1] = Stage(last.image, last.name, (*last.steps, Step(word, rest.strip())))
    return stages


def _copy(text: str) -> Copy:
    words = shlex.split(text)
    options = [word for word in words if word.startswith("--")]
    *sources, target = [word for word in words if not word.startswith("--")]
    origin = next((word.removeprefix("--from=") for word in options if word.startswith("--from=")), None)
    return Copy(tuple(sources), target, origin)


def moved(text: str, root: Path) -> str:
    """`text` with the image's own folders below `root`."""
    return _OURS.sub(lambda match: f"{root}/{match[1]}", text)


def script(
    stages: Sequence[Stage],
    context: Path,
    root: Path,
    kept: Path,
    arguments: Mapping[str, str] | None = None,
    instead: Mapping[str, Path] | None = None,
) -> str:
    """Bash that builds the last stage in `root`. kept: where finished earlier stages are moved to. arguments: of the
    build, in place of an ARG's default. instead: what stands for a source of the context.

    Every stage is built at the same place, so that programs of an environment that is copied from one stage to the next
    find their interpreter, and what a stage forgot to copy is not there.
    """
    lines = ["set -eux"]
    for number, stage in enumerate(stages):
        here = str(root)
        lines += [f"rm -rf {root}", f"mkdir -p {root}", f"cd {root}"]
        for step in stage.steps:
            if step.word == "ARG":
                name = step.text.partition("=")[0]
                given = (arguments or {}).get(name)
                lines.append(f"export {step.text}" if given is None else f"export {name}={shlex.quote(given)}")
            elif step.word == "WORKDIR":
                here = moved(step.text, root)
                lines.append(f"mkdir -p {here} && cd {here}")
            elif step.word == "COPY":
                lines += _copied(_copy(step.text), context, root, kept, here, instead or {})
            elif step.word == "RUN" and not step.text.startswith("apt-get"):
                lines.append(f"( {moved(step.text, root)} )")
        if number < len(stages) - 1:
            lines += ["cd /", f"mv {root} {kept}/{stage.name}"]
    return "\n".join(lines) + "\n"


def _copied(copy: Copy, context: Path, root: Path, kept: Path, here: str, instead: Mapping[str, Path]) -> list[str]:
    target = moved(copy.target, root) if copy.target.startswith("/") else f"{here}/{copy.target}"
    into = copy.target.endswith("/")
    lines = [f"mkdir -p {target if into else Path(target).parent}"]
    for source in copy.sources:
        place = kept / copy.origin / source.lstrip("/") if copy.origin else instead.get(source, context / source)
        if place.is_dir() or copy.origin is not None:  # of a folder, its content is copied
            lines.append(f"mkdir -p {target} && cp -a {place}/. {target}/")
        else:
            lines.append(f"cp -a {place} {target}")
    return lines


def environment(stage: Stage, root: Path, base: Path, outside: Mapping[str, str]) -> dict[str, str]:
    """Variables of a container: those of the image, its folders moved and the base's programs in `base`."""
    found = {name: moved(value, root) for name, value in stage.environment.items()}
    if "PATH" in found:
        found["PATH"] = found["PATH"].replace("/usr/local/bin", str(base))
    return {**found, **outside}
