"""The architectures of the matrix: what is not tiny by itself, what they are given, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..tiny_models import VOCABULARY
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
    name: str,
    language: Mapping[str, Any],
    vision: Mapping[str, Any],
    places: int,
    quick: bool = False,
    pictures: Tensor | None = None,
    **fields: Any,
) -> Row:
    """A language model that is shown pictures, of which each takes so many places in the text."""
    return Row(
        name,
        {"text_config": language, "vision_config": vision, **fields},
        lambda model: shown(places, pictures),
        quick=quick,
    )


def shown(places: int, pictures: Tensor | None = None) -> Inputs:
    """Two texts with a picture in each."""
    ids = tokens(2, 6 + places)
    ids[:, 3 : 3 + places] = IMAGE_TOKEN
    return {"input_ids": ids, "pixel_values": noise(2, 3, 16, 16) if pictures is None else pictures}


def patches(places: int, width: int) -> Inputs:
    """The same, as the Qwen models take pictures: cut into patches, of which four become one place."""
    side = 2 * int(places**0.5)
    found = shown(places, noise(2 * side * side, width))
    found["image_grid_thw"] = torch.tensor([[1, side, side]] * 2)
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
    text("CTRLLMHeadModel", dff=64),
    text("XLNetLMHeadModel"),
    text("BitNetForCausalLM"),
    text("CwmForCausalLM"),
    text("DogeForCausalLM"),
    text("GraniteSWAForCausalLM"),
    uncalibrated("HrmTextForCausalLM", "runs model.L_module.layers.0 several times in one pass"),
    text("HyperCLOVAXForCausalLM"),
    text("Jais2ForCausalLM"),
    text("LaraMiniForCausalLM"),
    text("VaultGemmaForCausalLM"),
    text("YoutuForCausalLM", num_key_value_heads=2),
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
    text("AfmoeForCausalLM"),
    text("Cohere2MoeForCausalLM"),
    text("DeepseekV32ForCausalLM", num_key_value_heads=2, index_n_heads=2, index_head_dim=32, index_topk=4),
    text(
        "DeepseekV4ForCausalLM", o_lora_rank=32, o_groups=2, index_n_heads=2, index_head_dim=16, index_topk=4,
    ),
    text("Dots1ForCausalLM", n_shared_experts=1),
    text("ExaoneMoeForCausalLM"),
    text("FlexOlmoForCausalLM"),
    text("FlintForCausalLM"),
    text("Glm4MoeLiteForCausalLM", num_key_value_heads=2),
    text("GlmMoeDsaForCausalLM", num_key_value_heads=2),
    text("GraniteMoeSharedForCausalLM"),
    text("HunYuanMoEV1ForCausalLM"),
    text("HYV3ForCausalLM"),
    text("JetMoeForCausalLM"),
    text("Kolibri1ForCausalLM"),
    text("LagunaForCausalLM"),
    text(
        "LongcatFlashForCausalLM", num_key_value_heads=2, moe_topk=2, zero_expert_num=2, expert_ffn_hidden_size=WIDTH,
    ),
    text("MellumForCausalLM"),
    text("MiMoV2FlashForCausalLM"),
    text("MiniMaxForCausalLM"),
    text("MiniMaxM3VLForCausalLM"),
    text("SolarOpenForCausalLM"),
    text("ZayaForCausalLM", num_experts_per_tok=1),
    # state-space models, recurrent ones and hybrids
    text("MambaForCausalLM", quick=True),
    text("Mamba2ForCausalLM", num_heads=4, n_groups=1),
    text("FalconMambaForCausalLM"),
    uncalibrated("RwkvForCausalLM", "RwkvModel scales its weight in place when it first runs", quick=True, rescale_every=1),
    text("xLSTMForCausalLM", chunk_size=16, hidden_size=128, embedding_dim=128),
    text("JambaForCausalLM", quick=True, attn_layer_period=2, attn_layer_offset=1),
    text("BambaForCausalLM", mamba_n_heads=4, attn_layer_indices=[1]),
    uncalibrated(
        "ZambaForCausalLM", "uses one block in several places", layers_block_type=["mamba", "hybrid"] * 2,
        num_hidden_layers=4, num_key_value_heads=2, attention_hidden_size=64, attention_head_dim=32,
    ),
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
    text("Lfm2MoeForCausalLM", layer_types=["conv", "full_attention"], num_dense_layers=1),
    text("Lfm3ForCausalLM", layer_types=["conv", "full_attention"]),
    text("OlmoHybridForCausalLM", layer_types=LINEAR),
    text("Qwen3_5MoeForCausalLM", layer_types=LINEAR),
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
    text("XLMRobertaForMaskedLM"),
    text("CamembertForMaskedLM"),
    text("BigBirdForMaskedLM"),
    text("ConvBertForMaskedLM"),
    text("EsmForMaskedLM", position_embedding_type="rotary", mask_token_id=3),
    text("FNetForMaskedLM"),
    text("FunnelForMaskedLM", block_sizes=[1, 1]),
    text("GteForMaskedLM"),
    text("JinaEmbeddingsV3ForMaskedLM"),
    text("LayoutLMForMaskedLM"),
    text("NystromformerForMaskedLM"),
    text("RemBertForMaskedLM"),
    uncalibrated("SqueezeBertForMaskedLM", "has no list of decoder layers that could be calibrated one by one"),
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
    text("BigBirdPegasusForConditionalGeneration"),
    text("BlenderbotForConditionalGeneration"),
    text("FSMTForConditionalGeneration", src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY),
    text("MBartForConditionalGeneration"),
    text("MT5ForConditionalGeneration", decoder_start_token_id=0),
    text("MvpForConditionalGeneration"),
    text("PLBartForConditionalGeneration"),
    text(
        "ProphetNetForConditionalGeneration", num_encoder_layers=2, num_encoder_attention_heads=2, num_decoder_attention_heads=2,
    ),
    text("T5GemmaForConditionalGeneration"),
    # sound
    uncalibrated("WhisperForConditionalGeneration", TAKES.format("input_features"), quick=True),
    uncalibrated("Wav2Vec2ForCTC", TAKES.format("input_values")),
    uncalibrated("HubertForCTC", TAKES.format("input_values")),
    uncalibrated("WavLMForCTC", TAKES.format("input_values")),
    # pixels
    uncalibrated("ViTForImageClassification", PIXELS),
    uncalibrated("Dinov2Model", PIXELS),
    uncalibrated("DINOv3ViTModel", PIXELS),
    uncalibrated("BeitForImageClassification", PIXELS),
    uncalibrated("DeiTForImageClassification", PIXELS),
    uncalibrated(
        "SwinForImageClassification", PIXELS,
        embed_dim=WIDTH, depths=[1, 1], num_heads=[2, 2], patch_size=4, window_size=2,
    ),
    Row("CLIPModel", {}, lambda model: shown(0), quick=True),
    Row("SiglipModel", {}, lambda model: shown(0)),
    # language models that see
    seeing("AyaVisionForConditionalGeneration", {"of": "Cohere2Config"}, {"of": "SiglipVisionConfig"}, 1),
    seeing("Idefics3ForConditionalGeneration", {"of": "LlamaConfig"}, {}, 1, pictures=noise(2, 1, 3, 16, 16)),
    seeing("SmolVLMForConditionalGeneration", {"of": "LlamaConfig"}, {}, 1, pictures=noise(2, 1, 3, 16, 16)),
    seeing(
        "InternVLForConditionalGeneration", {"of": "Qwen2Config"},
        {"of": "InternVLVisionConfig", "image_size": [16, 16], "patch_size": [8, 8]}, 1,
    ),
    Row(
        "Mistral3ForConditionalGeneration",
        {"text_config": {"of": "MistralConfig"}, "vision_config": {"of": "PixtralVisionConfig"}},
        lambda model: {**shown(1), "image_sizes": torch.tensor([[16, 16]] * 2)},
    ),
    Row(
        "Blip2ForConditionalGeneration",
        {"text_config": {"of": "OPTConfig"}, "qformer_config": {"encoder_hidden_size": WIDTH}, "num_query_tokens": 4},
        lambda model: shown(4),
    ),
    Row("Gemma4ForConditionalGeneration"),  # this and the next two without a picture
    Row("Phi4MultimodalForCausalLM", {"audio_config": {"num_blocks": 1, "ext_pw_out_channel": 32, "nemo_conv_channels": 32}}),
    Row(
        "MllamaForConditionalGeneration",
        {
            "text_config": {"cross_attention_layers": [1]},
            "vision_config": {
                "num_global_layers": 1, "intermediate_layers_indices": [0], "vision_output_dim": 64, "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]],
            },
        },
    ),
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
    Row(
        "Qwen3_5ForConditionalGeneration",
        {
            "text_config": {"rope_parameters": SECTIONS, "layer_types": LINEAR},
            "vision_config": QWEN_VISION | {"num_position_embeddings": 16},
        },
        lambda model: patches(4, 3 * 2 * 8 * 8),
    ),
)  # fmt: skip
