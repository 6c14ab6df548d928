//! Files: safetensors, sharded checkpoints, PEFT adapter folders, Hugging Face configs.
