"""DiT against the published numbers, and each promise of its docstrings."""

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_diffclf.models.dit import NAMES, DiT, positions_2d


def tiny(**overrides) -> DiT:
    """A DiT none of whose parameters are zero."""
    torch.manual_seed(0)
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "depth": 2, "num_heads": 4}
    dit = DiT(**{**sizes, "num_classes": 10, **overrides})
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.1)
    return dit.eval().requires_grad_(False)


def batch(height: int = 8, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 4, height, width, generator=generator)
    return x, torch.tensor([0, 1, 500, 998, 999]), torch.tensor([0, 3, 9, 9, 5])


NULL = torch.full((5,), 10)


# --- against the published numbers ---------------------------------------------------------------------------------


def test_forward_is_the_published_one(golden_dit):
    dit, golden = golden_dit
    torch.testing.assert_close(dit(golden["x"], golden["t"], golden["y"]), golden["out"], atol=1e-5, rtol=0)


def test_guidance_is_the_published_one(golden_dit):
    dit, golden = golden_dit
    x, t, y = golden["x"][:3], golden["t"][:3], torch.tensor([0, 3, 9])
    output = dit.forward_with_cfg(x, t, y, guidance_scale=4.0, guided_channels=3)
    torch.testing.assert_close(output, golden["cfg_out"][:3], atol=1e-5, rtol=0)
    # The reference repeats the guided channels in its second half, the rest of which is the prediction without class
    torch.testing.assert_close(output[:, :3], golden["cfg_out"][3:, :3], atol=1e-5, rtol=0)
    null = dit(x, t, torch.full_like(y, dit.null_label))
    torch.testing.assert_close(null[:, 3:], golden["cfg_out"][3:, 3:], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("DiT-S/2", 33), ("DiT-B/2", 130), ("DiT-B/4", 130), ("DiT-L/2", 458), ("DiT-L/4", 458), ("DiT-XL/2", 675)],
)
def test_parameter_counts_are_the_published_ones(name, millions):
    with torch.device("meta"):
        dit = DiT.from_name(name)
    assert sum(p.numel() for p in dit.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    assert dit.blocks[0].attn.fused_attn


def test_table_of_positions_is_saved_but_not_trained(golden_dit):
    dit = golden_dit.model
    assert "pos_embed" in dit.state_dict()
    assert "pos_embed" not in dict(dit.named_parameters())
    fresh = DiT(8, 2, 4, 48, 1, 4)
    torch.testing.assert_close(fresh.pos_embed, dit.pos_embed, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [4, 16])
def test_positions_are_those_of_diffusers(size):
    theirs = get_2d_sincos_pos_embed(64, size, base_size=size, output_type="pt")
    torch.testing.assert_close(positions_2d(size, size, 64), theirs.float(), atol=1e-5, rtol=0)


def test_positions_tell_rows_from_columns():
    codes = positions_2d(2, 3, 8).reshape(2, 3, 8)
    assert torch.equal(codes[0, :, :4], codes[1, :, :4])  # the first half knows the column only
    assert torch.equal(codes[:, 0, 4:], codes[:, 2, 4:])  # the second half the row only
    assert codes.flatten(0, 1).unique(dim=0).shape == (6, 8)


# --- initialisation ------------------------------------------------------------------------------------------------


def test_fresh_network_outputs_exactly_zero():
    dit = DiT(8, 2, 4, 32, 2, 4, num_classes=10)
    assert torch.equal(dit(*batch()), torch.zeros(5, 8, 8, 8))


def test_fresh_blocks_are_the_identity():
    torch.manual_seed(0)
    dit = DiT(8, 2, 4, 32, 2, 4)
    tokens, condition = torch.randn(3, 16, 32), torch.randn(3, 32)
    for block in dit.blocks:
        assert torch.equal(block(tokens, condition), tokens)


def test_fresh_weights_have_the_published_spread():
    torch.manual_seed(0)
    dit = DiT(16, 2, 4, 256, 1, 4)

    def xavier(fan_in: int, fan_out: int) -> float:
        return (2 / (fan_in + fan_out)) ** 0.5

    expected = {
        "x_embedder.proj.weight": xavier(4 * 2 * 2, 256),
        "t_embedder.mlp.0.weight": 0.02,
        "t_embedder.mlp.2.weight": 0.02,
        "y_embedder.embedding_table.weight": 0.02,
        "blocks.0.attn.qkv.weight": xavier(256, 768),
        "blocks.0.attn.proj.weight": xavier(256, 256),
        "blocks.0.mlp.fc1.weight": xavier(256, 1024),
        "blocks.0.mlp.fc2.weight": xavier(1024, 256),
    }
    for name, parameter in dit.named_parameters():
        assert parameter.std().item() == pytest.approx(expected.pop(name, 0.0), rel=0.05), name
    assert not expected


# --- labels and guidance -------------------------------------------------------------------------------------------


def test_dropping_all_labels_is_the_null_label():
    dit = tiny(class_dropout_prob=1.0)
    x, t, y = batch()
    assert torch.equal(dit.train()(x, t, y), dit.eval()(x, t, NULL))


def test_drop_mask_decides_in_both_modes():
    dit = tiny(class_dropout_prob=0.5)
    x, t, y = batch()
    drop = torch.tensor([True, False, True, False, False])
    expected = dit(x, t, torch.where(drop, NULL, y))
    assert torch.equal(dit(x, t, y, drop=drop), expected)
    assert torch.equal(dit.train()(x, t, y, drop=drop), expected)
    assert y.tolist() == [0, 3, 9, 9, 5]  # the caller's labels are left alone


def test_training_drops_at_the_given_rate_and_eval_never():
    dit = tiny(class_dropout_prob=0.3, input_size=2, depth=1)
    n = 2000
    x, t, y = torch.zeros(n, 4, 2, 2), torch.zeros(n), torch.zeros(n, dtype=torch.int64)
    labelled = dit(x, t, y)
    assert torch.equal(labelled, dit(x, t, y))
    dropped = (dit.train()(x, t, y) - labelled).abs().amax((1, 2, 3)) > 1e-3
    assert 0.26 < dropped.float().mean() < 0.34  # 4 standard deviations
    torch.manual_seed(5)
    first = dit(x, t, y)
    torch.manual_seed(5)
    assert torch.equal(first, dit(x, t, y))  # from the global generator


def test_without_label_dropout_there_is_no_null_label():
    dit = tiny(class_dropout_prob=0.0)
    x, t, y = batch()
    assert dit.null_label is None
    assert dit.y_embedder.embedding_table.weight.shape == (10, 32)
    assert torch.equal(dit.train()(x, t, y), dit.eval()(x, t, y))
    with pytest.raises(ValueError, match="class_dropout_prob is 0"):
        dit(x, t, y, drop=torch.zeros(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="class_dropout_prob is 0"):
        dit.forward_with_cfg(x, t, y, 2.0)


@pytest.mark.parametrize("guided_channels", [None, 1, 3])
def test_guidance_scale_1_is_the_condition_and_0_is_none(guided_channels):
    dit = tiny()
    x, t, y = batch()
    guided = 4 if guided_channels is None else guided_channels
    close = {"atol": 1e-6, "rtol": 1e-5}
    torch.testing.assert_close(dit.forward_with_cfg(x, t, y, 1.0, guided_channels), dit(x, t, y), **close)
    without = dit.forward_with_cfg(x, t, y, 0.0, guided_channels)
    torch.testing.assert_close(without[:, :guided], dit(x, t, NULL)[:, :guided], **close)
    torch.testing.assert_close(without[:, guided:], dit(x, t, y)[:, guided:], **close)


def test_guidance_in_training_mode_drops_no_label():
    dit = tiny(class_dropout_prob=1.0)
    x, t, y = batch()
    assert torch.equal(dit.train().forward_with_cfg(x, t, y, 2.0), dit.eval().forward_with_cfg(x, t, y, 2.0))


# --- sets of classes, and blocks that see none -----------------------------------------------------------------------


def test_a_set_of_classes_is_its_mean_embedding():
    dit = tiny()
    x, t, y = batch()
    sets = [{0}, {3, 4}, set(range(10)), {9, 1, 5}, {5}]
    members = torch.tensor([[k in one for k in range(10)] for one in sets])
    table = dit.y_embedder.embedding_table.weight.numpy().astype(np.float64)
    means = np.stack([np.mean([table[k] for k in one], axis=0) for one in sets])
    expected = dit(x, t, torch.from_numpy(means.astype(np.float32)))
    torch.testing.assert_close(dit(x, t, members), expected, atol=1e-6, rtol=1e-5)
    single = torch.zeros(5, 10, dtype=torch.bool).scatter(1, y[:, None], True)
    assert torch.equal(dit(x, t, single), dit(x, t, y))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dit(x, t, single), dit(x, t, y))
    drop = torch.tensor([True, False, True, False, False])
    assert torch.equal(dit(x, t, single, drop=drop), dit(x, t, y, drop=drop))
    with pytest.raises(ValueError, match=r"y: torch.bool \(5, 9\), expected .* or torch.bool \(5, 10\)"):
        dit(x, t, members[:, 1:])


# --- shapes and dtypes ---------------------------------------------------------------------------------------------


def test_input_need_not_be_square():
    dit = tiny(input_size=(4, 12))
    x, t, y = batch(4, 12)
    output = dit(x, t, y)
    assert output.shape == (5, 8, 4, 12)
    # Patches go back to where they came from: with zeroed gates, a patch's output depends on that patch alone
    for block in dit.blocks:
        for parameter in block.adaLN_modulation.parameters():
            parameter.zero_()
    changed = x.clone()
    changed[:, :, 2:4, 8:10] += 1
    where = (dit(changed, t, y) != dit(x, t, y)).any(1)
    assert where[:, 2:4, 8:10].all()
    assert where.sum() == 5 * 4


def test_variance_is_optional():
    dit = tiny(learn_sigma=False)
    x, t, y = batch()
    assert dit(x, t, y).shape == dit.forward_with_cfg(x, t, y, 2.0).shape == (5, 4, 8, 8)


def test_each_row_is_independent_and_time_may_be_float():
    dit = tiny()
    x, t, y = batch()
    torch.testing.assert_close(dit(x, t.double(), y)[2:3], dit(x[2:3], t[2:3], y[2:3]), atol=1e-6, rtol=1e-5)


def test_bfloat16_autocast_is_close_to_float32(golden_dit):
    dit, golden = golden_dit
    with torch.autocast("cpu", torch.bfloat16):
        output = dit(golden["x"], golden["t"], golden["y"])
    assert (output.float() - golden["out"]).abs().mean() < 0.02 * golden["out"].abs().mean()


def test_network_may_be_bfloat16():
    dit = tiny().bfloat16()
    x, t, y = batch()
    assert dit(x.bfloat16(), t, y).dtype == torch.bfloat16
    waves = []
    dit.t_embedder.mlp.register_forward_pre_hook(lambda _, args: waves.append(args[0]))
    dit(x.bfloat16(), t, y)
    assert not torch.equal(waves[0][3], waves[0][4])  # times 998 and 999 remain different


def test_wrong_shapes_and_labels_raise_one_clear_error():
    dit = tiny()
    x, t, y = batch()
    with pytest.raises(ValueError, match=r"x: shape \(5, 4, 8, 4\), expected \(N, 4, 8, 8\)"):
        dit(x[..., :4], t, y)
    with pytest.raises(ValueError, match=r"x: shape \(5, 3, 8, 8\), expected \(N, 4, 8, 8\)"):
        dit(x[:, :3], t, y)
    with pytest.raises(ValueError, match=r"t: shape \(4,\), expected \(5,\)"):
        dit(x, t[:4], y)
    with pytest.raises(ValueError, match=r"y: torch.int64 \(4,\), expected torch.int64 \(5,\)"):
        dit(x, t, y[:4])
    with pytest.raises(ValueError, match=r"y: torch.float32 \(5,\), expected torch.int64 \(5,\)"):
        dit(x, t, y.float())
    with pytest.raises(ValueError, match=r"y: labels 0 … 11, expected 0 … 10"):
        dit(x, t, torch.tensor([0, 1, 2, 3, 11]))
    with pytest.raises(ValueError, match=r"y: labels -1 … 3, expected 0 … 10"):
        dit(x, t, torch.tensor([0, 1, 2, 3, -1]))
    with pytest.raises(ValueError, match=r"drop: torch.int64 \(5,\), expected torch.bool \(5,\)"):
        dit(x, t, y, drop=y)
    with pytest.raises(ValueError, match=r"guided_channels: 5, expected 1 … 4"):
        dit.forward_with_cfg(x, t, y, 2.0, guided_channels=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_size": (8, 9)}, r"input_size: 8 x 9, expected multiples of the patch size 2"),
        ({"hidden_size": 30}, r"hidden_size: 30, expected a multiple of 4 and of the 4 heads"),
        ({"class_dropout_prob": 1.5}, r"class_dropout_prob: 1.5, expected a probability"),
    ],
)
def test_impossible_sizes_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


def test_names():
    assert len(NAMES) == 12
    with torch.device("meta"):
        dit = DiT.from_name("DiT-S/8", input_size=(16, 24), in_channels=3, num_classes=7, depth=2)
    assert dit.pos_embed.shape == (1, 6, 384)
    assert (dit.in_channels, dit.out_channels, dit.null_label, len(dit.blocks)) == (3, 6, 7, 2)
    with pytest.raises(ValueError, match=r"name: 'DiT-M/2', expected one of DiT-S/2, DiT-S/4.*DiT-XL/8"):
        DiT.from_name("DiT-M/2")


def test_network_survives_a_round_trip_through_a_file(golden_dit, tmp_path):
    dit, golden = golden_dit
    save_file(dit.state_dict(), tmp_path / "dit.safetensors")
    copy = DiT(8, 2, 4, 48, 3, 4, num_classes=10).eval()
    copy.load_state_dict(load_file(tmp_path / "dit.safetensors"))
    assert torch.equal(copy(golden["x"], golden["t"], golden["y"]), dit(golden["x"], golden["t"], golden["y"]))
