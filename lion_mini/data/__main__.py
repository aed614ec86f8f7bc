"""`python -m lion_mini.data convert` makes training records of the official files, `inspect` looks at some."""

import sys

from .convert import main

if __name__ == "__main__":
    sys.exit(main())
