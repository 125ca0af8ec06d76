"""Audio encoders from a pretrained folder: (B, K) samples of a recording -> (B, D).

Each makes the features that its model was trained on, in torch and without weights, of the whole recording; the layers
see windows of it. Zeros after the last sound are no part of the recording.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, cast

import torch
import torchaudio
from torch import Tensor, nn

from fedmm.errors import ConfigError
from fedmm.models.encoder import encoders
from fedmm.models.pretrained import PretrainedTransformer, Source, Steps
from fedmm.models.transformer import cut_windows
from fedmm.schema import InputSpec

# B studies, K samples, R frames, N mel bands, C channels, V windows, L steps of a window, T = V x L, W width of a step
# F places of a patch on the frequency axis, D width of the embedding

RATE = 16_000  # of all three models, where their preprocessor_config.json does not say otherwise
FFT, HOP = 400, 160  # samples: 25 and 10 ms; fixed in the feature extractors of Whisper and AST


class PretrainedAudio(PretrainedTransformer, abc.ABC):
    """Mean over the steps of each window, then over the windows that sound."""

    projections = ("q_proj", "v_proj")

    def __init__(self, spec: InputSpec, width: int, source: Source) -> None:
        super().__init__(spec, width, source)
        self.extractor = source.extractor()
        rate = self.extractor.get("sampling_rate", RATE)
        if spec.audio_rate != rate:
            raise ConfigError(
                f"the model of the pretrained folder {source.folder.name!r} was trained on audio of {rate} Hz",
                fix=f"data.audio_rate={rate}; recordings of any rate are resampled",
            )
        if self.count(spec.audio_shape[0]) < 1:
            raise ConfigError(
                f"audio of {spec.audio_seconds:g} s is too short for this model", fix="data.audio_seconds=2"
            )

    @abc.abstractmethod
    def count(self, samples: int) -> int:
        """Steps of a recording."""

    def layers(self) -> Sequence[nn.Module]:
        net: Any = self.backbone
        return cast(Sequence[nn.Module], net.layers)


def length_of(audio_BK: Tensor) -> Tensor:
    """(B,) samples up to the last one that is not zero."""
    place_K = torch.arange(1, audio_BK.shape[1] + 1, device=audio_BK.device)
    return torch.where(audio_BK != 0, place_K, 0).amax(1)


def before(count: int, end_B: Tensor) -> Tensor:
    """(B, count) bool: steps 0 … end - 1."""
    return torch.arange(count, device=end_B.device) < end_B.unsqueeze(1)


# --- wav2vec 2.0 --------------------------------------------------------------------------------------------------------

WINDOW = 768  # steps of 20 ms, 15 s: the longest crop that it was trained on (Baevski et al. 2020)


@encoders["audio"].register("wav2vec2")
class Wav2Vec2(PretrainedAudio):
    """wav2vec 2.0 from a pretrained folder (Baevski et al. 2020): convolutions on samples, then a Transformer."""

    model_type, network = "wav2vec2", "Wav2Vec2Model"

    def part(self, whole: Any) -> nn.Module:
        """Without what only training of its own kind used. The weight norm of one convolution becomes a plain weight."""
        nn.utils.parametrize.remove_parametrizations(whole.encoder.pos_conv_embed.conv, "weight")
        whole.adapter = None
        return cast(nn.Module, whole)

    def steps(self, audio_BK: Tensor) -> Steps:
        net: Any = self.backbone
        length_B = length_of(audio_BK)
        x_BCT = self.normalised(audio_BK, length_B).unsqueeze(1)
        for layer in net.feature_extractor.conv_layers:
            x_BCT = layer(x_BCT)
        x_BTW, _ = net.feature_projection(x_BCT.transpose(1, 2))
        steps_B = self._counts(length_B).clamp(min=1) * (length_B > 0)
        mask_BT = before(x_BTW.shape[1], steps_B)
        x_BTW = torch.where(mask_BT.unsqueeze(-1), x_BTW, torch.zeros_like(x_BTW))
        x_BTW = x_BTW + net.encoder.pos_conv_embed(x_BTW)
        if not self.config.do_stable_layer_norm:
            x_BTW = net.encoder.layer_norm(x_BTW)
        mask_BVL = cut_windows(mask_BT, WINDOW)
        return Steps(cut_windows(x_BTW, WINDOW).flatten(1, 2), mask_BVL, mask_BVL)

    def normalised(self, audio_BK: Tensor, length_B: Tensor) -> Tensor:
        """Mean 0, variance 1 over what sounds, zeros after it: transformers' Wav2Vec2FeatureExtractor."""
        if not self.extractor.get("do_normalize", True):
            return audio_BK
        here_BK, count_B1 = before(audio_BK.shape[1], length_B), length_B.clamp(min=1).unsqueeze(1)
        centred_BK = (audio_BK - audio_BK.sum(1, keepdim=True) / count_B1) * here_BK
        return centred_BK / (centred_BK.square().sum(1, keepdim=True) / count_B1 + 1e-7).sqrt()

    def _counts(self, samples: Any) -> Any:
        for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride, strict=True):
            samples = (samples - kernel) // stride + 1
        return samples

    def count(self, samples: int) -> int:
        return int(self._counts(samples))

    def layers(self) -> Sequence[nn.Module]:
        net: Any = self.backbone
        return cast(Sequence[nn.Module], net.encoder.layers)

    def after(self) -> nn.Module:
        net: Any = self.backbone
        return cast(nn.Module, net.encoder.layer_norm if self.config.do_stable_layer_norm else nn.Identity())


# --- Whisper ------------------------------------------------------------------------------------------------------------


@encoders["audio"].register("whisper")
class Whisper(PretrainedAudio):
    """Encoder of Whisper from a pretrained folder (Radford et al. 2023), over what sounds instead of always 30 s."""

    model_type, network = "whisper", "WhisperForAudioClassification"
    prefix = "encoder."

    def __init__(self, spec: InputSpec, width: int, source: Source) -> None:
        super().__init__(spec, width, source)
        bands = int(self.config.num_mel_bins)
        with torch.device("cpu"):  # also where the model is only counted: it looks at its own values
            filters = torchaudio.functional.melscale_fbanks(
                FFT // 2 + 1, 0.0, 8000.0, bands, RATE, norm="slaney", mel_scale="slaney"
            )
        self.register_buffer("filters", filters.T.contiguous(), persistent=False)
        self.register_buffer("shape", torch.hann_window(FFT), persistent=False)

    def part(self, whole: Any) -> nn.Module:
        """The decoder was never read."""
        whole.encoder.embed_positions.requires_grad_(False)  # sinusoids
        return cast(nn.Module, whole.encoder)

    def steps(self, audio_BK: Tensor) -> Steps:
        net: Any = self.backbone
        x_BWT = nn.functional.gelu(net.conv1(self.log_mel(audio_BK)))
        x_BTW = nn.functional.gelu(net.conv2(x_BWT)).transpose(1, 2)
        steps_B = (length_of(audio_BK) + 2 * HOP - 1) // (2 * HOP)
        longest = int(self.config.max_source_positions)
        x_BVLW = cut_windows(x_BTW, longest)
        x_BVLW = x_BVLW + net.embed_positions.weight[: x_BVLW.shape[2]]
        mask_BVL = cut_windows(before(x_BTW.shape[1], steps_B), longest)
        return Steps(x_BVLW.flatten(1, 2), mask_BVL, mask_BVL)

    def log_mel(self, audio_BK: Tensor) -> Tensor:
        """(B, N, R): transformers' WhisperFeatureExtractor, for the frames that there are. Silence follows the end."""
        frames = audio_BK.shape[1] // HOP
        padded_BK = nn.functional.pad(audio_BK, [0, FFT])
        window = self.get_buffer("shape")
        power = torch.stft(padded_BK, FFT, HOP, window=window, return_complex=True)[..., :frames].abs().square()
        log_BNR = (self.get_buffer("filters") @ power).clamp(min=1e-10).log10()
        return (torch.maximum(log_BNR, log_BNR.amax((1, 2), keepdim=True) - 8.0) + 4.0) / 4.0

    def count(self, samples: int) -> int:
        return (samples // HOP + 1) // 2

    def after(self) -> nn.Module:
        net: Any = self.backbone
        return cast(nn.Module, net.layer_norm)


# --- Audio Spectrogram Transformer --------------------------------------------------------------------------------------

MEAN, SPREAD = -4.2677393, 4.5689974  # of AudioSet, where preprocessor_config.json does not say otherwise
EMPHASIS, LOW, PADDED = 0.97, 20.0, 512  # Kaldi's


@encoders["audio"].register("ast")
class AST(PretrainedAudio):
    """Audio Spectrogram Transformer from a pretrained folder (Gong et al. 2021), over what sounds instead of always 10 s.

    Its two tokens and its positions are no layers, so they are never trained; the two tokens are its summary of a window.
    """

    model_type, network = "audio-spectrogram-transformer", "ASTModel"

    def __init__(self, spec: InputSpec, width: int, source: Source) -> None:
        super().__init__(spec, width, source)
        banks, _ = torchaudio.compliance.kaldi.get_mel_banks(
            self.config.num_mel_bins, PADDED, float(RATE), LOW, 0.0, 100.0, -500.0, 1.0
        )
        self.register_buffer("filters", nn.functional.pad(banks, [0, 1]), persistent=False)
        self.register_buffer("shape", torch.hann_window(FFT, periodic=False), persistent=False)

    def part(self, whole: Any) -> nn.Module:
        for token in whole.embeddings.parameters(recurse=False):
            token.requires_grad_(False)
        return cast(nn.Module, whole)

    def steps(self, audio_BK: Tensor) -> Steps:
        net: Any = self.backbone
        e_BWFT = net.embeddings.patch_embeddings.projection(
            self.fbank(audio_BK).transpose(1, 2).unsqueeze(1).contiguous()
        )
        bands, longest = net.embeddings.get_shape(self.config)
        e_BVLFW = cut_windows(e_BWFT.permute(0, 3, 2, 1), longest)
        place_FLW = net.embeddings.position_embeddings[0, 2:].reshape(bands, longest, -1)[:, : e_BVLFW.shape[2]]
        e_BVLW = (e_BVLFW.transpose(2, 3) + place_FLW).flatten(2, 3)  # frequency first, as in its positions
        tokens = torch.cat([net.embeddings.cls_token, net.embeddings.distillation_token], dim=1)
        tokens = (tokens + net.embeddings.position_embeddings[:, :2]).expand(*e_BVLW.shape[:2], -1, -1)
        steps_B = (length_of(audio_BK) + HOP * self.config.time_stride - 1) // (HOP * self.config.time_stride)
        here_BVL = cut_windows(before(e_BWFT.shape[3], steps_B), longest)
        sounds_BV2 = here_BVL.any(2, keepdim=True).expand(-1, -1, 2)
        mask_BVL = torch.cat([sounds_BV2, here_BVL.repeat(1, 1, bands)], dim=2)
        read_BVL = torch.cat([sounds_BV2, torch.zeros_like(mask_BVL[..., 2:])], dim=2)
        return Steps(torch.cat([tokens, e_BVLW], dim=2).flatten(1, 2), mask_BVL, read_BVL)

    def fbank(self, audio_BK: Tensor) -> Tensor:
        """(B, R, N): transformers' ASTFeatureExtractor (Kaldi's filter bank), for the frames that there are."""
        frame_BRK = audio_BK.unfold(1, FFT, HOP)
        frame_BRK = frame_BRK - frame_BRK.mean(2, keepdim=True)
        earlier_BRK = nn.functional.pad(frame_BRK, [1, 0], mode="replicate")[..., :-1]
        frame_BRK = (frame_BRK - EMPHASIS * earlier_BRK) * self.get_buffer("shape")
        power = torch.fft.rfft(frame_BRK, PADDED).abs().square()
        log_BRN: Tensor = (power @ self.get_buffer("filters").T).clamp(min=torch.finfo(torch.float32).eps).log()
        if not self.extractor.get("do_normalize", True):
            return log_BRN
        mean, spread = float(self.extractor.get("mean", MEAN)), float(self.extractor.get("std", SPREAD))
        return (log_BRN - mean) / (2 * spread)

    def count(self, samples: int) -> int:
        frames = (samples - FFT) // HOP + 1
        return (frames - int(self.config.patch_size)) // int(self.config.time_stride) + 1

    def after(self) -> nn.Module:
        net: Any = self.backbone
        return cast(nn.Module, net.layernorm)
