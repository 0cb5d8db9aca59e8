"""The training loop: packed lists through `model.py` with autograd, AdamW, warm-up and cosine, exact resume."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

import torch

from lastrerank import saving
from lastrerank.adapters import write_adapter
from lastrerank.checkpoint import Checkpoint
from lastrerank.cpus import available_cpus
from lastrerank.isolation import isolated
from lastrerank.kept import digest, partial_name
from lastrerank.lists import ListPrompt
from lastrerank.model import LastLayerProjections, LayerWeights, Model, ModelWeights
from lastrerank.ops.reference import ReferenceOperations
from lastrerank.packing import pack
from lastrerank.prompt import EncodedBlock
from lastrerank.readouts import Projector
from lastrerank.stored import read_json
from lastrerank.training.data import TrainingData
from lastrerank.training.drawing import DRAWING, WORKERS, DrawnList, ListDrawer
from lastrerank.training.losses import cosine, disperse_loss, distill_loss, rank_loss, similar_loss
from lastrerank.training.operations import TrainingOperations


@dataclass(frozen=True)
class TrainingConfig:
    """steps of lists_per_step lists each. Weights are those of the paper; 0 leaves a loss out.

    hard and easy: negatives per list, mined and random; with hard_least, the mined ones are as many as is drawn between
    the two. During the first `easy_start` of the steps half of them are random instead. doc_tokens: documents are cut
    here; with doc_tokens_least those of half of the lists at a number drawn between the two, short ones as often as
    long ones by factors. list_tokens: of documents that have more than this together some negatives are left out. A
    share `crowded` of the lists has 30 to 100 random documents more, all cut at doc_tokens_least, so that lists of as
    many as people rank are known, too. dual and similar are applied to a random half and a random eighth of the lists
    (they change the prompt).
    temperature falls linearly from the first to the second.
    average: decay, a step, of a running mean of the weights, which is what checkpoints hold (the paper merges some at
    the end); 0 for the weights themselves. constant: the learning rate stays where it is after the warm-up, for a
    training that is to go on as long as it gets better; else it falls by a cosine.
    lora_rank: 0 trains everything; else the decoder's linears get updates `lora_alpha / rank * B A`, and nothing
    else but the projector is trained (the paper's first stage: rank 16, alpha 32).
    """

    steps: int = 1000
    lists_per_step: int = 4
    hard: int = 8
    hard_least: int = 0
    easy: int = 4
    easy_start: float = 0.15
    doc_tokens: int = 96
    doc_tokens_least: int = 0
    list_tokens: int = 0
    crowded: float = 0.0
    query_tokens: int = 48
    learning_rate: float = 1e-3
    embedding_rate: float = 0.5
    warmup: float = 0.05
    weight_decay: float = 0.05
    temperature: tuple[float, float] = (0.25, 0.1)
    rank: float = 1.0
    disperse: float = 0.45
    dual: float = 0.85
    similar: float = 0.85
    distill: float = 0.0
    average: float = 0.0
    constant: bool = False
    lora_rank: int = 0
    lora_alpha: float = 32.0
    seed: int = 0

    @classmethod
    def from_file(cls, path: str | Path) -> TrainingConfig:
        """A recipe: a JSON object of these fields.

        Raises:
            ValueError: it is no JSON object, or a field is unknown or has a value of another kind; the message names
                it.
        """
        given = read_json(Path(path))
        kinds = {field.name: field.default for field in fields(cls)}
        for name, value in given.items():
            if name not in kinds:
                raise ValueError(f"{path}: the recipe has {name!r}, expected fields among {sorted(kinds)}")
            default = kinds[name]
            if isinstance(default, bool):
                if not isinstance(value, bool):
                    raise ValueError(f"{path}: the recipe's {name} is {value!r:.80}, expected true or false")
                continue
            numbers = value if isinstance(default, tuple) and isinstance(value, list) else [value]
            whole = isinstance(default, int)
            fits = len(numbers) == (len(default) if isinstance(default, tuple) else 1) and all(
                isinstance(number, int if whole else (int, float)) and not isinstance(number, bool)
                and math.isfinite(number) and number >= 0 for number in numbers
            )  # fmt: skip
            if not fits:
                raise ValueError(f"{path}: the recipe's {name} is {value!r:.80}, expected a value like {default!r}")
        fitting: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}
        return cls(**fitting)


# What a field may be, beside a number of its kind that is not negative.
_BOUNDS = {
    "lists_per_step": (1, math.inf), "doc_tokens": (1, math.inf), "query_tokens": (1, math.inf), "easy_start": (0, 1),
    "crowded": (0, 1), "warmup": (0, 1), "temperature": (1e-3, math.inf),
}  # fmt: skip


class Trainer:
    """Trains a checkpoint on lists. State is everything needed to go on exactly: weights, optimiser, step.

    Args:
        checkpoint: where training starts.
        data: lists to draw from.
        config: the recipe.
        device: torch device; a GPU trains under bf16 autocast of the linears.
        identity: of what a training depends on beside the recipe, by digest; a state is of one identity.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        data: TrainingData,
        config: TrainingConfig,
        device: str = "cpu",
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        prompt = checkpoint.family.prompt
        if not isinstance(prompt, ListPrompt):
            raise ValueError(f"{checkpoint.name} is of the family {checkpoint.family.name!r}: only listwise ones train")
        if config.lora_rank and (checkpoint.adapter is not None or checkpoint.config.quantised):
            what = "an adapter over another model" if checkpoint.adapter is not None else "int8"
            whole = f"lastrerank convert {checkpoint.name} FOLDER --dtype float32"
            raise ValueError(f"lora_rank is {config.lora_rank}: {checkpoint.name} is {what}; start from what `{whole}` "
                             "makes of it")  # fmt: skip
        for name, (least, most) in _BOUNDS.items():
            for value in config.temperature if name == "temperature" else (getattr(config, name),):
                if not least <= value <= most:
                    raise ValueError(f"{name} is {value}, expected {least} to {most}")
        if not config.average < 1:
            raise ValueError(f"average is {config.average}, expected less than 1")
        if not config.hard + config.easy:
            raise ValueError("hard and easy are 0: a list of one document teaches no order")
        if not config.easy and data.unmined:
            raise ValueError(f"easy is 0: {data.unmined} lists have no mined negative and would be of one document")
        for name in ("hard", "doc_tokens"):
            least, most = getattr(config, f"{name}_least"), getattr(config, name)
            if least > most:
                raise ValueError(f"{name}_least is {least}, {name} {most}")
        if config.crowded and not config.doc_tokens_least:
            raise ValueError(f"crowded is {config.crowded}, doc_tokens_least 0: crowded lists are cut at that")
        taught = config.distill and all(row.teacher is not None for row in data.rows)
        if not config.rank and not taught:
            raise ValueError(f"rank is 0, distill {config.distill}: a list without a teacher would teach no order")
        self.identity = dict(identity or {}) | {"way of drawing lists": DRAWING}
        self.checkpoint, self.data, self.config, self.device = checkpoint, data, config, torch.device(device)
        loaded = checkpoint.weights(self.device, torch.float32)
        state = saving.state_dict(checkpoint.config, loaded)
        self.parameters = {name: t.detach().float().clone() for name, t in state.items()}
        self.low_rank = self._low_rank_updates()
        trained = {n: p for n, p in self.parameters.items() if not self.low_rank or n.startswith("projector.")}
        trained |= self.low_rank
        for parameter in trained.values():
            parameter.requires_grad_()
        self.drawer = ListDrawer(data, config, checkpoint.tokenizer, prompt)
        # Beside a GPU other processes draw the lists; a CPU has enough to do with the steps.
        self.workers = min(WORKERS, available_cpus() - 1) if self.device.type == "cuda" else 0
        serve = TrainingOperations.serve(self.device, checkpoint.config.head_dim)
        self.operations = TrainingOperations() if serve else ReferenceOperations()
        self._trained = list(trained.values())
        embedding = [p for n, p in trained.items() if "embed_tokens" in n]
        matrices = [p for n, p in trained.items() if p.ndim == 2 and "embed_tokens" not in n]
        vectors = [p for p in trained.values() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": embedding, "weight_decay": 0.0, "scale": config.embedding_rate},
                {"params": matrices, "weight_decay": config.weight_decay, "scale": 1.0},
                {"params": vectors, "weight_decay": 0.0, "scale": 1.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.averaged = {name: tensor.detach().clone() for name, tensor in trained.items()} if config.average else {}
        self.step = 0

    def train(
        self, log: IO[str], *, until: int | None = None, on_step: Callable[[], None] | None = None
    ) -> None:
        """Train to the end of the recipe, or to step `until`. Writes a JSON line a step, then calls on_step."""
        last = self.config.steps if until is None else min(until, self.config.steps)
        started = time.perf_counter()
        for lists in self.drawer.ahead(self.step, last, self.workers):
            with isolated(self.device, inference=False):
                record = self._train_step(lists)
            record["tokens_per_s"] = record["tokens"] / (time.perf_counter() - started)
            started = time.perf_counter()
            log.write(json.dumps(record) + "\n")
            log.flush()
            if on_step is not None:
                on_step()

    def _train_step(self, lists: Sequence[DrawnList]) -> dict[str, Any]:
        """One step of the optimiser; what the log says of it."""
        rate = _schedule(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        losses = self._accumulate(lists)
        norm = float(torch.nn.utils.clip_grad_norm_(self._trained, 1.0))
        if not math.isfinite(norm):
            raise RuntimeError(f"step {self.step}: the gradient is not finite ({losses})")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._average()
        tokens = sum(len(drawn.block) for drawn in lists)
        return {"step": self.step, **losses, "grad_norm": norm, "learning_rate": rate, "tokens": tokens}

    def _accumulate(self, lists: Sequence[DrawnList]) -> dict[str, float]:
        """Gradients of one step, summed over its lists; mean losses."""
        config = self.config
        t0, t1 = config.temperature
        t = t0 + (t1 - t0) * self.step / max(1, config.steps - 1)
        readouts, projector = self.readouts([drawn.block for drawn in lists])
        vectors = torch.relu(readouts @ projector.w1.t()) @ projector.w2.t()

        weights = {"rank": config.rank, "disperse": config.disperse, "dual": config.dual, "similar": config.similar,
                   "distill": config.distill}
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        found: dict[str, list[torch.Tensor]] = {}
        counts = [len(drawn.block.doc_rows) + 1 for drawn in lists]
        for drawn, own in zip(lists, vectors.split(counts), strict=True):
            for name, loss in self._losses(drawn, own, t).items():
                total = total + weights[name] * loss
                found.setdefault(name, []).append(loss.detach())
        (total / config.lists_per_step).backward()
        return {name: float(torch.stack(losses).mean()) for name, losses in found.items()}

    def readouts(self, blocks: Sequence[EncodedBlock]) -> tuple[torch.Tensor, Projector]:
        """Normed states `[R, D]` at what is read of packed prompts, one after another: the documents, the query; the
        projector."""
        weights = self.weights()
        model = Model(self.checkpoint.config, weights, self.operations)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            hidden = model.hidden_states(pack(blocks, self.device))
        normed = self.operations.rms_norm(hidden.float(), weights.norm, self.checkpoint.config.rms_norm_eps)
        assert isinstance(weights.readout, Projector)
        return normed, weights.readout

    def _losses(self, example: DrawnList, vectors: torch.Tensor, t: float) -> dict[str, torch.Tensor]:
        """Of one list, `vectors` as `readouts` orders them."""
        config, dual = self.config, example.dual
        early, docs, query_vector = vectors[: int(dual)], vectors[int(dual) : -1], vectors[-1:]

        originals, positive = docs, example.positive
        if example.copy_of is not None:
            kept = [place for place, copy in enumerate(example.copy_of) if copy >= 0]
            originals, positive = docs[kept], kept.index(example.positive)
        scores = cosine(query_vector, originals)[0]
        losses = {"rank": rank_loss(scores, positive, t)}
        if config.disperse and len(originals) > 1:
            losses["disperse"] = disperse_loss(originals, t)
        if dual:
            losses["dual"] = rank_loss(cosine(early, originals)[0], positive, t)
        if example.copy_of is not None:
            losses["similar"] = similar_loss(originals, docs[[c for c in example.copy_of if c >= 0]], t)
        if config.distill and example.teacher is not None:
            teacher = torch.tensor(example.teacher, dtype=torch.float32, device=self.device)
            losses["distill"] = distill_loss(scores, teacher, t)
        return losses

    def _low_rank_updates(self) -> dict[str, torch.Tensor]:
        """For every linear of the decoder A `[r, in]`, random, and B `[out, r]`, zero; none for rank 0."""
        rank, generator = self.config.lora_rank, torch.Generator().manual_seed(self.config.seed)
        updates: dict[str, torch.Tensor] = {}
        for name, weight in self.parameters.items():
            if rank and name.endswith("_proj.weight"):
                out, width = weight.shape
                a = torch.randn(rank, width, generator=generator, dtype=torch.float32) * width**-0.5
                updates[f"{name}.lora_a"] = a.to(self.device)
                updates[f"{name}.lora_b"] = torch.zeros(out, rank, dtype=torch.float32, device=self.device)
        return updates

    @torch.no_grad()
    def _average(self) -> None:
        """The running mean follows; in the first steps it is a plain mean, so that it isn't the start for long."""
        follow = 1 - min(self.config.average, self.step / (self.step + 10))
        current = self.parameters | self.low_rank
        for name, mean in self.averaged.items():
            mean.lerp_(current[name], follow)

    def merged(self, averaged: bool = False) -> dict[str, torch.Tensor]:
        """Every tensor of the checkpoint as it is now, or on the average, low-rank updates added; differentiable."""
        current = self.parameters | self.low_rank | (self.averaged if averaged else {})
        if not self.low_rank:
            return current
        scale = self.config.lora_alpha / self.config.lora_rank
        with torch.autocast(self.device.type, enabled=False):  # saving happens outside of `isolated`
            return {
                name: current[name] + scale * (current[f"{name}.lora_b"] @ current[f"{name}.lora_a"])
                if f"{name}.lora_a" in self.low_rank else current[name]
                for name in self.parameters
            }  # fmt: skip

    def weights(self) -> ModelWeights:
        """The parameters as a model's weights, packed by differentiable concatenation."""
        p, config = self.merged(), self.checkpoint.config
        layers = []

        def qkv(attn: str) -> torch.Tensor:
            return torch.cat([p[f"{attn}{x}_proj.weight"] for x in "qkv"])

        for index in range(config.num_layers):
            prefix, attn = f"model.layers.{index}.", f"model.layers.{index}.self_attn."
            layers.append(
                LayerWeights(
                    input_norm=p[f"{prefix}input_layernorm.weight"],
                    qkv=None if index == config.num_layers - 1 else qkv(attn),
                    qkv_bias=torch.cat([p[f"{attn}{x}_proj.bias"] for x in "qkv"]) if config.attention_bias else None,
                    q_norm=p.get(f"{attn}q_norm.weight"),
                    k_norm=p.get(f"{attn}k_norm.weight"),
                    o=p[f"{attn}o_proj.weight"],
                    o_bias=p.get(f"{attn}o_proj.bias"),
                    post_norm=p[f"{prefix}post_attention_layernorm.weight"],
                    gate_up=torch.cat([p[f"{prefix}mlp.gate_proj.weight"], p[f"{prefix}mlp.up_proj.weight"]]),
                    down=p[f"{prefix}mlp.down_proj.weight"],
                )
            )
        final, q_size = qkv(attn), config.num_heads * config.head_dim
        return ModelWeights(
            p["model.embed_tokens.weight"], tuple(layers), LastLayerProjections(final[:q_size], final[q_size:]),
            p["model.norm.weight"], Projector(p["projector.0.weight"], p["projector.2.weight"]),
        )  # fmt: skip

    def save_checkpoint(self, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write the weights as a published-format checkpoint, in one step (see `lastrerank.saving`)."""
        name = str(dtype).removeprefix("torch.")
        raw = {n: v for n, v in self.checkpoint.raw_config.items() if n not in ("torch_dtype", "quantization_config")}
        raw["dtype"] = name
        raw["lastrerank"] = {k: v for k, v in (raw.get("lastrerank") or {}).items() if k != "random"}
        state = {n: t.detach().to("cpu", dtype) for n, t in self.merged(averaged=True).items()}
        source = self.checkpoint
        limits = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": source.config.max_context}
        saving.save(
            folder, raw, source.tokenizer, limits | dict(source.tokenizer_config), state, python_files=source.folder,
            hub_id=source.base if "/" in source.base else None,
        )  # fmt: skip

    def save_adapter(self, folder: str | Path) -> None:
        """Write the low-rank updates and the projector as an adapter that PEFT reads (see `lastrerank.adapters`).

        Raises:
            ValueError: everything is trained (lora_rank is 0).
        """
        if not self.low_rank:
            raise ValueError("lora_rank is 0: everything is trained, there is no adapter")
        current = {n: t.detach() for n, t in (self.parameters | self.low_rank | self.averaged).items()}
        updates = {
            name: (current[f"{name}.lora_b"], current[f"{name}.lora_a"])
            for name in self.parameters if f"{name}.lora_a" in self.low_rank
        }  # fmt: skip
        source = self.checkpoint
        base, revision = str(source.folder.resolve()), None
        if "/" in source.name:
            base, revision = source.name, source.folder.name if source.folder.parent.name == "snapshots" else None
        projector = {name: tensor for name, tensor in current.items() if name.startswith("projector.")}
        write_adapter(folder, base, updates, projector, self.config.lora_rank, self.config.lora_alpha, revision)

    def save_state(self, path: str | Path) -> None:
        """Write what `load_state` needs to go on exactly where this trainer is; the file is replaced in one step.

        Raises:
            OSError: it can't be written; the old one is there.
        """
        partial = partial_name(Path(path))
        state: dict[str, Any] = {
            "step": self.step, "config": asdict(self.config), "identity": self.identity,
            "optimizer": self.optimizer.state_dict(),
            "parameters": {n: t.detach() for n, t in (self.parameters | self.low_rank).items()},
            "averaged": self.averaged,
        }  # fmt: skip
        try:
            torch.save(state | {"checksum": _checksum(state)}, partial)
            with partial.open("rb") as written:
                os.fsync(written.fileno())
            partial.replace(path)
        except RuntimeError as error:  # PyTorch's, of a full disk
            raise OSError(f"{path} can't be written: {error}") from error
        finally:
            partial.unlink(missing_ok=True)

    def load_state(self, path: str | Path) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: the state is damaged, or of another recipe, start or data.
        """
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            intact = state.pop("checksum") == _checksum(state)
        except Exception as error:  # whatever PyTorch makes of a damaged file
            raise ValueError(f"{path} is damaged ({type(error).__name__}): remove it to start anew") from error
        if not intact:
            raise ValueError(f"{path} is damaged (its checksum is another): remove it to start anew")
        for name in sorted(state["identity"].keys() | self.identity.keys()):
            if state["identity"].get(name) != self.identity.get(name):
                raise ValueError(f"{path} is of a training with another {name}: name another output, or remove it")
        # What a field that is newer or older than the state means there is its default, or nothing.
        ours = asdict(self.config)
        theirs = {field.name: field.default for field in fields(self.config)} | state["config"]
        for name, value in theirs.items():
            if value != ours.get(name, 0):
                raise ValueError(f"{path} was trained with {name} = {value!r}, this recipe has {ours.get(name)!r}")
        with torch.no_grad():
            for name, tensor in (self.parameters | self.low_rank).items():
                tensor.copy_(state["parameters"][name])
            for name, tensor in self.averaged.items():
                tensor.copy_(state["averaged"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def _checksum(value: Any) -> str:
    """SHA-256 of everything in a nested state."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return digest(str(value.dtype), list(value.shape), hashlib.sha256(raw.data).hexdigest())
    if isinstance(value, dict):
        items = sorted(value.items(), key=lambda item: str(item[0]))
        return digest(*([str(key), _checksum(own)] for key, own in items))
    if isinstance(value, (list, tuple)):
        return digest(*map(_checksum, value))
    return digest(value)


def _schedule(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then the learning rate, constant or by a cosine to a twentieth of it."""
    warmup = max(1, int(config.warmup * config.steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.constant:
        return config.learning_rate
    progress = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))

