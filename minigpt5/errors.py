"""One exception tree. Every message names the value seen and what to do about it."""


class MiniGPT5Error(Exception):
    """Base of everything this project raises on purpose."""


class InvalidRequest(MiniGPT5Error, ValueError):
    """A request that cannot be served as it is.

    `field` names the request's field, so that an HTTP front can point at it.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.field = field
        self.message = message

    def __str__(self) -> str:
        return self.message


class BadPicture(InvalidRequest):
    """A picture file that is not read; `field` is its place in a request or a data set."""


class Blocked(MiniGPT5Error):
    """A text or a picture that a filter stops."""


class BaseModelNotFound(MiniGPT5Error):
    """A base-model id that no place provides; the message lists the places."""


class ModelFolderError(MiniGPT5Error):
    """A model folder that is missing, damaged or not what it says it is."""


class FingerprintMismatch(ModelFolderError):
    """Vokens of one model were given to the decoder of another."""


class StoryNotFound(MiniGPT5Error, KeyError):
    """No story, page or picture under this id."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else "story not found"


class StoryDamaged(StoryNotFound):
    """A stored story whose files somebody else has damaged."""


class StoryTaken(MiniGPT5Error):
    """A story is being made by another process: what this one has of it is no longer to be stored."""


class StorageError(MiniGPT5Error):
    """A folder or URI for stories that cannot be used."""


class TrainingError(MiniGPT5Error):
    """A training run that cannot begin or continue."""


class NotFinite(TrainingError):
    """A loss that is not a number, or without end: the message names the rows."""


class SettingsError(MiniGPT5Error, ValueError):
    """A setting that this machine cannot meet."""


class EngineFull(MiniGPT5Error):
    """An engine has as many requests as it takes; the caller may try again later."""


class EngineLost(MiniGPT5Error):
    """The process of an engine died under a request; another one may take it up."""
