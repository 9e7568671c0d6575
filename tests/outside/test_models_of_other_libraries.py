"""Forty tiny models of libraries that regimewrap knows nothing of, with random weights: what ``wrap`` promises holds.

Not part of the default run: ``pytest -m outside tests/outside``; see docs/how-to/run-the-zoo.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

import regimewrap

pytestmark = [pytest.mark.outside, pytest.mark.filterwarnings("ignore")]


def image(size: int = 32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size)


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape)


VIT = {"image_size": 32, "num_classes": 3, "dim": 16, "depth": 1, "heads": 2, "mlp_dim": 32}
CV = ["resnet10", "preresnet10", "seresnet10", "mobilenet_wd4", "shufflenet_g1_wd4", "squeezenet_v1_0",
      "mobilenetv3_small_w7d20", "efficientnet_b0", "ghostnet", "igcv3_wd4"]  # fmt: skip
SEGMENTERS = ["Unet", "FPN", "Linknet", "MAnet", "DeepLabV3", "UnetPlusPlus", "PSPNet"]

#: Name of a case, with the module that is imported and what makes the model and its inputs from it.
MODELS: dict[str, tuple[str, Callable[[Any], tuple[nn.Module, tuple[Any, ...]]]]] = {
    "vit": ("vit_pytorch", lambda m: (m.ViT(patch_size=8, **VIT), (image(),))),
    "simple_vit": ("vit_pytorch", lambda m: (m.SimpleViT(patch_size=8, **VIT), (image(),))),
    "deepvit": ("vit_pytorch.deepvit", lambda m: (m.DeepViT(patch_size=8, **VIT), (image(),))),
    "cait": ("vit_pytorch.cait", lambda m: (m.CaiT(patch_size=8, cls_depth=1, **VIT), (image(),))),
    "pit": ("vit_pytorch.pit", lambda m: (m.PiT(patch_size=8, **{**VIT, "depth": (1, 1)}), (image(),))),
    "mobile_vit": ("vit_pytorch.mobile_vit", lambda m: (
        m.MobileViT((64, 64), [16, 24, 32], [8, 8, 12, 12, 16, 16, 24, 24, 32, 32, 48], 3), (image(64),))),
    "xcit": ("vit_pytorch.xcit", lambda m: (m.XCiT(patch_size=8, cls_depth=1, **VIT), (image(),))),
    "performer": ("performer_pytorch", lambda m: (
        m.Performer(dim=16, depth=1, heads=2, dim_head=8, nb_features=8), (tokens(2, 6, 16),))),
    "linformer": ("linformer", lambda m: (m.Linformer(dim=16, seq_len=8, depth=1, heads=2, k=4), (tokens(2, 8, 16),))),
    "conformer": ("conformer", lambda m: (
        m.ConformerBlock(dim=16, dim_head=8, heads=2, conv_kernel_size=7), (tokens(2, 6, 16),))),
    "perceiver": ("perceiver_pytorch", lambda m: (
        m.Perceiver(num_freq_bands=2, depth=1, max_freq=4.0, input_channels=3, num_latents=4, latent_dim=16,
                    cross_dim_head=8, latent_heads=2, latent_dim_head=8, num_classes=3),
        (tokens(2, 8, 8, 3),))),
    "local_attention": ("local_attention", lambda m: (
        m.LocalTransformer(num_tokens=11, dim=16, depth=1, max_seq_len=8, local_attn_window_size=4, heads=2,
                           dim_head=8),
        (torch.randint(0, 11, (2, 8)),))),
    "facenet": ("facenet_pytorch", lambda m: (m.InceptionResnetV1(), (image(96),))),
    "rtdl_mlp": ("rtdl_revisiting_models", lambda m: (
        m.MLP(d_in=5, d_out=2, n_blocks=2, d_block=16, dropout=0.1), (tokens(4, 5),))),
    "rtdl_resnet": ("rtdl_revisiting_models", lambda m: (
        m.ResNet(d_in=5, d_out=2, n_blocks=2, d_block=16, d_hidden=None, d_hidden_multiplier=2.0, dropout1=0.1,
                 dropout2=0.0), (tokens(4, 5),))),
    "rtdl_ft_transformer": ("rtdl_revisiting_models", lambda m: (
        m.FTTransformer(n_cont_features=5, cat_cardinalities=[3], d_out=2,
                        **{**m.FTTransformer.get_default_kwargs(1), "_is_default": False}),
        (tokens(4, 5), torch.randint(0, 3, (4, 1))))),
    "tabnet": ("pytorch_tabnet.tab_network", lambda m: (
        m.TabNet(5, 2, n_d=8, n_a=8, group_attention_matrix=torch.eye(5)), (tokens(8, 5),))),
    "nflows_residual": ("nflows.nn.nets", lambda m: (m.ResidualNet(5, 4, hidden_features=16), (tokens(4, 5),))),
    "normflows_mlp": ("normflows.nets", lambda m: (m.MLP([5, 16, 4]), (tokens(4, 5),))),
    "normflows_residual": ("normflows.nets", lambda m: (m.ResidualNet(5, 4, 16), (tokens(4, 5),))),
    "zuko_mlp": ("zuko.nn", lambda m: (m.MLP(5, 2, [16, 16]), (tokens(4, 5),))),
    "diffusers_unet": ("diffusers", lambda m: (
        m.UNet2DModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                      down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                      up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                      attention_head_dim=4), (image(8), 3))),
    "diffusers_kl": ("diffusers", lambda m: (
        m.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2), (image(8),))),
    **{f"cv_{name}": ("pytorchcv.model_provider", lambda m, name=name: (
        m.get_model(name, pretrained=False, num_classes=3), (image(224, batch=1),)))
       for name in CV},
    **{f"smp_{name}": ("segmentation_models_pytorch", lambda m, name=name: (
        getattr(m, name)("resnet18", encoder_weights=None, classes=2), (image(64),))) for name in SEGMENTERS},
}  # fmt: skip


def tensors(output: Any) -> list[Tensor]:
    output = getattr(output, "sample", output)
    output = getattr(output, "__dict__", output) if not isinstance(output, Tensor | tuple | list | dict) else output
    return [each for each in _pytree.tree_leaves(output) if isinstance(each, Tensor)]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_another_library_is_gated_and_comes_back(name):
    home, make = MODELS[name]
    library = pytest.importorskip(home, exc_type=ImportError, reason=f"pip install what has {home}")
    torch.manual_seed(0)
    model, inputs = make(library)
    for parameter in model.parameters():  # a branch that is multiplied by zero would hide what happens in it
        if (parameter == parameter.flatten()[0]).all():
            parameter.data.add_(torch.rand_like(parameter) * 0.1)
    classes = [type(module) for module in model.modules()]

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        with torch.no_grad():
            return tensors(model(*inputs))

    model.eval()
    bare = run()
    regimewrap.wrap(model, example_inputs=inputs)
    coverage = regimewrap.verify(model, *inputs)
    assert coverage.gated, coverage
    assert not coverage.escaped, coverage
    with regimewrap.at_keep_ratio(model, 1.0):
        assert all(map(torch.equal, run(), bare))
    with regimewrap.at_keep_ratio(model, 0.1):
        assert not all(map(torch.equal, run(), bare))
    regimewrap.unwrap(model)
    assert all(map(torch.equal, run(), bare))
    assert [type(module) for module in model.modules()] == classes
