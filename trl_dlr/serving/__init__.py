# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

from .app import create_app
from .server import Server, ServerSettings


__all__ = ["Server", "ServerSettings", "create_app"]
