"""`excimer …` and `python -m excimer.cli …`. Light, so that Ctrl-C during the imports finds it ready."""

import signal
import sys
from types import FrameType


def _interrupt(_: int, frame: FrameType | None) -> None:
    """As Ctrl-C would; that may be ignored itself, as in a script's background."""
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    if not callable(on_ctrl_c):
        raise KeyboardInterrupt
    on_ctrl_c(signal.SIGINT, frame)


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores it
            signal.signal(number, _interrupt)
    try:
        from excimer.cli.command_line import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = 130
        print("excimer: interrupted before anything was done", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
