"""`python -m lion_mini.data convert` makes training records from the official files, `inspect` checks a file."""

import sys

from .convert import main

sys.exit(main())
