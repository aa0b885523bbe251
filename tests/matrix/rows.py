"""The architectures of the matrix: what is not tiny by itself, what they are given, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .tiny import IMAGE_TOKEN, WIDTH, inputs_of, noise, tiny, tokens

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """An architecture.

    Args:
        name: its class in transformers.
        fields: of its config, beside the sizes that `tiny` gives.
        inputs: of a model.
        refused: the words in which a way is refused before any work, by the column of the table.
        quick: run by `make test`.
    """

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[Any], Inputs] = inputs_of
    refused: Mapping[str, str] = field(default_factory=dict)
    quick: bool = False

    def model(self) -> Any:
        """A tiny random one."""
        return tiny(self.name, self.fields)


def text(name: str, quick: bool = False, **fields: Any) -> Row:
    """What takes text alone, or sound or pixels alone, and has no parts."""
    return Row(name, fields, quick=quick)


def uncalibrated(name: str, reason: str, quick: bool = False, **fields: Any) -> Row:
    """The same, where it is not calibrated, in these words."""
    return Row(name, fields, refused={"GPTQ 4": reason}, quick=quick)


def seeing(
    name: str, language: Mapping[str, Any], vision: Mapping[str, Any], places: int, quick: bool = False, **fields: Any
) -> Row:
    """A language model that is shown pictures, of which each takes so many places in the text."""
    return Row(
        name, {"text_config": language, "vision_config": vision, **fields}, lambda model: shown(places), quick=quick
    )


def shown(places: int, **pictures: Tensor) -> Inputs:
    """Two texts with a picture in each."""
    ids = tokens(2, 6 + places)
    ids[:, 3 : 3 + places] = IMAGE_TOKEN
    return {"input_ids": ids, **(pictures or {"pixel_values": noise(2, 3, 16, 16)})}


def patches(places: int, width: int) -> Inputs:
    """The same, as the Qwen models take pictures: cut into patches, of which four become one place."""
    side = 2 * int(places**0.5)
    grid = torch.tensor([[1, side, side]] * 2)
    found = shown(places, pixel_values=noise(2 * side * side, width), image_grid_thw=grid)
    found["mm_token_type_ids"] = (found["input_ids"] == IMAGE_TOKEN).long()
    return found


TAKES = "takes {}, not input_ids, and calibration is on token ids"
PIXELS = TAKES.format("pixel_values")
LINEAR, SLIDING = ["linear_attention", "full_attention"], ["sliding_attention", "full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SECTIONS = ROPE | {"mrope_section": [2, 3, 3]}
QWEN_VISION = {"hidden_size": WIDTH, "embed_dim": WIDTH, "out_hidden_size": WIDTH, "spatial_merge_size": 2}

ROWS: tuple[Row, ...] = (
    # decoders that scales can be folded into
    text("LlamaForCausalLM", quick=True),
    text("MistralForCausalLM"),
    text("Qwen2ForCausalLM"),
    text("Qwen3ForCausalLM"),
    text("GraniteForCausalLM"),
    text("GemmaForCausalLM"),
    text("Gemma2ForCausalLM"),
    text("Gemma3ForCausalLM"),
    text("Olmo2ForCausalLM"),
    text("Phi3ForCausalLM"),
    text("PhiForCausalLM"),
    text("OPTForCausalLM"),
    text("GPTNeoXForCausalLM"),
    text("GPT2LMHeadModel", quick=True),
    # other decoders
    text("BloomForCausalLM"),
    text("MptForCausalLM"),
    text("FalconForCausalLM", quick=True),
    text("GPTJForCausalLM", rotary_dim=8),
    text("GPTNeoForCausalLM", attention_types=[[["global", "local"], 1]]),
    text("GPTBigCodeForCausalLM"),
    text("CodeGenForCausalLM", rotary_dim=4, n_head=4),
    text("OpenAIGPTLMHeadModel"),
    text("Starcoder2ForCausalLM"),
    text("CohereForCausalLM"),
    text("Cohere2ForCausalLM"),
    text("GlmForCausalLM"),
    text("Glm4ForCausalLM"),
    text("StableLmForCausalLM"),
    text("NemotronForCausalLM"),
    text("OlmoForCausalLM"),
    text("Olmo3ForCausalLM"),
    text("SmolLM3ForCausalLM"),
    text("Ministral3ForCausalLM"),
    text("Exaone4ForCausalLM"),
    text("HeliumForCausalLM"),
    text("PersimmonForCausalLM"),
    text("BioGptForCausalLM"),
    text("XGLMForCausalLM"),
    text("ArceeForCausalLM"),
    text("ApertusForCausalLM"),
    text("Ernie4_5ForCausalLM"),
    text("SeedOssForCausalLM"),
    text("HunYuanDenseV1ForCausalLM"),
    text("DiffLlamaForCausalLM", num_key_value_heads=2),
    text("NanoChatForCausalLM"),
    text("MiniCPM3ForCausalLM", num_key_value_heads=2),
    text("ModernBertDecoderForCausalLM"),
    text("Gemma3nForCausalLM", num_kv_shared_layers=2, num_hidden_layers=4, layer_types=SLIDING * 2),
    text("Gemma4ForCausalLM"),
    text("Llama4ForCausalLM"),
    # experts
    text("MixtralForCausalLM"),
    text("Qwen2MoeForCausalLM"),
    text("Qwen3MoeForCausalLM"),
    text("OlmoeForCausalLM"),
    text("PhimoeForCausalLM"),
    text("GraniteMoeForCausalLM"),
    text("Glm4MoeForCausalLM"),
    text("GptOssForCausalLM"),
    text("DeepseekV2ForCausalLM", num_key_value_heads=2, first_k_dense_replace=1),
    text("DeepseekV3ForCausalLM", quick=True, num_key_value_heads=2, first_k_dense_replace=1, n_group=2, topk_group=1),
    text("MiniMaxM2ForCausalLM"),
    text("Ernie4_5_MoeForCausalLM", moe_k=2),
    # state-space models, recurrent ones and hybrids
    text("MambaForCausalLM", quick=True),
    text("Mamba2ForCausalLM", num_heads=4, n_groups=1),
    text("FalconMambaForCausalLM"),
    uncalibrated("RwkvForCausalLM", "RwkvModel scales its weight in place when it first runs", quick=True, rescale_every=1),
    text("xLSTMForCausalLM", chunk_size=16, hidden_size=128, embedding_dim=128),
    text("JambaForCausalLM", quick=True, attn_layer_period=2, attn_layer_offset=1),
    text("BambaForCausalLM", mamba_n_heads=4, attn_layer_indices=[1]),
    uncalibrated(
        "Zamba2ForCausalLM", "uses one block in several places",
        layers_block_type=["mamba", "hybrid"] * 2, num_hidden_layers=4,
    ),
    text("FalconH1ForCausalLM", mamba_d_ssm=64, mamba_n_heads=4),
    text("NemotronHForCausalLM", mamba_num_heads=4, mamba_head_dim=16, n_groups=1),
    text("GraniteMoeHybridForCausalLM", mamba_n_heads=4, layer_types=["mamba", "attention"]),
    text("RecurrentGemmaForCausalLM", num_hidden_layers=3),
    text("Lfm2ForCausalLM"),
    text("Qwen3NextForCausalLM", layer_types=LINEAR),
    text("Qwen3_5ForCausalLM", quick=True, layer_types=LINEAR),
    text("KimiLinearForCausalLM", num_key_value_heads=2, layer_types=LINEAR),
    # encoders
    text("BertForMaskedLM"),
    text("RobertaForSequenceClassification"),
    text("DistilBertForMaskedLM"),
    text("ElectraForMaskedLM"),
    uncalibrated("AlbertForMaskedLM", "runs albert.encoder.albert_layer_groups.0 several times in one pass", quick=True),
    text("DebertaV2ForMaskedLM"),
    text("MPNetForMaskedLM"),
    text("ModernBertForMaskedLM"),
    uncalibrated("XLMWithLMHeadModel", "ffns.1 of XLMWithLMHeadModel reads what blocks long before it put out", quick=True),
    text("EuroBertForMaskedLM"),
    text("NomicBertForMaskedLM"),
    text("LongformerForMaskedLM"),
    # encoder-decoders
    text("T5ForConditionalGeneration", quick=True, decoder_start_token_id=0),
    text("UMT5ForConditionalGeneration"),
    text("LongT5ForConditionalGeneration"),
    text("SwitchTransformersForConditionalGeneration"),
    text("BartForConditionalGeneration"),
    text("PegasusForConditionalGeneration"),
    text("MarianMTModel", quick=True),
    text("M2M100ForConditionalGeneration"),
    text("LEDForConditionalGeneration"),
    # sound
    uncalibrated("WhisperForConditionalGeneration", TAKES.format("input_features"), quick=True),
    uncalibrated("Wav2Vec2ForCTC", TAKES.format("input_values")),
    # pixels
    uncalibrated("ViTForImageClassification", PIXELS),
    uncalibrated("Dinov2Model", PIXELS),
    uncalibrated("DINOv3ViTModel", PIXELS),
    Row("CLIPModel", {}, lambda model: {**shown(0), "pixel_values": noise(2, 3, 16, 16)}, quick=True),
    Row("SiglipModel", {}, lambda model: {**shown(0), "pixel_values": noise(2, 3, 16, 16)}),
    # language models that see
    seeing("LlavaForConditionalGeneration", {"of": "LlamaConfig"}, {"of": "CLIPVisionConfig"}, 4),
    seeing("PaliGemmaForConditionalGeneration", {"of": "GemmaConfig"}, {"of": "SiglipVisionConfig"}, 4),
    seeing("Gemma3ForConditionalGeneration", {}, {"of": "SiglipVisionConfig"}, 4, mm_tokens_per_image=4, quick=True),
    Row(
        "Qwen2VLForConditionalGeneration",
        {"text_config": {"rope_parameters": SECTIONS}, "vision_config": QWEN_VISION},
        lambda model: patches(4, 3 * 2 * 8 * 8),
        quick=True,
    ),
    Row(
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {"rope_parameters": SECTIONS},
            "vision_config": QWEN_VISION | {"window_size": 32, "fullatt_block_indexes": [1]},
        },
        lambda model: patches(4, 3 * 2 * 8 * 8),
    ),
    Row(
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": {"rope_parameters": SECTIONS},
            "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        },
        lambda model: patches(4, 3 * 2 * 8 * 8),
    ),
)  # fmt: skip
