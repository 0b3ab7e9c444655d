"""The bytes that every policy is trained on and served with: a change here breaks every checkpoint."""

import pytest

from recap_model import conditioning

GOLDEN = {
    conditioning.POSITIVE: b"open the drawer\nAdvantage: positive\n",
    conditioning.NEGATIVE: b"open the drawer\nAdvantage: negative\n",
    conditioning.NONE: b"open the drawer\n",
}


@pytest.mark.parametrize("indicator", sorted(GOLDEN))
def test_golden_bytes(indicator: int) -> None:
    assert conditioning.prompt("open the drawer", indicator).encode() == GOLDEN[indicator]
    assert conditioning.prompt("  open the drawer \n", indicator).encode() == GOLDEN[indicator]


def test_served_and_unconditional_prompts() -> None:
    assert conditioning.positive_prompt("open the drawer").encode() == GOLDEN[conditioning.POSITIVE]
    assert conditioning.unconditional_prompt("open the drawer").encode() == GOLDEN[conditioning.NONE]


def test_unknown_indicator_is_refused() -> None:
    with pytest.raises(ValueError, match="indicator: expected 1"):
        conditioning.prompt("open the drawer", 2)


def test_only_one_place_spells_the_clause() -> None:
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    sources = [
        p for d in ("recap_model", "training", "exporters", "services", "clients") for p in (root / d).rglob("*.py")
    ]
    spelled = {p.name for p in sources if "Advantage: " in p.read_text()}
    assert spelled == {"conditioning.py"}
