"""Fusions over time: a patient's studies one after the other; a report and a recording side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedmm.models.fusion import Concat, Fusion, flat_with_flags, fusions
from fedmm.models.fusion_attention import HEADS, Attention, learnt
from fedmm.models.sequence import Sequence
from fedmm.schema import MODALITIES, Timeline

# B studies, S studies of one patient, M modalities, D width, A attention heads, K D / A, T steps of both sequences

MONTH = 30.0  # days; differences are counted in months, as follow-up images of the chest are: guess
STEPS = 64  # at most, of a sequence: bounds attention at (2 x 64)^2 scores a head; a default report has 64
FADING = 10.0  # of a head's attention over the whole length, to begin with and about: guess


@fusions.register("timeline")
class OverStudies(Fusion):
    """Each study fused as by `concat`, then it asks the same patient's studies of the same or an earlier day.

    A study without a day asks itself alone and is asked by nobody else; so does each study where no timeline is given.
    The time between two studies is a learnt bias of each head (one looks back to the beginning, one at the last study),
    and how far back each head looked is told to the next layer.

    Allowed because the unit is the patient: gradients are added up by patient before they are clipped, so studies of one
    patient may mix. Rows of other patients are never read, not even with weight 0 (0 x NaN is NaN): each study's own
    patient's rows are gathered first. With privacy.unit = record a study is a unit of its own: refused
    (training.loop.check_unit). In training the history is what was drawn: at most training.max_studies of a patient, at
    random; in evaluation it is everything up to that day.
    Source: attention with a bias linear in the distance, Press et al. 2022.
    """

    over_time = True

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.heads = math.gcd(width, HEADS)
        self.study = Concat(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.slope = nn.Embedding(1, self.heads)
        self.output = nn.Linear(width + self.heads, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, z_BMD: Tensor, seen_BM: Tensor, timeline: Timeline | None = None) -> Tensor:
        z_BD = self.study(z_BMD, seen_BM)
        row_BS, asked_BS, apart_BS = history(timeline or each_alone(z_BD))
        query_BAK, key_BAK, value_BAK = (
            layer(z_BD).unflatten(1, (self.heads, -1)) for layer in (self.query, self.key, self.value)
        )
        slope_BA1 = learnt(self.slope, z_BD).transpose(1, 2)
        score_BAS = torch.einsum("bak,bsak->bas", query_BAK, key_BAK[row_BS]) / math.sqrt(query_BAK.shape[-1])
        score_BAS = score_BAS + slope_BA1 * apart_BS.unsqueeze(1)
        asked_B1S = asked_BS.unsqueeze(1)
        weight_BAS = score_BAS.masked_fill(~asked_B1S, torch.finfo(score_BAS.dtype).min).softmax(-1) * asked_B1S
        found_BD = torch.einsum("bas,bsak->bak", weight_BAS, value_BAK[row_BS]).flatten(1)
        back_BA = (weight_BAS * apart_BS.unsqueeze(1)).sum(2)
        out: Tensor = self.norm(z_BD + self.output(torch.cat([found_BD, back_BA], dim=1)))
        return out


def each_alone(z_BD: Tensor) -> Timeline:
    """Every study of a patient of its own."""
    patient_B = torch.arange(len(z_BD), device=z_BD.device)
    return Timeline(patient_B, z_BD.new_full((len(z_BD),), torch.nan))


def history(timeline: Timeline) -> tuple[Tensor, Tensor, Tensor]:
    """(B, S) each: rows of the study's own patient, whether the study asks them, log(1 + months) between the two.

    S: most studies of a patient in the batch; a place that is left over holds the study itself and is not asked.
    """
    patient_B, day_B = timeline
    count_P = torch.bincount(patient_B)
    most = int(count_P.max()) if len(patient_B) else 1
    self_B1 = torch.arange(len(patient_B), device=patient_B.device).unsqueeze(1)
    place_S = torch.arange(most, device=patient_B.device)
    there_BS = place_S < count_P[patient_B].unsqueeze(1)
    first_B1 = (count_P.cumsum(0) - count_P)[patient_B].unsqueeze(1)
    place_BS = torch.where(there_BS, first_B1 + place_S, 0)
    row_BS = torch.where(there_BS, patient_B.argsort(stable=True)[place_BS], self_B1)
    past_B1, past_BS = day_B.unsqueeze(1), day_B[row_BS]
    asked_BS = there_BS & ((past_BS <= past_B1) | (row_BS == self_B1))  # a comparison with NaN is false
    apart_BS = torch.where(past_BS < past_B1, past_B1 - past_BS, 0.0) / MONTH
    return row_BS, asked_BS, apart_BS.log1p()


@fusions.register("aligned")
class Aligned(Fusion):
    """Words ask the sounds of their time and sounds the words, then both are joined with all modalities as by `concat`.

    Attention of each head fades with |t_sound - t_word| at a learnt rate; times are relative positions (sequence.py). For
    dictations read along the report, and wherever it matters what was said when. One set of weights for both directions
    and a learnt mark of who speaks. Needs encoders that give a sequence; an absent modality is asked by nobody and adds 0.
    Source: Tsai et al. 2019, cross-modal attention of unaligned sequences; the bias as in Press et al. 2022.
    """

    sequences = ("report", "audio")

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.kind = nn.Embedding(len(self.sequences), width)
        self.before, self.ask = nn.LayerNorm(width), Attention(width)
        self.fade = nn.Embedding(1, self.ask.heads)
        self.between, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.join = nn.Linear(len(MODALITIES) * (width + 1) + len(self.sequences) * width, width)

    def forward(self, z_BMD: Tensor, seen_BM: Tensor, sequences: Mapping[str, Sequence] | None = None) -> Tensor:
        """sequences: of each of `self.sequences`; none: each modality is one step."""
        given = sequences or {name: as_one_step(name, z_BMD, seen_BM) for name in self.sequences}
        parts = [given[name].coarse(STEPS) for name in self.sequences]
        heard_BXD = self.listen(parts).flatten(1)
        out: Tensor = self.join(torch.cat([flat_with_flags(z_BMD, seen_BM), heard_BXD], dim=1)).relu()
        return out

    def listen(self, parts: list[Sequence]) -> Tensor:
        """(B, 2, D) mean over each sequence's steps after they have asked the other's; zeros where it is absent."""
        lengths = [part.z_BLD.shape[1] for part in parts]
        speaker_T = torch.arange(len(parts), device=parts[0].z_BLD.device).repeat_interleave(
            torch.tensor(lengths, device=parts[0].z_BLD.device)
        )
        z_BTD = torch.cat([part.z_BLD for part in parts], dim=1)
        z_BTD = z_BTD + self.kind(speaker_T.repeat(len(z_BTD), 1))
        mask_BT = torch.cat([part.mask_BL for part in parts], dim=1)
        time_BT = torch.cat([part.time_BL for part in parts], dim=1)
        allowed_BTT = mask_BT.unsqueeze(1) & (speaker_T.unsqueeze(1) != speaker_T)
        apart_BTT = (time_BT.unsqueeze(2) - time_BT.unsqueeze(1)).abs()
        rate_BA11 = nn.functional.softplus(learnt(self.fade, z_BTD)).transpose(1, 2).unsqueeze(3)
        bias_BATT = -FADING * rate_BA11 * apart_BTT.unsqueeze(1)
        z_BTD = z_BTD + self.ask(self.before(z_BTD), allowed_BTT, bias_BATT)
        z_BTD = z_BTD + self.narrow(nn.functional.gelu(self.wide(self.between(z_BTD))))
        steps = self.after(z_BTD).split(lengths, dim=1)
        means = [part._replace(z_BLD=z_BLD).mean() for part, z_BLD in zip(parts, steps, strict=True)]
        return torch.stack(means, dim=1)


def as_one_step(name: str, z_BMD: Tensor, seen_BM: Tensor) -> Sequence:
    """A modality without times."""
    m = MODALITIES.index(name)
    share_B1 = seen_BM[:, m : m + 1].to(z_BMD.dtype)
    return Sequence(z_BMD[:, m : m + 1], share_B1, torch.full_like(share_B1, 0.5))
