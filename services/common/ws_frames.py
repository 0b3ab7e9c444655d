"""Websocket frames out of a byte stream (RFC 6455, section 5.2), for a server whose messages are large: a whole binary
message is unmasked in one go out of the buffer that the kernel wrote it to; everything else is left to a library."""

from collections.abc import Callable

try:
    from websockets.speedups import apply_mask
except ImportError:  # a build without its C part
    from websockets.utils import apply_mask

_FIRST = 1 << 15  # bytes of a new buffer: state and prompt alone, or the beginning of frames
_KEPT = 1 << 19  # a larger buffer is given back when it is empty: robots are silent most of the time, and many
_SPARE = 1 << 12  # beyond a message: a read that does not fill its buffer need not be tried again
_LONGEST_HEAD = 14
_ALL = 1 << 63
_FIN_BINARY, _MASKED = 0x82, 0x80
_OPCODES = frozenset({0, 1, 2, 8, 9, 10})


class Frames:
    """Cuts a stream at the frames' ends. It starts at the beginning of a frame.

    message: called with the payload of every binary message that came in one masked frame without extension bits while
    `plain(size)` is true. other: called with the bytes of all else as they come, cut at the ends of frames, so that the
    library behind it is always at the beginning of a frame when `message` is called. alive: false when the library has
    seen the end of the conversation; what follows is thrown away.

    Memory: 32 KiB to 512 KiB; while a message comes, twice its bytes that are here, or as much as the largest that has
    come before. What a header claims costs nothing.
    """

    def __init__(
        self,
        message: Callable[[bytes], None],
        other: Callable[[bytes], None],
        plain: Callable[[int], bool],
        alive: Callable[[], bool],
    ) -> None:
        self._message, self._other, self._plain, self._alive = message, other, plain, alive
        self._buffer = bytearray(_FIRST)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0  # of the bytes that wait for more
        self._owed = 0  # bytes of the frame that the library is reading
        self._expected = self._proven = 0  # bytes of the message that comes, by its header; of the largest that came

    @property
    def capacity(self) -> int:
        """Bytes of the buffer."""
        return len(self._buffer)

    def room(self) -> memoryview:
        """Where the next bytes of the stream go; never empty. `take` says how many they were."""
        if self._end == len(self._buffer):
            self._make_room()
        return self._view[self._end :]

    def take(self, count: int) -> None:
        """`count` bytes have been written to `room()`."""
        self._end += count
        while self._next():
            pass
        if self._start == self._end:
            self._start = self._end = 0
            if len(self._buffer) > _KEPT:
                self._replace(_FIRST)

    def feed(self, data: bytes) -> None:
        """The same for bytes that lie elsewhere."""
        left = memoryview(data)
        while left:
            room = self.room()
            count = min(len(room), len(left))
            room[:count] = left[:count]
            self.take(count)
            left = left[count:]

    def _next(self) -> bool:
        """Pass on the next frame, or the part of it that can be; False when more bytes must come first."""
        if not self._alive():
            self._start = self._end
            return False
        start, waiting = self._start, self._end - self._start
        if self._owed:
            return self._pass_on(min(waiting, self._owed))
        if waiting < 2:
            return False
        first, second = self._buffer[start], self._buffer[start + 1]
        if not (second & _MASKED and first & 0x0F in _OPCODES):
            self._owed = _ALL  # the library ends the conversation here
            return True
        length, head = second & 0x7F, 6
        if length >= 126:
            head = 8 if length == 126 else _LONGEST_HEAD
            if waiting < head - 4:
                return False
            length = int.from_bytes(self._view[start + 2 : start + head - 4])
        if first != _FIN_BINARY or not self._plain(length):
            self._owed = head + length
            return True
        if waiting < head + length:
            self._expected = head + length
            return False
        self._proven = max(self._proven, head + length)
        body = start + head
        self._start = body + length
        self._message(apply_mask(self._view[body : self._start], bytes(self._view[body - 4 : body])))
        return True

    def _pass_on(self, count: int) -> bool:
        if not count:
            return False
        data = bytes(self._view[self._start : self._start + count])
        self._start += count
        self._owed -= count
        self._other(data)
        return True

    def _make_room(self) -> None:
        if not self._start:
            self._replace(max(2 * len(self._buffer), min(self._expected, self._proven) + _SPARE))
            return
        left = self._end - self._start
        self._view[:left] = self._view[self._start : self._end]
        self._start, self._end = 0, left

    def _replace(self, size: int) -> None:
        buffer = bytearray(size)
        buffer[: self._end] = self._view[: self._end]
        self._buffer, self._view = buffer, memoryview(buffer)
