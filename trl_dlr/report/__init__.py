# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

from .callback import LatentReportCallback
from .page import render_report, write_report
from .probe import take_probe


__all__ = [
    "LatentReportCallback",
    "render_report",
    "take_probe",
    "write_report",
]
