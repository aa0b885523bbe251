"""The command line: one file a command, each with `NAME`, `SUMMARY`, `add_parser` and `run`."""
