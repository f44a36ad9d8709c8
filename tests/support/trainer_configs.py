"""Configs of other trainers, as a user of each would have them, for the shipped cat: (file name, text)."""

KOHYA = (
    "cat-lora.txt",
    """
export MODEL="runwayml/stable-diffusion-v1-5"
accelerate launch --num_processes=1 --mixed_precision=bf16 train_network.py \\
  --pretrained_model_name_or_path=$MODEL --train_data_dir=img --resolution=512,512 \\
  --output_dir=out --output_name=cat --network_module=networks.lora --network_dim=8 --network_alpha=4 \\
  --unet_lr=1e-3 --text_encoder_lr=5e-5 --max_train_epochs=10 --train_batch_size=2 --lr_scheduler=cosine \\
  --lr_warmup_steps=10 --optimizer_type=AdamW --optimizer_args "weight_decay=0.1" "betas=0.9,0.99" \\
  --min_snr_gamma=5 --enable_bucket --caption_extension=.txt --xformers --cache_latents --clip_skip=2 \\
  --random_colours=3 --wandb_api_key=0123456789abcdef0123456789abcdef01234567
""",
)

KOHYA_TRAINING = (
    "training.toml",
    """
[model_arguments]
pretrained_model_name_or_path = "runwayml/stable-diffusion-v1-5"
v_parameterization = false
[training_arguments]
dataset_config = "dataset.toml"
network_module = "networks.lora"
network_dim = 16
learning_rate = 1e-4
max_train_steps = 20
mixed_precision = "no"
save_every_n_epochs = 2
seed = 3
""",
)

KOHYA_DATASET = (
    "dataset.toml",
    """
[general]
caption_extension = ".txt"
shuffle_caption = true
keep_tokens = 1
[[datasets]]
resolution = 512
batch_size = 3
keep_tokens = 2
  [[datasets.subsets]]
  image_dir = 'D:\\cats\\sks'
  class_tokens = "sks cat"
  num_repeats = 5
  [[datasets.subsets]]
  image_dir = 'D:\\cats\\other'
  class_tokens = "a cat"
  keep_tokens = 3
""",
)

KOHYA_GUI = (
    "gui.json",
    """
{"LoRA_type": "Standard", "pretrained_model_name_or_path": "runwayml/stable-diffusion-v1-5",
 "train_data_dir": "img", "reg_data_dir": "", "output_dir": "out", "output_name": "cat", "max_resolution": "512,768",
 "epoch": 4, "max_train_steps": 0, "max_train_epochs": 0, "train_batch_size": 2, "learning_rate": 0.0001,
 "text_encoder_lr": 5e-05, "unet_lr": 0.0001, "network_dim": 32, "network_alpha": 16, "lr_scheduler": "cosine",
 "lr_warmup": 10, "optimizer": "AdamW8bit", "optimizer_args": "", "caption_extension": ".txt", "enable_bucket": true,
 "min_snr_gamma": 5, "noise_offset_type": "Original", "noise_offset": 0.05, "multires_noise_iterations": 6,
 "additional_parameters": "--max_grad_norm=0", "xformers": "xformers", "flux1_checkbox": false, "sdxl": false,
 "huggingface_token": "hf_abcdefghijklmnopqrstuvwx"}
""",
)

ONETRAINER = (
    "onetrainer.json",
    """
{"__version": 11, "training_method": "LORA", "model_type": "STABLE_DIFFUSION_15",
 "base_model_name": "stable-diffusion-v1-5/stable-diffusion-v1-5", "output_model_destination": "models/cat.safetensors",
 "concepts": [{"path": "img", "balancing": 2.0, "balancing_strategy": "REPEATS",
               "text": {"prompt_source": "sample", "enable_tag_shuffling": true, "keep_tags_count": 1},
               "image": {"enable_random_flip": true, "enable_crop_jitter": false}}],
 "resolution": "512", "epochs": 3, "batch_size": 2, "learning_rate": 0.0003, "learning_rate_warmup_steps": 10,
 "gradient_accumulation_steps": 2, "train_dtype": "BFLOAT_16", "lora_rank": 8, "layer_filter_preset": "attn-mlp",
 "optimizer": {"optimizer": "ADAMW", "beta2": 0.99, "weight_decay": 0.1}, "loss_weight_fn": "MIN_SNR_GAMMA",
 "text_encoder": {"train": false}, "text_encoder_layer_skip": 1, "perturbation_noise_weight": 0.1,
 "secrets": {"huggingface_token": "hf_abcdefghijklmnopqrstuvwx"}}
""",
)

SIMPLETUNER = (
    "config.json",
    """
{"--model_family": "sd1x", "--model_type": "lora", "--lora_rank": 16, "--lora_alpha": 16, "--resolution": 512,
 "--resolution_type": "pixel", "--pretrained_model_name_or_path": "stable-diffusion-v1-5/stable-diffusion-v1-5",
 "--data_backend_config": "multidatabackend.json", "--max_train_steps": 100, "--num_train_epochs": 0,
 "--learning_rate": 1e-4, "--optimizer": "adamw_bf16", "--lr_scheduler": "constant", "--output_dir": "output/cat",
 "--validation_prompt": "a cat on the beach", "--validation_steps": 50, "--snr_gamma": 5, "--report_to": "none",
 "--flow_schedule_shift": 3}
""",
)

SIMPLETUNER_BACKENDS = (
    "multidatabackend.json",
    """
[{"id": "cat", "type": "local", "instance_data_dir": "img", "crop": true, "crop_style": "random",
  "crop_aspect": "square", "resolution": 512, "resolution_type": "pixel", "caption_strategy": "instanceprompt",
  "instance_prompt": "a sks cat", "repeats": 4, "cache_dir_vae": "cache/vae"},
 {"id": "text", "dataset_type": "text_embeds", "type": "local", "default": true, "cache_dir": "cache/text"}]
""",
)

AI_TOOLKIT = (
    "ai-toolkit.yaml",
    """
job: extension
config:
  name: cat_v1
  process:
    - type: sd_trainer
      training_folder: output
      trigger_word: sks
      network: {type: lora, linear: 16, linear_alpha: 8}
      save: {dtype: float16, save_every: 250, max_step_saves_to_keep: 4}
      datasets:
        - folder_path: img
          caption_ext: txt
          caption_dropout_rate: 0.05
          resolution: [512, 768]
      train:
        batch_size: 1
        steps: 2000
        gradient_accumulation_steps: 4
        lr: 1.0e-4
        optimizer: adamw8bit
        noise_scheduler: ddpm
        dtype: bf16
        weight_jitter: 0.1
        ema_config: {use_ema: true, ema_decay: 0.99}
      model: {name_or_path: runwayml/stable-diffusion-v1-5, is_xl: false}
      sample: {sample_every: 250, prompts: ["[trigger] on the beach"], neg: "", seed: 42, guidance_scale: 7}
""",
)

DIFFUSERS = (
    "dreambooth.sh",
    """
export MODEL_NAME="stable-diffusion-v1-5/stable-diffusion-v1-5"
export INSTANCE_DIR="img"
HF_TOKEN=hf_abcdefghijklmnopqrstuvwx accelerate launch --mixed_precision="fp16" train_dreambooth.py \\
  --pretrained_model_name_or_path=$MODEL_NAME --instance_data_dir=${INSTANCE_DIR} --class_data_dir=class \\
  --output_dir=out/cat --with_prior_preservation --prior_loss_weight=1.0 --instance_prompt="a photo of sks cat" \\
  --class_prompt="a photo of a cat" --resolution=512 --train_batch_size=1 --gradient_accumulation_steps=1 \\
  --use_8bit_adam --learning_rate=2e-6 --lr_scheduler="constant" --lr_warmup_steps=0 --num_class_images=200 \\
  --max_train_steps=800 --train_text_encoder --offset_noise --push_to_hub
""",
)

WEBUI = (
    "settings-2023-05-01-10-00-00.json",
    """
{"datetime": "2023-05-01 10:00:00", "model_name": "v1-5-pruned", "model_hash": "e1441589a6", "num_of_dataset_images": 6,
 "num_vectors_per_token": 4, "embedding_name": "my-cat", "learn_rate": "0.005:100, 1e-3:1000", "batch_size": 2,
 "gradient_step": 1, "data_root": "img", "log_directory": "log", "training_width": 512, "training_height": 512,
 "steps": 1000, "clip_grad_mode": "disabled", "clip_grad_value": "0.1", "latent_sampling_method": "once",
 "create_image_every": 500, "save_embedding_every": 500, "save_image_with_stored_embedding": true,
 "template_file": "C:\\\\webui\\\\textual_inversion_templates\\\\subject.txt", "initial_step": 0}
""",
)

# The name of the importer -> the files of one config.
CONFIGS = {
    "kohya": (KOHYA,),
    "kohya-gui": (KOHYA_GUI,),
    "onetrainer": (ONETRAINER,),
    "simpletuner": (SIMPLETUNER, SIMPLETUNER_BACKENDS),
    "ai-toolkit": (AI_TOOLKIT,),
    "diffusers": (DIFFUSERS,),
    "webui": (WEBUI,),
}
