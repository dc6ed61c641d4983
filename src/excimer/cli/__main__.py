"""`excimer …` and `python -m excimer.cli …`. Light, so that Ctrl-C during the imports finds it ready."""

import sys


def main() -> None:
    try:
        from excimer.cli.command_line import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = 130
        print("excimer: interrupted before anything was done", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
