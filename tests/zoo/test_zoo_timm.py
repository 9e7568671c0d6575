"""timm's zoo: every name planned on the meta device, and the smallest model of every module family on real tensors."""

from __future__ import annotations

import time
from types import ModuleType
from typing import Any

import pytest
import torch
from zoo_checks import QUIET, examine

import regimewrap

pytestmark = QUIET

#: The smallest model of each of timm's modules whose images have at most 300 pixels a side, and the size it is given.
#: Where a module has none that small (NaFlexViT, NASNet, ...), its smallest model, which takes smaller images as well.
FAMILIES = {
    "beit": ("beit_base_patch16_224", 224),
    "byoanet": ("halonet_h1", 256),
    "byobnet": ("test_byobnet", 96),
    "cait": ("cait_xxs24_224", 224),
    "coat": ("coat_tiny", 224),
    "convit": ("convit_tiny", 224),
    "convmixer": ("convmixer_768_32", 96),
    "convnext": ("test_convnext", 96),
    "cpubone": ("cpubone_nano", 96),
    "crossvit": ("crossvit_tiny_240", 240),
    "csatv2": ("csatv2", 256),
    "cspnet": ("cs3darknet_focus_s", 96),
    "cspnext": ("cspnext_tiny", 96),
    "davit": ("davit_tiny", 96),
    "deepseek_vit": ("deepseek_vit_412m", 126),
    "deit": ("deit_tiny_patch16_224", 224),
    "densenet": ("densenet121", 96),
    "dla": ("dla46x_c", 96),
    "dpn": ("dpn48b", 96),
    "edgenext": ("edgenext_xx_small", 96),
    "efficientformer": ("efficientformer_l1", 224),
    "efficientformer_v2": ("efficientformerv2_s0", 224),
    "efficientnet": ("test_efficientnet", 96),
    "efficientvim": ("efficientvim_m1", 96),
    "efficientvit_mit": ("efficientvit_b0", 96),
    "efficientvit_msra": ("efficientvit_m0", 224),
    "eva": ("vit_tiny_patch16_dinov3_qkvb", 256),
    "fasternet": ("fasternet_t0", 96),
    "fastvit": ("fastvit_t8", 96),
    "focalnet": ("focalnet_tiny_srf", 96),
    "gcvit": ("gcvit_xxtiny", 224),
    "gemma4_vit": ("gemma4_vit_167m", 96),
    "ghostnet": ("ghostnet_050", 96),
    "hardcorenas": ("hardcorenas_b", 96),
    "hgnet": ("hgnetv2_b0", 96),
    "hiera": ("hiera_tiny_224", 224),
    "hieradet_sam2": ("hieradet_small", 224),
    "hrnet": ("hrnet_w18_small", 96),
    "iformer": ("iformer_t", 96),
    "inception_next": ("inception_next_atto", 96),
    "inception_resnet_v2": ("inception_resnet_v2", 96),
    "inception_v3": ("inception_v3", 96),
    "inception_v4": ("inception_v4", 96),
    "lcnetv2": ("lcnetv2_small", 96),
    "levit": ("levit_128s", 224),
    "lowformer": ("lowformer_b0", 96),
    "mambaout": ("test_mambaout", 96),
    "maxxvit": ("test_coatnet", 160),
    "metaformer": ("poolformerv2_s12", 96),
    "mlp_mixer": ("gmlp_ti16_224", 224),
    "mobilenetv3": ("mobilenetv3_small_050", 96),
    "mobilenetv5": ("mobilenetv5_base", 96),
    "mobilevit": ("mobilevit_xxs", 96),
    "mvitv2": ("mvitv2_tiny", 224),
    "naflexvit": ("naflexvit_base_patch16_gap", 96),
    "nasnet": ("nasnetalarge", 128),
    "nest": ("nest_tiny", 224),
    "nextvit": ("nextvit_small", 96),
    "nfnet": ("test_nfnet", 96),
    "pit": ("pit_ti_224", 224),
    "pnasnet": ("pnasnet5large", 128),
    "pvt_v2": ("pvt_v2_b0", 96),
    "qwen3_vit": ("qwen3_vit_88m", 64),
    "rdnet": ("rdnet_tiny", 96),
    "regnet": ("regnetx_002", 96),
    "repghost": ("repghostnet_050", 96),
    "repvit": ("repvit_m1", 96),
    "res2net": ("res2next50", 96),
    "resnest": ("resnest14d", 96),
    "resnet": ("test_resnet", 96),
    "resnetv2": ("resnetv2_18", 96),
    "rexnet": ("rexnet_100", 96),
    "selecsls": ("selecsls42", 96),
    "senet": ("legacy_seresnet18", 96),
    "sequencer": ("sequencer2d_s", 224),
    "shvit": ("shvit_s1", 96),
    "sknet": ("skresnet18", 96),
    "starnet": ("starnet_s050", 96),
    "swiftformer": ("swiftformer_xs", 224),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 224),
    "swin_transformer_v2": ("swinv2_tiny_window16_256", 256),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", 224),
    "tiny_vit": ("tiny_vit_5m_224", 96),
    "tnt": ("tnt_s_legacy_patch16_224", 224),
    "tresnet": ("tresnet_m", 96),
    "twins": ("twins_svt_small", 224),
    "vgg": ("vgg11", 96),
    "visformer": ("visformer_tiny", 224),
    "vision_transformer": ("test_vit", 160),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 224),
    "vision_transformer_relpos": ("test_vit_relpos", 160),
    "vision_transformer_sam": ("samvit_base_patch16_224", 224),
    "vitamin": ("vitamin_small_224", 224),
    "volo": ("volo_d1_224", 224),
    "vovnet": ("ese_vovnet19b_slim_dw", 96),
    "xception": ("legacy_xception", 96),
    "xception_aligned": ("xception41p", 96),
    "xcit": ("xcit_nano_12_p8_224", 224),
}
#: More models, for what is special about them.
SPECIAL = {
    "bat_resnext26ts": 256,  # attention by bilinear transforms
    "botnet26t_256": 256,  # attention between convolutions
    "cs3se_edgenet_x": 96,  # squeeze-excite in cross stages
    "eca_nfnet_l0": 96,  # scaled activations
    "efficientnet_cc_b0_4e": 96,  # mixtures of convolutions
    "ese_vovnet39b_evos": 96,  # EvoNorm: norm and activation in one
    "eva02_tiny_patch14_224": 224,  # SwiGLU
    "gcresnet33ts": 96,  # global context gates
    "lambda_resnet26t": 128,  # lambda layers
    "mobilenetv4_hybrid_medium": 96,  # attention between convolutions, universal inverted bottlenecks
    "mobilevitv2_050": 128,  # functions in methods that branch
    "regnetz_b16_evos": 96,  # EvoNorm and squeeze-excite
    "resnetv2_50d_evos": 96,  # EvoNorm before each convolution
    "resnetv2_50d_frn": 96,  # filter response norm with a thresholded linear unit
    "skresnext50_32x4d": 96,  # selective kernels
    "vit_wee_patch16_reg1_gap_256": 256,  # register tokens
}
SHORT = {
    *("byobnet", "convnext", "coat", "cspnext", "efficientnet", "fasternet", "ghostnet", "levit", "mambaout"),
    *("maxxvit", "mobilenetv3", "mobilevit", "nfnet", "resnet", "starnet", "vision_transformer", "xcit"),
    *("resnetv2_50d_frn", "lambda_resnet26t"),
}
#: What does not hold yet, and why.
FAILING: dict[str, str] = {}


def marks(key: str) -> list[pytest.MarkDecorator]:
    """Return the marks of a family or a special model: the form of the zoo it is in, and if it is known to fail."""
    known = [pytest.mark.xfail(reason=FAILING[key], strict=True)] if key in FAILING else []
    return [pytest.mark.zoo if key in SHORT else pytest.mark.zoo_full, *known]


@pytest.fixture(scope="module")
def timm() -> ModuleType:
    """The library, imported only if the zoo runs."""
    return pytest.importorskip("timm")


CASES = [pytest.param(name, size, marks=marks(family)) for family, (name, size) in FAMILIES.items()]
CASES += [pytest.param(name, size, marks=marks(name)) for name, size in SPECIAL.items()]


@pytest.mark.parametrize(("name", "size"), CASES)
def test_wrapping_keeps_every_bit_of_a_timm_model(name: str, size: int, timm, report):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    report(examine(model, lambda _: ((images.clone(),), {})))


@pytest.mark.zoo
def test_the_zoo_has_every_family_of_timm(timm):
    assert FAMILIES.keys() == set(timm.list_modules())
    assert sum(len(timm.list_models(module=family)) for family in FAMILIES) == len(timm.list_models())


@pytest.mark.zoo
def test_the_smallest_model_of_every_family_can_be_planned(timm, report):
    report(plan_all(timm, [name for name, _ in FAMILIES.values()]))


@pytest.mark.zoo_full
@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_of_a_family_can_be_planned(family: str, timm, report):
    report(plan_all(timm, timm.list_models(module=family)))


def plan_all(timm: ModuleType, names: list[str]) -> dict[str, Any]:
    """Plan models on the meta device, without memory; each has a site, or the refusal names its activations."""
    seconds = {}
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name)
        start = time.perf_counter()
        plan = regimewrap.plan(model)
        seconds[name] = time.perf_counter() - start
        assert not plan.unreachable, f"{name}: {plan.unreachable[:3]}"
        if not plan.gated:
            with pytest.raises(regimewrap.errors.NoSitesError, match="Activations seen: "):
                regimewrap.wrap(model)
    slowest = max(seconds, key=seconds.__getitem__)
    return {
        "models": len(names),
        "plan_s": round(sum(seconds.values()), 2),
        "slowest": slowest,
        "slowest_ms": round(seconds[slowest] * 1000),
    }
