"""Libraries and programs that adapters need on their machine, and the commands that install them.

An adapter returns its requirements from `Backend.requirements()`. The worker checks them before each discovery: a missing
requirement keeps the worker from being ready, a missing optional one is only reported. One that is installed later is found
without a restart.
"""

from __future__ import annotations

import importlib
import shutil
from dataclasses import dataclass
from importlib.util import find_spec

from schemas.installation import install_hint
from schemas.jobs import Capability


@dataclass(frozen=True, slots=True)
class Library:
    """A Python library."""

    module: str
    """The name that is imported."""
    title: str
    purpose: str
    """The purpose in a sentence, after "for"."""
    extra: str
    """The extra of pyproject.toml that brings it."""
    optional: bool = False
    """Without it some requests are refused, or less is reported, but the worker is ready."""
    capabilities: tuple[Capability, ...] = ()
    """Only models with these capabilities need it; empty: all models."""

    def problem(self) -> str | None:
        """Return the problem and what to do; None where the library can be used."""
        defect = self._find_defect()
        if defect is None:
            return None
        return f"{self.title} {defect}; the worker needs it for {self.purpose}. Install it with: {install_hint(self.extra)}."

    def _find_defect(self) -> str | None:
        try:
            if find_spec(self.module) is None:
                importlib.invalidate_caches()  # it may have been installed since this process started
            if find_spec(self.module) is None:
                return "is not installed"
            if not self.optional:
                importlib.import_module(self.module)
        except Exception as error:  # a half-installed library raises nearly anything
            return f"cannot be imported ({type(error).__name__}: {error})"
        return None


@dataclass(frozen=True, slots=True)
class Program:
    """A program on the PATH of the worker, or by its path."""

    command: str
    remedy: str
    """What the operator may do instead of installing it."""
    optional: bool = False
    capabilities: tuple[Capability, ...] = ()

    def problem(self) -> str | None:
        """Return the problem and what to do; None where the program can be run."""
        if shutil.which(self.command) is not None:
            return None
        return f"There is no program {self.command!r} on this machine. Install it, or {self.remedy}."


AUDIO_CODECS = Library(
    "av",
    "PyAV",
    "the sound formats and speeds that its backend does not make itself",
    "audio",
    optional=True,
    capabilities=(Capability.SPEECH,),
)
PILLOW = Library("PIL", "Pillow", "picture formats, sizes and masks", "images")
OPTIONAL_PILLOW = Library(
    "PIL",
    "Pillow",
    "the picture formats that its backend does not make itself",
    "images",
    optional=True,
    capabilities=(Capability.IMAGES,),
)
