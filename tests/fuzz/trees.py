"""Valid messages as trees of maps and lists, to be changed in one place and encoded again: past the first check of a
decoder, where changed bytes rarely come."""

import copy
import io
import json
import pickle
import random
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
from mcap.reader import make_reader
from mcap.writer import CompressionType, Writer

import lerobot_pickles

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 255, 2**31, 2**63 - 1, -(2**63), 2**64 - 1, 0.5, float("nan"), float("inf"), 1e308,
    "", "a", "\x00", "Advantage: negative", "<f4", "|O", "V8", ">M8[s]", "f4,f4", "a" * 3000, b"", b"\xff\xd8\xff",
    [], [[]], [0], [2**40, 2**40], [-1], [1.5], [[1], [1, 2]], {}, {"": {}}, {"a": 1}, {b"__ndarray__": True},
    {b"__jpeg__": True, b"data": b"\xff\xd8"}, {"__numpy__": "AAAA", "dtype": "|u1", "shape": [3]},
    {b"__ndarray__": True, b"data": b"", b"dtype": "<f4", b"shape": [0, 2**40]},
    {b"__ndarray__": True, b"data": b"ab", b"dtype": "<U0", b"shape": [1]},
    {b"__npgeneric__": True, b"data": 1e400, b"dtype": "|u1"},
    {b"nd": True, b"type": "<f4", b"kind": b"", b"shape": [1], b"data": b"abcd"},
)  # fmt: skip
"""Values that have broken a decoder somewhere."""

Codec = tuple[Callable[[bytes], Any], Callable[[Any], bytes]]


class _Classes(pickle.Unpickler):
    """Reads our own corpus only."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class("lerobot_pickles" if module.startswith("lerobot.") else module, name)


def _load_pickle(data: bytes) -> Any:
    value = _Classes(io.BytesIO(data)).load()
    return {"class": type(value).__name__, "fields": dict(vars(value))}


def _dump_pickle(tree: Any) -> bytes:
    kind = getattr(lerobot_pickles, tree["class"])
    value = object.__new__(kind)
    value.__dict__.update({str(key): item for key, item in tree["fields"].items()})
    return lerobot_pickles.lerobot_pickle(value)


def _load_mcap(data: bytes) -> Any:
    reader = make_reader(io.BytesIO(data))
    return [[channel.topic, message.sequence, json.loads(message.data)]
            for _, channel, message in reader.iter_messages(log_time_order=False)]  # fmt: skip


def _dump_mcap(tree: Any) -> bytes:
    stream = io.BytesIO()
    writer = Writer(stream, compression=CompressionType.NONE)
    writer.start(library="fuzz")
    schema = writer.register_schema("any", "jsonschema", b"{}")
    channels: dict[str, int] = {}
    for topic, sequence, message in tree:
        if topic not in channels:
            channels[topic] = writer.register_channel(topic, "json", schema)
        writer.add_message(channels[topic], 0, json.dumps(message).encode(), 0, sequence)
    writer.finish()
    return stream.getvalue()


CODECS: dict[str, Codec] = {
    "msgpack": (lambda data: msgpack.unpackb(data, strict_map_key=False), msgpack.packb),
    "json": (json.loads, lambda tree: json.dumps(tree).encode()),
    "pickle": (_load_pickle, _dump_pickle),
    "mcap": (_load_mcap, _dump_mcap),
}


def changed(form: str, data: bytes, chance: random.Random) -> bytes | None:
    """`data` with one to three parts of its tree replaced, removed, doubled or moved; None where that cannot be."""
    if form not in CODECS:
        return None
    load, dump = CODECS[form]
    try:
        tree = load(data)
        for _ in range(chance.randint(1, 3)):
            _change(tree, chance)
        return dump(tree)
    except Exception:  # a tree that its own format has no bytes for
        return None


def _change(tree: Any, chance: random.Random) -> None:
    holder, key = _place(tree, chance)
    action = chance.randrange(4)
    if action == 0:
        del holder[key]
    elif action == 1:
        other, there = _place(tree, chance)
        holder[key] = copy.deepcopy(other[there])
    elif action == 2 and isinstance(holder[key], bytes):
        holder[key] = holder[key][: chance.randint(0, len(holder[key]))] * chance.randint(0, 2)
    elif action == 2 and isinstance(holder[key], np.ndarray):
        holder[key] = holder[key].astype(chance.choice(["u1", "<f4", ">i8", "?"]))[: chance.randint(0, 2)]
    else:
        holder[key] = copy.deepcopy(chance.choice(HOSTILE))


def _place(tree: Any, chance: random.Random) -> tuple[Any, Any]:
    """A holder and a key in it, by a walk from the root. Raises IndexError for a tree without parts."""
    while True:
        key = chance.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        below = tree[key]
        if not isinstance(below, dict | list) or not below or chance.random() < 0.2:
            return tree, key
        tree = below
