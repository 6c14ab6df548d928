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

choice! {
    /// Into what the frozen linear layers of the blocks are packed.
    Quantization {
        /// Not at all.
        None = "none",
        /// 4-bit NormalFloat in blocks of 64 (QLoRA).
        Nf4 = "nf4",
        /// The same with its scales packed, too: 0.52 bytes a weight instead of 0.56.
        Nf4Double = "nf4-double",
        /// 8-bit integers with a scale for each row.
        Int8 = "int8",
    }
}

choice! {
    /// Where the matrices of the frozen base lie.
    Weights {
        /// In memory, in the dtype that is computed in: the fastest.
        Converted = "converted",
        /// In memory, in the dtype of the checkpoint; products convert what they need, tile by tile.
        Stored = "stored",
        /// In the checkpoint's file, block after block; for a base larger than memory. CPU only.
        Mapped = "mapped",
        /// In the memory of the host, block after block; for a base larger than the memory of a CUDA device.
        Host = "host",
    }
}

choice! {
    /// Who computes, on a CUDA device, what memory alone makes slow: gates, rotary embeddings, dropout, losses, NF4.
    Kernels {
        /// libtorch, each by a chain of its own operations.
        Libtorch = "libtorch",
        /// Kernels of this project, each one pass over memory; NVRTC compiles them at the start.
        Compiled = "compiled",
    }
}

impl Kernels {
    /// In the terms of the crate of operations.
    pub fn of_device(self) -> lora_torch::DeviceKernels {
        lora_torch::DeviceKernels::named(self.name()).unwrap_or(lora_torch::DeviceKernels::Libtorch)
    }
}

fn are_libtorch(of: &Kernels) -> bool {
    *of == Kernels::Libtorch
}

impl Quantization {
    /// In the terms of the model's crate.
    pub fn packing(self) -> Option<lora_model::Packing> {
        lora_model::Packing::named(self.name())
    }
}

impl Weights {
    /// In the terms of the model's crate.
    pub fn storage(self) -> lora_model::Storage {
        lora_model::Storage::named(self.name()).unwrap_or_default()
    }
}
/// The names of `problem_type` in a model's `config.json`.
const PROBLEMS: &[&str] = &["single_label_classification", "multi_label_classification", "regression"];

// Left out of a saved configuration, so that those of earlier versions stay equal to it.
fn is_unpacked(of: &Quantization) -> bool {
    *of == Quantization::None
}

fn is_converted(of: &Weights) -> bool {
    *of == Weights::Converted
}

section! {
    /// The base model.
    ModelConfig {
        /// Folder of the base model: a Hugging Face checkpoint with `config.json`, safetensors files and tokenizer. Or a model of
        /// the hub, as `hf://OWNER/NAME`, with `@REVISION` behind it where wanted.
        path: String = String::new(), Kind::Text;
        /// The dtype in which the base model computes; adapters are float32 whatever it is. `auto` takes that of the
        /// checkpoint, or float32 where the device has no matrix units for it.
        dtype: DType = DType::Auto, Kind::Choice(DType::NAMES);
        /// Packs the frozen linear layers of the blocks: `nf4` (4 bits a weight, QLoRA), `nf4-double`, `int8`, or `none`. The
        /// base is read block by block, so memory never holds more than what is kept.
        #[serde(skip_serializing_if = "is_unpacked")]
        quantization: Quantization = Quantization::None, Kind::Choice(Quantization::NAMES);
        /// Where the matrices of the frozen base lie: `converted` to the dtype that is computed in (the fastest), `stored` in
        /// that of the checkpoint, or `mapped` from its file (the leanest, for a base larger than memory). On a CUDA device the
        /// blocks may lie on the `host`: each comes over while the one before it is computed, and at most two are there.
        #[serde(skip_serializing_if = "is_converted")]
        weights: Weights = Weights::Converted, Kind::Choice(Weights::NAMES);
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
        /// Who computes gates, rotary embeddings, dropout, losses and the numbers of NF4 on a CUDA device: `libtorch`, or kernels of
        /// this project that are `compiled` at the start. Both within rounding. Without effect on the CPU.
        #[serde(skip_serializing_if = "are_libtorch")]
        kernels: Kernels = Kernels::Libtorch, Kind::Choice(Kernels::NAMES);
        /// Threads of one operation on the CPU; 0 takes all cores.
        threads: u32 = 0, Kind::Integer { min: 0, max: 4096 };
    }
}
