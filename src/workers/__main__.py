"""``python -m workers`` is the ``credits`` command."""

from workers.cli import main

if __name__ == "__main__":
    main()
