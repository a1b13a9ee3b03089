# SPDX-License-Identifier: Apache-2.0
"""Complete training programs built on :mod:`slope_ext`."""


class UsageError(ValueError):
    """A mistake in the arguments or in the files they name; the message is one line."""
