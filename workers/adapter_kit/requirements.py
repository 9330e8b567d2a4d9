"""What adapters need of the machine that they run on, and the command that installs it.

An adapter returns its requirements from `Backend.requirements()`. The worker checks them before each discovery: one that is missing
keeps the worker from being ready, an optional one is only reported. What is installed later is found without a restart.
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
    """What is imported."""
    title: str
    purpose: str
    """What it is needed for, after "for"."""
    extra: str
    """The extra of pyproject.toml that brings it."""
    optional: bool = False
    """Without it some requests are refused, or less is shown; the worker is ready all the same."""
    capabilities: tuple[Capability, ...] = ()
    """It matters only to models of these; empty: to all."""

    def problem(self) -> str | None:
        """Return what is wrong and what to do, or None where the library can be used."""
        fault = self._fault()
        if fault is None:
            return None
        return f"{self.title} {fault}; the worker needs it for {self.purpose}. Install it with: {install_hint(self.extra)}."

    def _fault(self) -> str | None:
        try:
            if find_spec(self.module) is None:
                importlib.invalidate_caches()  # it may have been installed since this process began
            if find_spec(self.module) is None:
                return "is not installed"
            if not self.optional:
                importlib.import_module(self.module)
        except Exception as error:  # a library that is half installed raises nearly anything
            return f"cannot be imported ({type(error).__name__}: {error})"
        return None


@dataclass(frozen=True, slots=True)
class Program:
    """A program on the PATH of the worker, or by its path."""

    command: str
    remedy: str
    """What else the operator may do."""
    optional: bool = False
    capabilities: tuple[Capability, ...] = ()

    def problem(self) -> str | None:
        """Return what is wrong and what to do, or None where the program can be run."""
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
