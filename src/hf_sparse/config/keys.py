"""What a sparse checkpoint is told by in config.json; no torch here."""

QUANT_METHOD = "hf_sparse"
# In shards, their index and config.json: the id of the save that they are of.
SAVE_KEY = "hf_sparse_save"
