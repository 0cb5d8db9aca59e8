"""A plain pretrained decoder becomes the start of a training: what it computes stays, what is new is as described."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from typer.testing import CliRunner

from lastrerank import Reranker
from lastrerank.checkpoint import open_checkpoint, open_decoder
from lastrerank.cli import app
from lastrerank.lists import EMBED_TOKEN, RERANK_TOKEN
from lastrerank.packing import pack
from lastrerank.random_checkpoint import small_tokenizer
from lastrerank.training import bundled
from lastrerank.training.data import ListRow, TrainingData, read_training_data
from lastrerank.training.decoder import is_decoder, linear_projector, listwise_start, whitening
from lastrerank.training.gguf import decoder_from_gguf
from lastrerank.training.trainer import TrainingConfig
from lastrerank.training.vocabulary import fitted

TEXTS = ["expert passage", "a relevant ranking", "numerical identifiers", "the intent of a question", "search query",
         "determine relevance", "provide the passages", "an instruction"]  # fmt: skip
CONFIG = TrainingConfig(steps=2, lists_per_step=2, hard=3, easy=0, doc_tokens=32, dual=0.0, similar=0.0)
SHAPE = {
    "vocab_size": 1024, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip
ARCHITECTURES = {
    "llama": (transformers.LlamaConfig, {}), "llama with biases": (transformers.LlamaConfig, {"attention_bias": True}),
    "qwen2": (transformers.Qwen2Config, {}), "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
}  # fmt: skip


def lists():
    rows = [ListRow(text.split()[-1], i, tuple(j for j in range(8) if j != i), None, "all")
            for i, text in enumerate(TEXTS)]  # fmt: skip
    return TrainingData(TEXTS, rows)


def decoder(folder, kind):
    """A random decoder as a published one is stored: no markers among its tokens."""
    torch.manual_seed(0)
    config, more = ARCHITECTURES[kind]
    model = transformers.AutoModelForCausalLM.from_config(config(**SHAPE, **more))
    with torch.no_grad():
        for parameter in model.parameters():  # biases are zero at first
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    raw = json.loads(small_tokenizer().to_str())
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] not in (EMBED_TOKEN, RERANK_TOKEN)]
    Tokenizer.from_str(json.dumps(raw)).save(str(folder / "tokenizer.json"))
    return folder, model


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_start_computes_what_the_decoders_first_layers_compute(kind, tmp_path):
    source, model = decoder(tmp_path / "decoder", kind)
    assert is_decoder(source)
    start = listwise_start(source, tmp_path / "start", lists(), CONFIG, layers=2)
    assert not is_decoder(start)
    reranker = Reranker.from_pretrained(start, backend="reference")
    query, *documents = reranker.encoder.cut(["expert", *TEXTS], 32)
    batch = pack([reranker.encoder.encode_block(query, documents)], torch.device("cpu"))
    model.model.layers = model.model.layers[:2]
    model.resize_token_embeddings(reranker.config.vocab_size)
    model.model.embed_tokens.weight.data = load_file(start / "model.safetensors")["model.embed_tokens.weight"]
    with torch.inference_mode():
        own = reranker.model.hidden_states(batch)
        expected = model.model(input_ids=batch.ids[None], output_hidden_states=True).hidden_states[-1]
        normed = reranker.model.ops.rms_norm(own, reranker.model.weights.norm, reranker.config.rms_norm_eps)
    # Transformers' last hidden state is after the norm.
    assert torch.allclose(normed, expected[0][batch.read_rows], atol=1e-4, rtol=1e-4)
    # Old rows are as they were, markers are new, and each much like the end of a turn.
    table, old = reranker.model.weights.embedding, open_decoder(source).state["model.embed_tokens.weight"]
    markers = [reranker.checkpoint.tokenizer.token_to_id(t) for t in (EMBED_TOKEN, RERANK_TOKEN)]
    kept = [i for i in range(len(old)) if i not in markers]
    assert torch.equal(table[kept].float(), old[kept].float())
    end = old[reranker.checkpoint.tokenizer.token_to_id("<|im_end|>")]
    assert all(0.8 < torch.cosine_similarity(table[marker].float(), end.float(), dim=0) < 0.99 for marker in markers)
    assert not torch.equal(table[markers[0]], table[markers[1]])
    assert reranker.rerank("expert", TEXTS, max_doc_length=32, max_query_length=32)


def test_whitened_readouts_can_be_told_apart():
    generator = torch.Generator().manual_seed(0)
    common = 20 * torch.randn(40, generator=generator)
    spread = torch.logspace(0, -2, 40)
    documents = common + spread * torch.randn(300, 40, generator=generator)
    queries = common * 1.1 + spread * torch.randn(60, 40, generator=generator)
    assert torch.nn.functional.cosine_similarity(documents[:150], documents[150:]).mean() > 0.97
    w1, w2 = linear_projector(whitening(documents, queries, 16))
    assert w1.shape == (32, 40) and w2.shape == (16, 32)
    vectors = torch.relu(documents @ w1.T) @ w2.T
    assert abs(torch.nn.functional.cosine_similarity(vectors[:150], vectors[150:]).mean()) < 0.1
    assert vectors.mean(0).abs().max() < 0.05 and 0.3 < vectors.std(0)[0] < 1.2
    assert torch.allclose(vectors, documents @ whitening(documents, queries, 16).T, atol=1e-4)


def test_the_command_takes_a_plain_decoder(tmp_path):
    source, _ = decoder(tmp_path / "decoder", "llama")
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    (pairs / "documents.jsonl").write_text(
        "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(TEXTS))
    )
    (pairs / "pairs.jsonl").write_text(
        "".join(json.dumps({"query": t.split()[-1], "positive": i}) + "\n" for i, t in enumerate(TEXTS))
    )
    (tmp_path / "recipe.json").write_text(
        json.dumps({"steps": 2, "lists_per_step": 2, "hard": 2, "easy": 1, "constant": True, "average": 0.9,
                    "doc_tokens": 32, "doc_tokens_least": 8})
    )  # fmt: skip

    def run(*more):
        arguments = ["train", pairs, "--start", source, "--output", tmp_path / "out", "--recipe",
                     tmp_path / "recipe.json", "--json", *more]  # fmt: skip
        return CliRunner().invoke(app, list(map(str, arguments)))

    done = run("--layers", "2")
    assert done.exit_code == 0, done.output
    trained = Reranker.from_pretrained(tmp_path / "out" / "last")
    assert trained.config.num_layers == 2 and trained.checkpoint.raw_config["model_type"] == "llama"
    assert run("--layers", "2").exit_code == 0  # nothing is left to do
    # What was made of it is part of what a state is of.
    made = tmp_path / "out" / "start" / "config.json"
    before = made.read_text()
    made.write_text(before.replace('"rms_norm_eps"', '"max_length": 20, "rms_norm_eps"'))
    assert "another made" in run("--layers", "2").output
    made.write_text(before)
    other = run("--layers", "3")
    assert other.exit_code == 2 and "another start" in other.output
    (tmp_path / "recipe.json").write_text(json.dumps({"constant": 1}))
    assert "constant is 1, expected true or false" in run().output.replace("\n", " ")
    refused = CliRunner().invoke(app, ["train", str(pairs), "--start", str(tmp_path / "out" / "last"), "--output",
                                       str(tmp_path / "again"), "--layers", "1"])  # fmt: skip
    assert refused.exit_code == 2 and "no plain decoder" in refused.output
    too_many = CliRunner().invoke(app, ["train", str(pairs), "--start", str(source), "--output",
                                        str(tmp_path / "more"), "--layers", "4"])  # fmt: skip
    assert too_many.exit_code == 2 and "expected 1 to 3" in too_many.output


def test_what_is_no_plain_decoder_is_not_taken_for_one(tmp_path):
    source, _ = decoder(tmp_path / "decoder", "qwen3")
    for name, more in (("Qwen3-Reranker-0.6B", {}), ("x", {"lastrerank": {"family": "qwen3-reranker"}}),
                       ("y", {"architectures": ["Qwen3ForSequenceClassification"]})):  # fmt: skip
        folder = tmp_path / name
        shutil.copytree(source, folder)
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | more))
        assert not is_decoder(folder)
    state = load_file(source / "model.safetensors")
    for extra, said in (({"model.layers.0.self_attn.q_proj.bias": torch.zeros(96)}, "tensors are unknown"),
                        ({"norm.weight": torch.zeros(96)}, "there twice")):  # fmt: skip
        save_file(state | extra, str(source / "model.safetensors"), metadata={"format": "pt"})
        with pytest.raises(ValueError, match=said):
            open_decoder(source)


def test_a_fitted_vocabulary_reads_what_it_keeps_as_before():
    tokenizer = small_tokenizer(["the quick brown fox jumps over the lazy dog " * 20, *TEXTS * 20], 600)
    texts = [*TEXTS * 3, "überprüfung der überprüfung", "überprüfung"]
    new, before = fitted(tokenizer, texts, keep=330, add=12, always=["lazy"])
    vocabulary = new.get_vocab_size(with_added_tokens=False)
    assert new.get_vocab_size() == len(before) and vocabulary <= 330 + 12 + len("lazy")
    old = tokenizer.encode("lazy").ids
    assert [before[i] for i in new.encode("lazy").ids] == [(i,) for i in old]
    kept, as_before = {ids[0] for ids in before if len(ids) == 1}, 0
    for text in texts:
        ids, old = new.encode(text).ids, tokenizer.encode(text).ids
        assert new.decode(ids) == text
        if kept.issuperset(old):  # every token spells what it spelt
            assert [b for i in ids for b in before[i]] == old
            as_before += 1
    assert 0 < as_before < len(texts)
    assert len(new.encode("überprüfung").ids) < len(tokenizer.encode("überprüfung").ids)
    anything = "jumps 日本語 \t12 <|im_start|>x"
    assert new.decode(new.encode(anything).ids, skip_special_tokens=False) == anything
    special = [t["content"] for t in json.loads(new.to_str())["added_tokens"]]
    assert [new.token_to_id(t) for t in special] == list(range(vocabulary, new.get_vocab_size()))
    with pytest.raises(ValueError, match="expected a byte-level BPE"):
        fitted(Tokenizer.from_str(json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
               "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None,
               "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}})), [], 1, 1)  # fmt: skip


def teacher(texts):
    """Words that begin alike mean the like."""
    found = np.stack([np.random.default_rng(list((text.strip().lower() or " ")[:3].encode())).normal(size=16)
                      for text in texts])  # fmt: skip
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def test_new_words_begin_as_old_ones_of_their_meaning(tmp_path):
    source, _ = decoder(tmp_path / "decoder", "llama")
    texts = ["passagem relevancia"] * 50 + TEXTS
    bundled.fit_decoder(source, tmp_path / "fitted", texts, teacher, 700, 40)
    found = open_decoder(tmp_path / "fitted")
    table = found.state["model.embed_tokens.weight"]
    assert len(table) == found.raw_config["vocab_size"] == found.tokenizer.get_vocab_size()
    new, old = (found.tokenizer.encode(text).ids[-1] for text in (" relevancia", " relevance"))
    assert new != old
    others = torch.cosine_similarity(table[new][None], table, dim=1)
    assert torch.cosine_similarity(table[new], table[old], dim=0) > others.quantile(0.95)
    start = listwise_start(tmp_path / "fitted", tmp_path / "start", lists(), CONFIG)
    assert open_checkpoint(start).config.num_layers == 3


def test_lists_of_the_bundled_checkpoint(tmp_path, monkeypatch):
    """A list's negatives are of its pool and no answer, its teacher is BM25's scores beside a label's share, and every
    pool has its own; queries are people's, made, and in another language, with the negatives of one in its own."""
    monkeypatch.setattr(bundled, "MADE", {"debian/en": 200, "lo-index": 50})
    words = ("page", "style", "print", "table")
    documents = [f"{word} {other} is what the {other} of every {word} says in its own words"
                 for word in words for other in ("numbers", "one", "two", "x", "y", "z")]  # fmt: skip
    (tmp_path / "documents.jsonl").write_text(
        "".join(json.dumps({"id": f"d{i}", "text": t}) + "\n" for i, t in enumerate(documents))
    )
    pairs = [{"query": " ".join(t.split()[:2]), "positive": f"d{i}", "lang": "en", "group": f"p{i}",
              "source": "debian" if i < 12 else "lo-index"} for i, t in enumerate(documents)]  # fmt: skip
    pairs += [{"query": "druck eins", "positive": "d13", "lang": "de", "group": "p12", "source": "lo-index"},
              {"query": "druck zwei", "positive": "d14", "lang": "de", "group": "p0", "source": "lo-index"},
              {"query": "seite zwei", "positive": "d2", "lang": "de>en", "source": "debian-x"}]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    data = read_training_data(bundled.sampled_lists(tmp_path, tmp_path / "lists"))
    weights = bundled.pool_weights(data)
    assert set(weights) == {"lo-index/en", "lo-index/de", "debian/en", "debian-x/de>en", "lo-index-x/en",
                            "lo-index-x/de"}  # fmt: skip
    assert all(weights[pool] == bundled.WEIGHTS[pool] for pool in ("debian/en", "lo-index/en", "lo-index/de"))
    human = {(row["query"], row["positive"], f"{row['source']}/{row['lang']}") for row in pairs}
    counts = Counter(row.pool for row in data.rows)
    assert counts["debian/en"] > 12 + 180 and counts["lo-index/en"] > 11 + 45
    assert 0 < sum(row.renamed for row in data.rows) < len(data.rows) / 2
    for row in data.rows:
        assert row.positive not in row.negatives and row.teacher is not None
        assert list(row.teacher[1:]) == sorted(row.teacher[1:], reverse=True)  # as BM25 found them
        assert max(row.teacher) <= bundled.SHARPNESS and min(row.teacher[1:], default=1) > 0
        label = bundled.LABEL if (row.query, f"d{row.positive}", row.pool) in human else bundled.LABEL_MADE
        label = bundled.LABEL_RENAMED if row.renamed else bundled.LABEL_ACROSS if "-x/" in row.pool else label
        assert row.label == label
        assert all((number < 12) == row.pool.startswith("debian") for number in (row.positive, *row.negatives))
    best = [row.teacher[0] == bundled.SHARPNESS for row in data.rows if row.label == bundled.LABEL]
    assert sum(best) > len(best) / 2  # BM25 finds most of them first
    [foreign] = [row for row in data.rows if row.query == "seite zwei"]
    assert foreign.pool == "debian-x/de>en" and foreign.positive == 2
    assert any(foreign.negatives == row.negatives for row in data.rows if row.pool == "debian/en" and row.positive == 2)
    assert {row.query for row in data.rows if row.pool == "lo-index-x/en"} <= {"druck eins", "druck zwei"}


def test_the_bundled_recipe_goes_on_from_nothing_else(tmp_path, monkeypatch):
    """What is kept is of its data and settings; what has no word of them is somebody else's."""
    (tmp_path / "data").mkdir()
    monkeypatch.setattr("sys.argv", ["bundled", str(tmp_path / "data"), str(tmp_path / "out")])
    reached = []
    monkeypatch.setattr(bundled, "sampled_lists", lambda data, output: reached.append(data) or exit(0))
    for refused, change in ((False, None), (False, None), (True, ("data/pairs.jsonl", "{}")), (True, ("out/x", ""))):
        if change is not None:
            (tmp_path / change[0]).write_text(change[1])
        with pytest.raises(SystemExit, match="is of other data or another recipe" if refused else "^0$"):
            bundled.main()
    assert len(reached) == 2
    (tmp_path / "out" / "made_of.json").unlink()
    with pytest.raises(SystemExit, match="is of other data or another recipe"):
        bundled.main()


def test_a_gguf_file_holds_the_same_decoder(tmp_path):
    gguf = pytest.importorskip("gguf")
    source, model = decoder(tmp_path / "decoder", "llama")
    state, tokenizer = model.state_dict(), Tokenizer.from_file(str(source / "tokenizer.json"))
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    for name, value in (("embedding_length", 96), ("block_count", 3), ("feed_forward_length", 160),
                        ("attention.head_count", 6), ("attention.head_count_kv", 2), ("context_length", 4096)):
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    raw = json.loads(tokenizer.to_str())
    tokens = [tokenizer.id_to_token(i) or f"<unused{i}>" for i in range(SHAPE["vocab_size"])]
    special = {token["content"] for token in raw["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in raw["model"]["merges"]])
    theirs = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
              "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
              "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
              }  # fmt: skip
    for name, tensor in state.items():
        if name == "lm_head.weight":
            continue
        module = name.removesuffix(".weight")
        if module.startswith("model.layers."):
            _, _, layer, module = module.split(".", 3)
            if module.endswith(("q_proj", "k_proj")):  # llama.cpp's order of a head's channels
                heads = 6 if module.endswith("q_proj") else 2
                tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
            written = f"blk.{layer}.{theirs[module]}.weight"
        else:
            written = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}[module] + ".weight"
        writer.add_tensor(written, tensor.numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    found = open_decoder(decoder_from_gguf(path, tmp_path / "out"))
    for name, tensor in found.state.items():
        assert torch.equal(tensor, state[name]), name
    assert found.raw_config["rms_norm_eps"] == 1e-5 and found.raw_config["rope_theta"] == 10000.0
    text = "expert passage\n\n 12 <|im_start|>user"
    split = found.tokenizer.encode(text).tokens
    assert "<|im_start|>" in split and "1" in split and "12" not in split
