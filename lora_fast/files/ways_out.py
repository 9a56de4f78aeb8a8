"""Why an adapter's file is refused, and what to do instead: what the refusals add where that is not plain."""

RESIZED = (
    " (was the vocabulary resized for the training? Then the base needs as many rows: transformers' "
    "model.resize_token_embeddings(rows) before load_adapter; for lora-fast merge, a base that was saved after it)"
)
BASE_WEIGHTS = (
    " (PEFT leaves base weights out with save_pretrained(..., save_embedding_layers=False); it takes embeddings along "
    "where they are targets or the vocabulary was resized, and a resized base is best saved by itself)"
)
NO_LINEAR = (
    " (an adapter of a convolution, say: ours are for nn.Linear and nn.Embedding; PEFT's own merge_and_unload can "
    "merge it)"
)
EMBEDDING = (
    " (an adapter of an embedding, which lora-fast merge does not reach: load_adapter into the model and merge_lora do)"
)
RENAMED = (
    " (transformers 5 calls modules of some models, Qwen2-VL's and ViT's among them, otherwise than their files and "
    "transformers 4 do. load_adapter maps the files' names to a transformers model's, lora-fast merge the other way "
    "where transformers is installed; not so what transformers fuses or splits: merge that with PEFT, in the versions "
    "that trained it)"
)
IN_PEFT = "; PEFT's own merge_and_unload can merge it"
UNSUPPORTED = {
    "init_lora_weights": (
        ": such a start changes the base's weights too, and the file does not hold by how much (PEFT makes a LoRA for "
        "the unchanged base of it, of twice the rank: save_pretrained(..., "
        "path_initial_model_for_weight_conversion=START), START being the adapter as it was before the training)"
    ),
    "trainable_token_indices": f": it replaces rows of the embeddings{IN_PEFT}",
    "layer_replication": f": its model has copies of layers that the base has once{IN_PEFT}",
    "lora_bias": f": it has biases in lora_B{IN_PEFT}",
}
