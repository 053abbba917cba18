"""Errors a user can meet. Each message says what failed, why, and what to do."""

from __future__ import annotations


class KtError(Exception):
    """Base of every error that is the user's to fix; the CLI prints it without a traceback."""


class PluginError(KtError):
    """A plug-in failed to import, misspelt a hook, or took a name that was already taken."""


class UnknownNameError(KtError):
    """A backend, format, device or model source of that name is not registered."""


class BackendUnavailableError(KtError):
    """The backend exists, but this machine cannot run it."""


class DeviceError(KtError):
    """An accelerator, or its runtime, failed or refused."""


class UnsupportedModelError(KtError):
    """The model cannot be run: not a Mixture of Experts, or no adapter understands it."""


class UnsupportedFormatError(KtError):
    """The format is unknown, or the checkpoint or the backend cannot give it."""


class UnsupportedTrainingError(KtError):
    """A gradient is asked for that the backend does not compute."""


class UnsupportedDenseError(KtError):
    """Dense layers are to be packed that the device cannot compute, or the model does not allow."""


class CheckpointError(KtError):
    """The checkpoint is missing, incomplete, damaged or inconsistent with its config."""


class NotEnoughMemoryError(KtError):
    """The model does not fit; raised before anything large is allocated."""


class NotEnoughDiskError(KtError):
    """There is no room on the disk for what is to be written."""


class ModelSourceError(KtError):
    """A named or remote model could not be brought onto this machine."""


class TokenizerError(KtError):
    """Text was asked for, but the model directory has no usable tokenizer or chat template."""


class ContextLengthError(KtError):
    """The prompt, or the prompt with the tokens asked for, exceeds the model's context."""


class InvalidRequestError(KtError):
    """An argument is out of its range."""


class TraceError(KtError):
    """A routing trace or routing statistics cannot be read, or belong to another model."""


class MissingExtraError(KtError):
    """Something is asked for that needs an optional package, which is not installed."""
