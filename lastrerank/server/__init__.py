"""`lastrerank serve`: the engine over HTTP, with the routes that rerankers are already called by."""

from lastrerank.server.app import create_app
from lastrerank.server.limits import Limits

__all__ = ["Limits", "create_app"]
