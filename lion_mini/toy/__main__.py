"""`python -m lion_mini.toy --show 6` draws scenes with their texts and boxes."""

from .world import main

if __name__ == "__main__":
    main()
