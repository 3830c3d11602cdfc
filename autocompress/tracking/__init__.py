"""MLflow as a view of a study: written beside the search, and rebuildable from the record.

This package is the only importer of MLflow, inside functions.
`runs` says what MLflow should hold, `view` how its page should look, `mirror` writes the
difference to what it holds, `writer` drives that (`process`: in a process of its own),
`tracker` follows a running study, `server` opens the UI. `register` makes a MLflow model of an
export and puts it in the registry; `served` runs such a model to verify it.
"""

from autocompress.tracking.server import serve
from autocompress.tracking.store import Home
from autocompress.tracking.tracker import MlflowTracker, NullTracker, Tracker, default_uri, sync
from autocompress.tracking.writer import LocalWriter, Target

__all__ = ["Home", "LocalWriter", "MlflowTracker", "NullTracker", "Target", "Tracker", "default_uri", "serve", "sync"]
