"""What candidates have in common: computed once, with the results of a network that computes it for each."""

import warnings

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_diffclf import Candidates, DiffusionClassifier, Draws, LikelihoodRatio
from lightning_diffclf.denoiser import SharingDenoiser
from lightning_diffclf.models import sharing, unet
from lightning_diffclf.models.pipeline import PipelineDenoiser
from lightning_diffclf.models.sharing import Sharing, replaced
from tests.models import tiny_pipelines
from tests.models.tiny_pipelines import make

PROMPTS = ["a photo of a cat.", "two dogs, one small", "a cat", "a drawing of a dog"]
CROSS_ATTENTION = ["SD 1", "SD 2 v", "SDXL", "PixArt"]
PAIR = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
CANDIDATE = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
pytestmark = pytest.mark.filterwarnings("ignore:images of .* pixels")


class Plain:
    """A denoiser with its four members only."""

    def __init__(self, whole: PipelineDenoiser) -> None:
        self.schedule, self.candidates, self.encode, self.predict = (
            whole.schedule,
            whole.candidates,
            whole.encode,
            whole.predict,
        )


def denoiser(family: str = "SD 1", classes: tuple[int, ...] = (0, 1, 2, 3)) -> PipelineDenoiser:
    found = PipelineDenoiser(make(family), Candidates(PROMPTS, classes), PROMPTS)
    found.encode(images(1))
    return found


def images(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def inputs(ours: PipelineDenoiser) -> tuple[Tensor, Tensor]:
    x_t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    return ours.schedule.network_rows(x_t, ours.schedule.timesteps(3))


@torch.no_grad()
def both(ours: PipelineDenoiser) -> tuple[Tensor, Tensor]:
    x_t, t = inputs(ours)
    return ours.predict_shared(x_t, t, PAIR, CANDIDATE), ours.predict(x_t[PAIR], t[PAIR], CANDIDATE)


def assert_equal_up_to_rounding(ours: PipelineDenoiser) -> None:
    torch.testing.assert_close(*both(ours), rtol=1e-6, atol=5e-6)


# --- the same results ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CROSS_ATTENTION)
@pytest.mark.parametrize("rule", [None, LikelihoodRatio(0.2)])
def test_scores_are_those_of_a_plain_denoiser(family, rule):
    ours = denoiser(family, classes=(0, 1, 0, 1))  # each with two prompts
    assert isinstance(ours, SharingDenoiser)
    settings = {"elimination": rule, "ensemble": "mean", "microbatch": 7}
    results = DiffusionClassifier(ours, Draws(6), **settings)(images())
    expected = DiffusionClassifier(Plain(ours), Draws(6), **settings)(images())
    for a, b in zip(results, expected, strict=True):
        assert (a.label, a.nfe, a.draws_K.tolist()) == (b.label, b.nfe, b.draws_K.tolist())
        torch.testing.assert_close(a.scores_K, b.scores_K, rtol=1e-6, atol=0)
    assert ours._sharing._shareable.of_input
    assert ours._sharing._tables


@pytest.mark.parametrize("family", ["SD 3", "FLUX dev", "DiT"])
def test_without_cross_attention_rows_are_predicted_as_ever(family):
    prompts = ["3", "7", "1", "2"] if family == "DiT" else PROMPTS
    ours = PipelineDenoiser(make(family), Candidates(PROMPTS), prompts)
    ours.encode(images(1))
    assert torch.equal(*both(ours))


def test_with_guidance():
    """Two calls for one prediction, of which the second is of the same prompt in all rows."""
    ours = denoiser()
    x_t, t = inputs(ours)
    empty = torch.zeros_like(CANDIDATE)
    with torch.no_grad():
        with_prompt, without = (ours.predict_shared(x_t, t, PAIR, k) for k in (CANDIDATE, empty))
        expected = [ours.predict(x_t[PAIR], t[PAIR], k) for k in (CANDIDATE, empty)]
    guided = without + 4 * (with_prompt - without)
    torch.testing.assert_close(guided, expected[1] + 4 * (expected[0] - expected[1]), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(with_prompt, without)


def test_half_precision_and_autocast():
    ours = denoiser()
    with torch.autocast("cpu", torch.bfloat16):
        shared, plain = both(ours)
    torch.testing.assert_close(shared, plain, rtol=0.02, atol=0.02)
    assert_equal_up_to_rounding(ours)  # tables of the other precision are not used
    ours = PipelineDenoiser(make("SD 1").to(dtype=torch.bfloat16), Candidates(PROMPTS), PROMPTS)
    ours.encode(images(1))
    shared, plain = both(ours)
    assert shared.dtype == torch.bfloat16
    torch.testing.assert_close(shared, plain, rtol=0.02, atol=0.02)


def test_in_inference_mode_and_out_of_it():
    ours = denoiser("SDXL")
    with torch.inference_mode():
        both(ours)
    conditions = tuple(part.clone().requires_grad_() for part in ours.conditions(CANDIDATE))
    x_t, t = inputs(ours)
    output = ours.predict_from(x_t[PAIR], t[PAIR], conditions)
    assert all(part.any() for part in torch.autograd.grad(output.square().sum(), conditions))
    torch.testing.assert_close(ours.predict_shared(x_t, t, PAIR, CANDIDATE), output.detach(), rtol=1e-6, atol=1e-6)


# --- what is shared ------------------------------------------------------------------------------------------------


def outputs(network: nn.Module, names: list[str], predict) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    handles = [
        network.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: found.update({name: output})
        )
        for name in names
    ]
    with torch.no_grad():
        predict()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", CROSS_ATTENTION)
def test_modules_do_not_depend_on_what_they_are_said_not_to(family):
    ours = denoiser(family)
    both(ours)
    shareable, (x_t, t) = ours._sharing._shareable, inputs(ours)
    for names, others in (
        (shareable.of_input, (x_t, t, torch.tensor([3, 3, 0]))),
        (shareable.of_prompt, (x_t + 1, t.flip(0), torch.tensor([0, 1, 2]))),
    ):
        first = outputs(ours.network, list(names), lambda: ours.predict(x_t, t, torch.tensor([0, 1, 2])))
        second = outputs(ours.network, list(names), lambda others=others: ours.predict(*others))
        assert first.keys() == second.keys() == names.keys() != set()
        assert all(torch.equal(first[name], second[name]) for name in names)


def test_all_before_the_first_cross_attention_is_shared():
    ours = denoiser()
    both(ours)
    first = "down_blocks.1.attentions.0"
    assert set(ours._sharing._shareable.of_input) == {
        "conv_in",
        "down_blocks.0.resnets.0",
        "down_blocks.0.downsamplers.0",
        "down_blocks.1.resnets.0",
        *(f"{first}.{name}" for name in ("norm", "proj_in")),
        *(f"{first}.transformer_blocks.0.{name}" for name in ("norm1", "attn1", "norm2", "attn2.to_q")),
    }
    keys = {name for name, _ in ours.network.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))}
    assert set(ours._sharing._shareable.of_prompt) == keys
    xl = denoiser("SDXL")  # whose pooled text is added to the time, which the first block sees
    both(xl)
    assert set(xl._sharing._shareable.of_input) == {
        "conv_in",
        "down_blocks.0.resnets.0.norm1",
        "down_blocks.0.resnets.0.conv1",
    }


def test_the_operations_that_are_saved():
    ours = denoiser()
    both(ours)  # prompts are done
    x_t, t = inputs(ours)
    with torch.no_grad(), FlopCounterMode(display=False) as shared:
        ours.predict_shared(x_t, t, PAIR, CANDIDATE)
    with torch.no_grad(), FlopCounterMode(display=False) as plain:
        ours.predict(x_t[PAIR], t[PAIR], CANDIDATE)
    counts, shareable = plain.get_flop_counts(), ours._sharing._shareable

    def of(names) -> int:
        return sum(sum(counts.get(f"UNet2DConditionModel.{name}", {}).values()) for name in names)

    assert of(shareable.of_input) > 0
    assert of(shareable.of_prompt) > 0
    saved = of(shareable.of_input) * (1 - len(x_t) / len(PAIR)) + of(shareable.of_prompt)
    assert plain.get_total_flops() - shared.get_total_flops() == pytest.approx(saved)


def test_memory_of_prompts_is_bounded(monkeypatch):
    for limit, count in ((0, 0), (3 * 4 * 9856, 3), (2**30, 8)):
        monkeypatch.setattr(sharing, "TABLE_BYTES", limit)
        ours = denoiser()
        assert_equal_up_to_rounding(ours)
        tables = ours._sharing._tables.values()
        assert len(tables) == count
        assert sum(table.numel() * table.element_size() for table in tables) <= limit


# --- other networks, and changes -----------------------------------------------------------------------------------


def test_changed_weights_make_tables_anew():
    ours = denoiser()
    before, _ = both(ours)
    with torch.no_grad():
        ours.network.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_k").weight.mul_(-2)
    assert_equal_up_to_rounding(ours)
    assert not torch.allclose(both(ours)[0], before)


def test_moved_weights_do_not():
    """As offloading does, away and back."""
    ours = denoiser()
    both(ours)
    tables = ours._sharing._tables
    ours.network._apply(torch.clone)
    both(ours)
    assert ours._sharing._tables is tables


def test_processors_of_others_are_left_alone():
    ours = denoiser()
    both(ours)

    class Louder(AttnProcessor):
        def __call__(self, *args, **kwargs):
            return 2 * super().__call__(*args, **kwargs)

    before, _ = both(ours)
    for processor in (AttnProcessor(), Louder()):
        ours.network.set_attn_processor(processor)
        assert_equal_up_to_rounding(ours)
    assert not torch.allclose(both(ours)[0], before)


def test_lora_is_left_alone():
    peft = pytest.importorskip("peft")
    for prepare in (False, True):  # before or after what is shared was found
        ours = denoiser()
        if prepare:
            both(ours)
        before = both(denoiser())[0]
        settings = peft.LoraConfig(r=2, target_modules=["to_k", "to_v", "to_q"], init_lora_weights=False)
        ours.network.add_adapter(settings)
        assert_equal_up_to_rounding(ours)
        assert not torch.allclose(both(ours)[0], before)
        ours.network.disable_adapters()
        torch.testing.assert_close(both(ours)[0], before, rtol=1e-6, atol=5e-6)


def test_hooks_of_others_see_all_rows_and_forward_methods_come_back():
    ours = denoiser()
    x_t, t = inputs(ours)
    seen = []
    handle = ours.network.conv_in.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    own = ours.network.conv_in.forward
    ours.network.down_blocks[0].resnets[0].forward = other = ours.network.down_blocks[0].resnets[0].forward
    ours.predict_shared(x_t, t, PAIR, CANDIDATE)
    handle.remove()
    assert seen[-1] == len(PAIR)
    assert ours.network.conv_in.forward == own
    assert "forward" not in vars(ours.network.conv_in)
    assert vars(ours.network.down_blocks[0].resnets[0])["forward"] is other
    with pytest.raises(RuntimeError, match="broken"), replaced({ours.network.conv_in: lambda x: x}):
        raise RuntimeError("broken")
    assert ours.network.conv_in.forward == own


def test_compiled_networks_are_left_alone():
    ours = denoiser()
    assert ours.network.mid_block is not None
    both(ours)
    assert ours._sharing._forwards(inputs(ours)[0], PAIR, CANDIDATE)
    ours.network.mid_block.compile(backend="eager")  # at its first call
    assert ours._sharing._forwards(inputs(ours)[0], PAIR, CANDIDATE) == {}


def test_a_network_that_needs_data_is_called_as_it_is():
    class Needs(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (1 if float(x.detach().sum()) > 0 else 2)

    network = tiny_pipelines.unet()
    network.conv_out = nn.Sequential(network.conv_out, Needs())
    share = Sharing(network, unet.predict, {"encoder_hidden_states": torch.randn(4, 5, 32)}, {})
    x_t, t = torch.randn(3, 4, 8, 8), torch.tensor([1, 2, 3])
    with torch.no_grad():
        with pytest.warns(UserWarning, match="UNet2DConditionModel does not run on tensors without data"):
            output = share(x_t, t, PAIR, CANDIDATE)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once is enough
            assert torch.equal(share(x_t, t, PAIR, CANDIDATE), output)
        rows = {"encoder_hidden_states": share.embeddings["encoder_hidden_states"][CANDIDATE]}
        assert torch.equal(unet.predict(network, x_t[PAIR], t[PAIR], rows), output)
