"""`make compose-smoke`: docker-compose.yml, built and run for real.

It wants an engine, and the compose file's ports on this machine. What was started is taken down again.
"""

import argparse
import sys

from deploy.smoke.project import SmokeError, require_engine


def main() -> int:
    """Runs it; returns the exit status: 0, 1 for what is not as it should be, 2 where it cannot be tried."""
    parser = argparse.ArgumentParser(prog="make compose-smoke", description=__doc__)
    parser.add_argument("--without", action="append", default=[], choices=["grafana"], help="where it cannot be had")
    parser.add_argument("--demo", action="store_true", help="the profile demo too: its image has torch, some gigabytes")
    arguments = parser.parse_args()
    try:
        require_engine()
    except SmokeError as error:
        print(f"compose-smoke: {error}", file=sys.stderr)
        return 2
    # Not before: it brings torch, and whoever has no engine need not wait for it.
    from deploy.smoke.story import ALL, smoke

    try:
        smoke([name for name in ALL if name not in arguments.without], demo=arguments.demo)
    except SmokeError as error:
        print(f"compose-smoke: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
