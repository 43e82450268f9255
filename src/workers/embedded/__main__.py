"""`python -m workers.embedded fetch`: download what the embedded servers need, showing progress.

Exits 0 when all is there, 2 with a sentence when not. `lock` writes the list of Kafka's jars anew.
"""

import sys

from workers.embedded import EmbeddedError, fetch
from workers.embedded.downloads import write_pins


def _say(sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")


def main(arguments: list[str]) -> int:
    """Run one command; returns the exit status."""
    try:
        match arguments:
            case ["fetch"]:
                fetch()
            case ["lock"]:
                write_pins(_say)
            case _:
                _say("usage: python -m workers.embedded fetch | lock")
                return 2
    except EmbeddedError as error:
        _say(str(error))
        return 2
    except KeyboardInterrupt:
        _say("Interrupted; what was already downloaded is kept.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
