"""``python -m hvpspec`` is the same program as ``hvpspec``."""

from hvpspec.cli import main

if __name__ == "__main__":
    main()
