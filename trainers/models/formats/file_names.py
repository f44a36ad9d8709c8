"""Names and suffixes of artifact files, in a module that does not import torch."""

LOSSLESS_IMAGES = (".avif", ".jxl")  # need an optional library
EMBEDDING_IMAGES = (".png", ".webp", *LOSSLESS_IMAGES)  # image formats that can contain an embedding
EMBEDDINGS = (".pt", ".bin", ".safetensors", *EMBEDDING_IMAGES)
NEGATIVE = "-neg"  # suffix of the name of a negative embedding
DIFFUSERS_LORA = "pytorch_lora_weights.safetensors"  # the name that `load_lora_weights(folder)` looks for
