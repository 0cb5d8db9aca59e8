"""The operations on an NVIDIA GPU by the Triton kernels of `kernels/`; matrix products and gathers by PyTorch.

Not yet run on a GPU: asked for by name only, `backend="auto"` doesn't choose it.
"""

from __future__ import annotations

from lastrerank.kernels.attention import attention
from lastrerank.kernels.qk_norm_rope import qk_norm_rope
from lastrerank.kernels.rms_norm import add_rms_norm, rms_norm
from lastrerank.kernels.score import score
from lastrerank.kernels.swiglu import swiglu
from lastrerank.ops.reference import ReferenceOperations


class TritonOperations(ReferenceOperations):
    """See `lastrerank.ops.Operations`. Grad must be disabled."""

    rms_norm = staticmethod(rms_norm)
    add_rms_norm = staticmethod(add_rms_norm)
    qk_norm_rope = staticmethod(qk_norm_rope)
    attention = staticmethod(attention)
    swiglu = staticmethod(swiglu)
    score = staticmethod(score)
