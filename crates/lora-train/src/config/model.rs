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

/// The names of `problem_type` in a model's `config.json`.
const PROBLEMS: &[&str] = &["single_label_classification", "multi_label_classification", "regression"];

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
        /// Names of the labels of a classifier, in the order of their ids; those of the checkpoint, or else of the data, when
        /// absent.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        labels: Vec<String> = Vec::new(), Kind::Texts;
        /// What a classifier predicts: one of its labels, any of them, or numbers; told by the checkpoint, or else by the data,
        /// when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        problem_type: Option<String> = None, Kind::Choice(PROBLEMS);
        /// Threads of one operation on the CPU; 0 takes all cores.
        threads: u32 = 0, Kind::Integer { min: 0, max: 4096 };
    }
}
