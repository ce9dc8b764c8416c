"""A tiny instance of every model family, and how its attention calls have to come out.

One `Case` at least for each row of `FAMILIES` in host/families.py.
"""

from types import SimpleNamespace

import torch
from comfy.ldm.chroma_radiance.model import ChromaRadianceParams
from family_kit import CROSS, FRAMES, MASKED, NO_LAYER, NOT_VIDEO, TOO_SHORT, Case, names

DOUBLE, BOTH = names("double", 2), names("double", 2) | names("single", 2)


def normal(**shapes):
    """Conditions: random tensors of these shapes."""
    return lambda generator: {name: torch.randn(1, *shape, generator=generator) for name, shape in shapes.items()}


def reference(*shape):
    """Conditions: a reference latent."""
    return lambda generator: {"reference_latents": [torch.randn(1, *shape, generator=generator)]}


def both(*conditions):
    return lambda generator: {name: value for part in conditions for name, value in part(generator).items()}


def words(tokens, total=None):
    """Conditions: the attention mask of a text of so many tokens."""
    mask = torch.zeros(1, total or tokens, dtype=torch.long)
    mask[:, :tokens] = 1
    return lambda generator: {"attention_mask": mask}


WAN = {"dim": 128, "ffn_dim": 128, "num_heads": 1, "num_layers": 2, "in_dim": 16, "out_dim": 16}
WAN_REFERENCE = reference(16, 1, 16, 16)


def wan_image(generator):
    hidden = torch.randn(1, 257, 1280, generator=generator)
    return {"clip_vision_output": SimpleNamespace(penultimate_hidden_states=hidden)}


def wan_control(generator):
    return {"vace_frames": [torch.randn(1, 32, 5, 16, 16, generator=generator)] * 2,
            "vace_mask": [torch.ones(1, 64, 5, 16, 16)] * 2, "vace_strength": [1.0, 1.0]}


def wan_context(generator):
    return {"context_latents": [torch.randn(1, 16, 1, 16, 16, generator=generator)]}


ANIMATE_2 = "model_animate2:WanAnimate2Model"


def wan(name, model_type, network="model:WanModel", config=None, **changes):
    given = {"latent": (16, 5, 16, 16), "text": (4, 4096), "video": 320, "layers": DOUBLE, "dense": {CROSS: 2},
             **changes}
    return Case(name, f"comfy.ldm.wan.{network}", {**WAN, "model_type": model_type, **(config or {})}, **given)


LTX = {"in_channels": 128, "cross_attention_dim": 128, "attention_head_dim": 64, "num_attention_heads": 2,
       "caption_channels": 64, "num_layers": 2}
LTX_AUDIO = {**LTX, "audio_attention_head_dim": 64, "audio_num_attention_heads": 1, "audio_cross_attention_dim": 64,
             "connector_num_attention_heads": 1, "connector_attention_head_dim": 64, "connector_num_layers": 1,
             "audio_connector_num_attention_heads": 1}
LTX_FRAME = 80
"""Tokens."""
MASKED_GUIDES = {CROSS: 2, MASKED: 2}
"""Newer versions split the call as well."""


def guide(strength=1.0, hidden=0):
    """Conditions: a guide frame at the end of the latent, of which the mask hides some tokens."""
    mask = torch.ones(1, 1, 5, 8, 10)
    mask[:, :, -1].view(-1)[:hidden] = -1.0
    entry = {"pre_filter_count": LTX_FRAME, "strength": strength, "pixel_mask": None, "latent_shape": (1, 8, 10)}
    return both(words(6), lambda generator: {"keyframe_idxs": torch.zeros(1, 3, LTX_FRAME, 2), "concat_mask": mask,
                                             "guide_attention_entries": [entry]})


def ltx(name, network="model:LTXVModel", config=LTX, **changes):
    given = {"latent": (128, 5, 8, 10), "text": (6, 64), "video": 400, "layers": DOUBLE, "dense": {CROSS: 2},
             "conditions": words(6), "resized": True, **changes}
    return Case(name, f"comfy.ldm.lightricks.{network}", config, **given)


def ltx2(name, audio, **changes):
    return ltx(name, "av_model:LTXAVModel", LTX_AUDIO, latent=((128, 5, 8, 10), audio), text=(6, 128), **changes)


HUNYUAN = {"image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768,
           "context_in_dim": 64, "hidden_size": 128, "mlp_ratio": 4.0, "num_heads": 1, "depth": 2,
           "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 256, "patch_size": [1, 2, 2], "qkv_bias": True,
           "guidance_embed": True, "byt5": False, "meanflow": False, "use_cond_type_embedding": False,
           "vision_in_dim": None, "meanflow_sum": False}
HUNYUAN_1_5 = {**HUNYUAN, "in_channels": 65, "out_channels": 32, "vec_in_dim": None, "guidance_embed": False,
               "byt5": True, "use_cond_type_embedding": True, "vision_in_dim": 1152, "patch_size": [1, 1, 1],
               "meanflow_sum": True}


def glyphs_and_image(generator):
    return {"pooled_output": None, "conditioning_byt5small": torch.randn(1, 20, 1472, generator=generator),
            "clip_vision_output": SimpleNamespace(last_hidden_state=torch.randn(1, 30, 1152, generator=generator))}


def hunyuan(name, config=HUNYUAN, latent=(16, 5, 24, 20), text=(150, 64), layers=BOTH, dense=None, **changes):
    return Case(name, "comfy.ldm.hunyuan_video.model:HunyuanVideo", config, latent, text, 600, layers,
                dense or {NO_LAYER: 2}, after=0, **changes)


MINIMAX = {"hidden_size": 128, "num_layers": 2, "token_refiner_num_layers": 1, "num_attention_heads": 1,
           "attention_head_dim": 128, "ffn_hidden_size": 128, "latents_dim": 24, "audio_latents_dim": 32,
           "text_dim": 64, "timestep_input_dim": 32, "time_embed_hidden_size": 64, "time_embed_dim": 64,
           "rope_inv_freq_len": 16}


def keyframe(generator):
    latent = torch.randn(1, 24, 1, 20, 24, generator=generator)
    return {"minimax_keyframes": [{"latent": latent, "resolved_frame_index": 0}]}


def minimax(name, **changes):
    return Case(name, "comfy.ldm.minimax.model:MiniMaxH3Model", MINIMAX, ((24, 5, 20, 24), (32, 2, 10)), (60, 64), 600,
                DOUBLE, after=0, **changes)


COGVIDEO = {"num_attention_heads": 2, "attention_head_dim": 64, "time_embed_dim": 64, "num_layers": 2,
            "in_channels": 16, "patch_size": 2, "text_embed_dim": 64, "use_rotary_positional_embeddings": True}


def cogvideo(name, config, video):
    return Case(name, "comfy.ldm.cogvideo.model:CogVideoXTransformer3DModel", {**COGVIDEO, **config}, (16, 6, 20, 20),
                (60, 64), video, DOUBLE, after=0)


MOCHI = {"depth": 2, "patch_size": 2, "num_heads": 1, "hidden_size_x": 128, "hidden_size_y": 64, "mlp_ratio_x": 96.0,
         "mlp_ratio_y": 2.0, "learn_sigma": False, "in_channels": 12, "qk_norm": True, "qkv_bias": False,
         "out_bias": True, "attn_drop": 0.0, "patch_embed_bias": True, "posenc_preserve_area": True,
         "timestep_mlp_bias": True, "attend_to_padding": False, "timestep_scale": 1000.0, "use_t5": True,
         "t5_feat_dim": 64, "t5_token_length": 256, "rope_theta": 10000.0}
COSMOS = {"max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16,
          "patch_spatial": 2, "patch_temporal": 1, "model_channels": 128, "num_blocks": 2, "num_heads": 1,
          "crossattn_emb_channels": 64, "pos_emb_cls": "rope3d", "pos_emb_learnable": True,
          "pos_emb_interpolation": "crop", "use_adaln_lora": True, "adaln_lora_dim": 16,
          "extra_per_block_abs_pos_emb": False, "rope_enable_fps_modulation": False}
COSMOS_1 = {**{name: COSMOS[name] for name in (
    "max_img_h", "max_img_w", "max_frames", "in_channels", "out_channels", "patch_spatial", "patch_temporal",
    "model_channels", "num_blocks", "num_heads", "crossattn_emb_channels", "pos_emb_cls", "use_adaln_lora",
    "adaln_lora_dim")}, "block_x_format": "THWBD", "affline_emb_norm": True, "extra_per_block_abs_pos_emb": True,
            "extra_per_block_abs_pos_emb_type": "learnable"}
KANDINSKY = {"in_text_dim": 64, "in_text_dim2": 32, "time_dim": 64, "model_dim": 128, "ff_dim": 128,
             "visual_embed_dim": 132, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (16, 24, 24)}

IMAGE = (16, 48, 50)
"""600 tokens."""
POOLED = normal(pooled_output=(32,))
FLUX = {"image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 64,
        "hidden_size": 128, "mlp_ratio": 4.0, "num_heads": 1, "depth": 2, "depth_single_blocks": 2,
        "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
        "txt_ids_dims": []}
FLUX_2 = {**FLUX, "image_model": "flux2", "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "mlp_ratio": 3.0,
          "axes_dim": [32] * 4, "theta": 2000, "patch_size": 1, "qkv_bias": False, "global_modulation": True,
          "mlp_silu_act": True, "ops_bias": False, "txt_ids_dims": [3], "default_ref_method": "index",
          "ref_index_scale": 10.0}
CHROMA = {**{name: value for name, value in FLUX.items() if name != "guidance_embed"}, "image_model": "chroma",
          "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 128, "hidden_dim": 64, "n_layers": 2}
RADIANCE = {**CHROMA, "image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3, "patch_size": 16,
            "nerf_hidden_size": 16, "nerf_mlp_ratio": 2, "nerf_depth": 1, "nerf_max_freqs": 4, "nerf_tile_size": 512,
            "nerf_final_head_type": "conv", "nerf_embedder_dtype": torch.float32, "use_x0": False,
            **{name: False for name in ("use_sequential_txt_ids",) if name in ChromaRadianceParams.__annotations__}}
PIXELS = (3, 384, 400)
"""600 tokens of 16 x 16 pixels."""
MAGE = {"in_channels": 128, "out_channels": 128, "num_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 2560}
KREA = {"features": 128, "tdim": 32, "txtdim": 64, "heads": 1, "kvheads": 1, "layers": 2, "txtlayers": 2, "txtheads": 1,
        "txtkvheads": 1}
JOY = {"in_channels": 16, "hidden_size": 128, "num_attention_heads": 1, "text_dim": 64, "num_layers": 2}
PIXEL_DIT = {"num_groups": 1, "hidden_size": 128, "pixel_hidden_size": 4, "pixel_attn_hidden_size": 128,
             "pixel_num_groups": 1, "patch_depth": 2, "pixel_depth": 1, "txt_embed_dim": 64}
QWEN = {"in_channels": 64, "num_layers": 2, "attention_head_dim": 128, "num_attention_heads": 1,
        "joint_attention_dim": 64}
SD3 = {"in_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": 32, "num_blocks": 2,
       "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}},
       "num_patches": 36864, "pos_embed_max_size": 192, "pos_embed_scaling_factor": None, "qk_norm": "rms"}
HIDREAM = {"attention_head_dim": 128, "axes_dims_rope": [64, 32, 32], "caption_channels": [32, 64],
           "max_resolution": [128, 128], "in_channels": 16, "llama_layers": [0, 1, 2, 3], "num_attention_heads": 1,
           "num_routed_experts": 2, "num_activated_experts": 1, "num_layers": 2, "num_single_layers": 2,
           "out_channels": 16, "patch_size": 2, "text_emb_dim": 32}
LUMINA = {"patch_size": 2, "in_channels": 16, "dim": 128, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 1,
          "n_kv_heads": 1, "axes_dims": [32, 48, 48], "axes_lens": [300, 512, 512], "cap_feat_dim": 64, "qk_norm": True,
          "multiple_of": 32, "ffn_dim_multiplier": 1.0, "rope_theta": 256.0}
HUNYUAN_IMAGE = {**HUNYUAN, "in_channels": 64, "out_channels": 64, "vec_in_dim": None, "patch_size": [1, 1],
                 "axes_dim": [64, 64], "guidance_embed": False, "byt5": True}
Z_IMAGE = {**LUMINA, "dim": 256, "n_heads": 2, "n_kv_heads": 2, "z_image_modulation": True, "pad_tokens_multiple": 32,
           "time_scale": 1000.0}


def flux(name, conditions):
    return Case(name, "comfy.ldm.flux.model:Flux", FLUX, IMAGE, (60, 64), 600, BOTH, before=60, conditions=conditions)


def qwen(name, layers=DOUBLE, **changes):
    return Case(name, "comfy.ldm.qwen_image.model:QwenImageTransformer2DModel", QWEN, (16, 1, 48, 50), (60, 64), 600,
                layers, before=60, resized=True, **changes)


def sd3(name, layers, config=None):
    return Case(name, "comfy.ldm.modules.diffusionmodules.mmdit:OpenAISignatureMMDITWrapper", {**SD3, **(config or {})},
                IMAGE, (60, 64), 600, layers, after=0, conditions=POOLED)


def lumina(name, config, **changes):
    return Case(name, "comfy.ldm.lumina.model:NextDiT", config, IMAGE, (60, 64), 600, DOUBLE,
                {NO_LAYER: 1, TOO_SHORT: 1}, resized=True, **changes)


CASES = [
    wan("Wan T2V", "t2v"),
    wan("Wan I2V", "i2v", config={"in_dim": 36}, conditions=wan_image, dense={CROSS: 4}),
    wan("Wan Fun, reference before", "t2v", config={"in_dim_ref_conv": 16}, conditions=WAN_REFERENCE, before=64),
    wan("Wan, reference after", "t2v", conditions=wan_context, before=0),
    wan("Wan VACE, two contexts", "vace", "model:VaceWanModel", {"vace_layers": 1, "vace_in_dim": 96},
        conditions=wan_control, layers=DOUBLE | {("double 0", 1), ("double 0", 2)}, dense={CROSS: 4}),
    wan("Wan Camera", "camera_2.2", "model:CameraWanModel", {"in_dim": 36},
        conditions=normal(camera_conditions=(24, 5, 16, 16))),
    wan("Wan S2V, reference after", "s2v", "model:WanModel_S2V", before=0,
        conditions=both(normal(audio_embed=(25, 1024, 20)), WAN_REFERENCE)),
    wan("Wan Animate, pose", "animate", "model_animate:AnimateWanModel", {"in_dim": 36, "num_layers": 5},
        conditions=normal(pose_video_latent=(16, 4, 16, 16)), layers=names("double", 5), dense={CROSS: 10}),
    wan("Wan HuMo, reference after", "humo", "model:HumoWanModel", before=0, dense={CROSS: 4},
        conditions=both(normal(audio_embed=(5, 8, 5, 1280)), WAN_REFERENCE)),
    wan("Wan Dancer, music", "wandancer", "model_wandancer:WanDancerModel", {"in_dim": 36},
        conditions=both(wan_image, normal(audio_embed=(20, 35))), dense={CROSS: 4}),
    wan("Wan SCAIL, reference and half-size pose", "scail", "model:SCAILWanModel", {"in_dim": 20}, before=64,
        dense={CROSS: 4},
        conditions=both(WAN_REFERENCE, normal(pose_video_latent=(16, 5, 8, 8)))),
    wan("Wan SCAIL, full-size pose", "scail", "model:SCAILWanModel", {"in_dim": 20}, before=64,
        dense={CROSS: 4},
        conditions=both(WAN_REFERENCE, normal(pose_video_latent=(16, 5, 16, 16)))),
    wan("Wan SCAIL-2, masks", "scail2", "model:SCAIL2WanModel", {"in_dim": 20}, before=64, dense={CROSS: 4},
        conditions=both(WAN_REFERENCE, normal(pose_video_latent=(16, 5, 8, 8), driving_mask_28ch=(5, 28, 8, 8),
                                              ref_mask_28ch=(6, 28, 16, 16)))),
    wan("Wan Animate 2", "animate2", ANIMATE_2, {"in_dim": 36}, detected={"model_type": "animate2"}, layers=set(),
        conditions=normal(pose_video_latent=(16, 4, 16, 16)), dense={CROSS: 2 * 4, NOT_VIDEO: 2, FRAMES: 2 * 2}),
    wan("Wan Animate 2, steps without pose", "animate2", ANIMATE_2, {"in_dim": 36}, dense={CROSS: 4},
        detected={"model_type": "animate2"}),
    wan("Wan causal, all frames at once", "t2v", "ar_model:CausalWanModel", detected={"causal_ar": True}),
    ltx("LTXV"),
    ltx("LTXV, guide", conditions=guide()),
    ltx("LTXV, masked guide", conditions=guide(hidden=30), video=400 - 30),
    ltx("LTXV, guide with a strength", conditions=guide(strength=0.5), layers=set(), dense=MASKED_GUIDES),
    # Audio as long as the video, so that only the width of its attention tells it apart.
    ltx2("LTX-2", (8, 400, 16), dense={CROSS: 4, NOT_VIDEO: 2 + 4}),
    ltx2("LTX-2, short audio", (8, 40, 16), dense={CROSS: 4 + 4, TOO_SHORT: 2}),
    hunyuan("HunyuanVideo", conditions=normal(pooled_output=(768,))),
    hunyuan("HunyuanVideo 1.5, glyphs and image", HUNYUAN_1_5, (32, 5, 12, 10), (140, 64), conditions=glyphs_and_image),
    hunyuan("HunyuanVideo, masked text", layers=set(), dense={MASKED: 6}, cfg=1.0,
            conditions=both(normal(pooled_output=(768,)), words(150))),
    hunyuan("HunyuanVideo 1.5, super-resolution", {**HUNYUAN_1_5, "in_channels": 98}, (32, 5, 12, 10), (140, 64),
            conditions=glyphs_and_image),
    hunyuan("Hunyuan Image 2.1", HUNYUAN_IMAGE, (64, 24, 25)),
    hunyuan("Hunyuan Image 2.1, refiner", {**HUNYUAN_IMAGE, "in_channels": 128, "patch_size": [1, 1, 1],
                                           "axes_dim": [16, 56, 56]}, (64, 1, 24, 25)),
    minimax("MiniMax H3"),
    minimax("MiniMax H3, keyframe", conditions=keyframe),
    cogvideo("CogVideoX", {}, 600),
    cogvideo("CogVideoX 1.5", {"patch_size_t": 2}, 300),
    Case("Mochi", "comfy.ldm.genmo.joint_model.asymm_models_joint:AsymmDiTJoint", MOCHI, (12, 3, 20, 20), (256, 64),
         300, DOUBLE, before=0, conditions=words(60, 256), resized=True),
    Case("Cosmos Predict2", "comfy.ldm.cosmos.predict2:MiniTrainDIT", COSMOS, (16, 5, 16, 16), (6, 64), 320,
         names("block", 2), {CROSS: 2}, resized=True),
    Case("Anima", "comfy.ldm.anima.model:Anima", {**COSMOS, "crossattn_emb_channels": 1024}, (16, 1, 40, 40), (6, 1024),
         400, names("block", 2), {CROSS: 2}, resized=True),
    Case("Cosmos 1", "comfy.ldm.cosmos.model:GeneralDIT", COSMOS_1, (16, 5, 16, 16), (6, 64), 320, names("block", 2),
         {CROSS: 2}, resized=True),
    Case("Kandinsky 5", "comfy.ldm.kandinsky5.model:Kandinsky5", KANDINSKY, (16, 5, 16, 16), (140, 64), 320, DOUBLE,
         {NO_LAYER: 1, CROSS: 2}, conditions=POOLED, resized=True),
    flux("Flux", POOLED),
    flux("Flux, Kontext reference", both(POOLED, reference(16, 16, 16))),
    Case("Flux 2", "comfy.ldm.flux.model:Flux", FLUX_2, (128, 24, 25), (60, 64), 600, BOTH, before=512),
    Case("Chroma", "comfy.ldm.chroma.model:Chroma", CHROMA, IMAGE, (60, 64), 600, BOTH, before=60, resized=True),
    Case("Chroma Radiance", "comfy.ldm.chroma_radiance.model:ChromaRadiance", RADIANCE, PIXELS, (60, 64), 600, BOTH,
         before=60, resized=True),
    Case("Mage-Flow", "comfy.ldm.mage_flow.model:MageFlowTransformer2DModel", MAGE, (128, 24, 25), (60, 2560), 600,
         DOUBLE, before=60, resized=True),
    Case("Krea 2", "comfy.ldm.krea2.model:SingleStreamDiT", KREA, IMAGE, (60, 128), 600, names("single", 2),
         {TOO_SHORT: 4}, before=60, resized=True),
    Case("JoyImage, image to edit", "comfy.ldm.joyimage.model:JoyImageTransformer3DModel", JOY, (16, 1, 48, 50),
         (60, 64), 600, DOUBLE, before=0, resized=True, conditions=reference(16, 1, 16, 16)),
    Case("PixelDiT", "comfy.ldm.pixeldit.model:PixDiT_T2I", PIXEL_DIT, PIXELS, (60, 64), 600, DOUBLE, {NO_LAYER: 1},
         after=0, resized=True, detected={"image_model": "pixeldit_t2i"}),
    qwen("Qwen-Image"),
    qwen("Qwen-Image, image to edit", conditions=reference(16, 1, 16, 16)),
    qwen("Qwen-Image, masked text", conditions=words(60), layers=set(), dense={MASKED: 2}),
    sd3("SD3.5 large", names("joint", 2)),
    sd3("SD3.5 medium", names("joint", 2) | {("joint 0", 1)}, {"x_block_self_attn_layers": [0]}),
    Case("HiDream-I1", "comfy.ldm.hidream.model:HiDreamImageTransformer2DModel", HIDREAM, IMAGE, (40, 32), 600, BOTH,
         before=0, resized=True, conditions=normal(pooled_output=(32,), conditioning_llama3=(4, 30, 64))),
    lumina("Lumina 2", LUMINA, before=60),
    lumina("Z-Image", Z_IMAGE, after=8),
    Case("Z-Image, pixels", "comfy.ldm.lumina.model:NextDiTPixelSpace", {
        **Z_IMAGE, "in_channels": 3, "patch_size": 16, "decoder_hidden_size": 32, "decoder_num_res_blocks": 1,
        "decoder_max_freqs": 4}, PIXELS, (60, 64), 600, DOUBLE, {NO_LAYER: 1, TOO_SHORT: 1}, after=8, resized=True,
         detected={"image_model": "zimage_pixel"}),
]


def case(name):
    return next(case for case in CASES if case.name == name)
