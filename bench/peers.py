"""What else runs a Qwen3 decoder on a CPU: llama.cpp, OpenVINO and ONNX Runtime, each from the same checkpoint.

Each gets its best start. The embedding table stays outside, so that none computes an output head over the vocabulary
or converts one; prompts, what is read and the scores are the baselines' (`bench.baseline`, `bench.pairs`). OpenVINO and
ONNX Runtime convert a plain decoder of ours, since an exported Transformers model carries more operations. What is
converted is written beside the checkpoint and taken from there the next time.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bench.measure import machine


class PlainDecoder(torch.nn.Module):
    """Qwen3 of one sequence as an exporter likes it: plain operations, everything that depends on positions is given.

    Args:
        config: of the checkpoint.
        state: its tensors, names without `model.`, fp32.
    """

    def __init__(self, config: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim, self.eps = config["head_dim"], config["rms_norm_eps"]
        self.num_layers = config["num_hidden_layers"]
        for name, tensor in state.items():
            # Inputs of a matrix product as exporters store them: [in, out].
            matrix = tensor.T.contiguous() if tensor.ndim == 2 else tensor
            self.register_buffer(name.replace(".", "_"), matrix)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Embeddings `[T, C]`, cos and sin `[T, head_dim]` to hidden states `[T, C]`."""
        for layer in range(self.num_layers):

            def weight(name: str, layer: int = layer) -> torch.Tensor:
                return getattr(self, f"layers_{layer}_{name}_weight")

            def heads(name: str, count: int, y: torch.Tensor) -> torch.Tensor:
                return (y @ weight(f"self_attn_{name}_proj")).view(-1, count, self.head_dim)

            y = self._norm(x, weight("input_layernorm"))
            q = self._rotate(self._norm(heads("q", self.heads, y), weight("self_attn_q_norm")), cos, sin)
            k = self._rotate(self._norm(heads("k", self.kv_heads, y), weight("self_attn_k_norm")), cos, sin)
            v = heads("v", self.kv_heads, y)
            group = self.heads // self.kv_heads
            k, v = (t.repeat_interleave(group, dim=1).transpose(0, 1)[None] for t in (k, v))
            mixed = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, is_causal=True)
            mixed = mixed[0].transpose(0, 1).reshape(-1, self.heads * self.head_dim)
            x = x + mixed @ weight("self_attn_o_proj")
            y = self._norm(x, weight("post_attention_layernorm"))
            gated = torch.nn.functional.silu(y @ weight("mlp_gate_proj")) * (y @ weight("mlp_up_proj"))
            x = x + gated @ weight("mlp_down_proj")
        return self._norm(x, self.norm_weight)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * weight

    def _rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


class Peer:
    """A decoder run by another library on embeddings that are looked up here.

    Args:
        folder: checkpoint of Qwen3 architecture without windows, in the published format.

    Raises:
        NotImplementedError: it is of another architecture.
    """

    file: str

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        if self.config["model_type"] != "qwen3":
            raise NotImplementedError(f"the decoder is {self.config['model_type']}, not qwen3")
        with safe_open(str(folder / "model.safetensors"), "pt") as file:
            self.table = file.get_tensor("model.embed_tokens.weight")
        self.convert(folder)
        self.load(folder / self.file)

    def convert(self, folder: Path) -> None:
        """Write `file` if it isn't there."""
        raise NotImplementedError

    def load(self, path: Path) -> None:
        raise NotImplementedError

    def run(self, embeddings: np.ndarray) -> np.ndarray:
        """`[T, C]` to `[T, C]`, fp32."""
        raise NotImplementedError

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states `[T, C]` after the last norm, of ids `[T]`."""
        return torch.from_numpy(self.run(self.table[ids].float().numpy()))

    def state(self, folder: Path) -> dict[str, torch.Tensor]:
        """The decoder's tensors without the embeddings, names without `model.`, fp32."""
        named = load_file(str(folder / "model.safetensors")).items()
        state = {name.removeprefix("model."): tensor.float() for name, tensor in named if name.startswith("model.")}
        del state["embed_tokens.weight"]
        return state

    def rotary(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin `[T, head_dim]`."""
        half = self.config["head_dim"] // 2
        frequencies = self.config["rope_theta"] ** (-np.arange(half) / half)
        angles = np.arange(length)[:, None] * np.concatenate([frequencies, frequencies])
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def example(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs to trace the plain decoder with."""
        cos, sin = (torch.from_numpy(part) for part in self.rotary(7))
        return torch.zeros(7, self.config["hidden_size"]), cos, sin


class OpenVino(Peer):
    """fp32, latency hint."""

    file = "openvino.xml"
    precision: str | None = "f32"  # None: OpenVINO's own choice

    def convert(self, folder: Path) -> None:
        import openvino

        path = folder / OpenVino.file
        if not path.exists():
            width, head_dim = self.config["hidden_size"], self.config["head_dim"]
            decoder = PlainDecoder(self.config, self.state(folder))
            with torch.inference_mode():
                model = openvino.convert_model(
                    decoder, example_input=self.example(),
                    input=[openvino.PartialShape([-1, size]) for size in (width, head_dim, head_dim)],
                )  # fmt: skip
            openvino.save_model(model, path, compress_to_fp16=False)

    def load(self, path: Path) -> None:
        import openvino

        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        if self.precision is not None:
            settings["INFERENCE_PRECISION_HINT"] = self.precision
        self.compiled = openvino.compile_model(path, "CPU", settings)
        found = self.compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if self.precision not in (None, found):
            raise ImportError(f"OpenVINO computes in {found} here")

    def run(self, embeddings: np.ndarray) -> np.ndarray:
        return self.compiled([embeddings, *self.rotary(len(embeddings))])[0]


class OpenVinoBfloat16(OpenVino):
    """bf16, which OpenVINO takes by itself where the processor multiplies it."""

    precision = "bf16"


class OpenVinoInt8(OpenVino):
    """Weights in int8 by NNCF, one scale an output; whatever OpenVINO makes of them here."""

    file = "openvino-int8.xml"
    precision = None

    def convert(self, folder: Path) -> None:
        import nncf
        import openvino

        super().convert(folder)
        if not (folder / self.file).exists():
            model = openvino.Core().read_model(folder / OpenVino.file)
            compressed = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
            openvino.save_model(compressed, folder / self.file)


class OnnxRuntime(Peer):
    """fp32."""

    file = "onnxruntime.onnx"

    def convert(self, folder: Path) -> None:
        path = folder / OnnxRuntime.file
        if not path.exists():
            names = ["x", "cos", "sin"]
            torch.onnx.export(
                PlainDecoder(self.config, self.state(folder)).eval(), self.example(), str(path), dynamo=False,
                opset_version=17, input_names=names, output_names=["hidden"],
                dynamic_axes={name: {0: "tokens"} for name in [*names, "hidden"]},
            )  # fmt: skip

    def load(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Idle threads that spin would slow whoever's turn it is.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])

    def run(self, embeddings: np.ndarray) -> np.ndarray:
        cos, sin = self.rotary(len(embeddings))
        return self.session.run(None, {"x": embeddings, "cos": cos, "sin": sin})[0]


class OnnxRuntimeInt8(OnnxRuntime):
    """Dynamic quantisation: activations u8, weights s8 an output and 7 bits, or sums would saturate without VNNI."""

    file = "onnxruntime-int8.onnx"

    def convert(self, folder: Path) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        super().convert(folder)
        if not (folder / self.file).exists():
            quantize_dynamic(
                folder / OnnxRuntime.file, folder / self.file, per_channel=True, reduce_range=True,
                weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"], use_external_data_format=True,
            )  # fmt: skip


class LlamaCpp(Peer):
    """A GGUF file written here. Its vocabulary is a stub of 32: the context is given embeddings, flash attention on."""

    kind, file = "Q8_0", "llama-q8_0.gguf"

    def convert(self, folder: Path) -> None:
        import gguf

        if (folder / self.file).exists():
            return
        config, writer = self.config, gguf.GGUFWriter(folder / self.file, "qwen3")
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(config["rope_theta"])
        writer.add_vocab_size(32)
        writer.add_tokenizer_model("none")
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
        for name, tensor in {"embed_tokens.weight": self.table[:32].float(), **self.state(folder)}.items():
            kind = gguf.GGMLQuantizationType[self.kind if tensor.ndim == 2 else "F32"]
            renamed = names.get_name(f"model.{name}", (".weight",))
            writer.add_tensor(renamed, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def load(self, path: Path) -> None:
        import llama_cpp

        self.library = llama_cpp
        self.silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.silence, ctypes.c_void_p(0))
        settings = llama_cpp.llama_model_default_params()
        # With its own layouts for AMX its products fault there (0.3.36: ldtilecfg in ggml_backend_amx_mul_mat).
        settings.use_extra_bufts = "amx_int8" not in machine()["flags"]
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        self.make_context(1024)

    def make_context(self, length: int) -> None:
        """Make one for `length` tokens: its cache takes memory for all of them."""
        library = self.library
        settings = library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = self.length = length
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        settings.embeddings, settings.pooling_type = True, library.LLAMA_POOLING_TYPE_NONE
        settings.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.pointer = library.llama_init_from_model(self.model, settings)
        if not self.pointer:
            raise RuntimeError(f"llama.cpp made no context for {length} tokens")

    def run(self, embeddings: np.ndarray) -> np.ndarray:
        library, (length, width) = self.library, embeddings.shape
        if length > self.length:
            library.llama_free(self.pointer)
            self.make_context(-(-length // 1024) * 1024)
        library.llama_memory_clear(library.llama_get_memory(self.pointer), True)
        batch = library.llama_batch_init(length, width, 1)
        try:
            batch.n_tokens = length
            ctypes.memmove(batch.embd, np.ascontiguousarray(embeddings).ctypes.data, embeddings.nbytes)
            for i in range(length):
                batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = i, 1, 0, 1
            status = library.llama_decode(self.pointer, batch)
            if status != 0:
                raise RuntimeError(f"llama_decode answered {status}")
            states = library.llama_get_embeddings(self.pointer)
            return np.ctypeslib.as_array(states, (length, width)).copy()
        finally:
            library.llama_batch_free(batch)


class LlamaCppF16(LlamaCpp):
    kind, file = "F16", "llama-f16.gguf"


class LlamaCppBF16(LlamaCpp):
    kind, file = "BF16", "llama-bf16.gguf"


class LlamaCppQ4(LlamaCpp):
    kind, file = "Q4_0", "llama-q4_0.gguf"
