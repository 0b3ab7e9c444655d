"""What `keep_heap` is for, counted: page faults of a process that makes and drops frames."""

import subprocess
import sys

PROGRAM = """
import resource
from services.common.heap import keep_heap

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):  # a message with two frames of 224 px, the frames, and the model's input
        request = [b"x" * size for size in (301_056, 150_528, 150_528, 301_056)]
        del request
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = faults()
keep_heap()
faults()
print(before, faults())
"""


def test_frames_are_not_faulted_in_again_after_every_request() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60)
    before, after = map(int, done.stdout.split())
    assert before > 50 * 50 and after < before / 10
