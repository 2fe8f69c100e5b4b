import os
import subprocess
import sys
from pathlib import Path

import pytest
from clocks import CAN_JUMP, Clocks

_TELL = "import sys, time\nfor _ in sys.stdin: print(time.time(), time.monotonic(), flush=True)"


@pytest.mark.skipif(not CAN_JUMP, reason="no C compiler")
def test_a_clock_that_jumps_is_the_wall_clock_alone(tmp_path: Path) -> None:
    clocks = Clocks(tmp_path)
    environment = {**os.environ, **clocks.environment("one")}
    with subprocess.Popen(
        [sys.executable, "-c", _TELL], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        found = []
        for seconds in (0, 86_400, -86_400):
            clocks.jump("one", seconds)
            print(file=process.stdin, flush=True)
            found.append([float(each) for each in process.stdout.readline().split()])
        process.stdin.close()
    (wall, steady), *others = found
    assert [round((its - wall) / 3600) for its, _ in others] == [24, -24]
    assert all(0 <= its - steady < 60 for _, its in others)
