"""Names and suffixes of artifact files, for code that loads no torch."""

LOSSLESS_IMAGES = (".avif", ".jxl")  # written by libraries that are optional
EMBEDDING_IMAGES = (".png", ".webp", *LOSSLESS_IMAGES)  # images that carry an embedding
EMBEDDINGS = (".pt", ".bin", ".safetensors", *EMBEDDING_IMAGES)
NEGATIVE = "-neg"  # ends the name of the vectors that go into the negative prompt
DIFFUSERS_LORA = "pytorch_lora_weights.safetensors"  # the name that `load_lora_weights(folder)` looks for
