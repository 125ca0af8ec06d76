"""Report encoders from a pretrained folder: (B, T) ids of its own tokeniser, shifted by one, 0 is padding -> (B, D).

Ids are stored without special tokens: each window gets the folder's own frame ([CLS] … [SEP]) here. A window is as long
as the model's positions; windows of a long report stand beside one another and are averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fedmm.errors import ConfigError
from fedmm.models.encoder import encoders
from fedmm.models.pretrained import PretrainedTransformer, Source, Steps
from fedmm.models.text_sequence import used
from fedmm.models.transformer import cut_windows
from fedmm.pretrained_folder import specials, tokenizer
from fedmm.schema import InputSpec

# B studies, V windows, L tokens of a window (framed: F), T tokens, W width of a token, D width of the embedding


class PretrainedReport(PretrainedTransformer):
    """Mean over the tokens of each window, its frame among them, then over the windows that hold a token."""

    def __init__(self, spec: InputSpec, width: int, source: Source) -> None:
        name = source.folder.name
        if spec.report_tokenizer != name:
            raise ConfigError(
                f"the report encoder reads tokens of the pretrained folder {name!r}",
                why="token ids mean something to the model that they were made for alone",
                fix=f"data.report_tokenizer={name}",
            )
        super().__init__(spec, width, source)
        words = tokenizer(name)
        before, behind = specials(words)
        if words.get_vocab_size() > self.config.vocab_size:
            raise source.wrong(
                f"its tokeniser has {words.get_vocab_size()} tokens, its model {self.config.vocab_size}",
                fix="get both from the same place",
            )
        self.register_buffer("before", torch.tensor(before, dtype=torch.int64), persistent=False)
        self.register_buffer("behind", torch.tensor(behind, dtype=torch.int64), persistent=False)
        self.room = self.config.max_position_embeddings - self.first() - len(before) - len(behind)
        if self.room < 1:
            raise source.wrong("its model has no positions for tokens")

    def first(self) -> int:
        """The first position."""
        return 0

    def steps(self, report_BT: Tensor) -> Steps:
        id_BVF, mask_BVF = self.framed(cut_windows(used(report_BT), self.room))
        # One row of ids for each study and contiguous: a shared row has no gradient per study.
        place_F = torch.arange(id_BVF.shape[2], device=id_BVF.device) + self.first()
        place_BVF = place_F.expand(id_BVF.shape).contiguous()
        return Steps(self.embed(id_BVF.flatten(1), place_BVF.flatten(1)), mask_BVF, mask_BVF)

    def framed(self, report_BVL: Tensor) -> tuple[Tensor, Tensor]:
        """(B, V, F) ids of the model, each window's tokens in its frame; (B, V, F) bool: where such are."""
        before, behind = self.get_buffer("before"), self.get_buffer("behind")
        count_BV1 = (report_BVL > 0).sum(2, keepdim=True)
        # Ids above the vocabulary come from no tokeniser (a test compares): random ones of a rehearsal may.
        id_BVL = (report_BVL - 1).clamp(min=0, max=self.config.vocab_size - 1)
        front = before.expand(*id_BVL.shape[:2], -1)
        back = behind.expand(*id_BVL.shape[:2], -1)
        id_BVF = torch.cat([front, id_BVL, torch.zeros_like(back)], dim=2)
        end_BVS = len(before) + count_BV1 + torch.arange(len(behind), device=id_BVF.device)
        id_BVF = id_BVF.scatter(2, end_BVS, back)
        length_BV1 = torch.where(count_BV1 > 0, count_BV1 + len(before) + len(behind), 0)
        return id_BVF, torch.arange(id_BVF.shape[2], device=id_BVF.device) < length_BV1

    def embed(self, id_BT: Tensor, place_BT: Tensor) -> Tensor:
        """(B, T, W)"""
        net: Any = self.backbone
        return cast(
            Tensor,
            net.embeddings(input_ids=id_BT, position_ids=place_BT, token_type_ids=torch.zeros_like(id_BT)),
        )

    def layers(self) -> Sequence[nn.Module]:
        net: Any = self.backbone
        return cast(Sequence[nn.Module], net.encoder.layer)


@encoders["report"].register("bert")
class Bert(PretrainedReport):
    """BERT from a pretrained folder (Devlin et al. 2019); also ClinicalBERT, PubMedBERT and other models of this type."""

    model_type, network = "bert", "BertModel"
    settings: ClassVar[Mapping[str, Any]] = {"add_pooling_layer": False}
    projections = ("query", "value")  # as in Hu et al. 2021


@encoders["report"].register("roberta")
class Roberta(PretrainedReport):
    """RoBERTa from a pretrained folder (Liu et al. 2019)."""

    model_type, network = "roberta", "RobertaModel"
    settings: ClassVar[Mapping[str, Any]] = {"add_pooling_layer": False}
    projections = ("query", "value")

    def first(self) -> int:
        """Its positions begin after that of padding."""
        return int(self.config.pad_token_id) + 1


@encoders["report"].register("distilbert")
class DistilBert(PretrainedReport):
    """DistilBERT from a pretrained folder (Sanh et al. 2019): half of BERT's layers."""

    model_type, network = "distilbert", "DistilBertModel"
    projections = ("q_lin", "v_lin")

    def embed(self, id_BT: Tensor, place_BT: Tensor) -> Tensor:
        net: Any = self.backbone
        return cast(Tensor, net.embeddings(id_BT, position_ids=place_BT))

    def layers(self) -> Sequence[nn.Module]:
        net: Any = self.backbone
        return cast(Sequence[nn.Module], net.transformer.layer)
