"""Encoders from a pretrained folder say what transformers' own models say, train what they should, and refuse the rest."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmm.errors import ConfigError, PolicyRefused
from fedmm.models import audio_pretrained
from fedmm.models.audio_pretrained import AST, PretrainedAudio, Whisper
from fedmm.models.catalogue import catalogue
from fedmm.models.encoder import Encoder, encoders
from fedmm.models.multimodal import ModelSpec, build_model
from fedmm.models.pretrained import Frozen, Pooled, encoder_for
from fedmm.models.store import load_model, save_model
from fedmm.models.text_pretrained import PretrainedReport
from fedmm.pretrained_folder import VARIABLE, digest, digests, find
from fedmm.schema import InputSpec
from fedmm.training.loop import Workbench
from tests import tiny
from tests.pretrained_folders import MODALITY, RATE, RECORDINGS, REPORTS, folder_spec, network, write
from tests.privacy.measure import LIMIT, clipped_sum, engine_on

INPUTS = InputSpec(image_size=32, report_tokens=32, report_buckets=64, audio_mels=8, audio_seconds=0.4)
CLS, SEP = 1, 2
every_report = pytest.mark.parametrize("name", REPORTS)


def spec_for(name: str, tuning: str = "full", **inputs: Any) -> ModelSpec:
    return folder_spec(name, tuning, InputSpec(**{**INPUTS.model_dump(), **inputs}))


def make(name: str, tuning: str = "full", **inputs: Any) -> Encoder:
    spec, modality = spec_for(name, tuning, **inputs), MODALITY[name]
    torch.manual_seed(0)
    return encoder_for(modality, encoders[modality].get(name), spec.model, spec.inputs, spec.pretrained)


def sound(studies: int, samples: int, seed: int = 0) -> Tensor:
    return torch.randn(studies, samples, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


@pytest.fixture
def own(tmp_path: Path, pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of some folders that a test may change."""
    for name in ("distilbert", "bert"):
        shutil.copytree(pretrained / name, tmp_path / name)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path


# --- the same as transformers' own models -----------------------------------------------------------------------------


@every_report
def test_a_long_report_is_the_mean_of_what_the_model_says_of_each_window(name: str, pretrained: Path) -> None:
    encoder = cast(PretrainedReport, make(name)).eval()
    theirs = hf.AutoModel.from_pretrained(pretrained / name).eval()
    tokens = [[4, 5, 9, 30, 31, 32, 33, 60, 61], [7, 8]]  # of the first report seven fit a window
    report_BT = torch.zeros(2, INPUTS.report_tokens, dtype=torch.int64)
    for row, ids in enumerate(tokens):
        report_BT[row, : len(ids)] = torch.tensor(ids) + 1
    with torch.no_grad():
        windows = [torch.tensor([[CLS, *ids, SEP]]) for ids in ([4, 5, 9, 30, 31, 32, 33], [60, 61], [7, 8])]
        mean_N = [theirs(input_ids=ids).last_hidden_state.mean((0, 1)) for ids in windows]
        said = encoder.summary(report_BT)
    torch.testing.assert_close(said, torch.stack([(mean_N[0] + mean_N[1]) / 2, mean_N[2]]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [{}, {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}])
def test_wav2vec2_says_what_transformers_says_of_recordings_of_two_lengths(
    kind: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "wav2vec2", network("wav2vec2", **kind))
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    encoder = cast(PretrainedAudio, make("wav2vec2")).eval()
    theirs = hf.Wav2Vec2Model.from_pretrained(tmp_path / "wav2vec2").eval()
    audio_BK = sound(2, 6400)
    audio_BK[1, 4000:] = 0
    extractor = hf.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    rows = [audio_BK[0].numpy(), audio_BK[1, :4000].numpy()]
    given = extractor(rows, sampling_rate=RATE, padding="max_length", max_length=6400, return_tensors="pt")
    with torch.no_grad():
        state_BTW = theirs(**given).last_hidden_state
        mask_BT = theirs._get_feature_vector_attention_mask(state_BTW.shape[1], given["attention_mask"])
        expected = (state_BTW * mask_BT.unsqueeze(2)).sum(1) / mask_BT.sum(1, keepdim=True)
        torch.testing.assert_close(encoder.summary(audio_BK), expected, rtol=1e-3, atol=1e-4)


def test_whisper_hears_what_its_own_extractor_and_encoder_hear(pretrained: Path) -> None:
    encoder = cast(Whisper, make("whisper")).eval()
    theirs = hf.WhisperModel.from_pretrained(pretrained / "whisper").encoder.eval()
    audio_BK = sound(2, 6400)
    made = hf.WhisperFeatureExtractor()(list(audio_BK.numpy()), sampling_rate=RATE, return_tensors="pt")
    given_BNR = made["input_features"][..., :40]
    torch.testing.assert_close(encoder.log_mel(audio_BK), given_BNR, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        expected = theirs(given_BNR).last_hidden_state.mean(1)
        torch.testing.assert_close(encoder.summary(audio_BK), expected, rtol=1e-3, atol=1e-4)


def test_ast_hears_what_its_own_extractor_and_model_hear(pretrained: Path) -> None:
    encoder = cast(AST, make("ast", audio_seconds=0.255)).eval()
    theirs = hf.ASTModel.from_pretrained(pretrained / "ast").eval()
    audio_BK = sound(2, 4080)  # exactly its 24 frames
    extractor = hf.ASTFeatureExtractor(num_mel_bins=16, max_length=24)
    given = extractor(list(audio_BK.numpy()), sampling_rate=RATE, return_tensors="pt")["input_values"]
    torch.testing.assert_close(encoder.fbank(audio_BK), given, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(encoder.summary(audio_BK), theirs(given).pooler_output, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["whisper", "ast"])  # the group norm of wav2vec2 spans silence, as in the original
def test_silence_after_a_recording_changes_nothing(name: str, pretrained: Path) -> None:
    encoder = cast(Pooled, make(name, audio_seconds=0.8)).eval()
    audio_BK = torch.nn.functional.pad(sound(1, 3200), [0, 9600])
    with torch.no_grad():
        one_window, several = (encoder.summary(audio_BK[:, :samples]) for samples in (3600, 12800))
    torch.testing.assert_close(one_window, several, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["wav2vec2", "whisper"])
@pytest.mark.parametrize("clipping", ["hooks", "ghost"])
def test_a_recording_of_several_windows_is_clipped_exactly(
    name: str, clipping: str, pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audio_pretrained, "WINDOW", 6)
    spec = spec_for(name, audio_seconds=0.8)
    engine = engine_on(build_model(spec, 3), clipping=clipping)
    whole = tiny.batch([1, 3, 2], inputs=spec.inputs, seed=5)
    everybody = clipped_sum(engine, whole)
    rests = [clipped_sum(engine, tiny.pick(whole, [p for p in range(3) if p != gone])) for gone in range(3)]
    moved = [float((everybody - rest).norm()) / engine.max_grad_norm for rest in rests]
    assert 0.5 < max(moved) <= LIMIT


# --- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tuning", "part"),
    [
        ("bert", "full", "embeddings.word_embeddings"),
        ("distilbert", "last", "transformer.layer.1"),
        ("wav2vec2", "last", "encoder.layers.1"),
        ("bert", "lora", "lora_"),
        ("whisper", "frozen", None),
    ],
)
def test_what_is_frozen_is_neither_sent_nor_saved_and_comes_back_from_the_folder(
    name: str, tuning: str, part: str | None, pretrained: Path, tmp_path: Path
) -> None:
    model = build_model(spec_for(name, tuning), 3)
    sent = [weight for weight in model.trained() if "backbone" in weight]
    if part is None:
        assert not sent
        assert not [weight for weight in model.state_dict() if "backbone" in weight]
    else:
        assert any(part in weight for weight in sent)
        assert tuning == "full" or all(part in weight for weight in sent)
    with torch.no_grad():
        for value in model.trained().values():
            value.add_(0.01)
    save_model(model, tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.trained())
    batch = tiny.batch([1, 2], inputs=model.spec.inputs)
    said = [m.eval()(batch.inputs, batch.seen_BM) for m in (model, load_model(tmp_path))]
    assert torch.equal(*said)


@pytest.mark.parametrize(("name", "tuning"), [("distilbert", "lora"), ("roberta", "last"), ("ast", "full")])
@pytest.mark.parametrize("clipping", ["hooks", "ghost"])
def test_it_passes_the_rehearsal_before_anybody_is_charged(
    name: str, tuning: str, clipping: str, pretrained: Path
) -> None:
    bench = Workbench(spec_for(name, tuning), torch.device("cpu"), clipping=clipping)
    assert bench.private_model is not None


def test_low_rank_additions_change_nothing_at_first(pretrained: Path) -> None:
    report_BT = torch.randint(0, 60, (3, INPUTS.report_tokens), generator=torch.Generator().manual_seed(1))
    full, lora = (cast(Pooled, make("bert", tuning)).eval() for tuning in ("full", "lora"))
    with torch.no_grad():
        torch.testing.assert_close(full.summary(report_BT), lora.summary(report_BT))


def test_frozen_features_are_those_of_the_whole_network_and_their_identity_is_the_folders(own: Path) -> None:
    report_BT = torch.randint(0, 60, (40, INPUTS.report_tokens), generator=torch.Generator().manual_seed(1))
    whole, frozen = cast(Pooled, make("distilbert").eval()), cast(Frozen, make("distilbert", "frozen"))
    with torch.no_grad():
        features = frozen.features(report_BT)
        torch.testing.assert_close(features, whole.summary(report_BT))
    assert features.is_contiguous()
    assert not features.requires_grad
    before = frozen.identity()
    weights = load_file(own / "distilbert/model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, own / "distilbert/model.safetensors")
    assert cast(Frozen, make("distilbert", "frozen")).identity() != before


def test_what_is_frozen_stays_in_eval_and_no_dropout_is_left(own: Path) -> None:
    content = json.loads((own / "bert/config.json").read_text())
    assert content["hidden_dropout_prob"] == 0.1, "the folder asks for some"
    model = make("bert", "lora").train()
    assert all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
    frozen = [m for m in model.modules() if [*m.parameters()] and not any(p.requires_grad for p in m.parameters())]
    assert frozen
    assert not any(m.training for m in frozen)


def test_an_image_network_takes_what_fits_by_name_and_adds_up_the_colours(pretrained: Path) -> None:
    theirs = load_file(pretrained / "resnet18/model.safetensors")
    mine = make("resnet18").state_dict()
    assert torch.equal(mine["backbone.conv1.weight"], theirs["conv1.weight"].sum(1, keepdim=True))
    assert torch.equal(mine["backbone.layer4.1.conv2.weight"], theirs["layer4.1.conv2.weight"])
    assert torch.equal(mine["backbone.bn1.weight"], theirs["bn1.weight"])
    with pytest.raises(ConfigError, match="lora"):
        make("resnet18", "lora")


# --- what is refused --------------------------------------------------------------------------------------------------


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def another_type(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def wrong_sizes(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "dim": 32}))


def nonsense(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "n_layers": "many", "dim": -1}))


def missing_tensors(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({n: v for n, v in weights.items() if "layer.1." not in n}, folder / "model.safetensors")


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def a_link_out(folder: Path) -> None:
    moved = folder.parent / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(moved)
    (folder / "model.safetensors").symlink_to(moved)


def a_linked_folder(folder: Path) -> None:
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (pickled, "no model.safetensors"),
        (no_folder, "is not here"),
        (another_type, "not of a distilbert"),
        (no_json, "no JSON object"),
        (wrong_sizes, "do not make a distilbert|lacks"),
        (nonsense, "do not make a distilbert|lacks"),
        (missing_tensors, "lacks 16 tensors"),
        (cut_short, "cannot be read"),
        (a_link_out, "is a link"),
        (a_linked_folder, "is a link"),
        (no_tokenizer, r"no tokenizer\.json"),
        (broken_tokenizer, "cannot be read"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_folder_that_is_not_what_it_should_be_is_refused_by_whoever_starts_the_run(
    damage: Any, says: str, own: Path
) -> None:
    damage(own / "distilbert")
    with pytest.raises(ConfigError, match=says) as caught:
        make("distilbert")
    assert str(own) not in caught.value.what


@pytest.mark.parametrize("damage", [pickled, no_folder, a_link_out])
def test_a_hospital_refuses_a_folder_that_is_not_usable(damage: Any, own: Path) -> None:
    spec = spec_for("distilbert")
    damage(own / "distilbert")
    with pytest.raises(PolicyRefused, match="'distilbert'") as caught:
        build_model(spec)
    assert str(own) not in caught.value.public_text


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"])
def test_a_hospital_refuses_a_folder_in_which_any_file_that_is_read_differs(file: str, own: Path) -> None:
    spec = spec_for("distilbert")
    build_model(spec)
    with (own / "distilbert" / file).open("ab") as opened:
        opened.write(b" ")
    with pytest.raises(PolicyRefused, match="differs from the coordinator's"):
        build_model(spec)


def test_a_hospital_refuses_a_model_that_names_a_folder_without_its_digest(pretrained: Path) -> None:
    with pytest.raises(PolicyRefused, match="without its digest"):
        build_model(spec_for("distilbert").model_copy(update={"pretrained": {}}))


@pytest.mark.parametrize("name", ["../bert", "/etc", "a/b", "..", "", "bert\n", "b" * 65, ".hidden"])
def test_a_name_is_never_a_path(name: str, pretrained: Path) -> None:
    with pytest.raises(ConfigError, match="no name"):
        find(name)
    with pytest.raises(ValueError, match="digests"):
        ModelSpec(**{**spec_for("bert").model_dump(), "pretrained": {"../bert": "0" * 64}})


def test_without_the_variable_folders_are_looked_for_in_the_working_directory(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.rename(own.parent / "pretrained")
    monkeypatch.delenv(VARIABLE)
    monkeypatch.chdir(own.parent)
    assert find("bert") == (own.parent / "pretrained/bert").resolve()
    monkeypatch.setenv(VARIABLE, "nowhere")
    with pytest.raises(ConfigError, match="is not here"):
        find("bert")


def test_the_digest_covers_names_and_bytes(own: Path) -> None:
    first = digest(own / "bert")
    assert first == digest(own / "bert")
    (own / "bert/README.md").write_text("not read, not covered")
    assert digest(own / "bert") == first
    shutil.copy(own / "bert/tokenizer.json", own / "bert/preprocessor_config.json")
    assert digest(own / "bert") != first


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        ({"report": "bert", "report_from": "bert"}, "data.report_tokenizer=bert"),
        ({"report": "bert", "report_from": "bert", "report_tokenizer": "distilbert"}, "data.report_tokenizer=bert"),
        ({"report_tokenizer": "bert"}, "data.report_tokenizer empty"),
        ({"report": "bert"}, "docs/howto-pretrained.md"),
        ({"report": "ngrams", "report_from": "bert"}, "model.report_from empty"),
        ({"audio": "whisper", "audio_from": "whisper"}, "data.audio_form=waveform"),
        ({"audio_form": "waveform", "audio_rate": RATE}, "data.audio_form=log_mel"),
        ({"audio": "ast", "audio_from": "ast", "audio_form": "waveform"}, "data.audio_rate=16000"),
        ({"image": "resnet50", "image_from": "resnet18"}, "resnet50"),
    ],
)
def test_settings_that_do_not_fit_together_say_what_to_change(
    change: dict[str, str], fix: str, pretrained: Path
) -> None:
    form = {key: value for key, value in change.items() if key in InputSpec.model_fields}
    model = tiny.leaves(**{key: value for key, value in change.items() if key not in form})
    inputs = InputSpec(**{**INPUTS.model_dump(), **form})
    with pytest.raises(ConfigError) as caught:
        build_model(ModelSpec(inputs=inputs, model=model, labels=tiny.LABELS, pretrained=digests(model, inputs)))
    assert fix in caught.value.fix


def test_nothing_reaches_for_the_network_or_follows_what_a_config_names(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads((own / "bert/config.json").read_text())
    named = {
        "auto_map": {"AutoModel": "evil--code.Model"},
        "_name_or_path": "evil/model",
        "quantization_config": {"a": 1},
    }
    (own / "bert/config.json").write_text(json.dumps({**content, **named}))
    (own / "bert/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/model"}))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was tried"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was tried"))
    assert type(cast(Pooled, make("bert", "lora")).backbone) is hf.BertModel


def test_the_catalogue_lists_them_and_says_what_they_need() -> None:
    details = catalogue()["details"]
    for name in (*REPORTS, *RECORDINGS):
        modality = MODALITY[name]
        assert details[f"{modality} {name}"]["trained"] is None
        assert details[f"{modality} {name}"]["why"] == f"needs model.{modality}_from=NAME"
