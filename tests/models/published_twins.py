"""Tiny networks in the form in which others publish theirs, and what these compute: written from the papers.

Everything here is a function of weights by their published names; nothing of the package is used.
"""

import math

import torch
from torch.nn import functional as F


class Weights(dict):
    """Random weights that are made as they are asked for, so that names and shapes are said where they are used."""

    def __init__(self, seed=0):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def make(self, name, *shape, std=0.2, mean=0.0):
        self[name] = mean + std * torch.randn(shape, generator=self.generator)

    def linear(self, name, inputs, outputs):
        self.make(f"{name}.weight", outputs, inputs, std=1 / math.sqrt(inputs))
        self.make(f"{name}.bias", outputs, std=0.1)

    def conv(self, name, inputs, outputs, kernel):
        self.make(f"{name}.weight", outputs, inputs, kernel, kernel, std=1 / math.sqrt(inputs * kernel**2))
        self.make(f"{name}.bias", outputs, std=0.1)


# --- transformers ----------------------------------------------------------------------------------------------------


def sincos(positions, dim):
    speed = 1 / 10000 ** (torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.double()[:, None] * speed
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def transformer(
    side=8, patch=2, channels=4, width=32, depth=2, heads=4, classes=10, sigma=False, seed=0, ratio=4, **switches
):
    """Weights of a DiT, with switches ``rms``, ``swiglu``, ``rope``, ``qk`` and ``no_shift``."""
    w, grid = Weights(seed), side // patch
    w.conv("x_embedder.proj", channels, width, patch)
    w.linear("t_embedder.mlp.0", 256, width)
    w.linear("t_embedder.mlp.2", width, width)
    w.make("y_embedder.embedding_table.weight", classes + 1, width, std=1.0)
    rows, columns = torch.arange(grid).repeat_interleave(grid), torch.arange(grid).repeat(grid)
    w["pos_embed"] = torch.cat([sincos(columns, width // 2), sincos(rows, width // 2)], dim=1)[None].float()
    for i in range(depth):
        block = f"blocks.{i}"
        w.linear(f"{block}.attn.qkv", width, 3 * width)
        w.linear(f"{block}.attn.proj", width, width)
        if switches.get("swiglu"):
            hidden = int(2 / 3 * int(width * ratio))
            w.linear(f"{block}.mlp.w12", width, 2 * hidden)
            w.linear(f"{block}.mlp.w3", hidden, width)
        else:
            w.linear(f"{block}.mlp.fc1", width, ratio * width)
            w.linear(f"{block}.mlp.fc2", ratio * width, width)
        w.linear(f"{block}.adaLN_modulation.1", width, (4 if switches.get("no_shift") else 6) * width)
        for norm in ("norm1", "norm2") if switches.get("rms") else ():
            w.make(f"{block}.{norm}.weight", width, mean=1.0)
        for norm in ("q_norm", "k_norm") if switches.get("qk") else ():
            w.make(f"{block}.attn.{norm}.weight", width // heads, mean=1.0)
            if not switches.get("rms"):
                w.make(f"{block}.attn.{norm}.bias", width // heads)
    if switches.get("rms"):
        w.make("final_layer.norm_final.weight", width, mean=1.0)
    w.linear("final_layer.linear", width, patch**2 * channels * (2 if sigma else 1))
    w.linear("final_layer.adaLN_modulation.1", width, 2 * width)
    if switches.get("rope"):
        half = width // heads // 2
        speed = 1 / 10000 ** (torch.arange(0, half, 2).float() / half)
        angles = torch.arange(grid).float()[:, None] * speed
        angles = angles.repeat_interleave(2, dim=1)  # of one axis
        both = torch.cat([angles[:, None].expand(-1, grid, -1), angles[None].expand(grid, -1, -1)], dim=2)
        w["feat_rope.freqs_cos"], w["feat_rope.freqs_sin"] = both.cos().flatten(0, 1), both.sin().flatten(0, 1)
    return dict(w)


def turn(w, x):
    """Rotary positions: x cos + (-x_2, x_1, -x_4, x_3, …) sin."""
    swapped = torch.empty_like(x)
    swapped[..., 0::2], swapped[..., 1::2] = -x[..., 1::2], x[..., 0::2]
    return x * w["feat_rope.freqs_cos"] + swapped * w["feat_rope.freqs_sin"]


def normed(w, name, x, eps=1e-6):
    if f"{name}.weight" in w and f"{name}.bias" not in w:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]
    return F.layer_norm(x, x.shape[-1:], w.get(f"{name}.weight"), w.get(f"{name}.bias"), eps)


def transformer_forward(w, x, t, y, heads=4):
    """What the published transformers compute (Peebles & Xie 2023; Yao et al. 2025)."""

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    n, width, patch = len(x), *w["x_embedder.proj.weight"].shape[::3]
    tokens = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=patch)
    grid = tokens.shape[2]
    tokens = tokens.flatten(2).transpose(1, 2) + w["pos_embed"]
    speed = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = t.float()[:, None] * speed
    time = linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], dim=1))
    condition = linear("t_embedder.mlp.2", F.silu(time)) + w["y_embedder.embedding_table.weight"][y]
    for i in range(1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))):
        block = f"blocks.{i}"
        parts = linear(f"{block}.adaLN_modulation.1", F.silu(condition)).split(width, dim=1)
        parts = [part[:, None] for part in parts]
        zero = torch.zeros_like(parts[0])
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            parts if len(parts) == 6 else [zero, parts[0], parts[1], zero, parts[2], parts[3]]
        )
        h = normed(w, f"{block}.norm1", tokens) * (1 + scale1) + shift1
        q, k, v = linear(f"{block}.attn.qkv", h).reshape(n, -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        if f"{block}.attn.q_norm.weight" in w:
            eps = 1e-6 if f"{block}.attn.q_norm.bias" not in w else 1e-5
            q, k = normed(w, f"{block}.attn.q_norm", q, eps), normed(w, f"{block}.attn.k_norm", k, eps)
        if "feat_rope.freqs_cos" in w:
            q, k = turn(w, q), turn(w, k)
        attention = (q @ k.transpose(2, 3) / math.sqrt(width // heads)).softmax(dim=3) @ v
        tokens = tokens + gate1 * linear(f"{block}.attn.proj", attention.transpose(1, 2).reshape(n, -1, width))
        h = normed(w, f"{block}.norm2", tokens) * (1 + scale2) + shift2
        if f"{block}.mlp.w12.weight" in w:
            gate, value = linear(f"{block}.mlp.w12", h).chunk(2, dim=2)
            h = linear(f"{block}.mlp.w3", gate * gate.sigmoid() * value)
        else:
            h = linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", h), approximate="tanh"))
        tokens = tokens + gate2 * h
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(condition))[:, None].chunk(2, dim=2)
    out = linear("final_layer.linear", normed(w, "final_layer.norm_final", tokens) * (1 + scale) + shift)
    out = out.reshape(n, grid, grid, patch, patch, -1)
    return out.permute(0, 5, 1, 3, 2, 4).reshape(n, -1, grid * patch, grid * patch)


# --- EDM2 ------------------------------------------------------------------------------------------------------------


def edm2(side=8, channels=4, widths=(64, 128), blocks=1, attention=(4,), classes=10, seed=0, prefix=""):
    """Weights of EDM2's U-Net (Karras et al. 2024, figure 21)."""
    w, embedding = Weights(seed), max(widths)

    def block(name, inputs, outputs, decodes, attends=False):
        w.make(f"{name}.emb_gain", std=0.5)
        w.make(f"{name}.conv_res0.weight", outputs, inputs if decodes else outputs, 3, 3)
        w.make(f"{name}.emb_linear.weight", outputs, embedding)
        w.make(f"{name}.conv_res1.weight", outputs, outputs, 3, 3)
        if inputs != outputs:
            w.make(f"{name}.conv_skip.weight", outputs, inputs, 1, 1)
        if attends:
            w.make(f"{name}.attn_qkv.weight", 3 * outputs, outputs, 1, 1)
            w.make(f"{name}.attn_proj.weight", outputs, outputs, 1, 1)

    w.make("out_gain", mean=1.0)
    w.make("emb_fourier.freqs", widths[0], std=2 * math.pi)
    w.make("emb_fourier.phases", widths[0], std=2 * math.pi)
    w.make("emb_noise.weight", embedding, widths[0])
    if classes:
        w.make("emb_label.weight", embedding, classes)
    skips, now = [], channels + 1
    for i, width in enumerate(widths):
        res = f"enc.{side >> i}x{side >> i}"
        if i == 0:
            w.make(f"{res}_conv.weight", width, now, 3, 3)
            now = width
        else:
            block(f"{res}_down", now, now, False)
        skips.append(now)
        for j in range(blocks):
            block(f"{res}_block{j}", now, width, False, side >> i in attention)
            now = width
            skips.append(now)
    for i, width in reversed(list(enumerate(widths))):
        res = f"dec.{side >> i}x{side >> i}"
        if i == len(widths) - 1:
            block(f"{res}_in0", now, now, True, True)
            block(f"{res}_in1", now, now, True)
        else:
            block(f"{res}_up", now, now, True)
        for j in range(blocks + 1):
            block(f"{res}_block{j}", now + skips.pop(), width, True, side >> i in attention)
            now = width
    w.make("out_conv.weight", channels, now, 3, 3)
    w.make("logvar_fourier.freqs", 8)
    w.make("logvar_fourier.phases", 8)
    w.make("logvar_linear.weight", 1, 8)
    return {(name if name.startswith("logvar") else prefix + name): value for name, value in w.items()}


def edm2_denoised(w, x_t, sigma, y):
    """D(x; sigma) of the paper: preconditioning (table 1, EDM) around the network."""
    s = sigma[:, None, None, None]
    total = (s**2 + 0.25).sqrt()
    return 0.25 / total**2 * x_t + 0.5 * s / total * edm2_forward(w, x_t / total, sigma.log() / 4, y)


def rms_normed(x, axes):
    return x / (1e-4 + x.pow(2).mean(axes, keepdim=True).sqrt())


def edm2_forward(w, x, noise, y):
    def weight(name):
        value = w[f"{name}.weight"]
        return rms_normed(value, tuple(range(1, value.ndim))) / math.sqrt(value[0].numel())

    def mp_conv(name, x):
        return F.conv2d(x, weight(name), padding=weight(name).shape[2] // 2)

    def mp_silu(x):
        return x * x.sigmoid() / 0.596

    def mp_sum(a, b, t):
        return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)

    waves = math.sqrt(2) * (noise[:, None] * w["emb_fourier.freqs"] + w["emb_fourier.phases"]).cos()
    classes = w["emb_label.weight"].shape[1]
    one_hot = F.one_hot(y, classes).float() * math.sqrt(classes)
    embedding = mp_silu(mp_sum(waves @ weight("emb_noise").T, one_hot @ weight("emb_label").T, 0.5))

    def block(name, x):
        decodes = name.startswith("dec")
        if name.endswith("_down"):
            x = (x[..., 0::2, 0::2] + x[..., 1::2, 0::2] + x[..., 0::2, 1::2] + x[..., 1::2, 1::2]) / 4
        if name.endswith("_up"):
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        skip = f"{name}.conv_skip.weight" in w
        if not decodes:
            x = rms_normed(mp_conv(f"{name}.conv_skip", x) if skip else x, 1)
        r = mp_conv(f"{name}.conv_res0", mp_silu(x))
        gains = embedding @ weight(f"{name}.emb_linear").T * w[f"{name}.emb_gain"] + 1
        r = mp_conv(f"{name}.conv_res1", mp_silu(r * gains[:, :, None, None]))
        x = mp_sum(mp_conv(f"{name}.conv_skip", x) if skip and decodes else x, r, 0.3)
        if f"{name}.attn_qkv.weight" in w:
            n, c, h, _ = x.shape
            parts = mp_conv(f"{name}.attn_qkv", x).reshape(n, c // 64, 64, 3, h * h)
            q, k, v = (rms_normed(parts[:, :, :, i], 2) for i in range(3))  # (N, heads, 64, L) each
            attention = torch.einsum("nhcq,nhck->nhqk", q, k / 8).softmax(dim=3)
            a = torch.einsum("nhqk,nhck->nhcq", attention, v).reshape(x.shape)
            x = mp_sum(x, mp_conv(f"{name}.attn_proj", a), 0.3)
        return x.clip(-256, 256)

    order = list(dict.fromkeys(".".join(name.split(".")[:2]) for name in w if name.startswith(("enc.", "dec."))))
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    skips = []
    for name in order:
        if name.startswith("enc."):
            x = mp_conv(name, x) if name.endswith("_conv") else block(name, x)
            skips.append(x)
        else:
            if "_block" in name:
                skip = skips.pop()
                a, b = x.shape[1], skip.shape[1]
                total = math.sqrt((a + b) / (0.5**2 + 0.5**2))
                x = torch.cat([x * total / math.sqrt(a) * 0.5, skip * total / math.sqrt(b) * 0.5], dim=1)
            x = block(name, x)
    return mp_conv("out_conv", x) * w["out_gain"]


# --- the autoencoder of latent diffusion -----------------------------------------------------------------------------


def ldm(channels=4, widths=(32, 32, 64), blocks=1, attends=True, seed=0):
    """Weights of an autoencoder of latent diffusion (Rombach et al. 2022), attention at its lowest resolution."""
    w = Weights(seed)

    def norm(name, width):
        w.make(f"{name}.weight", width, mean=1.0)
        w.make(f"{name}.bias", width)

    def resnet(name, inputs, outputs):
        norm(f"{name}.norm1", inputs)
        w.conv(f"{name}.conv1", inputs, outputs, 3)
        norm(f"{name}.norm2", outputs)
        w.conv(f"{name}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            w.conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attention(name, width):
        norm(f"{name}.norm", width)
        for layer in ("q", "k", "v", "proj_out"):
            w.conv(f"{name}.{layer}", width, width, 1)

    top = len(widths) - 1
    for part, first, last in (("encoder", 3, 2 * channels), ("decoder", channels, 3)):
        now = widths[0] if part == "encoder" else widths[-1]
        w.conv(f"{part}.conv_in", first, now, 3)
        levels = range(top + 1) if part == "encoder" else range(top, -1, -1)
        for level in levels:
            name = f"{part}.{'down' if part == 'encoder' else 'up'}.{level}"
            for i in range(blocks + (part == "decoder")):
                resnet(f"{name}.block.{i}", now, widths[level])
                now = widths[level]
                if attends and level == top:
                    attention(f"{name}.attn.{i}", now)
            if part == "encoder" and level != top:
                w.conv(f"{name}.downsample.conv", now, now, 3)
            if part == "decoder" and level != 0:
                w.conv(f"{name}.upsample.conv", now, now, 3)
        resnet(f"{part}.mid.block_1", widths[-1], widths[-1])
        attention(f"{part}.mid.attn_1", widths[-1])
        resnet(f"{part}.mid.block_2", widths[-1], widths[-1])
        norm(f"{part}.norm_out", now)
        w.conv(f"{part}.conv_out", now, last, 3)
    w.conv("quant_conv", 2 * channels, 2 * channels, 1)
    w.conv("post_quant_conv", channels, channels, 1)
    return dict(w)


def _ldm_layers(w):
    def conv(name, x, stride=1, padding=None):
        weight = w[f"{name}.weight"]
        return F.conv2d(x, weight, w[f"{name}.bias"], stride, weight.shape[2] // 2 if padding is None else padding)

    def norm(name, x):
        return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def resnet(name, x):
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)))
        h = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", h)))
        return h + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in w else x)

    def attention(name, x):
        h = norm(f"{name}.norm", x)
        q, k, v = (conv(f"{name}.{layer}", h).flatten(2) for layer in "qkv")  # (N, C, L) each
        share = (q.transpose(1, 2) @ k / math.sqrt(q.shape[1])).softmax(dim=2)
        return x + conv(f"{name}.proj_out", (v @ share.transpose(1, 2)).reshape(x.shape))

    def middle(part, x):
        x = resnet(f"{part}.mid.block_1", x)
        return resnet(f"{part}.mid.block_2", attention(f"{part}.mid.attn_1", x))

    def level(name, x):
        count = len({one.split(".")[4] for one in w if one.startswith(f"{name}.block.")})
        for i in range(count):
            x = resnet(f"{name}.block.{i}", x)
            if f"{name}.attn.{i}.q.weight" in w:
                x = attention(f"{name}.attn.{i}", x)
        return x

    return conv, norm, middle, level


def ldm_encoded(w, images):
    """Mean of the posterior."""
    conv, norm, middle, level = _ldm_layers(w)
    top = max(int(one.split(".")[2]) for one in w if one.startswith("encoder.down."))
    x = conv("encoder.conv_in", images)
    for i in range(top + 1):
        x = level(f"encoder.down.{i}", x)
        if i != top:
            x = conv(f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
    x = conv("encoder.conv_out", F.silu(norm("encoder.norm_out", middle("encoder", x))))
    return conv("quant_conv", x).chunk(2, dim=1)[0]


def ldm_decoded(w, latents):
    conv, norm, middle, level = _ldm_layers(w)
    top = max(int(one.split(".")[2]) for one in w if one.startswith("decoder.up."))
    x = middle("decoder", conv("decoder.conv_in", conv("post_quant_conv", latents)))
    for i in range(top, -1, -1):
        x = level(f"decoder.up.{i}", x)
        if i != 0:
            x = conv(f"decoder.up.{i}.upsample.conv", x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    return conv("decoder.conv_out", F.silu(norm("decoder.norm_out", x)))
