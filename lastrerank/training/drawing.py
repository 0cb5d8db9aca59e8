"""What a step of training reads: lists drawn from the data, cut, and encoded as prompts.

A step's lists depend on its number and the recipe alone, so that training resumes exactly, and other processes may draw
them ahead (a GPU computes faster than one process encodes).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset

from lastrerank.families.listwise import GGUF_PROMPT
from lastrerank.kept import digest
from lastrerank.lists import ListEncoder, ListPrompt
from lastrerank.prompt import EncodedBlock
from lastrerank.training.data import TrainingData, TrainingList, labelled

if TYPE_CHECKING:
    from lastrerank.training.trainer import TrainingConfig

# Of the rules by which a step's lists are drawn: a training goes on by the ones that it began with, or not at all.
DRAWING = 3
# Random documents more in a crowded list.
CROWD = (30, 100)
# Processes that draw for a GPU, and steps that each of them is ahead.
WORKERS, AHEAD = 8, 4


@dataclass(frozen=True)
class DrawnList:
    """A list as a step reads it.

    block: its prompt; dual: with the query early, too, whose row is read as if it were the first document's.
    positive, copy_of: as of `TrainingList`. teacher: logits of the teacher's distribution, the label's share in it.
    """

    block: EncodedBlock
    dual: bool
    positive: int
    teacher: tuple[float, ...] | None
    copy_of: tuple[int, ...] | None


class ListDrawer(Dataset[list[DrawnList]]):
    """The lists of every step, by its number.

    Args:
        data: lists to draw from.
        config: the recipe.
        tokenizer: with the prompt's control tokens.
        prompt: of the checkpoint's family.
    """

    def __init__(self, data: TrainingData, config: TrainingConfig, tokenizer: Tokenizer, prompt: ListPrompt) -> None:
        self.data, self.config = data, config
        self.encoder = ListEncoder(tokenizer, prompt)
        self.dual_encoder = ListEncoder(tokenizer, GGUF_PROMPT)
        self._vocabulary = tokenizer.get_vocab_size()
        # Ids that no renamed text has or loses: the template's, numbers, what isn't text.
        template = self._block(TrainingList("", ("",) * 100, 0), False, 1).ids
        self._fixed = np.union1d(template, list(tokenizer.get_added_tokens_decoder()))

    def __getitem__(self, step: int) -> list[DrawnList]:
        config = self.config
        early = step < config.easy_start * config.steps
        drawn = []
        for number in range(step * config.lists_per_step, (step + 1) * config.lists_per_step):
            rng = random.Random(f"{config.seed}/{number}/sizes")
            similar = config.similar > 0 and number % 8 == 7
            crowded = rng.random() < config.crowded and not similar
            hard, easy, cap = config.hard, config.easy, config.doc_tokens
            if config.hard_least:
                hard = rng.randint(config.hard_least, hard)
            if crowded:
                easy += rng.randint(*CROWD)
            elif early:
                hard, easy = hard // 2, easy + hard - hard // 2
            if similar:  # a list of twice the documents
                hard, easy = hard // 2, easy // 2
            least = config.doc_tokens_least
            if least and (crowded or rng.random() < 0.5):
                cap = least if crowded else round(least * (cap / least) ** rng.random())
            example = self.data.draw(config.seed, number, hard, easy, augment=similar)
            if not crowded and not similar:
                example = self._shorter(example, cap)
            dual = config.dual > 0 and number % 2 == 0
            block = self._block(example, dual, cap)
            # Of the documents that are left: the label's share is the same, whatever the list.
            teacher = example.teacher and tuple(labelled(example.teacher, example.label, example.positive))
            drawn.append(DrawnList(block, dual, example.positive, teacher, example.copy_of))
        return drawn

    def ahead(self, first: int, last: int, workers: int) -> Iterator[list[DrawnList]]:
        """The lists of steps `first` to `last - 1`, drawn by `workers` processes; for 0, when they are asked for."""
        return iter(
            DataLoader(
                self, batch_size=None, sampler=range(first, last), generator=torch.Generator(), num_workers=workers,
                prefetch_factor=AHEAD if workers else None, multiprocessing_context="fork" if workers else None,
            )
        )  # fmt: skip

    def _shorter(self, example: TrainingList, cap: int) -> TrainingList:
        """The list without the negatives that are too many for `list_tokens`."""
        most = self.config.list_tokens
        if not most:
            return example
        lengths = [cut.length for cut in self.encoder.cut(example.documents, cap)]
        total, kept = lengths[example.positive], [example.positive]
        for place, length in enumerate(lengths):
            if place != example.positive and total + length <= most:
                total += length
                kept.append(place)
        kept.sort()
        return replace(
            example, documents=tuple(example.documents[place] for place in kept),
            positive=kept.index(example.positive),
            teacher=None if example.teacher is None else tuple(example.teacher[place] for place in kept),
        )  # fmt: skip

    def _block(self, example: TrainingList, dual: bool, cap: int) -> EncodedBlock:
        encoder = self.dual_encoder if dual else self.encoder
        query = encoder.cut([example.query], self.config.query_tokens)[0]
        block = encoder.encode_block(query, encoder.cut(example.documents, cap))
        if example.renamed:
            block = self._renamed(block, digest(example.query, example.documents))
        if dual and block.early_query_row is not None:
            block = replace(block, doc_rows=np.append(block.early_query_row, block.doc_rows))
        return block

    def _renamed(self, block: EncodedBlock, seed: str) -> EncodedBlock:
        """The prompt with a drawn share of its texts' tokens renamed."""
        rng = np.random.default_rng(int(seed, 16))
        own = np.setdiff1d(block.ids, self._fixed)
        drawn = rng.random(len(own)) < rng.choice((0.3, 0.6, 1.0))
        names = np.arange(self._vocabulary, dtype=np.int32)
        free = np.setdiff1d(names, np.union1d(self._fixed, own[~drawn]))
        names[own[drawn]] = rng.choice(free, int(drawn.sum()), replace=False)
        return replace(block, own_ids=names[block.ids], prefix=None)

