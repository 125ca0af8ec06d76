"""Pretrained folders with tiny random models, in the form in which Hugging Face's own `save_pretrained` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn

from fedmm.models.multimodal import ModelSpec
from fedmm.pretrained_folder import digests
from fedmm.schema import InputSpec
from tests import tiny

VOCABULARY = 100
POSITIONS = 9  # 7 tokens and their frame in a window
RATE = 16_000
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
REPORTS = ("bert", "roberta", "distilbert")
RECORDINGS = ("wav2vec2", "whisper", "ast")
IMAGES = ("resnet18",)
MODALITY = {**dict.fromkeys(REPORTS, "report"), **dict.fromkeys(RECORDINGS, "audio"), **dict.fromkeys(IMAGES, "image")}


def inputs_for(name: str, inputs: InputSpec) -> InputSpec:
    """`inputs` as the encoder of this name, from a folder of the same name, wants them."""
    settings: dict[str, Any] = {}
    if name in REPORTS:
        settings = {"report_tokenizer": name}
    if name in RECORDINGS:
        settings = {"audio_form": "waveform", "audio_rate": RATE}
    return InputSpec(**{**inputs.model_dump(), **settings})


def folder_spec(name: str, tuning: str, inputs: InputSpec) -> ModelSpec:
    """Of a tiny model with the encoder of this name from the folder of the same name."""
    form, modality = inputs_for(name, inputs), MODALITY[name]
    model = tiny.leaves(**{modality: name, f"{modality}_from": name, "tuning": tuning})
    return ModelSpec(inputs=form, model=model, labels=tiny.LABELS, pretrained=digests(model, form))


def write_all(root: Path) -> None:
    """A folder for each of REPORTS, RECORDINGS and IMAGES."""
    for name in (*REPORTS, *RECORDINGS):
        write(root / name, network(name))
    for name in IMAGES:
        write_image(root / name, name)


def network(name: str, **more: Any) -> Any:
    """A model of `transformers` with random weights and a head for its own kind of training."""
    import transformers as hf

    words = {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS}
    torch.manual_seed(1)
    if name == "bert":
        return hf.BertForMaskedLM(hf.BertConfig(**SIZES, **words, **more))
    if name == "roberta":
        words["max_position_embeddings"] += 1  # its positions begin after that of padding
        return hf.RobertaForMaskedLM(hf.RobertaConfig(**SIZES, **words, pad_token_id=0, **more))
    if name == "distilbert":
        return hf.DistilBertForMaskedLM(
            hf.DistilBertConfig(**words, dim=16, n_layers=2, n_heads=2, hidden_dim=24, **more)
        )
    if name == "wav2vec2":
        convolutions = {
            "conv_dim": (8, 8, 8), "conv_kernel": (10, 8, 8), "conv_stride": (10, 8, 4), "num_feat_extract_layers": 3,
            "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_codevectors_per_group": 4,
        }  # fmt: skip
        return hf.Wav2Vec2ForPreTraining(hf.Wav2Vec2Config(**SIZES, **convolutions, **more))
    if name == "whisper":
        sizes = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        given = {"max_source_positions": 20, "num_mel_bins": 80, **more}
        config = hf.WhisperConfig(
            vocab_size=VOCABULARY, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, **sizes, **special, **given
        )  # fmt: skip
        return hf.WhisperForConditionalGeneration(config)
    patches = {"patch_size": 4, "frequency_stride": 4, "time_stride": 4}
    model = hf.ASTForAudioClassification(hf.ASTConfig(**SIZES, **patches, num_mel_bins=16, max_length=24, **more))
    for token in model.audio_spectrogram_transformer.embeddings.parameters(recurse=False):
        nn.init.normal_(token)  # zero at first in transformers: two equal tokens tell nothing
    return model


def write(folder: Path, model: Any) -> None:
    """config.json, model.safetensors, and tokenizer.json for reports."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder)
    if model.config.model_type in REPORTS:
        write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """Words w0 … w93 and "no effusion seen"; cuts and pads as many published ones do, which must be undone."""
    words = ["<pad>", "[CLS]", "[SEP]", "[UNK]", "no", "effusion", *(f"w{i}" for i in range(94))]
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    made.enable_truncation(4)
    made.enable_padding(length=12)
    made.save(str(folder / "tokenizer.json"))


def write_image(folder: Path, name: str) -> None:
    """As from torchvision: BatchNorm with its statistics, three colours, 1000 classes."""
    from torchvision import models

    torch.manual_seed(2)
    folder.mkdir(parents=True)
    save_file(getattr(models, name)(weights=None).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": name}))
