"""`python -m lion_mini.data convert` makes training records from the official files, `inspect` checks a file."""

from .convert import main

raise SystemExit(main())
