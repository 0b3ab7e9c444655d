"""The page that keeps the results of the benchmarks."""

from pathlib import Path


def append(path: Path, text: str) -> None:
    """Put a section (`## ...`) before the others, below the page's introduction: newest first."""
    old = path.read_text() if path.is_file() else "# Benchmarks\n"
    head, _, rest = old.partition("\n## ")
    path.write_text(f"{head.rstrip()}\n\n{text.rstrip()}\n" + (f"\n## {rest}" if rest else ""))
