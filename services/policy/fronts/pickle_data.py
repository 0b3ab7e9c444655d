"""Reads the pickles of LeRobot's robot clients as data. Nothing is imported, called or executed: the handful of opcodes
that numbers, text, maps, numpy arrays and named dataclasses need are interpreted here, every other one is refused.

Python's own `pickle.Unpickler` is not used even with an allow list: it sizes its memo by a number in the message, and
lets a pickle set attributes of whatever the list allows.
"""

import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from services.common.errors import ServiceError, bad_field
from services.policy.fronts.pickle_arrays import CALLS, Array, Dtype, Global, call, refuse

MAX_OPERATIONS = 20_000  # a robot of 100 joints and 8 cameras needs 4,000; each costs a microsecond and 100 bytes
_MARK = object()


@dataclass
class Record:
    """An instance of a dataclass of the sender. name: its class; module: where the sender has it; fields: by name."""

    module: str
    name: str
    fields: dict[str, Any] = field(default_factory=dict)


def read(data: bytes, what: str, classes: Collection[tuple[str, str]]) -> Any:
    """The object in a pickle of protocol 3 to 5: None, bool, int, float, str, list, tuple, dict with text keys, bytes
    (as a memoryview), numpy arrays (read-only views into `data`) and scalars, and a `Record` for an instance of one of
    `classes` (module, name).

    Raises ServiceError `bad_message` that names `what` and the offset for everything else.
    """
    machine = _Machine(data, classes)
    try:
        return _finished(machine.run())
    except ServiceError as error:
        raise bad_field(
            "bad_message",
            what,
            f"a pickle of numbers, text, arrays and {', '.join(sorted({name for _, name in classes}))}",
            f"{error.fault.message} at byte {machine.at} of {len(data)}; nothing of it was executed",
        ) from error


class _Machine:
    def __init__(self, data: bytes, classes: Collection[tuple[str, str]]) -> None:
        self._data, self._view, self._classes = data, memoryview(data), classes
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self.at = 0

    def run(self) -> Any:
        for _ in range(MAX_OPERATIONS):
            code = self._number(1)
            if code == _STOP:
                return self._pop()
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise refuse(f"opcode 0x{code:02x}, which no robot client sends")
            operation(self)
        raise refuse(f"more than {MAX_OPERATIONS} opcodes")

    # reading: every length is held against what is there before anything is made of it

    def _take(self, size: int) -> memoryview:
        start, self.at = self.at, self.at + size
        if self.at > len(self._data):
            self.at = start
            raise refuse(f"{size} bytes announced and {len(self._data) - start} there")
        return self._view[start : self.at]

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _line(self) -> str:
        end = self._data.find(b"\n", self.at, self.at + 256)
        if end < 0:
            raise refuse("a name without an end")
        line = _text(self._take(end - self.at))
        self.at += 1
        return line

    # the stack

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise refuse("an opcode without its operand")
        return self._stack.pop()

    def _top(self) -> Any:
        value = self._pop()
        self._stack.append(value)
        return value

    def _marked(self) -> list[Any]:
        for index in range(len(self._stack) - 1, -1, -1):
            if self._stack[index] is _MARK:
                items = self._stack[index + 1 :]
                del self._stack[index:]
                return items
        raise refuse("an opcode without its mark")

    # opcodes

    def skip(self, size: int) -> None:
        self._take(size)

    def mark(self) -> None:
        self._stack.append(_MARK)

    def whole(self, size: int) -> None:
        self.push(self._number(size))

    def signed(self) -> None:
        self.push(int.from_bytes(self._take(4), "little", signed=True))

    def long(self) -> None:
        self.push(int.from_bytes(self._take(self._number(1)), "little", signed=True))

    def real(self) -> None:
        self.push(struct.unpack(">d", self._take(8))[0])

    def text(self, size: int) -> None:
        self.push(_text(self._take(self._number(size))))

    def octets(self, size: int) -> None:
        self.push(self._take(self._number(size)))

    def tuple_of(self, count: int) -> None:
        self.push(tuple(reversed([self._pop() for _ in range(count)])))

    def tuple_to_mark(self) -> None:
        self.push(tuple(self._marked()))

    def append(self) -> None:
        item = self._pop()
        self._expect(list).append(item)

    def append_to_mark(self) -> None:
        items = self._marked()
        self._expect(list).extend(items)

    def set_item(self) -> None:
        value, key = self._pop(), self._pop()
        _fill(self._expect(dict), [key, value])

    def set_to_mark(self) -> None:
        items = self._marked()
        _fill(self._expect(dict), items)

    def _expect(self, kind: type) -> Any:
        top = self._top()
        if type(top) is not kind:
            raise refuse(f"a {kind.__name__} opcode on a {type(top).__name__}")
        return top

    def put(self, size: int) -> None:
        self._memo[self._number(size)] = self._top()  # a map: the index sizes nothing

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._top()

    def get(self, size: int) -> None:
        index = self._number(size)
        if index not in self._memo:
            raise refuse(f"memo {index}, which was never filled")
        self.push(self._memo[index])

    def global_line(self) -> None:
        self._global(self._line(), self._line())

    def global_stack(self) -> None:
        name, module = self._pop(), self._pop()
        self._global(module, name)

    def _global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise refuse("a global whose name is not text")
        known = (module, name) in self._classes or (module, name) in CALLS or (module, name) == ("numpy", "ndarray")
        if not known:
            raise refuse(f"the global {module[:80]}.{name[:80]}")
        self.push(Global(module, name))

    def reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        self.push(call(function, arguments))

    def new(self) -> None:
        arguments, kind = self._pop(), self._pop()
        if not isinstance(kind, Global) or (kind.module, kind.name) not in self._classes or arguments != ():
            raise refuse("an instance of something else than a dataclass")
        self.push(Record(kind.module, kind.name))

    def build(self) -> None:
        state = self._pop()
        target = self._top()
        if isinstance(target, Array | Dtype):
            target.build(state)
        elif isinstance(target, Record) and type(state) is dict:
            target.fields.update(state)
        else:
            raise refuse(f"a state for a {type(target).__name__}")


def _text(data: memoryview) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError:
        raise refuse("text that is not UTF-8") from None


def _fill(target: dict[str, Any], items: list[Any]) -> None:
    keys = items[::2]
    if len(items) % 2 or not all(type(key) is str for key in keys):  # text hashes without running anything
        raise refuse("a map with keys that are not text")
    target.update({key: _finished(value) for key, value in zip(keys, items[1::2], strict=True)})


def _finished(value: Any) -> Any:
    """A value as callers see it. Not deep: arrays are only looked for where robots have them, in maps."""
    if isinstance(value, Array):
        return value.value
    if isinstance(value, Global | Dtype):
        raise refuse("a global as a value")
    return value


_STOP = 0x2E
_OPERATIONS: dict[int, Callable[[_Machine], None]] = {
    0x80: lambda m: m.skip(1),  # PROTO
    0x95: lambda m: m.skip(8),  # FRAME
    ord("("): _Machine.mark,
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("K"): lambda m: m.whole(1),
    ord("M"): lambda m: m.whole(2),
    ord("J"): _Machine.signed,
    0x8A: _Machine.long,
    ord("G"): _Machine.real,
    0x8C: lambda m: m.text(1),
    ord("X"): lambda m: m.text(4),
    0x8D: lambda m: m.text(8),
    ord("C"): lambda m: m.octets(1),
    ord("B"): lambda m: m.octets(4),
    0x8E: lambda m: m.octets(8),
    0x96: lambda m: m.octets(8),  # BYTEARRAY8
    ord("]"): lambda m: m.push([]),
    ord("}"): lambda m: m.push({}),
    ord(")"): lambda m: m.push(()),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("t"): _Machine.tuple_to_mark,
    ord("a"): _Machine.append,
    ord("e"): _Machine.append_to_mark,
    ord("s"): _Machine.set_item,
    ord("u"): _Machine.set_to_mark,
    ord("q"): lambda m: m.put(1),
    ord("r"): lambda m: m.put(4),
    0x94: _Machine.memoize,
    ord("h"): lambda m: m.get(1),
    ord("j"): lambda m: m.get(4),
    ord("c"): _Machine.global_line,
    0x93: _Machine.global_stack,
    ord("R"): _Machine.reduce,
    0x81: _Machine.new,
    ord("b"): _Machine.build,
}
