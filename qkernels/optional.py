"""Packages that only some of the library needs, and what to install where they are missing."""

from __future__ import annotations

from .errors import MissingPackage

INSTALL_HF = "pip install 'qkernels[hf]' (in a clone of the repository: pip install '.[hf]' --no-build-isolation)"


def need_transformers(what: str) -> None:
    """Raise unless transformers can be imported.

    Raises:
        MissingPackage: says what needs it, why it cannot be imported, and the command that installs it.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "transformers"
        why = "is not installed" if missing else f"cannot be imported ({error})"
        raise MissingPackage(f"{what} needs transformers, which {why}: {INSTALL_HF}") from error
