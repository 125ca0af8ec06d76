"""One contract for every leaf that `fedmm models` lists, through the real model, loss and both ways of clipping.

Each leaf is put into an otherwise default tiny model. `make test` runs the small ones and a sample of the rest; all of it
is `pytest -m slow tests/models/test_contract.py`.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from fedmm.cli import main
from fedmm.config import RunConfig
from fedmm.errors import PlanInvalid
from fedmm.models.catalogue import CHOICES, catalogue
from fedmm.models.heads import probabilities, study_loss
from fedmm.models.multimodal import ModelSpec, MultimodalModel, build_model
from fedmm.models.store import load_model, save_model
from fedmm.pretrained_folder import digests
from fedmm.schema import MODALITIES, Batch, InputSpec, fixed
from fedmm.training.augment import VARY
from tests import tiny
from tests.pretrained_folders import IMAGES, MODALITY, RECORDINGS, REPORTS, inputs_for
from tests.privacy.measure import LIMIT, C, clipped_sum, engine_on

INPUTS = InputSpec(image_size=32, report_tokens=8, report_buckets=64, audio_mels=8, audio_seconds=0.4)
SUBSETS = [[bool(n >> m & 1) for m in range(len(MODALITIES))] for n in range(2 ** len(MODALITIES))]
LARGE = {"resnet18", "resnet50", "densenet121", "vgg16"}  # seconds each: slow, but for one of them
SAMPLE = {"resnet18"}
# Encoders from a folder, by tuning: all are slow but these.
SAMPLE_TUNED = {"bert full", "roberta last", "distilbert lora", "wav2vec2 full", "whisper frozen", "ast lora"}
FROM_FOLDER = {*REPORTS, *RECORDINGS, *IMAGES}
TUNINGS = ("full", "frozen", "lora", "last")
REFUSED: set[tuple[str, str, str]] = set()  # kind, name, clipping: refused at the start, with a reason


def leaves() -> list[object]:
    found = catalogue(INPUTS, 4)
    pairs = [(kind, name) for kind, names in found["encoders"].items() for name in names]
    pairs = [(kind, name) for kind, name in pairs if found["details"][f"{kind} {name}"]["trained"] is not None]
    pairs += [("fusion", name) for name in found["fusions"]]
    pairs += [
        (MODALITY[name], f"{name} {tuning}")
        for name in sorted(FROM_FOLDER)
        for tuning in TUNINGS
        if (name, tuning) != ("resnet18", "lora")  # refused: no attention
    ]
    slow = LARGE - SAMPLE | {name for _, name in pairs if " " in name} - SAMPLE_TUNED
    return [
        pytest.param(kind, name, marks=[pytest.mark.slow] if name in slow else [], id=f"{kind}-{name}")
        for kind, name in pairs
    ]


@pytest.fixture(autouse=True)
def folders(request: pytest.FixtureRequest) -> None:
    """The tiny pretrained models, where the leaf needs one."""
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    if " " in params.get("name", ""):
        request.getfixturevalue("pretrained")


every_leaf = pytest.mark.parametrize(("kind", "name"), leaves())


def inputs_of(name: str) -> InputSpec:
    return inputs_for(name.split()[0], INPUTS)


def model_of(kind: str, name: str) -> MultimodalModel:
    """name: of the leaf; "bert full": from the folder of that name, with that tuning."""
    name, _, tuning = name.partition(" ")
    folder = {f"{kind}_from": name, "tuning": tuning} if tuning else {}
    inputs, model = inputs_of(name), tiny.leaves(**{kind: name}, **folder)
    return build_model(ModelSpec(inputs=inputs, model=model, labels=tiny.LABELS, pretrained=digests(model, inputs)), 3)


def seen(batch: Batch, subset: list[bool]) -> torch.Tensor:
    return torch.tensor([subset] * batch.studies, dtype=torch.bool).reshape(-1, len(MODALITIES))


@every_leaf
def test_any_subset_and_any_batch_gives_finite_output_and_gradients(kind: str, name: str) -> None:
    model = model_of(kind, name)
    for studies, studies_P in ((0, []), (1, [1]), (7, [1, 4, 2])):
        batch = tiny.batch(studies_P, inputs=inputs_of(name))
        for subset in SUBSETS if studies == 1 else SUBSETS[:: len(SUBSETS) - 1]:
            model.zero_grad()
            out = model(batch.inputs, seen(batch, subset), batch.timeline)
            loss = study_loss(out, batch)
            assert loss.shape == (studies,)
            assert loss.isfinite().all()
            loss.sum().backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@every_leaf
def test_what_stands_in_an_absent_slot_is_not_seen(kind: str, name: str) -> None:
    model = model_of(kind, name).eval()
    for subset in SUBSETS[:-1]:
        results = []
        for filling in (0.0, 3.0, math.nan):
            batch = tiny.batch([1, 2], inputs=inputs_of(name))
            for modality, here in zip(MODALITIES, subset, strict=True):
                if not here:
                    batch.inputs[modality].fill_(
                        0 if modality == "report" and math.isnan(filling) else filling  # tokens are whole numbers
                    )
            with torch.no_grad():
                results.append(study_loss(model(batch.inputs, seen(batch, subset), batch.timeline), batch))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@every_leaf
@pytest.mark.parametrize("clipping", ["hooks", "ghost"])
def test_a_patient_moves_the_sum_by_at_most_the_clipping_norm_or_the_start_refuses(
    kind: str, name: str, clipping: str
) -> None:
    whole = tiny.batch([1, 3, 2], inputs=inputs_of(name), seed=5)
    model = model_of(kind, name)
    if (kind, name, clipping) in REFUSED:
        with pytest.raises(PlanInvalid):
            clipped_sum(engine_on(model, clipping=clipping), whole)
        return
    engine = engine_on(model, clipping=clipping)
    everybody = clipped_sum(engine, whole)
    moved = [
        float((everybody - clipped_sum(engine, tiny.pick(whole, [p for p in range(3) if p != gone]))).norm()) / C
        for gone in range(3)
    ]
    assert max(moved) <= LIMIT
    assert max(moved) > 0.5, "all are clipped at this C: a leaf whose gradients do not arrive would show"


@every_leaf
def test_it_takes_no_statistics_of_a_batch_and_changes_nothing_in_place(kind: str, name: str) -> None:
    for module in model_of(kind, name).modules():
        assert not isinstance(module, _BatchNorm)
        assert not getattr(module, "inplace", False)


@every_leaf
def test_saved_and_loaded_it_says_the_same(kind: str, name: str, tmp_path: Path) -> None:
    model, batch = model_of(kind, name).eval(), tiny.batch([2, 1], inputs=inputs_of(name))
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    with torch.no_grad():
        said = [probabilities(m(batch.inputs, batch.seen_BM, batch.timeline), tiny.LABELS) for m in (model, again)]
    assert torch.equal(*said)
    assert not {weight for weight in model.trained() if not model.get_parameter(weight).requires_grad}
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}, (
        "a buffer would leave without noise"
    )


def test_the_command_lists_every_leaf(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    found = catalogue()
    assert all(leaf in text for leaf in found["details"])
    assert all(detail["what"] for detail in found["details"].values())
    assert main(["models", "--format", "json"]) == 0
    for leaf, detail in json.loads(capsys.readouterr().out)["details"].items():
        ways = set(detail.get("clipped", {}).values())
        assert bool(ways) == bool(detail["trained"]), leaf
        assert ways <= {"book-keeping", "Opacus' sampler"}, leaf


def test_what_is_chosen_by_a_setting_names_one_that_there_is_with_a_value_that_it_takes() -> None:
    for how in (how for ways in CHOICES.values() for how in ways.values() if not how.startswith("fedmm ")):
        key, _, value = how.partition("=")
        assert key in RunConfig().flat()
        if value:
            assert RunConfig.from_flat({key: value}).flat()[key] == value
    assert set(CHOICES["augmentation"]) == set(VARY)


@pytest.mark.parametrize("clipping", ["hooks", "ghost"])
@pytest.mark.parametrize(("kind", "name"), [("image", "hog"), ("image", "scattering"), ("audio", "mfcc")])
def test_kept_features_give_the_clipped_sum_of_the_files_and_are_bounded_too(
    kind: str, name: str, clipping: str
) -> None:
    """What training really gets of an encoder with a fixed part: `fixed(name)` in the place of the modality."""
    raw = tiny.batch([1, 3, 2], inputs=INPUTS, seed=5)
    model = model_of(kind, name)
    with torch.no_grad():
        made = model.fixed_parts()[kind].features(raw.inputs[kind])
    others = {modality: value for modality, value in raw.inputs.items() if modality != kind}
    kept = replace(raw, inputs=others | {fixed(kind): made})
    engine = engine_on(model, clipping=clipping)
    everybody = clipped_sum(engine, kept)
    torch.testing.assert_close(everybody, clipped_sum(engine, raw), rtol=1e-4, atol=1e-5)
    for gone in range(3):
        rest = [p for p in range(3) if p != gone]
        moved = float((everybody - clipped_sum(engine, tiny.pick(kept, rest))).norm()) / C
        assert 0.5 < moved <= LIMIT
