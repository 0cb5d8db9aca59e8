"""PEFT reads the adapters that training writes, and what it writes is read here."""

from __future__ import annotations

import pytest
import torch

from lastrerank import Reranker
from lastrerank.adapters import write_adapter
from lastrerank.packing import pack
from lastrerank.random_checkpoint import small_tokenizer, write_random_checkpoint

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    overrides = {"max_position_embeddings": 4096, "lastrerank": {"max_query_length": 64, "max_doc_length": 256}}
    return write_random_checkpoint(
        tmp_path_factory.mktemp("base"), "tiny", tokenizer=small_tokenizer(), dtype=torch.float32, overrides=overrides
    )


def states(folder, theirs):
    """Final states of one prompt, before the last norm's successor, by both."""
    reranker = Reranker.from_pretrained(folder, backend="reference")
    query, *documents = reranker.encoder.cut(["expert", "a passage", "another one"], 64)
    block = reranker.encoder.encode_block(query, documents)
    batch = pack([block], torch.device("cpu"))
    with torch.inference_mode():
        own = reranker.model.hidden_states(batch)
        own = reranker.model.ops.rms_norm(own, reranker.model.weights.norm, reranker.config.rms_norm_eps)
        found = theirs(input_ids=batch.ids[None]).last_hidden_state[0][batch.read_rows]
    return own, found


def test_peft_reads_ours(base, tmp_path):
    generator = torch.Generator().manual_seed(0)
    updates = {
        f"model.layers.{i}.{module}.weight": (
            torch.randn(out, 4, generator=generator) * 0.2, torch.randn(4, width, generator=generator) * 0.2)
        for i in (0, 3) for module, out, width in (("self_attn.q_proj", 256, 128), ("mlp.down_proj", 128, 320))
    }  # fmt: skip
    write_adapter(tmp_path / "adapter", str(base), updates, {}, 4, 8.0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")).merge_and_unload().model.eval()
    own, found = states(tmp_path / "adapter", theirs)
    assert torch.allclose(own, found, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(own, states(base, theirs)[0], atol=1e-2)


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}]
)
def test_theirs_is_read_here(base, tmp_path, options):
    model = transformers.AutoModel.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "gate_proj"], **options)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    own, found = states(tmp_path / "adapter", adapted.eval())
    assert torch.allclose(own, found, atol=1e-4, rtol=1e-4)
