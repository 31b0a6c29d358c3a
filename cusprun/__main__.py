"""``python -m cusprun``."""

from cusprun.cli import main

if __name__ == "__main__":
    main()
