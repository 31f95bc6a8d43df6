"""The command line: `nibble VERB ...` or `python -m nibble VERB ...`."""

from nibble.commands.main import main

if __name__ == "__main__":
    main()
