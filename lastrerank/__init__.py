"""lastrerank: last-token rerankers, the scores of Transformers, faster and in a fraction of the memory."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lastrerank.families import Family
    from lastrerank.integrations.transformers import accelerate
    from lastrerank.request import RerankRequest, RerankResult
    from lastrerank.reranker import Reranker

__version__ = "0.1.0"
__all__ = ["Family", "RerankRequest", "RerankResult", "Reranker", "__version__", "accelerate"]

# Found when first asked for: PyTorch takes a second to import, and a command line that prints its help needs none of
# it.
_WHERE = {
    "Family": "families", "RerankRequest": "request", "RerankResult": "request", "Reranker": "reranker",
    "accelerate": "integrations.transformers",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"lastrerank.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'lastrerank' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
