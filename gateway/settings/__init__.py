"""The settings of the server and of each model, and the one line that says what is wrong with them.

A key that nobody knows is refused by name wherever it stands: a misspelt limit that is silently ignored
is found in production.
"""

from gateway.settings.model import (
    DimPadding,
    Instance,
    Latest,
    ModelSettings,
    Promote,
    Queue,
    SessionOptions,
    Specific,
    VersionPolicy,
    load_model_settings,
)
from gateway.settings.server import ENV_PREFIX, ServerSettings, load_server_settings

__all__ = [
    "ENV_PREFIX",
    "DimPadding",
    "Instance",
    "Latest",
    "ModelSettings",
    "Promote",
    "Queue",
    "ServerSettings",
    "SessionOptions",
    "Specific",
    "VersionPolicy",
    "load_model_settings",
    "load_server_settings",
]
