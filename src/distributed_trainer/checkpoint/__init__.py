# SPDX-License-Identifier: Apache-2.0
"""Save the state of a training to disk or send it to another process, and load it again."""
