"""The package's version, said here and read by everything else: pyproject.toml, reports, file headers."""

__version__ = "0.2.0"
