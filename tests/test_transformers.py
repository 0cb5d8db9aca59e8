"""Our forward and our attention inside models that Transformers has loaded, against Transformers' own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
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
    with pytest.raises(ValueError, match="position_ids don't count up by one"):
        model.forward(
            input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 4, 5, 6]]), attention_mask=torch.ones(1, 6)
        )
    with pytest.raises(TypeError, match="attention_mask is a dict"):
        model.forward(input_ids=ids, attention_mask={})
    with pytest.raises(ValueError, match="position_ids has shape"):
        model.forward(input_ids=ids, position_ids=torch.arange(5)[None])
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


# What replaces a computation accounts for all of it: the same numbers as Transformers' eager, or a refusal.


def same_or_refused(model, change, **inputs):
    """Hidden states after `change` are those of before it, or it, or the pass, is refused; which."""
    with torch.no_grad():
        expected = model(use_cache=False, **inputs).last_hidden_state
        try:
            change(model)
            out = model(use_cache=False, **inputs).last_hidden_state
        except (TypeError, ValueError) as error:
            assert str(error)
            return str(error)
    there = inputs.get("attention_mask", torch.ones(out.shape[:2])).bool()
    assert (out - expected)[there].abs().max() <= 5e-5 * max(1.0, float(expected.abs().max()))
    return "same"


def spread(model, std=0.2):
    """Weights large enough for everything that is computed to show."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0 if parameter.ndim > 1 else 1.0, std, generator=generator)
    return model


def family(name, **overrides):
    """A tiny model of one of Transformers' families."""
    size = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
            "pad_token_id": 0}  # fmt: skip
    own = {
        "Gemma2": {"query_pre_attn_scalar": 32, "sliding_window": 6, "attn_logit_softcapping": 0.5},
        "Gemma3Text": {"query_pre_attn_scalar": 32, "sliding_window": 6},
        "Mistral": {"sliding_window": 6},
        "GptOss": {"sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
        "ModernBert": {"head_dim": None, "global_attn_every_n_layers": 2},
        "Bert": {"head_dim": None, "is_decoder": False},
    }
    fields = {**size, **own.get(name, {}), **overrides}
    torch.manual_seed(0)
    kind, make = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}Model")
    model = make(kind(**{key: value for key, value in fields.items() if value is not None})).eval()
    model.set_attn_implementation("eager")
    return spread(model)


def attend_with_ours(model):
    model.set_attn_implementation(register_attention())


PACKED = {"position_ids": torch.cat([torch.arange(7), torch.arange(13)])[None]}
INPUTS = {
    "plain": {},
    "left": {"attention_mask": torch.tensor([[0] * 5 + [1] * 15, [1] * 20])},
    "packed": PACKED,
    "4-D mask": {"attention_mask": torch.ones(1, 1, 20, 20).tril().log()},
}


@pytest.mark.parametrize("inputs", INPUTS, ids=str)
@pytest.mark.parametrize(
    ("name", "overrides", "served"),
    [
        ("Qwen2", {}, True),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, True),
        ("Qwen3", {}, True),
        ("Qwen3", {"attention_bias": True}, True),
        ("Qwen3", {"is_causal": False}, False),
        ("Llama", {}, True),
        ("Mistral", {}, True),
        ("Gemma2", {}, False),
        ("Gemma2", {"attn_logit_softcapping": None}, None),
        ("Gemma3Text", {}, None),
        ("Gemma3Text", {"use_bidirectional_attention": True}, False),
        ("GptOss", {}, False),
        ("ModernBert", {}, False),
        ("Bert", {}, False),
    ],
    ids=str,
)
def test_attention_in_every_family_is_the_same_or_refused(name, overrides, served, inputs):
    if not hasattr(transformers, f"{name}Model"):
        pytest.skip(f"this Transformers has no {name}")
    model = family(name, **overrides)
    given = INPUTS[inputs]
    rows = len(given.get("attention_mask", torch.zeros(1)))
    ids = torch.randint(1, 200, (rows, 20), generator=torch.Generator().manual_seed(1))
    outcome = same_or_refused(model, attend_with_ours, input_ids=ids, **given)
    if inputs == "4-D mask":
        assert outcome != "same"
    elif served is not None and not (name in ("Bert", "ModernBert") and inputs == "packed"):
        assert (outcome == "same") is served, outcome


@pytest.mark.parametrize(
    "argument", [{"softcap": 5.0}, {"s_aux": torch.zeros(4)}, {"head_mask": torch.ones(4)}, {"is_causal": False},
                 {"cu_seq_lens_q": torch.tensor([0, 20])}, {"position_bias": torch.zeros(1)}, {"surprise": 1},
                 {"output_attentions": True}, {"dropout": 0.1}],
    ids=lambda argument: next(iter(argument)),
)  # fmt: skip
def test_arguments_of_an_attention_are_used_or_refused(argument):
    model = decoder()
    attend_with_ours(model)
    function = transformers.AttentionInterface._global_mapping["lastrerank"]
    q, k = torch.randn(1, 4, 20, 32), torch.randn(1, 2, 20, 32)
    module = model.layers[0].self_attn
    function(module, q, k, k, None, position_ids=torch.arange(20)[None], softcap=None, output_attentions=False)
    with pytest.raises(ValueError):
        function(module, q, k, k, None, **argument)


class Scaled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def lora(model):
    """As PEFT wraps a linear: `weight` is the frozen base weight."""

    class LoraLinear(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base
            self.up = torch.nn.Linear(base.in_features, base.out_features, bias=False)

        weight = property(lambda self: self.base_layer.weight)
        bias = property(lambda self: self.base_layer.bias)

        def forward(self, x):
            return self.base_layer(x) + self.up(x)

    model.layers[1].self_attn.q_proj = LoraLinear(model.layers[1].self_attn.q_proj)


def subclassed(model):
    model.layers[0].mlp.down_proj.__class__ = Scaled


def wrapped_forward(model):
    norm = model.layers[2].input_layernorm
    real = norm.forward
    norm.forward = lambda x: real(x) + 1


def attribute(path, value):
    def change(model):
        *parents, last = path.split(".")
        for parent in parents:
            model = getattr(model, parent)
        setattr(model, last, value)

    change.__name__ = f"{path} = {value}"
    return change


CHANGES = [
    lora, subclassed, wrapped_forward,
    attribute("layers.0.self_attn.scaling", 0.5), attribute("layers.1.self_attn.is_causal", False),
    attribute("norm.variance_epsilon", 0.5), attribute("layers.1.self_attn.sliding_window", 3),
    attribute("embed_tokens.max_norm", 0.5), attribute("config.rms_norm_eps", 0.5),
    attribute("layers.0.self_attn.q_proj.bias", torch.nn.Parameter(torch.ones(128))),
    attribute("layers.0.self_attn.o_proj.bias", torch.nn.Parameter(torch.ones(64))),
    attribute("layers.0.self_attn.temperature", torch.nn.Parameter(torch.ones(1))),
    attribute("rotary_emb.attention_scaling", 1.5),
    lambda model: model.layers[0].register_forward_hook(lambda module, inputs, out: out + 1),
    lambda model: model.layers[0].mlp.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,)),
    lambda model: torch.nn.utils.parametrizations.weight_norm(model.layers[0].mlp.up_proj),
    lambda model: model.rotary_emb.inv_freq.mul_(0.5),
    lambda model: model.layers.pop(1),
    lambda model: model.layers[0].mlp.register_buffer("gate", torch.ones(1)),
    lambda model: setattr(model.layers[0].mlp, "act_fn", torch.nn.GELU()),
    lambda model: model.layers[1].self_attn.q_norm.to(torch.float64),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_accelerate_does_not_know_is_refused(change):
    """Each of these changes what the model computes, or could; none is taken for the plain decoder."""
    model = spread(decoder())
    change(model)
    with pytest.raises((TypeError, ValueError)) as refused:
        lastrerank.accelerate(model)
    assert len(str(refused.value)) > 20 and "forward" not in vars(model)


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3"])
@pytest.mark.parametrize("overrides", [{}, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}],
                         ids=["full", "windowed"])  # fmt: skip
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inputs", INPUTS, ids=str)
def test_accelerated_decoders_are_the_same_or_refused(kind, overrides, bias, inputs):
    model = family(kind, **overrides, **({"attention_bias": True} if bias and kind == "Qwen3" else {}))
    given = INPUTS[inputs]
    rows = len(given.get("attention_mask", torch.zeros(1)))
    ids = torch.randint(1, 200, (rows, 20), generator=torch.Generator().manual_seed(1))
    outcome = same_or_refused(model, lastrerank.accelerate, input_ids=ids, **given)
    assert (outcome == "same") is (inputs != "4-D mask"), outcome


def test_other_families_are_not_accelerated():
    for name in ("Llama", "Mistral", "Gemma2", "Gemma3Text"):
        with pytest.raises(TypeError, match="expected a Qwen3 or Qwen2 decoder"):
            lastrerank.accelerate(family(name))


def test_accelerating_twice_and_after_outputs_were_collected():
    model = spread(decoder())
    ids = torch.randint(0, 300, (1, 9))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False, output_hidden_states=True).last_hidden_state
        lastrerank.accelerate(lastrerank.accelerate(model))
        assert (model(input_ids=ids, use_cache=False).last_hidden_state - expected).abs().max() <= 1e-4


def test_an_accelerated_pass_is_not_autocast():
    model = spread(decoder())
    ids = torch.randint(0, 300, (1, 9))
    lastrerank.accelerate(model)
    expected = model(input_ids=ids).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(input_ids=ids).last_hidden_state, expected)


def replace_linear(model):
    model.layers[1].self_attn.q_proj = torch.nn.Linear(64, 128, bias=False)


LATER = [
    lora, subclassed, replace_linear, attribute("norm.variance_epsilon", 0.5),
    attribute("layers.0.self_attn.scaling", 0.5),
    lambda model: model.layers[0].mlp.register_forward_hook(lambda module, inputs, out: out + 1),
    lambda model: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True),
    lambda model: model.set_input_embeddings(torch.nn.Embedding(300, 64)),
    lambda model: model.to(torch.bfloat16),
    lambda model: model.rotary_emb.inv_freq.mul_(0.5),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3"])
def test_biases_are_shared_too(kind):
    model, other = (family(kind, **({"attention_bias": True} if kind == "Qwen3" else {})) for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        ids = torch.randint(1, 200, (1, 9))
        expected = other(input_ids=ids, use_cache=False).last_hidden_state
        lastrerank.accelerate(model).load_state_dict(other.state_dict())
        assert (model(input_ids=ids).last_hidden_state - expected).abs().max() <= 1e-4


def test_an_accelerated_decoder_is_not_copied():
    """The copy would compute by the first one's weights."""
    model = lastrerank.accelerate(decoder())
    with pytest.raises(TypeError, match=r"isn't copied: del decoder\.forward"):
        copy.deepcopy(model)
    with pytest.raises(TypeError, match="isn't pickled"):
        pickle.dumps(model)
    del model.forward
    assert copy.deepcopy(model)(input_ids=torch.zeros(1, 3, dtype=torch.long)) is not None


@pytest.mark.parametrize("change", LATER, ids=lambda change: change.__name__)
def test_a_decoder_that_changes_after_it_was_accelerated_is_noticed(change):
    model = lastrerank.accelerate(spread(decoder()))
    ids = torch.randint(0, 300, (1, 6))
    model(input_ids=ids)
    change(model)
    with pytest.raises(ValueError, match="has changed since it was accelerated"):
        model(input_ids=ids)


def test_packed_copies_do_not_go_stale():
    if lastrerank.ops.availability(torch.device("cpu"), torch.float32)["native"]:
        pytest.skip("the native backend is not built here")
    model = lastrerank.accelerate(spread(decoder()), "native")
    ids = torch.randint(0, 300, (1, 6))
    model(input_ids=ids)
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight.mul_(2)
    with pytest.raises(ValueError, match="has changed since it was accelerated"):
        model(input_ids=ids)


def test_what_is_patched_outside_of_the_model_is_noticed(monkeypatch):
    from transformers.models.qwen3 import modeling_qwen3

    model = spread(decoder())
    with monkeypatch.context() as patched:
        patched.setattr(modeling_qwen3, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))
        with pytest.raises(TypeError, match="apply_rotary_pos_emb has been replaced"):
            lastrerank.accelerate(model)
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, inputs, out: None)
    try:
        with pytest.raises(TypeError, match="a hook for all modules"):
            lastrerank.accelerate(model)
    finally:
        hook.remove()
    model.layers[0].mlp.__dict__["act_fn"] = torch.tanh
    with pytest.raises(TypeError, match="act_fn has been set to"):
        lastrerank.accelerate(model)
