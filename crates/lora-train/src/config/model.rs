//! `[model]`: which base model, and where it runs.

use super::keys::{Kind, choice, section};

choice! {
    /// The dtype in which the base model computes. Adapters and their optimizer state are float32 whatever it is.
    DType {
        /// That of the checkpoint, or float32 where the device has no matrix units for it.
        Auto = "auto",
        /// 32 bits.
        Float32 = "float32",
        /// 16 bits with the exponent of float32.
        BFloat16 = "bfloat16",
        /// 16 bits after IEEE 754.
        Float16 = "float16",
    }
}

section! {
    /// The base model.
    ModelConfig {
        /// Folder of the base model: a Hugging Face checkpoint with `config.json`, safetensors files and tokenizer.
        path: String = String::new(), Kind::Text;
        /// The dtype in which the base model computes; adapters are float32 whatever it is. `auto` takes that of the
        /// checkpoint, or float32 where the device has no matrix units for it.
        dtype: DType = DType::Auto, Kind::Choice(DType::NAMES);
        /// Where to compute. `auto` takes the first CUDA device, or the CPU where there is none.
        device: String = "auto".into(), Kind::Device;
        /// Threads of one operation on the CPU; 0 takes all cores.
        threads: u32 = 0, Kind::Integer { min: 0, max: 4096 };
    }
}
