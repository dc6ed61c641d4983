"""`python -m excimer.supervisor SETTINGS.toml`: until SIGTERM, which leaves the services running."""

import sys
from pathlib import Path

from excimer.base.errors import ExcimerError
from excimer.service.logs import configure_logging, get_logger
from excimer.service.process_main import EXIT_CLEAN, EXIT_FAILED, EXIT_USAGE
from excimer.service.process_names import show_as
from excimer.service.settings import SettingsError, load_settings
from excimer.supervisor.child import run_launched
from excimer.supervisor.settings import SupervisorSettings
from excimer.supervisor.shell import supervise

log = get_logger(__name__)


def main(arguments: list[str]) -> int:
    """In the supervisor its exit code; in each service that it forks, that service's."""
    try:
        settings = load_settings(Path(arguments[0]), SupervisorSettings)
    except (IndexError, SettingsError) as error:
        print(f"excimer supervisor: {error}", file=sys.stderr)
        return EXIT_USAGE
    show_as("supervisor", ["-m", "excimer.supervisor", arguments[0]])
    configure_logging("supervisor", settings.log_level)
    try:
        launched = supervise(settings)
    except (ExcimerError, OSError) as error:
        log.error(f"supervisor failed: {error}", kind=type(error).__name__)
        return EXIT_FAILED
    return EXIT_CLEAN if launched is None else run_launched(launched)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
