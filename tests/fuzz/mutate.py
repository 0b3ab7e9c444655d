"""Changed bytes: the usual mutations, from an explicit generator, so that a seed gives the same inputs again."""

import random
from collections.abc import Sequence

from fuzz.trees import changed

LONGEST = 1 << 16
_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)


def mutated(form: str, pool: Sequence[bytes], chance: random.Random, valid: int | None = None) -> bytes:
    """An input made of one or two of `pool`: half the time by its tree, else by its bytes.

    valid: so many at the start of the pool are good messages; half of the inputs are made of those, None = all are.
    """
    data = pool[chance.randrange(len(pool) if valid is None or chance.random() < 0.5 else valid)]
    if chance.random() < 0.5:
        tree = changed(form, data, chance)
        if tree is not None and len(tree) <= LONGEST:
            data = tree
            if chance.random() < 0.7:
                return data
    for _ in range(1 << chance.randint(0, 4)):
        data = _step(data, pool, chance)
    return data[:LONGEST]


def _step(data: bytes, pool: Sequence[bytes], chance: random.Random) -> bytes:
    at = chance.randint(0, len(data))
    end = min(len(data), at + chance.randint(0, 16))
    action = chance.randrange(8)
    if action == 0 and data:
        at = min(at, len(data) - 1)
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    if action == 1:
        return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
    if action == 2:
        return data[:at] + data[end:]
    if action == 3:
        return data[:at] + chance.randbytes(chance.randint(1, 8)) + data[at:]
    if action == 4:
        return data[:end] + data[at:end] * chance.choice((1, 2, 8, 64)) + data[end:]
    if action == 5:
        size = chance.choice((1, 2, 4, 8))
        number = chance.choice(_NUMBERS) % (1 << 8 * size)
        return data[:at] + number.to_bytes(size, chance.choice(("little", "big"))) + data[at + size :]
    if action == 6:
        other = pool[chance.randrange(len(pool))]
        return data[:at] + other[chance.randint(0, len(other)) :]
    return data[:at]
