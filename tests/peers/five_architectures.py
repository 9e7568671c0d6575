"""Transformers' own ModelTesterMixin for five tiny architectures; the lane puts this file beside it."""

from __future__ import annotations

import unittest
from typing import Any, ClassVar

import torch
import transformers as t

from .test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

BATCH, LENGTH, VOCABULARY = 3, 7, 99
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class Tester:
    """What the mixin asks for: sizes, a config and inputs."""

    batch_size, hidden_size, num_hidden_layers, num_attention_heads = BATCH, 32, 2, 4
    is_training, num_choices, image_size, patch_size = True, 2, 16, 4

    def __init__(self, case: Case) -> None:
        self.case = case
        # Of an image: its patches and the class token.
        self.seq_length = self.encoder_seq_length = self.key_length = 17 if case.image else LENGTH
        self.decoder_seq_length = self.seq_length

    def get_config(self) -> Any:
        return self.case.config()

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        if self.case.image:
            return self.get_config(), {"pixel_values": floats_tensor([BATCH, 3, self.image_size, self.image_size])}
        ids = ids_tensor([BATCH, LENGTH], VOCABULARY)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.case.is_encoder_decoder:
            inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}
        return self.get_config(), inputs


class Case(ModelTesterMixin):
    image = False
    config: Any = None

    def setUp(self) -> None:
        self.model_tester = Tester(self)


class LlamaTest(Case, unittest.TestCase):
    all_model_classes = (t.LlamaModel, t.LlamaForCausalLM, t.LlamaForSequenceClassification)
    config = staticmethod(lambda: t.LlamaConfig(**SIZES, **TEXT, num_key_value_heads=2))


class GPT2Test(Case, unittest.TestCase):
    all_model_classes = (t.GPT2Model, t.GPT2LMHeadModel, t.GPT2ForSequenceClassification)
    config = staticmethod(lambda: t.GPT2Config(**TEXT, n_embd=32, n_layer=2, n_head=4, n_positions=64))


class BertTest(Case, unittest.TestCase):
    all_model_classes = (t.BertModel, t.BertForMaskedLM, t.BertForSequenceClassification)
    config = staticmethod(lambda: t.BertConfig(**SIZES, **TEXT))


class ViTTest(Case, unittest.TestCase):
    image, test_resize_embeddings = True, False
    all_model_classes = (t.ViTModel, t.ViTForImageClassification)
    config = staticmethod(lambda: t.ViTConfig(**SIZES, image_size=16, patch_size=4))


class T5Test(Case, unittest.TestCase):
    is_encoder_decoder = True
    all_model_classes = (t.T5Model, t.T5ForConditionalGeneration)
    sizes: ClassVar[dict[str, int]] = {"d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    config = staticmethod(lambda: t.T5Config(**T5Test.sizes, **TEXT, decoder_start_token_id=0))
