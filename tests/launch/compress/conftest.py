"""The classifier of `tests.compress.prune`."""

from tests.compress.prune.conftest import classifier as classifier
