"""lastrerank: last-token listwise rerankers, the same scores many times faster and in a fraction of the memory."""

from lastrerank.integrations.transformers import accelerate
from lastrerank.prompt import PromptTemplate
from lastrerank.request import RerankRequest
from lastrerank.reranker import Reranker

__version__ = "0.1.0"
__all__ = ["PromptTemplate", "RerankRequest", "Reranker", "__version__", "accelerate"]
