"""Our forward and our attention inside models that Transformers has loaded, against Transformers' own."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

import lastrerank
from bench.baseline import TransformersReranker
from lastrerank.integrations.transformers import register_attention

WINDOWED = {"use_sliding_window": True, "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}  # fmt: skip


def config(**overrides):
    shape = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96, "head_dim": 32,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}  # fmt: skip
    return Qwen3Config(**shape, **overrides)


def decoder(kind=Qwen3Model, **overrides):
    torch.manual_seed(0)
    return kind(config(**overrides)).eval()


def padded(side):
    """Ids `[3, 20]` of rows of 20, 1 and 13 tokens, and their mask."""
    torch.manual_seed(1)
    mask = torch.zeros(3, 20, dtype=torch.long)
    for row, length in enumerate((20, 1, 13)):
        mask[row, slice(length) if side == "right" else slice(20 - length, 20)] = 1
    return torch.randint(0, 300, (3, 20)), mask


@pytest.mark.parametrize("overrides", [{}, WINDOWED], ids=["full", "windowed"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("backend", ["auto", "native"])
def test_accelerated_hidden_states_are_transformers_own(overrides, side, backend):
    if backend == "native" and lastrerank.ops.availability(torch.device("cpu"), torch.float32)["native"]:
        pytest.skip("the native backend is not built here")
    model = decoder(**overrides)
    ids, mask = padded(side)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
        out = lastrerank.accelerate(model, backend)(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    there = mask.bool()
    assert (out.last_hidden_state - expected)[there].abs().max() <= 2e-5
    assert out.hidden_states[-1] is out.last_hidden_state and set(out.hidden_states[:-1]) == {None}
    assert out.last_hidden_state[~there].eq(0).all()


def test_weights_are_shared_and_the_old_forward_comes_back():
    model = decoder()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(0, 300, (1, 9))
    with torch.no_grad():
        expected = model(input_ids=ids).last_hidden_state
        lastrerank.accelerate(model)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        attn = model.layers[0].self_attn
        storages = {x.weight.untyped_storage().data_ptr() for x in (attn.q_proj, attn.k_proj, attn.v_proj)}
        assert len(storages) == 1
        model.layers[1].mlp.up_proj.weight.mul_(2)
        changed = model(input_ids=ids).last_hidden_state
        assert (changed - expected).abs().max() > 1e-3
        del model.forward
        assert (model(input_ids=ids).last_hidden_state - changed).abs().max() <= 2e-5


def test_a_causal_lm_around_it(reranker):
    model = decoder(Qwen3ForCausalLM)
    ids = torch.randint(0, 300, (2, 9))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        out = lastrerank.accelerate(model)(input_ids=ids, use_cache=False, output_hidden_states=True)
    assert (out.logits - expected).abs().max() <= 2e-5
    assert out.hidden_states[-1].shape == (2, 9, 64)


def test_the_published_rerank_over_an_accelerated_decoder(tiny_windowed, documents):
    """The plain Transformers reranker, unchanged, gives the same scores when its decoder has been accelerated."""
    plain = TransformersReranker(tiny_windowed)
    expected = plain.rerank("how do I print", documents[:6])
    lastrerank.accelerate(plain.model)
    results = plain.rerank("how do I print", documents[:6])
    assert [r["index"] for r in results] == [r["index"] for r in expected]
    for a, b in zip(results, expected, strict=True):
        assert abs(a["relevance_score"] - b["relevance_score"]) <= 2e-5


def test_what_is_not_served_is_refused():
    model = lastrerank.accelerate(decoder())
    ids = torch.randint(0, 300, (1, 6))
    for name, value in (("use_cache", True), ("past_key_values", object()), ("inputs_embeds", torch.zeros(1, 6, 64)),
                        ("output_attentions", True)):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            model.forward(input_ids=ids, **{name: value})
    with pytest.raises(TypeError, match="'surprise'"):
        model.forward(input_ids=ids, surprise=1)
    with pytest.raises(ValueError, match="input_ids"):
        model.forward()
    for mask in ([1, 1, 0, 1, 1, 1], [0] * 6):
        with pytest.raises(ValueError, match="attention_mask has an empty row, or a row with a hole"):
            model.forward(input_ids=ids, attention_mask=torch.tensor([mask]))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 5\)"):
        model.forward(input_ids=ids, attention_mask=torch.ones(1, 5))
    with pytest.raises(ValueError, match="position_ids"):
        model.forward(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 4, 5, 6]]))
    shifted = model.forward(input_ids=ids, position_ids=torch.arange(3, 9)[None]).last_hidden_state
    assert (shifted - model.forward(input_ids=ids).last_hidden_state).abs().max() <= 2e-5  # rotary is relative
    with pytest.raises(TypeError, match="model is a Linear"):
        lastrerank.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="training mode"):
        lastrerank.accelerate(decoder().train())


@pytest.mark.parametrize("overrides", [{}, WINDOWED], ids=["full", "windowed"])
@pytest.mark.parametrize("side", ["left", "right", None, "one row"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad"])
def test_registered_attention(overrides, side, grad):
    model = decoder(**overrides)
    ids, mask = padded(side if side in ("left", "right") else "left")
    ids, mask = (ids, mask if side else None) if side != "one row" else (ids[:1], None)
    there = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    gradients = []
    outputs = []
    # Not the sum of squares: after the last norm it is nearly constant, and its gradient mostly rounding.
    direction = torch.randn(*ids.shape, 64, generator=torch.Generator().manual_seed(2))
    for implementation in ("sdpa", register_attention()):
        model.set_attn_implementation(implementation)
        with torch.set_grad_enabled(grad):
            outputs.append(model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state)
            if grad:
                model.zero_grad()
                (outputs[-1] * direction)[there].sum().backward()
                gradients.append(model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert (outputs[0] - outputs[1])[there].abs().max() <= 2e-5
    if grad:
        assert (gradients[0] - gradients[1]).abs().max() <= 1e-5 * gradients[0].abs().max()


def test_registered_attention_refuses_a_cache():
    model = decoder(Qwen3ForCausalLM)
    model.set_attn_implementation(register_attention())
    with pytest.raises(ValueError, match="1 queries and 5 keys"):
        model.generate(torch.randint(0, 300, (1, 4)), max_new_tokens=3, do_sample=False, pad_token_id=0)
