//! Datasets to packed batches: formats, chat templates, loss masks, packing; links no torch.
